"""The paper's data sets: official counts, classes, files, checksums and terms of use.

Counts and file names come from the home pages of the data sets. `md5` is the authors' checksum
where they publish one (CIFAR, iNaturalist) and otherwise torchvision's; `sha256` is from the
tensorflow_datasets catalogue.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from threefold.errors import DataError, shorten


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
"""Names of the labels 0 to 9."""

DIGITS = tuple("0123456789")
"""Classes of MNIST and SVHN (SVHN's files store the digit 0 as label 10)."""

CIFAR10_CLASSES = _words("airplane automobile bird cat deer dog frog horse ship truck")
"""Names of the labels 0 to 9, as in `batches.meta`."""

CIFAR100_CLASSES = _words(
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus "
    "butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach "
    "couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster "
    "house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree "
    "motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear "
    "pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road "
    "rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel "
    "streetcar sunflower sweet_pepper table tank telephone television tiger tractor train "
    "trout tulip turtle wardrobe whale willow_tree wolf woman worm"
)
"""Names of the fine labels 0 to 99, as in `meta`."""

CIFAR100_SUPERCLASSES = _words(
    "aquatic_mammals fish flowers food_containers fruit_and_vegetables "
    "household_electrical_devices household_furniture insects large_carnivores "
    "large_man-made_outdoor_things large_natural_outdoor_scenes "
    "large_omnivores_and_herbivores medium_mammals non-insect_invertebrates people reptiles "
    "small_mammals trees vehicles_1 vehicles_2"
)
"""Names of the coarse labels 0 to 19."""

CASSAVA_CLASSES = ("cbb", "cbsd", "cgm", "cmd", "healthy")
"""Class folders of iCassava 2019."""

CASSAVA_2020_CLASSES = (
    "Cassava Bacterial Blight (CBB)",
    "Cassava Brown Streak Disease (CBSD)",
    "Cassava Green Mottle (CGM)",
    "Cassava Mosaic Disease (CMD)",
    "Healthy",
)
"""Names of the labels 0 to 4, as in `label_num_to_disease_map.json`."""

SURREY_LETTERS = tuple("abcdefghiklmnopqrstuvwxy")
"""The 24 letters that are signed without movement (all but j and z)."""


class RemoteFile(NamedTuple):
    """A file to download."""

    name: str
    urls: tuple[str, ...]
    """Mirrors, tried in order."""
    size: int = 0
    """Bytes; 0 = not published."""
    md5: str = ""
    sha256: str = ""
    unpack: bool = False
    """Whether it is an archive of image files, which are read unpacked."""


class PublishedDataset(NamedTuple):
    """A data set of the paper and where to get it."""

    title: str
    num_train: int
    """Images of the official training set."""
    num_test: int
    """Held-out images with labels."""
    homepage: str
    licence: str
    """The terms of use, in one sentence."""
    must_accept: bool
    """Whether the terms restrict the use, so that the user has to accept them."""
    files: tuple[RemoteFile, ...] = ()
    num_extra: int = 0
    """Additional images that `data.extra` enables."""
    extra_files: tuple[RemoteFile, ...] = ()
    """Files that only `data.extra` needs."""
    kaggle: str = ""
    """Name of the Kaggle competition, for a data set that needs a Kaggle account."""


_IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
_MNIST_MD5 = (
    "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "d53e105ee54ea40749a09fcbcd1e9432",
    "9fb629c4189551a2d022fa330f9573f3",
    "ec29112dd5afa0611ce80d1b7f02629c",
)
_FASHION_MNIST_MD5 = (
    "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "25c81989df183df01b3e8a0aad5dffbe",
    "bef4ecab320f06d8554ea6380940ec79",
    "bb300cfdad3c16e7a12a480ee83cd310",
)


def _idx_files(mirrors: tuple[str, ...], checksums: tuple[str, ...]) -> tuple[RemoteFile, ...]:
    return tuple(
        RemoteFile(name, tuple(f"{mirror}/{name}" for mirror in mirrors), md5=md5)
        for name, md5 in zip(_IDX_FILES, checksums, strict=True)
    )


def _file(base: str, name: str, **facts: Any) -> RemoteFile:
    return RemoteFile(name, (f"{base}/{name}",), **facts)


_TORONTO = "https://www.cs.toronto.edu/~kriz"
_CIFAR_TERMS = (
    "no licence is published; the authors ask to cite their technical report (Krizhevsky 2009)"
)
_STANFORD = "http://ufldl.stanford.edu/housenumbers"
_INAT = "https://ml-inat-competition-datasets.s3.amazonaws.com/2019"

PUBLISHED: dict[str, PublishedDataset] = {
    "mnist": PublishedDataset(
        title="MNIST",
        num_train=60_000,
        num_test=10_000,
        homepage="http://yann.lecun.com/exdb/mnist/",
        licence="CC BY-SA 3.0",
        must_accept=False,
        files=_idx_files(
            ("https://ossci-datasets.s3.amazonaws.com/mnist", "http://yann.lecun.com/exdb/mnist"),
            _MNIST_MD5,
        ),
    ),
    "fashion-mnist": PublishedDataset(
        title="Fashion-MNIST",
        num_train=60_000,
        num_test=10_000,
        homepage="https://github.com/zalandoresearch/fashion-mnist",
        licence="MIT",
        must_accept=False,
        files=_idx_files(
            ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",), _FASHION_MNIST_MD5
        ),
    ),
    "cifar10": PublishedDataset(
        title="CIFAR-10",
        num_train=50_000,
        num_test=10_000,
        homepage=f"{_TORONTO}/cifar.html",
        licence=_CIFAR_TERMS,
        must_accept=False,
        files=(_file(_TORONTO, "cifar-10-python.tar.gz", md5="c58f30108f718f92721af3b95e74349a"),),
    ),
    "cifar100": PublishedDataset(
        title="CIFAR-100",
        num_train=50_000,
        num_test=10_000,
        homepage=f"{_TORONTO}/cifar.html",
        licence=_CIFAR_TERMS,
        must_accept=False,
        files=(_file(_TORONTO, "cifar-100-python.tar.gz", md5="eb9058c3a382ffc7106e4002c42a8d85"),),
    ),
    "svhn": PublishedDataset(
        title="SVHN",
        num_train=73_257,
        num_test=26_032,
        num_extra=531_131,
        homepage=f"{_STANFORD}/",
        licence="for non-commercial use only",
        must_accept=True,
        files=(
            _file(
                _STANFORD,
                "train_32x32.mat",
                size=182_040_794,
                md5="e26dedcc434d2e4c54c9b2d4a06d8373",
                sha256="435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
            ),
            _file(
                _STANFORD,
                "test_32x32.mat",
                size=64_275_384,
                md5="eb5a983be6a315427106f1b164d9cef3",
                sha256="cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
            ),
        ),
        extra_files=(
            _file(
                _STANFORD,
                "extra_32x32.mat",
                size=1_329_278_602,
                md5="a93ce644f1a588dc4d68dda5feec44a7",
                sha256="a133a4beb38a00fcdda90c9489e0c04f900b660ce8a316a5e854838379a71eb3",
            ),
        ),
    ),
    "inaturalist2019": PublishedDataset(
        title="iNaturalist 2019",
        num_train=265_213,
        num_test=3_030,
        num_extra=3_030,
        homepage="https://github.com/visipedia/inat_comp/tree/master/2019",
        licence="non-commercial research and education only, the images may not be passed on, "
        "and the iNaturalist terms of service hold",
        must_accept=True,
        files=(
            _file(_INAT, "train2019.json.tar.gz", md5="b06a6683537867c0d5c7a45f407a306d"),
            _file(_INAT, "val2019.json.tar.gz", md5="5cc5509b0fe495f1c8c1362612448497"),
            _file(_INAT, "categories.json.tar.gz"),
            _file(
                _INAT, "train_val2019.tar.gz", md5="c60a6e2962c9b8ccbd458d12c8582644", unpack=True
            ),
        ),
    ),
    "icassava2019": PublishedDataset(
        title="iCassava 2019",
        num_train=5_656,
        num_test=1_885,
        num_extra=1_889,
        homepage="https://arxiv.org/abs/1908.02900",
        licence="the rules of the Kaggle competition cassava-disease hold",
        must_accept=True,
        files=(
            _file(
                "https://storage.googleapis.com/emcassavadata",
                "cassavaleafdata.zip",
                size=1_354_096_203,
                sha256="8ae63d2ef7dee0899d252a748523e603f97e2ae7022f103f92fc42a9fce74d95",
                unpack=True,
            ),
        ),
    ),
    "cassava2020": PublishedDataset(
        title="Cassava Leaf Disease 2020",
        num_train=21_397,
        num_test=0,
        homepage="https://www.kaggle.com/c/cassava-leaf-disease-classification",
        licence="the rules of the Kaggle competition hold",
        must_accept=True,
        kaggle="cassava-leaf-disease-classification",
    ),
    "surrey-asl": PublishedDataset(
        title="Surrey ASL finger spelling, data set A",
        num_train=65_774,
        num_test=0,
        homepage="https://empslocal.ex.ac.uk/people/staff/np331/index.php?"
        "section=FingerSpellingDataset",
        licence="no licence is published; ask the authors before any use but research "
        "(Pugeault and Bowden 2011)",
        must_accept=True,
        files=(
            _file(
                "https://www.cvssp.org/FingerSpellingKinect2011",
                "fingerspelling5.tar.bz2",
                unpack=True,
            ),
        ),
    ),
}
"""The data sets of the paper, by their `data.source`."""


def find_published(name: str) -> PublishedDataset:
    """Look up a published data set by its `data.source`.

    Raises:
        DataError: the name is unknown.
    """
    if name not in PUBLISHED:
        raise DataError("unknown published data set", got=name, expected=shorten(PUBLISHED))
    return PUBLISHED[name]


def count_note(name: str, num_train: int, num_test: int, extra: bool = False) -> list[str]:
    """Note that the number of images differs from the published one; empty if it agrees.

    Args:
        name: a key of `PUBLISHED`.
        num_train: training images that were read.
        num_test: held-out images that were read.
        extra: whether `data.extra` is set.
    """
    dataset = PUBLISHED[name]
    expected_train = dataset.num_train + (dataset.num_extra if extra else 0)
    # With extra, iNaturalist trains on its validation images, which are otherwise held out.
    expected_test = 0 if extra and name == "inaturalist2019" else dataset.num_test
    # Kaggle's edition of iCassava has no labels for its test images.
    test_counts = {expected_test, 0} if name == "icassava2019" else {expected_test}
    if num_train == expected_train and num_test in test_counts:
        return []
    return [
        f"not the complete {dataset.title}: {num_train:,} training and {num_test:,} test images "
        f"instead of {expected_train:,} and {expected_test:,}"
    ]


FILE_PATTERNS: dict[str, tuple[str, ...]] = {
    "fashion-mnist": ("*-ubyte*",),
    "mnist": ("*-ubyte*",),
    "cifar10": ("cifar-10-*", "data_batch_1*"),
    "cifar100": ("cifar-100-*", "fine_label_names.txt", "meta"),
    "svhn": ("*_32x32.mat",),
    "inaturalist2019": ("train_val2019*",),
    "icassava2019": ("cassavaleafdata*", "cassava-disease*", "train/cmd"),
    "cassava2020": ("cassava-leaf-disease-classification*", "train_images"),
    "surrey-asl": ("dataset5", "fingerspelling5*", "A/a"),
}
"""Glob patterns of the official files of each data set, relative to its folder."""


def data_table(source: str, root: Path) -> dict[str, Any]:
    """Build a recipe's `data` table for a path.

    Args:
        source: a key of `PUBLISHED`.
        root: a folder, an archive, or a CSV or parquet table.

    Returns:
        `source` and `root`; the source is `source` if the official files are there, else `csv`,
        `parquet` or `folder`.
    """
    if root.suffix in (".csv", ".parquet"):
        return {"source": root.suffix[1:], "root": str(root)}
    patterns = FILE_PATTERNS.get(source, ())
    official = root.is_file() or any(any(root.glob(pattern)) for pattern in patterns)
    class_folders = root.is_dir() and any(path.is_dir() for path in root.iterdir())
    return {"source": "folder" if class_folders and not official else source, "root": str(root)}
