"""The jobs of a run: plan, stages, checkpoints, out-of-fold assembly, distillation, results."""

from threefold.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "threefold.training.steps.augment": ["Augment"],
        "threefold.training.distillation": ["Distillation"],
        "threefold.training.jobs": ["train_members"],
        "threefold.training.steps.optimizers": ["KerasAdam", "create_optimizer"],
        "threefold.training.planning.plan": ["plan_folder"],
        "threefold.training.results.multiclass": ["evaluate_run", "write_results"],
        "threefold.training.run": ["Run"],
        "threefold.training.stages.loop": ["StageTask", "train_stage"],
        "threefold.training.progress.watcher": ["Watcher"],
    },
)
