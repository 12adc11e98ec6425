"""Make the packaged demo data: a class-balanced sample of Fashion-MNIST, drawn with a fixed seed.

    python scripts/make_demo_data.py [--source DIR] [--out FILE]

Equal input files give equal bytes, with the same zlib. The rows of the sample in the official files
are stored as `train_rows` and `test_rows`. Fashion-MNIST: Copyright (c) 2017 Zalando SE, MIT
License.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np

from threefold.data.sources.arrays import FASHION_MNIST_ROOT, read_idx

SEED = 2017
PER_CLASS = {"train": 300, "test": 100}
PREFIX = {"train": "train", "test": "t10k"}
OUT = Path(__file__).parents[1] / "src/threefold/assets/fashion_mnist/data.npz"


def choose_rows(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Draw `per_class` rows of each label, in ascending order."""
    rng = np.random.default_rng(seed)
    drawn = [
        rng.permutation(np.flatnonzero(labels == label))[:per_class] for label in np.unique(labels)
    ]
    return np.sort(np.concatenate(drawn)).astype(np.int32)


def choose(source: Path) -> dict[str, np.ndarray]:
    """Make the arrays of the demo data, by name."""
    arrays = {}
    for part, per_class in PER_CLASS.items():
        labels = read_idx(source / f"{PREFIX[part]}-labels-idx1-ubyte.gz", 1)
        rows = choose_rows(labels, per_class, SEED)
        images = read_idx(source / f"{PREFIX[part]}-images-idx3-ubyte.gz", 3)
        arrays[f"{part}_images"] = images[rows]
        arrays[f"{part}_labels"] = labels[rows]
        arrays[f"{part}_rows"] = rows
    return arrays


def pack(arrays: dict[str, np.ndarray]) -> bytes:
    """Write an .npz with fixed dates and the best compression; numpy's writer offers neither."""
    result = io.BytesIO()
    with zipfile.ZipFile(result, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array, allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            archive.writestr(info, member.getvalue(), zipfile.ZIP_DEFLATED, 9)
    return result.getvalue()


def main() -> None:
    """Write the file and print its checksum."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--source",
        type=Path,
        default=Path(FASHION_MNIST_ROOT),
        help="folder of the four idx .gz files",
    )
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    content = pack(choose(options.source))
    options.out.write_bytes(content)
    print(f"seed {SEED}, rows per class {PER_CLASS}")
    print(f"{options.out}: {len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
