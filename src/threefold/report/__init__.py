"""results.json to one self-contained HTML page; computes no score."""

from threefold.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "threefold.report.pages": ["write_page", "write_report"],
    },
)
