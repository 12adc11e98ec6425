"""Readers of each kind of source: folders, archives, arrays and tables."""
