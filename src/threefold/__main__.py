"""`python -m threefold`."""

from threefold.cli.main import main

main()
