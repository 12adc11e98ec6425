"""results.json to one self-contained HTML page; computes no score."""
