"""The command line: verbs, flags, and tables on the terminal."""
