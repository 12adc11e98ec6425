"""The jobs of a run: plan, stages, checkpoints, out-of-fold assembly, distillation, results."""
