"""What a finished run says: out-of-fold predictions, scores, costs, findings in its data."""
