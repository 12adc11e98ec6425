"""Export a run or a pipeline to one model file, behind the parity gate.

The package is not called `export`, because `threefold.export` is the public function.
"""

from threefold.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "threefold.exporting.onnx_graph": ["write_onnx"],
        "threefold.exporting.parity": ["compare"],
        "threefold.exporting.quantization": ["quantize"],
    },
)
