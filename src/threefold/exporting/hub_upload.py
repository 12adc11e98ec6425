"""Publish a run on the Hugging Face hub: the exported file, weights, scores and a README.md."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any, Final

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from threefold.errors import ExportError, RunError, is_disk_error
from threefold.exporting.hub_readme import write_readme
from threefold.files import TemporaryFolder
from threefold.json_files import write_json
from threefold.predictions.results_schema import Results
from threefold.predictions.run_folder import RunFolder
from threefold.recipe.recipe import Recipe, fold_name
from threefold.runtime.hub import network_errors

README: Final = "README.md"


def push(run_dir: str | Path, repository: str, *, private: bool = False, licence: str = "") -> str:
    """Upload a finished, exported run to a model repository, which is created if it is not there.

    The repository holds model.onnx, README.md, results.json, recipe.toml, and the weights of every
    network (`weights/MEMBER/FOLD.safetensors`). No image, no name of an image and no folder of this
    machine is among them.

    Args:
        run_dir: the run folder, with its model.onnx.
        repository: `user/name`, or `name` for the owner of the token.
        private: only the owner sees a new repository.
        licence: of the model, as the hub names it, such as `apache-2.0`.

    Returns:
        The address of the repository.

    Raises:
        RunError: the run is not complete or has no model.onnx.
        ExportError: there is no token, or the hub refuses or cannot be reached.
    """
    folder = RunFolder.open(run_dir)
    folder.check_finished()
    model = folder.path / "model.onnx"
    fix = shlex.join(["threefold", "export", str(folder.path), "--out", str(model)])
    if not folder.has(model.name):
        raise RunError("the run has no model.onnx", where=folder.path, fix=fix)
    folder.verify(model.name, f"run `{fix}`")
    with TemporaryFolder() as temporary:
        copy = Path(temporary)
        api = HfApi(library_name="threefold")
        try:
            address = api.create_repo(
                repository, private=private or None, repo_type="model", exist_ok=True
            )
            gather(folder, copy, address.repo_id, licence)
            api.upload_folder(
                repo_id=address.repo_id,
                folder_path=copy,
                commit_message=f"Upload {folder.any_results.name}",
            )
        except HFValidationError as error:
            raise ExportError(
                "not the name of a repository", got=repository, expected="user/name", fix=str(error)
            ) from None
        except LocalTokenNotFoundError:
            raise _no_token(repository) from None
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status == 401:
                raise _no_token(repository) from None
            reason = error.server_message or f"HTTP status {status}"
            raise ExportError("the hub refuses", where=repository, got=reason) from None
        except network_errors() as error:
            if is_disk_error(error):
                place = getattr(error, "filename", None) or temporary
                raise ExportError("cannot write", where=place, got=error) from None
            raise ExportError("cannot reach the hub", where=repository, got=error) from None
    return str(address)


def gather(folder: RunFolder, target: Path, repository: str, licence: str = "") -> None:
    """Put the files of a repository into a folder.

    Args:
        folder: a finished run with a model.onnx.
        target: an empty folder.
        repository: `user/name`, for the commands in README.md.
        licence: as in `push`.
    """
    for file in folder.path.glob("model.onnx*"):  # and the file of a large model's weights
        shutil.copyfile(file, target / file.name)
    # Suspect labels, copies and notes name images.
    results = folder.any_results.replace(notes=(), export=None)
    if isinstance(results, Results):
        results = results.replace(audit=None)
    write_json(target / "results.json", results.model_dump(mode="json", by_alias=True))
    readme = write_readme(folder, repository, licence)
    (target / README).write_text(readme, encoding="utf-8")
    recipe = without_folders(folder.recipe)
    (target / "recipe.toml").write_text(recipe.dump(f"of {repository}"), encoding="utf-8")
    for job in folder.recipe.jobs(folder.info.folds):
        weights = folder.job_folder(job) / "weights.safetensors"
        if weights.exists():
            place = target / "weights" / job.member
            place.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(weights, place / f"{fold_name(job.fold)}.safetensors")


def without_folders(recipe: Recipe) -> Recipe:
    """Return a recipe in which paths of this machine are only their last names."""
    data = recipe.data.model_copy(
        update={
            "root": Path(recipe.data.root).name,
            "group_file": Path(recipe.data.group_file).name,
        }
    )
    members = tuple(m.model_copy(update={"weights": Path(m.weights).name}) for m in recipe.members)
    changes: dict[str, Any] = {"data": data, "members": members}
    if recipe.pseudo_labels is not None:
        name = Path(recipe.pseudo_labels.images).name
        changes["pseudo_labels"] = recipe.pseudo_labels.model_copy(update={"images": name})
    if recipe.distill is not None:
        name = Path(recipe.distill.run).name
        changes["distill"] = recipe.distill.model_copy(update={"run": name})
    return recipe.model_copy(update=changes)


def _no_token(repository: str) -> ExportError:
    return ExportError(
        "the hub does not know you",
        where=repository,
        fix="run `hf auth login`, or set HF_TOKEN to a token that may write",
    )
