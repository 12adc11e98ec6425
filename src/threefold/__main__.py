"""`python -m threefold`."""

from threefold.entry import main

main()
