from pathlib import Path

from speed_peers import Case, Turn, copy_images, table

CASE = Case("train", "resnet50", 96)


def test_ratios_compare_turns_of_the_same_round() -> None:
    turns = [
        Turn(CASE, "threefold", 0, 10.0),
        Turn(CASE, "timm", 0, 5.0),
        Turn(CASE, "threefold", 1, 30.0),
        Turn(CASE, "timm", 1, 10.0),
        Turn(CASE, "threefold", 2, 20.0),
    ]

    ours, timm = table(turns).splitlines()[2:]

    assert ours == "| train | resnet50 | 96 | threefold | 20.0 |  |"
    assert timm == "| train | resnet50 | 96 | timm | 7.5 | 2.50 (2.00 - 3.00) |"


def test_images_are_taken_evenly_from_the_classes(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "all" / name).mkdir(parents=True)
        for number in range(5):
            (tmp_path / "all" / name / f"{number}.png").touch()

    copied = copy_images(tmp_path / "all", tmp_path / "some", 6)

    assert sorted(str(path.relative_to(copied)) for path in copied.rglob("*.png")) == [
        f"{name}/{number}.png" for name in ("cat", "dog") for number in range(3)
    ]
