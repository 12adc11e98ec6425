"""The paper's tables and figures as data: which recipe gives each, which cell is whose score, and the value that is printed there.

Values are the paper's. Where a figure prints none, those of the authors' notebooks stand (best epoch of each stage, on the test split).
Where a label of the paper is wrong, the note says so (docs/paper.md, "The paper's errors"). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from threefold.errors import RecipeError
from threefold.files import read_json
from threefold.paper.scales import Small


class Answer(NamedTuple):
    """Whose answers a cell scores."""

    kind: Literal["member", "ensemble", "folds"]
    name: str
    """The member; the method; or the member that answers alone outside of `folds`."""
    members: tuple[str, ...] = ()
    """Those that are combined."""
    folds: tuple[int, ...] = ()
    """Kind `folds`: where the mean of `members` answers (paper's table 3)."""
    run: str = "run"


class Cell(NamedTuple):
    """One value of a table or figure."""

    row: str
    column: str
    answer: Answer
    paper: float | None = None
    note: str = ""

    @property
    def label(self) -> str:
        """Row and column in one."""
        return f"{self.row} {self.column}".strip()


class Plan(NamedTuple):
    """One run of an item."""

    recipe: str
    source: str
    """The published data set."""
    members: tuple[str, ...]
    name: str = "run"
    overrides: tuple[str, ...] = ()


class Item(NamedTuple):
    """A table or figure of the paper."""

    name: str
    title: str
    plans: tuple[Plan, ...]
    cells: tuple[Cell, ...]
    pairs: tuple[tuple[str, str], ...]
    """Labels of cells that are compared by paired tests."""
    small: Small
    draw: Literal["dots", "curves", "macs", "groups"] = "dots"
    stages: Mapping[str, tuple[float, ...]] = {}
    """Best accuracy of each stage in the authors' notebooks, by member."""
    honest_only: bool = False
    smoke: tuple[str, ...] = ()
    """Members of a smoke run, where all of them would take too long; empty = all."""


LITE = ("tf_efficientnet_lite0.in1k", "tf_efficientnet_lite1.in1k", "tf_efficientnet_lite2.in1k")
"""Networks whose ImageNet weights are packaged."""


def _member(name: str, run: str = "run") -> Answer:
    return Answer("member", name, run=run)


def _mean(*members: str, run: str = "run") -> Answer:
    return Answer("ensemble", "mean", members, run=run)


def _plan(recipe: str, source: str, cells: tuple[Cell, ...]) -> tuple[Plan, ...]:
    """One run with the members that the cells need."""
    names = [n for cell in cells for n in (cell.answer.members or (cell.answer.name,))]
    names += [cell.answer.name for cell in cells if cell.answer.kind == "folds"]
    return (Plan(recipe, source, tuple(dict.fromkeys(names))),)


def _heads(
    values: Mapping[str, Mapping[str, float | None]],
) -> tuple[tuple[Cell, ...], tuple[tuple[str, str], ...]]:
    """Cells of backbones x heads, and the comparison of each head with STD."""
    cells = tuple(
        Cell(backbone, head, _member(f"{backbone.lower()}-{head.lower()}"), value)
        for backbone, row in values.items()
        for head, value in row.items()
    )
    return cells, tuple((c.label, f"{c.row} STD") for c in cells if c.column != "STD")


_T1, _P1 = _heads(
    {
        "InceptionV3": {"STD": 0.9434, "RNN": 0.9453, "GRU": 0.9430, "BiLSTM": 0.9445},
        "MobileNetV1": {"STD": 0.9404, "RNN": 0.9438, "GRU": 0.9439, "BiLSTM": 0.9410},
    }
)
_T2, _P2 = _heads(
    {
        "InceptionV3": {"STD": 0.9434, "BiLSTM": 0.9445},
        "Xception": {"STD": 0.9374, "BiLSTM": 0.9383},
        "ResNet50": {"STD": 0.9375, "BiLSTM": 0.9377},
        "Inception-ResNetV2": {"STD": 0.9364, "BiLSTM": 0.9360},
        "MobileNetV1": {"STD": 0.9404, "BiLSTM": 0.9410},
        "VGG19": {"STD": 0.9075, "BiLSTM": None},
        "SEResNeXt101": {"STD": None, "BiLSTM": None},
    }
)
_CASSAVA = ("seresnext101", "xception", "inception-resnetv2")
_T3 = (
    Cell(
        "one network in every set",
        "",
        Answer("folds", _CASSAVA[0]),
        0.928,
        "the paper does not say which network is in which set",
    ),
    Cell("AVG-3M in set 3", "", Answer("folds", _CASSAVA[0], _CASSAVA, (2,))),
    Cell("AVG-3M in set 4", "", Answer("folds", _CASSAVA[0], _CASSAVA, (3,)), 0.9368),
    Cell("AVG-3M in set 5", "", Answer("folds", _CASSAVA[0], _CASSAVA, (4,))),
    Cell("AVG-3M in sets 3, 4 and 5", "", Answer("folds", _CASSAVA[0], _CASSAVA, (2, 3, 4))),
)
_F4 = tuple(
    Cell(name, "", _member(name.lower()), paper, "" if paper else note)
    for name, paper, note in (
        ("InceptionV3-299", 0.7097, ""),
        ("InceptionV3-401", None, "no value printed"),
        ("InceptionV3-421", None, "no value printed"),
        ("Xception-421", 0.7347, ""),
        ("ResNet50-299", None, "a projection in the paper"),
        ("SEResNeXt101-421", None, "a projection in the paper"),
        ("Inception-ResNetV2-421", None, "a projection in the paper"),
    )
)
_F10 = (
    Cell("one stage", "", _member("one")),
    Cell("three stages", "", _member("three")),
    Cell("three stages, gate", "", _member("three", "gate")),
)
_TRIO = ("seresnext101-std", "xception-bilstm", "inception-resnetv2-std")
_F11 = (
    Cell("SEResNeXt101", "STD", _member(_TRIO[0]), 0.9541, "BiLSTM's number in the notebooks"),
    *(
        Cell("SEResNeXt101", h, _member(f"seresnext101-{h.lower()}"), v)
        for h, v in (("RNN", 0.9534), ("GRU", 0.9540), ("BiLSTM", 0.9541))
    ),
    Cell("Xception", "BiLSTM", _member(_TRIO[1]), 0.9521),
    Cell("Inception-ResNetV2", "STD", _member(_TRIO[2]), 0.9536),
)
_F11_STAGES = {
    "seresnext101-rnn": (0.9504, 0.9534, 0.9530),
    "seresnext101-gru": (0.9512, 0.9538, 0.9540),
    "seresnext101-bilstm": (0.9506, 0.9539, 0.9541),
    "xception-bilstm": (0.9495, 0.9519, 0.9521),
    "inception-resnetv2-std": (0.9481, 0.9536, 0.9529),
}
_T4 = (
    Cell("AVG-Softmax", "", _mean(*_TRIO), 0.9592),
    Cell("EXT-Softmax", "", Answer("ensemble", "pruned", _TRIO), 0.9591),
    Cell("E2E-3M", "", _member("e2e-3m"), 0.9585),
    Cell("SEResNeXt101-STD", "", _member(_TRIO[0]), 0.9541, "BiLSTM's number in the notebooks"),
)
_F12 = (
    Cell("SEResNeXt101", "STD", _member("seresnext101-std"), 0.9731),
    Cell("Xception", "STD", _member("xception-std"), 0.9702),
    Cell("Xception", "GRU", _member("xception-gru"), 0.9722),
    Cell("Inception-ResNetV2", "STD", _member("inception-resnetv2-std"), 0.9759),
    Cell("Inception-ResNetV2", "GRU", _member("inception-resnetv2-gru"), 0.9776),
    Cell("EfficientNetB4-299", "STD", _member("efficientnetb4-299"), 0.9785),
    Cell("EfficientNetB5-345", "STD", _member("efficientnetb5-345"), 0.9788),
)
_F12_STAGES = {
    "seresnext101-std": (0.9632, 0.9727, 0.9731),
    "xception-std": (0.9655, 0.9702, 0.9700),
    "xception-gru": (0.9648, 0.9721, 0.9722),
    "inception-resnetv2-std": (0.9689, 0.9759, 0.9758),
    "inception-resnetv2-gru": (0.9686, 0.9765, 0.9776),
    "efficientnetb4-299": (0.9749, 0.9785, 0.9785),
    "efficientnetb5-345": (0.9726, 0.9788, 0.9787),
}
_C3 = ("seresnext101-std", "e2e-3m", "efficientnetb5-345")
_T5 = (
    Cell("EXT-Softmax", "", Answer("ensemble", "pruned", _C3), 0.9836),
    Cell("AVG-Softmax", "", _mean(*_C3), 0.9833),
    Cell("EfficientNetB5-STD", "", _member("efficientnetb5-345"), 0.9788),
    Cell("SEResNeXt101-STD", "", _member("seresnext101-std"), 0.9731, "labelled GRU in the paper"),
    Cell(
        "Xception-STD",
        "",
        _member("xception-std"),
        0.9702,
        "labelled Inception-ResNetV2-GRU in the paper",
    ),
)
_C5 = (
    "seresnext101-std",
    "e2e-3m",
    "efficientnetb5-345",
    "efficientnetb7-299",
    "efficientnetb4-299",
)
_NETS = tuple(f"efficientnetb{i}" for i in range(8))
_C100 = (*_NETS, "seresnext101", "inception-resnetv2", "xception")
_STARS = (
    "efficientnetb0",
    "efficientnetb1",
    "efficientnetb3",
    "efficientnetb4",
    "efficientnetb6",
    "efficientnetb7",
    "inception-resnetv2",
)


def _column(
    data: str, run: str, values: Mapping[str, float], ensemble: tuple[str, ...], paper: float
) -> tuple[Cell, ...]:
    singles = [Cell(data, name, _member(name, run), value) for name, value in values.items()]
    return (*singles, Cell(data, "ensemble", _mean(*ensemble, run=run), paper))


_T6_10 = (
    Cell("CIFAR-10", "SEResNeXt101", _member("seresnext101-std", "cifar10"), 0.9731),
    Cell(
        "CIFAR-10",
        "InceptionResNetV2",
        _member("e2e-3m", "cifar10"),
        0.9702,
        "label and value disagree: three heads on it in the ensemble, Xception-STD's value",
    ),
    Cell("CIFAR-10", "EfficientNetB5-345", _member("efficientnetb5-345", "cifar10"), 0.9788),
    Cell("CIFAR-10", "EfficientNetB7-299", _member("efficientnetb7-299", "cifar10"), 0.9779),
    Cell("CIFAR-10", "EfficientNetB4-299", _member("efficientnetb4-299", "cifar10"), 0.9785),
    Cell("CIFAR-10", "ensemble", _mean(*_C5, run="cifar10"), 0.9852),
)
_T6_100 = _column(
    "CIFAR-100",
    "cifar100",
    dict(
        zip(
            (*_C100, "inceptionv3"),
            (
                0.8487,
                0.8657,
                0.8664,
                0.8700,
                0.8663,
                0.8721,
                0.8804,
                0.8721,
                0.8541,
                0.8609,
                0.8430,
                0.8365,
            ),
            strict=True,
        )
    ),
    _C100,
    0.9027,
)
_T6_SVHN = _column(
    "SVHN",
    "svhn",
    dict(
        zip(
            (*_NETS, "inception-resnetv2", "seresnext101", "xception"),
            (
                0.9873,
                0.9871,
                0.9875,
                0.9867,
                0.9878,
                0.9874,
                0.9880,
                0.9863,
                0.9860,
                0.9861,
                0.9853,
            ),
            strict=True,
        )
    ),
    _STARS,
    0.9899,
)
_T7 = (
    Cell("MobileNetV1", "", _member("mobilenetv1")),
    Cell("InceptionV3", "", _member("inceptionv3")),
    Cell("mean of both", "", _mean("mobilenetv1", "inceptionv3"), 0.949),
)
_B = tuple(Cell(n, "", _member(n)) for n in ("efficientnetv2-birnn", "convnext-std", "vit-bigru"))
_BEYOND = (*_B, Cell("mean of the three", "", _mean(*(c.row for c in _B))))


def _small(names: tuple[str, ...], **more: object) -> Small:
    """The Lite networks in turn for these members."""
    return Small({name: LITE[i % 3] for i, name in enumerate(names)}, **more)  # type: ignore[arg-type]


_SMALL_HEADS = Small(
    {
        f"{backbone}-{head}": lite
        for backbone, lite in (("mobilenetv1", LITE[0]), ("inceptionv3", LITE[1]))
        for head in ("std", "rnn", "gru", "bilstm")
    }
)
_SMALL_CIFAR = Small(
    {
        "seresnext101-std": LITE[0],
        "xception-std": LITE[1],
        "xception-gru": LITE[1],
        "efficientnetb5-345": LITE[2],
    },
    64,
    300,
)
_SMALL_STAGES = Small(
    {
        **{f"seresnext101-{head}": LITE[0] for head in ("std", "rnn", "gru", "bilstm")},
        _TRIO[1]: LITE[1],
        _TRIO[2]: LITE[2],
    }
)
_ONE_LITE = {f"inception-resnetv2-{head}": LITE[1] for head in ("gru", "std", "bilstm")}

ITEMS: dict[str, Item] = {
    item.name: item
    for item in (
        Item(
            "table1",
            "Table 1: recurrent layers on two networks, Fashion-MNIST",
            _plan("paper/table1", "fashion-mnist", _T1),
            _T1,
            _P1,
            _SMALL_HEADS,
        ),
        Item(
            "table2",
            "Table 2: BiLSTM and STD on seven networks, Fashion-MNIST",
            _plan("paper/table2", "fashion-mnist", _T2),
            _T2,
            _P2,
            Small(
                {
                    f"{b}-{h}": lite
                    for b, lite in zip(
                        ("mobilenetv1", "inceptionv3", "xception"), LITE, strict=True
                    )
                    for h in ("std", "bilstm")
                }
            ),
        ),
        Item(
            "table3",
            "Table 3: AVG-3M in chosen folds, iCassava 2019",
            _plan("paper/table3", "icassava2019", _T3),
            _T3,
            tuple((c.label, _T3[0].label) for c in _T3[1:]),
            _small(_CASSAVA, img_size=96, limit_per_class=150),
        ),
        Item(
            "figure4",
            "Figure 4: accuracy against multiply-adds, iNaturalist 2019",
            _plan("paper/figure4", "inaturalist2019", _F4),
            _F4,
            tuple((c.label, _F4[0].label) for c in _F4[1:]),
            _small(
                ("inceptionv3-299", "xception-421", "resnet50-299"), img_size=96, limit_per_class=10
            ),
            "macs",
        ),
        Item(
            "figure10",
            "Figure 10: one stage or three, gate on or off",
            (
                Plan("paper/figure10", "fashion-mnist", ("one", "three")),
                Plan("paper/figure10", "fashion-mnist", ("three",), "gate", ("train.gate=true",)),
            ),
            _F10,
            ((_F10[1].label, _F10[0].label), (_F10[2].label, _F10[1].label)),
            Small(
                {"one": LITE[0], "three": LITE[0]},
                stages={
                    "once": (14, 1e-3, "time"),
                    "stage1": (8, 1e-3, "time"),
                    "stage2": (3, 1e-4, "time"),
                    "stage3": (3, 1e-5, "time"),
                },
            ),
            "curves",
            honest_only=True,
        ),
        Item(
            "figure11",
            "Figure 11: three stages on Fashion-MNIST",
            _plan("paper/figure11", "fashion-mnist", _F11),
            _F11,
            tuple((c.label, _F11[0].label) for c in _F11[1:4]),
            _SMALL_STAGES,
            "curves",
            _F11_STAGES,
        ),
        Item(
            "table4",
            "Table 4: AVG, EXT and E2E-3M, Fashion-MNIST",
            _plan("paper/figure11", "fashion-mnist", _T4),
            _T4,
            (
                (_T4[0].label, _T4[3].label),
                (_T4[1].label, _T4[0].label),
                (_T4[2].label, _T4[0].label),
            ),
            _small((*_TRIO, "e2e-3m")),
        ),
        Item(
            "figure12",
            "Figure 12: three stages on CIFAR-10",
            _plan("paper/figure12", "cifar10", _F12),
            _F12,
            ((_F12[2].label, _F12[1].label), (_F12[4].label, _F12[3].label)),
            _SMALL_CIFAR,
            "curves",
            _F12_STAGES,
        ),
        Item(
            "table5",
            "Table 5: AVG and EXT, CIFAR-10",
            _plan("paper/figure12", "cifar10", _T5),
            _T5,
            ((_T5[0].label, _T5[1].label), (_T5[1].label, _T5[2].label)),
            Small(
                {
                    "seresnext101-std": LITE[0],
                    "efficientnetb5-345": LITE[2],
                    **_ONE_LITE,
                    "e2e-3m": "",
                    "xception-std": LITE[1],
                },
                64,
                300,
            ),
        ),
        Item(
            "table6",
            "Table 6: CIFAR-10, CIFAR-100, SVHN and their ensembles",
            (
                *(p._replace(name="cifar10") for p in _plan("paper/figure12", "cifar10", _T6_10)),
                *(
                    p._replace(name="cifar100")
                    for p in _plan("paper/table6-cifar100", "cifar100", _T6_100)
                ),
                *(p._replace(name="svhn") for p in _plan("paper/table6-svhn", "svhn", _T6_SVHN)),
            ),
            (*_T6_10, *_T6_100, *_T6_SVHN),
            (
                ("CIFAR-10 ensemble", "CIFAR-10 EfficientNetB5-345"),
                ("CIFAR-100 ensemble", "CIFAR-100 efficientnetb6"),
                ("SVHN ensemble", "SVHN efficientnetb6"),
            ),
            Small(
                {
                    **dict.fromkeys(("efficientnetb0", "efficientnetb4-299"), LITE[0]),
                    **dict.fromkeys(("efficientnetb1", "efficientnetb5-345"), LITE[1]),
                    **dict.fromkeys(("efficientnetb3", "seresnext101-std"), LITE[2]),
                },
                64,
                100,
            ),
            smoke=(
                "seresnext101-std",
                "efficientnetb5-345",
                "efficientnetb0",
                "efficientnetb6",
                "inception-resnetv2",
                "xception",
            ),
        ),
        Item(
            "table7",
            "Table 7: Surrey finger spelling, a signer left out at a time",
            _plan("paper/table7", "surrey-asl", _T7),
            _T7,
            ((_T7[2].label, _T7[1].label), (_T7[1].label, _T7[0].label)),
            Small({"mobilenetv1": LITE[0], "inceptionv3": LITE[1]}, 96, 100),
            "groups",
        ),
        Item(
            "beyond",
            "Beyond the paper: newer networks, BiRNN and BiGRU, any folder of images",
            _plan("beyond", "folder", _BEYOND),
            _BEYOND,
            tuple((_BEYOND[3].label, c.label) for c in _B),
            _small(tuple(c.row for c in _B), img_size=96, limit_per_class=200),
        ),
    )
}
"""Every table and figure with values or a claim, by name."""

SAME: dict[str, str] = {
    "figure6": "table1",
    "figure7": "table2",
    "figure9": "table3",
    "figure13": "table7",
}
"""Figures that show a table's values."""

PICTURES: dict[str, str] = {
    "figure1": "the design of E2E-3M",
    "figure2": "the design of one network",
    "figure3": "samples of iNaturalist 2019",
    "figure5": "samples of Fashion-MNIST",
    "figure8": "samples of iCassava 2019",
}
"""Figures without values: nothing to reproduce."""


def item(name: str) -> Item:
    """The item of that name, or of the table that a figure shows.

    Raises:
        RecipeError: there is none, or it has no values.
    """
    if name in PICTURES:
        raise RecipeError("this figure has no values to reproduce", where=name, got=PICTURES[name])
    key = SAME.get(name, name)
    if key not in ITEMS:
        raise RecipeError(
            "the paper has no such item here",
            got=name,
            expected=f"one of {', '.join([*ITEMS, *SAME])}",
        )
    return ITEMS[key]


def states(root: Path) -> list[dict[str, str]]:
    """Every item with what it is, and what was run of it below `root` (`ITEM-SCALE-PROTOCOL/reproduce.json`)."""
    lines = []
    for name, known in ITEMS.items():
        done = []
        for path in sorted(root.glob(f"{name}-*/reproduce.json")):
            found = read_json(path)
            done.append(f"{found['scale']}, {found['protocol']}, {found['trained'][:10]}")
        source = ", ".join(dict.fromkeys(plan.source for plan in known.plans))
        lines.append(
            {
                "name": name,
                "title": known.title,
                "data": source,
                "state": "; ".join(done) or "not run",
            }
        )
    return lines
