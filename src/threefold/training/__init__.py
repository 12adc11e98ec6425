"""The jobs of a run: plan, stages, checkpoints, out-of-fold assembly, distillation, results."""

from threefold.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "threefold.training.augment": ["Augment"],
        "threefold.training.distillation": ["Distillation"],
        "threefold.training.jobs": ["train_members"],
        "threefold.training.optimizers": ["KerasAdam", "create_optimizer"],
        "threefold.training.plan": ["plan_folder"],
        "threefold.training.results": ["evaluate_run", "write_results"],
        "threefold.training.run": ["Run"],
        "threefold.training.stages": ["StageTask", "train_stage"],
        "threefold.training.watcher": ["Watcher"],
    },
)
