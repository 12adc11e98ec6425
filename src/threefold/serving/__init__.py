"""HTTP and a web page over an exported model file.

Imports `threefold.runtime`, the image decoder, the archive reader and the ground modules only.
"""

from threefold.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "threefold.serving.app": ["make_app", "make_server", "run_server"],
        "threefold.serving.browser": ["WebFolder", "write_web"],
        "threefold.serving.limits": ["ServerLimits"],
    },
)
