"""The plan of a run, measured: members, image size, folds, tuning, and learning rates."""
