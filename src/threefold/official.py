"""Facts about the paper's data sets: names, official counts, classes, files, checksums and terms of use.

Counts and file names are those of the data sets' own pages. Checksums: `md5` are the authors' where they publish one
(CIFAR, iNaturalist) and else those that torchvision checks; `sha256` are those of the tensorflow_datasets catalogue.
"""

from __future__ import annotations

from typing import NamedTuple

from threefold.errors import DataError
from threefold.listing import shorten


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
"""Classes of MNIST and of SVHN (whose files call the digit 0 label 10)."""

CIFAR10_CLASSES = _words("airplane automobile bird cat deer dog frog horse ship truck")
"""Names of the labels 0 to 9, as batches.meta has them."""

CIFAR100_CLASSES = _words(
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle "
    "caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant "
    "flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man "
    "maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree "
    "plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper "
    "snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train "
    "trout tulip turtle wardrobe whale willow_tree wolf woman worm"
)
"""Names of the fine labels 0 to 99, as the file `meta` has them."""

CIFAR100_SUPERCLASSES = _words(
    "aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices "
    "household_furniture insects large_carnivores large_man-made_outdoor_things large_natural_outdoor_scenes "
    "large_omnivores_and_herbivores medium_mammals non-insect_invertebrates people reptiles small_mammals trees "
    "vehicles_1 vehicles_2"
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
"""Names of the labels 0 to 4, as label_num_to_disease_map.json has them."""

SURREY_LETTERS = tuple("abcdefghiklmnopqrstuvwxy")
"""The 24 letters that are no movement (no j, no z)."""


class Remote(NamedTuple):
    """A file to download: addresses that are tried in order, and what its content must be."""

    name: str
    urls: tuple[str, ...]
    size: int = 0
    """Bytes; 0 = not published."""
    md5: str = ""
    sha256: str = ""
    unpack: bool = False
    """Whether it is an archive of image files, which are read unpacked."""


class Official(NamedTuple):
    """A published data set."""

    title: str
    train: int
    """Images of the official training set; `test` those held out with labels, `extra` those of `data.extra`."""
    test: int
    extra: int
    home: str
    licence: str
    """The terms of use, in a sentence."""
    accept: bool
    """Whether the terms restrict what may be done, so that they have to be accepted."""
    files: tuple[Remote, ...] = ()
    extra_files: tuple[Remote, ...] = ()
    """Only needed with `data.extra`."""
    kaggle: str = ""
    """Name of the Kaggle competition, where an account is needed."""


def _idx(mirrors: tuple[str, ...], md5: tuple[str, str, str, str]) -> tuple[Remote, ...]:
    names = [
        f"{part}-{what}-ubyte.gz"
        for part in ("train", "t10k")
        for what in ("images-idx3", "labels-idx1")
    ]
    return tuple(
        Remote(name, tuple(mirror + name for mirror in mirrors), md5=checksum)
        for name, checksum in zip(names, md5, strict=True)
    )


def _at(
    base: str, name: str, size: int = 0, md5: str = "", sha256: str = "", unpack: bool = False
) -> Remote:
    return Remote(name, (f"{base}/{name}",), size, md5, sha256, unpack)


_TORONTO = "https://www.cs.toronto.edu/~kriz"
_STANFORD = "http://ufldl.stanford.edu/housenumbers"
_INAT = "https://ml-inat-competition-datasets.s3.amazonaws.com/2019"

OFFICIAL: dict[str, Official] = {
    "mnist": Official(
        "MNIST",
        60_000,
        10_000,
        0,
        "http://yann.lecun.com/exdb/mnist/",
        "CC BY-SA 3.0",
        False,
        _idx(
            ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/"),
            (
                "f68b3c2dcbeaaa9fbdd348bbdeb94873",
                "d53e105ee54ea40749a09fcbcd1e9432",
                "9fb629c4189551a2d022fa330f9573f3",
                "ec29112dd5afa0611ce80d1b7f02629c",
            ),
        ),
    ),
    "fashion-mnist": Official(
        "Fashion-MNIST",
        60_000,
        10_000,
        0,
        "https://github.com/zalandoresearch/fashion-mnist",
        "MIT",
        False,
        _idx(
            ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
            (
                "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                "25c81989df183df01b3e8a0aad5dffbe",
                "bef4ecab320f06d8554ea6380940ec79",
                "bb300cfdad3c16e7a12a480ee83cd310",
            ),
        ),
    ),
    "cifar10": Official(
        "CIFAR-10",
        50_000,
        10_000,
        0,
        f"{_TORONTO}/cifar.html",
        "no licence is published; the authors ask to cite their technical report (Krizhevsky 2009)",
        False,
        (_at(_TORONTO, "cifar-10-python.tar.gz", md5="c58f30108f718f92721af3b95e74349a"),),
    ),
    "cifar100": Official(
        "CIFAR-100",
        50_000,
        10_000,
        0,
        f"{_TORONTO}/cifar.html",
        "no licence is published; the authors ask to cite their technical report (Krizhevsky 2009)",
        False,
        (_at(_TORONTO, "cifar-100-python.tar.gz", md5="eb9058c3a382ffc7106e4002c42a8d85"),),
    ),
    "svhn": Official(
        "SVHN",
        73_257,
        26_032,
        531_131,
        f"{_STANFORD}/",
        "for non-commercial use only",
        True,
        (
            _at(
                _STANFORD,
                "train_32x32.mat",
                182_040_794,
                "e26dedcc434d2e4c54c9b2d4a06d8373",
                "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
            ),
            _at(
                _STANFORD,
                "test_32x32.mat",
                64_275_384,
                "eb5a983be6a315427106f1b164d9cef3",
                "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
            ),
        ),
        (
            _at(
                _STANFORD,
                "extra_32x32.mat",
                1_329_278_602,
                "a93ce644f1a588dc4d68dda5feec44a7",
                "a133a4beb38a00fcdda90c9489e0c04f900b660ce8a316a5e854838379a71eb3",
            ),
        ),
    ),
    "inaturalist2019": Official(
        "iNaturalist 2019",
        265_213,
        3_030,
        3_030,
        "https://github.com/visipedia/inat_comp/tree/master/2019",
        "non-commercial research and education only, the images may not be passed on, and the iNaturalist terms of "
        "service hold",
        True,
        (
            _at(_INAT, "train2019.json.tar.gz", md5="b06a6683537867c0d5c7a45f407a306d"),
            _at(_INAT, "val2019.json.tar.gz", md5="5cc5509b0fe495f1c8c1362612448497"),
            _at(_INAT, "categories.json.tar.gz"),
            _at(_INAT, "train_val2019.tar.gz", md5="c60a6e2962c9b8ccbd458d12c8582644", unpack=True),
        ),
    ),
    "icassava2019": Official(
        "iCassava 2019",
        5_656,
        1_885,
        1_889,
        "https://arxiv.org/abs/1908.02900",
        "the rules of the Kaggle competition cassava-disease hold",
        True,
        (
            _at(
                "https://storage.googleapis.com/emcassavadata",
                "cassavaleafdata.zip",
                1_354_096_203,
                sha256="8ae63d2ef7dee0899d252a748523e603f97e2ae7022f103f92fc42a9fce74d95",
                unpack=True,
            ),
        ),
    ),
    "cassava2020": Official(
        "Cassava Leaf Disease 2020",
        21_397,
        0,
        0,
        "https://www.kaggle.com/c/cassava-leaf-disease-classification",
        "the rules of the Kaggle competition hold",
        True,
        kaggle="cassava-leaf-disease-classification",
    ),
    "surrey-asl": Official(
        "Surrey ASL finger spelling, data set A",
        65_774,
        0,
        0,
        "https://empslocal.ex.ac.uk/people/staff/np331/index.php?section=FingerSpellingDataset",
        "no licence is published; ask the authors before any use but research (Pugeault and Bowden 2011)",
        True,
        (
            _at(
                "https://www.cvssp.org/FingerSpellingKinect2011",
                "fingerspelling5.tar.bz2",
                unpack=True,
            ),
        ),
    ),
}
"""The data sets of the paper, by the name that a recipe's `data.source` has for them."""


def official(name: str) -> Official:
    """The data set of that name.

    Raises:
        DataError: none is known.
    """
    if name not in OFFICIAL:
        raise DataError(
            "not a published data set that is known", got=name, expected=shorten(OFFICIAL)
        )
    return OFFICIAL[name]


def count_note(name: str, train: int, test: int, extra: bool = False) -> list[str]:
    """A sentence if the images are not as many as were published."""
    known = OFFICIAL[name]
    published = (
        known.train + (known.extra if extra else 0),
        0 if extra and name == "inaturalist2019" else known.test,
    )
    # Kaggle's iCassava has no labels for its test images.
    allowed = {published, (published[0], 0)} if name == "icassava2019" else {published}
    if (train, test) in allowed:
        return []
    return [
        f"not the whole of {known.title}: {train:,} training and {test:,} test images, "
        f"published are {published[0]:,} and {published[1]:,}"
    ]
