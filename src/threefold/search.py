"""Search over recipe keys with Optuna, chosen on out-of-fold rows and reported without optimism.

Each trial is a run of its own on the same folds. Test rows stay sealed until one trial is chosen;
so the best of many trials is not the best of many test scores. The recipe as it is stays, unless
another leads it by more than luck among that many trials explains.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, Final, NamedTuple

import numpy as np

from threefold.api import finish, train
from threefold.arguments import parse_minutes
from threefold.data.dataset import Sources
from threefold.data.load import load_data
from threefold.errors import RecipeError, RunError
from threefold.evaluation.optimism import Counts, optimism_entry
from threefold.extras import require_package
from threefold.files import delete_leftovers
from threefold.json_files import read_json, write_json
from threefold.predictions.predictions import Predictions
from threefold.predictions.results_schema import Optimism
from threefold.recipe.overrides import parse_value
from threefold.recipe.recipe import Recipe
from threefold.stats.one_standard_error import standard_error
from threefold.stats.scores import accuracy, correct
from threefold.stats.weighted_scores import log_losses
from threefold.training.jobs import train_members
from threefold.training.progress.watcher import Watcher
from threefold.training.results.multiclass import evaluate_run
from threefold.training.run import Run

ANSWERS: Final = "answers.npz"
"""In a trial's folder: the out-of-fold answers of its chosen ensemble."""
TRIALS: Final = "trials.json"
"""In the folder of the search: what was tried, and how it scored."""
ONE_STANDARD_ERROR: Final = 1 - NormalDist().cdf(1.0)
"""Chance of a lead of more than one standard error without a cause."""
FIXED: Final = ("data", "folds", "seed", "protocol", "name", "train.metric")
"""Keys that decide the rows that trials are compared on, which therefore all trials share."""


class Choices(NamedTuple):
    """One key of the recipe and the values to try: some, or a range."""

    key: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    log: bool = False

    def value(self, drawn: float) -> Any:
        """The value of the key for what Optuna has drawn."""
        if self.values:
            return self.values[int(drawn)]
        return int(drawn) if self.whole else float(f"{drawn:.4g}")

    def distribution(self, optuna: Any) -> Any:
        """What Optuna draws from: places among the values, or the range."""
        if self.values:
            return optuna.distributions.IntDistribution(0, len(self.values) - 1)
        if self.whole:
            return optuna.distributions.IntDistribution(int(self.low), int(self.high), self.log)
        return optuna.distributions.FloatDistribution(self.low, self.high, self.log)


class Trial(NamedTuple):
    """A finished trial.

    Attributes:
        number: 0 = the recipe as it is.
        drawn: what Optuna drew, by key; empty for the recipe as it is.
        overrides: the changes to the recipe, `a.b=c`.
        loss: mean log loss of the chosen ensemble on out-of-fold rows.
        accuracy: its accuracy there.
    """

    number: int
    drawn: dict[str, Any]
    overrides: tuple[str, ...]
    loss: float
    accuracy: float


class SearchResult(NamedTuple):
    """The outcome of a search.

    Attributes:
        trials: all of them, in order.
        chosen: number of the one that was chosen, trained, exported and reported.
        run: its run.
        optimism: how much better the choice looks on the rows it was made on.
    """

    trials: list[Trial]
    chosen: int
    run: Run
    optimism: Optimism | None


def parse_space(texts: Sequence[str]) -> list[Choices]:
    """Parse the keys to search over.

    Args:
        texts: `key=a,b,c` for some values, `key=low..high` for a range: whole numbers if both ends
            are, and on a logarithmic scale if the upper end is at least ten times the lower one.

    Raises:
        RecipeError: a text cannot be read, a key comes twice, or it decides which rows are scored.
    """
    space = [_parse(text) for text in texts]
    keys = [choices.key for choices in space]
    if not space or len(set(keys)) < len(keys):
        raise RecipeError(
            "a search needs keys, each of them once",
            where="--space",
            got=", ".join(keys) or "none",
            fix="for example --space train.batch_size=16,32,64 --space stages.tune.lr=1e-4..1e-2",
        )
    for key in keys:
        if key.startswith(tuple(f"{fixed}." for fixed in FIXED)) or key in FIXED:
            raise RecipeError(
                "all trials are compared on the same rows",
                where=f"--space {key}",
                expected="a key of training, augmentation, members, views or ensemble",
            )
    return space


