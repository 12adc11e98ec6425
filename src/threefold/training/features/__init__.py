"""Features of frozen backbones: computed once, kept on disk, read by heads and stages."""
