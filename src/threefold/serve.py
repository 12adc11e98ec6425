"""HTTP over an exported file: images in, probabilities out. Sees only the file, never the run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, UploadFile
from fastapi import File as FileField

from threefold.errors import DataError
from threefold.images import decode
from threefold.runtime import Model, load

MAX_FILES = 64
MAX_BYTES = 20 * 2**20


def make_app(model: Model) -> FastAPI:
    """The application around a loaded model: POST /predict, GET /health, GET /openapi.json."""
    app = FastAPI(
        title="threefold",
        docs_url=None,
        redoc_url=None,
        description=f"{model.card.get('name', 'model')}: {len(model.classes)} classes",
    )

    @app.get("/health")
    def health() -> dict[str, Any]:
        """Whether the model is loaded, and what it is."""
        return {"status": "ok", "classes": model.classes, "members": model.members, "score": model.card.get("score")}

    @app.post("/predict")
    def predict(
        files: Annotated[list[UploadFile], FileField(description="one or more image files")], top: int = 3
    ) -> dict[str, Any]:
        """The most probable classes of each image, and each member's opinion."""
        if len(files) > MAX_FILES:
            raise HTTPException(413, f"at most {MAX_FILES} files in a request")
        return {"answers": [_answer(model, file, top) for file in files]}

    return app


def _answer(model: Model, file: UploadFile, top: int) -> dict[str, Any]:
    data = file.file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise HTTPException(413, f"{file.filename}: at most {MAX_BYTES // 2**20} MB in a file")
    try:
        probs, members = model.explain([decode(data)])
    except DataError as error:
        raise HTTPException(415, f"{file.filename}: {error}") from None
    order = np.argsort(-probs[0], kind="stable")[: max(1, top)]
    return {
        "file": file.filename,
        "top": [{"label": model.classes[i], "probability": float(probs[0][i])} for i in order],
        "members": {name: model.classes[int(p.argmax())] for name, p in zip(model.members, members[0], strict=True)},
    }  # fmt: skip


def run_server(path: Path, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve an exported file until interrupted.

    Raises:
        ExportError: the file is not a threefold model.
    """
    uvicorn.run(make_app(load(path)), host=host, port=port, log_level="warning")
