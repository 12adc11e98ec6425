"""The files of a run's jobs: what is done, and whether it is intact.

A job is one stage of one member in one fold. Its `done.json` is written last and has the SHA-256 of
its other files, so a job that has one is complete, and a file that was changed since is found.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from threefold.errors import DamagedFileError, RunError
from threefold.files import sha256, unreadable
from threefold.json_files import read_json, write_json
from threefold.npz_files import read_arrays
from threefold.predictions.manifest import ManifestFiles
from threefold.predictions.records import JobRecord, seal
from threefold.recipe.recipe import Job, Recipe, fold_name


class JobFiles(ManifestFiles):
    """The job folders of a run; `run_folder.RunFolder` has the other files."""

    @property
    def recipe(self) -> Recipe:
        """The run's recipe."""
        raise NotImplementedError

    def retraining(self, job: Job) -> str:
        """Return how a job is made anew: with the earlier stages, whose weights it replaced."""
        return f"delete {self.job_folder(job).parent} and run `{self.train_command()}`"

    def job_folder(self, job: Job) -> Path:
        """Return the folder of a job's files."""
        return self.path / job.path

    def is_done(self, job: Job) -> bool:
        """Whether a job is complete: it or a later stage, which took its weights over, has them."""
        stages = [stage.name for stage in self.recipe.stages_of(job.member)]
        later = stages[stages.index(job.stage) :]
        folders = [self.job_folder(job._replace(stage=stage)) for stage in later]
        return (folders[0] / "done.json").exists() and any(
            (folder / "done.json").exists() and (folder / "weights.safetensors").exists()
            for folder in folders
        )

    def finish_job(self, job: Job, seconds: float) -> None:
        """Write done.json with the hashes of the job's files."""
        folder = self.job_folder(job)
        hashes = {
            path.name: sha256(path)
            for path in sorted(folder.iterdir())
            if path.name != "done.json" and not path.name.startswith(".")
        }
        record = JobRecord(job=job._asdict(), seconds=seconds, files=hashes)
        self.forget([f"{job.path}/done.json"])  # of a job that was deleted to be done again
        write_json(folder / "done.json", seal(record.as_json()))

    def job_record(self, job: Job) -> JobRecord:
        """Read the done.json of a job.

        Raises:
            RunError: it is missing or damaged, or that of another job.
        """
        path = self.job_folder(job) / "done.json"
        with self.advising(path, self.retraining(job)):
            self.verify(f"{job.path}/done.json")
            record = JobRecord.parse(read_json(path), path)
            if record.job != job._asdict():
                raise DamagedFileError(
                    "the folder holds the files of another job",
                    where=path,
                    expected=job.path,
                    got=", ".join(map(str, record.job.values())),
                )
        return record

    def verify_job(self, job: Job, *names: str) -> Path:
        """Check a finished job's files against their hashes, and return its folder.

        Args:
            job: the job.
            names: of the files to check; none = all.

        Raises:
            RunError: a file is missing or was changed, or cannot be read.
        """
        folder, files = self.job_folder(job), self.job_record(job).files
        for name in names or files:
            path = folder / name
            with self.advising(path, self.retraining(job)):
                try:
                    is_intact = sha256(path) == files.get(name)
                except OSError as error:
                    what = "a file of a finished job is missing or damaged"
                    raise unreadable(what, path, error) from None
                if not is_intact:
                    raise DamagedFileError(
                        "a file of a finished job is missing or damaged",
                        where=path,
                        expected="the SHA-256 in done.json",
                    )
        return folder

    def job_wrote(self, job: Job, name: str) -> bool:
        """Whether a finished job wrote a file of this name; the file itself may be lost since.

        Raises:
            RunError: the job's done.json is missing or damaged, or that of another job.
        """
        return name in self.job_record(job).files

    def read_job_arrays(self, job: Job, name: str) -> dict[str, np.ndarray]:
        """Read an .npz file of a finished job, checked against its hash.

        Raises:
            RunError: it is missing or was changed, or cannot be read.
        """
        return read_arrays(self.verify_job(job, name) / name)

    def job_probs(self, job: Job, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Read the probabilities of a member's last job in a fold, which scores these rows.

        Raises:
            RunError: the file is missing or damaged, or is about other rows.
        """
        arrays = self.read_job_arrays(job, "probs.npz")
        if not np.array_equal(arrays["rows"], rows):
            raise RunError(
                "a finished job answers other rows than its fold scores",
                where=self.job_folder(job) / "probs.npz",
                expected=f"{len(rows)} rows of the recipe's folds",
                got=f"{len(arrays['rows'])} rows of other folds",
                fix=self.retraining(job),
            )
        return arrays

    def histories(self) -> dict[Job, dict[str, Any]]:
        """Read the training history of every job that has one, in the order of their folders."""
        histories = {}
        done = {
            self.path / name for name in self.manifest if re.fullmatch(r"jobs/.+/done\.json", name)
        }
        done |= set(self.path.glob("jobs/*/*/*/done.json"))
        folders = {path.parent for path in (*done, *self.path.glob("jobs/*/*/*/history.json"))}
        for folder in sorted(folders):
            member, fold, stage = folder.parts[-3:]
            number = -1 if fold == fold_name(-1) else int(fold.removeprefix("fold"))
            job, file = Job(member, number, stage), folder / "history.json"
            if folder / "done.json" in done:
                if file.name not in self.job_record(job).files:
                    continue
                self.verify_job(job, file.name)
            with self.advising(file, self.retraining(job)):
                histories[job] = read_json(file)
        return histories
