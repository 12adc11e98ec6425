"""An exported file, loaded: images in, probabilities out, with numpy, pillow and onnxruntime only."""

from __future__ import annotations

FORMAT = 1
KEY = "threefold"
