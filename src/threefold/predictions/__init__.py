"""The array boundary: probabilities (members, rows, classes), their files and the run folder.

`Predictions` holds the probabilities with labels, ids and the rows that each network has seen.
`RunFolder` reads and writes the files of a run without torch.
"""

from threefold.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "threefold.predictions.adapters": ["from_arrays", "from_table"],
        "threefold.predictions.checks": ["check_labels", "check_probs"],
        "threefold.predictions.formats": ["read_predictions", "write_predictions"],
        "threefold.predictions.join": ["join_predictions"],
        "threefold.predictions.ledger": ["Ledger", "SeenRows"],
        "threefold.predictions.multilabel": ["MultilabelPredictions", "load_predictions"],
        "threefold.predictions.predictions": ["Predictions"],
        "threefold.predictions.records": ["RunInfo"],
        "threefold.predictions.results_schema": ["Results"],
        "threefold.predictions.run_folder": ["RunFolder"],
    },
)
