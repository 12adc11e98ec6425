"""Run an exported model file: images in, probabilities out.

Needs numpy, Pillow and onnxruntime only.
"""

from threefold.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "threefold.runtime.model": [
            "FAST",
            "FULL",
            "CascadePolicy",
            "Model",
            "load",
        ],
        "threefold.runtime.model_output": ["ModelOutput"],
    },
)
