"""Images and labels from any source, verified and split into folds.

Every source (folder, archive, CSV, parquet, hub, published data set) becomes an `ImageDataset`.
Nothing here imports torch or knows of predictions.
"""

from threefold.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "threefold.data.check": ["DataCheck", "Finding", "check_data", "find_spec"],
        "threefold.data.dataset": ["ImageDataset", "Sources"],
        "threefold.data.download": ["fetch"],
        "threefold.data.images": ["decode", "measure"],
        "threefold.data.leakage": ["duplicate_warnings", "find_duplicates", "guess_group_pattern"],
        "threefold.data.quality": ["QualityFinding", "find_outliers", "measure_quality"],
        "threefold.data.load": ["load_data"],
        "threefold.data.published": ["PublishedDataset", "find_published"],
        "threefold.data.scene_groups": [
            "GroupingEffect",
            "SceneGroups",
            "find_scene_groups",
            "grouping_effect",
        ],
        "threefold.data.group_file": ["GROUP_FILE", "read_groups", "write_groups"],
        "threefold.data.splits": ["Roles", "assign_roles", "refit_roles"],
        "threefold.data.synthetic": ["write_sample"],
    },
)