def _parse(text: str) -> Choices:
    key, equals, values = (part.strip() for part in text.partition("="))
    low, dots, high = values.partition("..")
    if not key or not equals or not values:
        raise _unreadable(text)
    if not dots:
        given = tuple(parse_value(part.strip()) for part in values.split(",") if part.strip())
        if len(given) < 2:
            raise _unreadable(text)
        return Choices(key, given)
    ends = (parse_value(low.strip()), parse_value(high.strip()))
    if not all(isinstance(end, int | float) and math.isfinite(end) for end in ends):
        raise _unreadable(text)
    first, last = map(float, ends)
    if not first < last:
        raise _unreadable(text)
    whole = all(isinstance(end, int) for end in ends)
    return Choices(key, (), first, last, whole, log=first > 0 and last >= 10 * first)


def _unreadable(text: str) -> RecipeError:
    return RecipeError(
        "cannot read the values to search over",
        where="--space",
        expected="key=a,b,c or key=low..high",
        got=text[:80],
    )


def search(
    recipe: Recipe,
    out: str | Path,
    space: Sequence[str],
    *,
    trials: int = 20,
    budget: str | float = 0,
    watcher: Watcher | None = None,
) -> SearchResult:
    """Try changes to a recipe, and finish the run of the best.

    A search that was interrupted goes on where it stopped, and draws what it would have drawn.

    Args:
        recipe: the recipe to change, which is trial 0.
        out: folder of the search; each trial is a run in `trials/`.
        space: the keys and values, see `parse_space`.
        trials: how many, with the recipe as it is.
        budget: no trial begins after this time: 90s, 20m, 2h, or a number of minutes; 0 = none.
        watcher: follows the training.

    Raises:
        RecipeError: the space or a value cannot be used.
        RunError: the folder holds another search.
        MissingExtraError: Optuna is not installed.
    """
    choices, watcher, minutes = parse_space(space), watcher or Watcher(), parse_minutes(budget)
    if recipe.protocol == "paper":
        raise RecipeError(
            "a search needs protocol = honest",
            where="protocol",
            got="paper",
            fix="--set protocol=honest",
        )
    if recipe.data.task == "multilabel":
        raise RecipeError(
            "a search compares answers of one class for each image",
            where="data.task",
            got="multilabel",
            fix="train the recipes one by one, and compare the runs: threefold compare RUN RUN",
        )
    optuna = _import_optuna()
    folder, began = Path(out), time.monotonic()
    done = _read_trials(folder, recipe, space)
    _write_trials(folder, recipe, space, done)  # so that a search that is killed goes on
    sources = load_data(recipe.data, recipe.seed)
    runs = [
        _open_trial(recipe, folder, trial.number, trial.overrides, watcher, sources)
        for trial in done
    ]
    for number in range(len(done), trials):
        if minutes and done and time.monotonic() - began > 60 * minutes:
            watcher.note(f"no time is left for trials {number} to {trials - 1}")
            break
        drawn, overrides = _draw(optuna, recipe, choices, done, number)
        what = ", ".join(overrides) or "the recipe as it is"
        watcher.note(f"trial {number} of {trials - 1}: {what}")
        runs.append(_open_trial(recipe, folder, number, overrides, watcher, sources))
        loss, share = _train_trial(runs[-1])
        done.append(Trial(number, drawn, overrides, loss, share))
        _write_trials(folder, recipe, space, done)
        watcher.note(f"trial {number}: log loss {loss:.4f}, accuracy {share:.4f} out of fold")
    return _finish(runs, done, watcher)


