"""`python -m threefold`."""

from threefold.cli import main

main()
