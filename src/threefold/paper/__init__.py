"""The paper's tables and figures, run again.

Phong and Ribeiro, Rethinking Recurrent Neural Networks and Other Improvements for Image
Classification, arXiv:2007.15161.
"""

from threefold.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "threefold.paper.items": ["Item", "find_item"],
        "threefold.paper.reproduce": ["Reproduction", "reproduce_item"],
        "threefold.paper.results": ["ItemResults"],
    },
)
