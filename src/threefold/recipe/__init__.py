"""The recipe: one TOML file that describes a run, its tables, and what must hold between them."""