def _import_optuna() -> Any:
    optuna = require_package("optuna", "a search needs", extra="search")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _draw(
    optuna: Any, recipe: Recipe, choices: list[Choices], done: list[Trial], number: int
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Draw the changes of a trial; they depend only on the recipe's seed and the trials before."""
    if number == 0:
        return {}, ()
    sampler = optuna.samplers.TPESampler(
        seed=recipe.seed + number, n_startup_trials=min(10, 2 + 2 * len(choices))
    )
    study = optuna.create_study(sampler=sampler)
    distributions = {entry.key: entry.distribution(optuna) for entry in choices}
    for trial in done:
        if trial.drawn:
            study.add_trial(
                optuna.trial.create_trial(
                    params=trial.drawn, distributions=distributions, value=trial.loss
                )
            )
    drawn = study.ask(distributions).params
    values = {entry.key: entry.value(drawn[entry.key]) for entry in choices}
    return dict(drawn), tuple(f"{key}={_as_toml(value)}" for key, value in values.items())


def _as_toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _open_trial(
    recipe: Recipe,
    folder: Path,
    number: int,
    overrides: Sequence[str],
    watcher: Watcher,
    sources: Sources,
) -> Run:
    """Begin or go on with the run of a trial."""
    tree = recipe.model_dump(mode="json", exclude_none=True)
    changed = Recipe.parse(tree, overrides, where="--space")
    path = folder / "trials" / f"{number:03d}"
    return Run.create(changed, path, watcher, f"trial {number} of a search", sources)


def _train_trial(run: Run) -> tuple[float, float]:
    """Train a trial; returns log loss and accuracy on out-of-fold rows. The test stays sealed."""
    if not (run.dir / ANSWERS).exists():
        with run.folder.locked():
            train_members(run)
            evaluation = evaluate_run(run, test_stays_sealed=True)
            run.folder.write_arrays(ANSWERS, probs=evaluation.probs)
    labels, probs = run.predictions("oof").labels, run.folder.read_arrays(ANSWERS)["probs"]
    return float(log_losses(probs, labels).mean()), accuracy(probs, labels)


def _finish(runs: list[Run], done: list[Trial], watcher: Watcher) -> SearchResult:
    """Choose a trial, and finish its run: open the test rows, export, report."""
    rows = runs[0].predictions("oof")
    tables = [run.folder.read_arrays(ANSWERS)["probs"] for run in runs]
    losses = np.stack([log_losses(probs, rows.labels) for probs in tables])
    chosen = choose_trial(losses, rows.groups)
    optimism = None
    if len(done) > 1:
        hits = np.stack([correct(probs, rows.labels) for probs in tables])
        optimism = _measure_optimism(losses, hits, rows, chosen)
    best = runs[chosen]
    run = train(best.recipe, best.dir, watcher, sources=best.sources)
    if optimism is not None and not any(line.choice == "trial" for line in run.results.optimism):
        run.folder.add_results("search", 0.0, optimism=(*run.results.optimism, optimism))
    finish(run)
    return SearchResult(done, done[chosen].number, run, optimism)


def choose_trial(losses: np.ndarray, groups: Any = None) -> int:
    """Return the trial with the least mean loss, or 0 if luck may explain its lead.

    With one rival that is the one-standard-error rule. Of many rivals some lead by luck alone, so
    the lead has to be larger: its chance of 16 % is divided by their number (Bonferroni).

    Args:
        losses: (trials, n) log loss of each row; trial 0 is the recipe as it is.
        groups: (n,) groups of the rows, or None.
    """
    best = int(losses.mean(1).argmin())
    if best == 0:
        return 0
    lead = losses[0] - losses[best]
    chance = ONE_STANDARD_ERROR / (len(losses) - 1)
    needed = NormalDist().inv_cdf(1 - chance) * standard_error(lead, groups)
    return best if lead.mean() > needed else 0


def _measure_optimism(
    losses: np.ndarray, hits: np.ndarray, rows: Predictions, chosen: int
) -> Optimism:
    """Compare the choice on all rows with choices that have not seen the rows they answer."""
    parts = rows.parts if rows.parts is not None else np.arange(len(rows)) % 5
    if len(np.unique(parts)) < 2:  # a single split: halves of it
        parts = np.arange(len(rows)) % 2
    honest = np.zeros(hits.shape[1])
    for part in np.unique(parts):
        inside = parts == part
        groups = None if rows.groups is None else np.asarray(rows.groups)[~inside]
        honest[inside] = hits[choose_trial(losses[:, ~inside], groups)][inside]
    return optimism_entry(
        "trial",
        f"the choice among {len(losses)} trials",
        Counts.from_hits(hits[chosen]),
        Counts.from_hits(honest),
        rows.groups,
        rows=("oof", "other folds"),
    )


def _read_trials(folder: Path, recipe: Recipe, space: Sequence[str]) -> list[Trial]:
    """The trials of an interrupted search."""
    path = folder / TRIALS
    if not path.exists():
        delete_leftovers(folder, TRIALS)
        if folder.exists() and any(folder.iterdir()):
            raise RunError("the folder holds other files", where=folder, fix="choose another --out")
        return []
    tree = read_json(path)
    if tree.get("recipe") != recipe.digest() or tree.get("space") != list(space):
        raise RunError(
            "the folder holds another search",
            where=folder,
            fix="give the same recipe and --space, or choose another --out",
        )
    return [Trial(**{**entry, "overrides": tuple(entry["overrides"])}) for entry in tree["trials"]]


def _write_trials(
    folder: Path, recipe: Recipe, space: Sequence[str], done: Sequence[Trial]
) -> None:
    write_json(
        folder / TRIALS,
        {
            "recipe": recipe.digest(),
            "space": list(space),
            "trials": [trial._asdict() for trial in done],
        },
    )
