"""A stage of training: what it starts from, its loop, and what it results in."""
