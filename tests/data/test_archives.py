"""Archives: sound ones unpack unchanged; hostile ones are refused and write nothing outside."""

from __future__ import annotations

import gzip
import io
import os
import stat
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from threefold.data.sources.archives import (
    ArchiveLimits,
    iter_members,
    read_members,
    safe_name,
    unpack,
    unpack_beside,
)
from threefold.errors import DataError

FILES = {"a.txt": b"one", "folder/b.bin": bytes(range(256)) * 9000, "folder/deep/empty": b""}


def entry(
    name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info


def write_tar(path: Path, entries: list[tuple[tarfile.TarInfo, bytes]], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for info, content in entries:
            archive.addfile(info, io.BytesIO(content))
    return path


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tar_of(path: Path, files: dict[str, bytes], mode: str) -> Path:
    entries = [(entry("./folder", kind=tarfile.DIRTYPE), b"")]
    entries += [(entry(f"./{name}", len(content)), content) for name, content in files.items()]
    return write_tar(path, entries, mode)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


@pytest.mark.parametrize("kind", ["w:", "w:gz", "w:bz2", "zip"])
def test_every_format_unpacks_unchanged(tmp_path: Path, kind: str) -> None:
    """The format is recognised by content, not by the name of the archive."""
    archive = tmp_path / "data.archive"
    write_zip(archive, FILES) if kind == "zip" else tar_of(archive, FILES, kind)

    folder = unpack_beside(archive)

    assert folder == tmp_path / "data.archive.unpacked"
    assert tree(folder) == FILES
    assert [member.name for member in iter_members(archive)] == list(FILES)
    assert read_members(archive, ["b.bin", "absent"]) == {"b.bin": FILES["folder/b.bin"]}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "data.archive",
        "data.archive.unpacked",
    ]


def test_what_a_killed_process_unpacked_is_deleted(tmp_path: Path) -> None:
    part = tmp_path / f".out.{2**22 + 1}.x.tmp" / "content" / "a.txt"  # no such process
    part.parent.mkdir(parents=True)
    part.write_text("half")

    unpack(write_zip(tmp_path / "a.zip", FILES), tmp_path / "out")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "out"]


def test_an_unpacked_folder_is_kept(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "a.zip", FILES)

    (unpack(archive, tmp_path / "out") / "a.txt").write_bytes(b"changed")

    assert (unpack(archive, tmp_path / "out") / "a.txt").read_bytes() == b"changed"


SAFE = st.from_regex(r"[a-z0-9 ]{1,8}(/[a-z0-9 ]{1,8}){0,3}", fullmatch=True)


@given(SAFE)
def test_safe_names_are_kept(name: str) -> None:
    assert safe_name(name) == safe_name("./" + name) == safe_name(name + "/") == name


@given(st.text(max_size=30))
def test_accepted_names_stay_below_the_folder(name: str) -> None:
    """On this system and on Windows."""
    try:
        safe = safe_name(name)
    except DataError:
        return

    assert os.path.normpath(f"/root/{safe}").startswith("/root")
    assert not set(safe) & set("\\\0\n")
    assert not safe.startswith("/")
    assert safe[1:2] != ":"


UNSAFE = [
    "../out.txt",
    "/etc/out.txt",
    "a/../../out.txt",
    "..\\out.txt",
    "C:out.txt",
    "./C:out.txt",
    "a/C:out.txt",
    "a\nb",
    "x" * 300,
    "a/\udcff",
]


@pytest.mark.parametrize("name", UNSAFE, ids=ascii)
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_unsafe_names_are_refused(tmp_path: Path, kind: str, name: str) -> None:
    box = tmp_path / "box"
    box.mkdir()
    archive = box / "a"
    if kind == "tar":
        write_tar(archive, [(entry("good", 1), b"1"), (entry(name, 3), b"bad")])
    elif name.isascii():
        write_zip(archive, {"good": b"1", name: b"bad"})
    else:
        pytest.skip("zipfile cannot write such a name")

    with pytest.raises(DataError, match="unsafe name"):
        unpack(archive, box / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["box", "a"]


SPECIAL = {
    "symbolic link": entry("link", kind=tarfile.SYMTYPE, link="/etc"),
    "inner symbolic link": entry("link", kind=tarfile.SYMTYPE, link="good"),
    "hard link": entry("link", kind=tarfile.LNKTYPE, link="/etc/passwd"),
    "device": entry("null", kind=tarfile.CHRTYPE),
    "block device": entry("disk", kind=tarfile.BLKTYPE),
    "fifo": entry("pipe", kind=tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("case", SPECIAL)
def test_links_and_devices_are_refused(tmp_path: Path, case: str) -> None:
    archive = write_tar(tmp_path / "a.tar.gz", [(entry("good", 1), b"1"), (SPECIAL[case], b"")])

    with pytest.raises(DataError, match="no plain file"):
        unpack(archive, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.gz"]


def test_a_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(info, "/etc")

    with pytest.raises(DataError, match="link or a special file"):
        unpack(tmp_path / "a.zip", tmp_path / "out")


def test_encrypted_and_unsupported_members_are_refused(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "a.zip", {"a": b"x" * 99}, zipfile.ZIP_LZMA)

    with pytest.raises(DataError, match="unsupported method"):
        unpack(archive, tmp_path / "out")

    content = bytearray(write_zip(archive, {"a": b"x" * 99}).read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1
    archive.write_bytes(content)

    with pytest.raises(DataError, match="need a password; got a; fix: unpack it"):
        unpack(archive, tmp_path / "out")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("names", [("a", "a"), ("a", "a/b"), ("a", "./a")])
def test_duplicate_names_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    archive = write_tar(tmp_path / "a.tar", [(entry(name, 1), b"1") for name in names], "w:")

    with pytest.raises(DataError, match=r"a\.tar; got the archive has a member twice"):
        unpack(archive, tmp_path / "out")


SMALL = ArchiveLimits(max_members=5, max_ratio=20, min_budget=1 << 16, disk_reserve=0)


def bomb(path: Path, kind: str) -> Path:
    zeros = bytes(1 << 22)
    if kind == "zip":
        return write_zip(path, {"a": zeros})
    return write_tar(path, [(entry("a", len(zeros)), zeros)], kind)


@pytest.mark.parametrize("kind", ["zip", "w:gz", "w:bz2"])
def test_a_decompression_bomb_is_refused(tmp_path: Path, kind: str) -> None:
    archive = bomb(tmp_path / "a", kind)

    with pytest.raises(DataError, match="decompression bomb"):
        unpack(archive, tmp_path / "out", SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    folder = unpack(archive, tmp_path / "out", SMALL._replace(min_budget=1 << 23))
    assert (folder / "a").stat().st_size == 1 << 22


def test_bytes_after_the_last_member_are_counted(tmp_path: Path) -> None:
    """They have to be decompressed to reach the checksum."""
    tar = tar_of(tmp_path / "a.tar", {"a": b"1"}, "w:").read_bytes()
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(tar + bytes(1 << 22)))

    with pytest.raises(DataError, match="decompression bomb"):
        list(iter_members(tmp_path / "a.tar.gz", SMALL))


def test_a_zip_gives_no_more_than_it_declares(tmp_path: Path) -> None:
    archive = bomb(tmp_path / "a.zip", "zip")
    content = bytearray(archive.read_bytes())
    struct.pack_into("<L", content, content.index(b"PK\1\2") + 24, 1000)
    archive.write_bytes(content)

    with pytest.raises(DataError, match="the archive is damaged"):
        unpack(archive, tmp_path / "out", SMALL)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_too_many_members_are_refused(tmp_path: Path, kind: str) -> None:
    files = {f"{i}": b"" for i in range(6)}
    archive = tmp_path / "a"
    write_zip(archive, files) if kind == "zip" else tar_of(archive, files, "w:gz")

    with pytest.raises(DataError, match="too many members"):
        unpack(archive, tmp_path / "out", SMALL)


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_memory_stays_at_a_few_blocks(tmp_path: Path, kind: str) -> None:
    content = os.urandom(1 << 16) * 256  # 16 MiB
    archive = tmp_path / "a"
    if kind == "tar":
        write_tar(archive, [(entry("a", len(content)), content)], "w:")
    else:
        write_zip(archive, {"a": content}, zipfile.ZIP_STORED)

    tracemalloc.start()
    unpack(archive, tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 6 << 20
    assert (tmp_path / "out/a").read_bytes() == content


def test_a_huge_tar_header_is_refused(tmp_path: Path) -> None:
    """A tar may declare that the name of its next member is a gigabyte long."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
    (tmp_path / "a.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(4096))

    with pytest.raises(DataError, match="a header of 1073741824 bytes"):
        list(iter_members(tmp_path / "a.tar"))


DAMAGED: dict[str, Callable[[bytes, bytes], bytes]] = {
    "cut gzip": lambda tar, _: tar[: len(tar) // 2],
    "wrong checksum of gzip": lambda tar, _: tar[:-8] + bytes(8),
    "cut zip": lambda _, zipped: zipped[: len(zipped) // 2],
    "changed zip": lambda _, zipped: zipped[:60] + bytes(20) + zipped[80:],
    "directory of a zip": lambda _, zipped: zipped[:-10] + struct.pack("<L", 1 << 29) + zipped[-6:],
    "no archive": lambda *_: b"GIF89a",
    "nothing": lambda *_: b"",
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_archives_are_refused_in_one_line(tmp_path: Path, case: str) -> None:
    files = {"a": os.urandom(5000), "b": os.urandom(5000)}
    sound = (
        tar_of(tmp_path / "1", files, "w:gz").read_bytes(),
        write_zip(tmp_path / "2", files).read_bytes(),
    )

    (tmp_path / "a").write_bytes(DAMAGED[case](*sound))

    for use in (
        lambda: unpack(tmp_path / "a", tmp_path / "out"),
        lambda: read_members(tmp_path / "a", ["a", "b"]),
    ):
        with pytest.raises(DataError) as caught:
            use()
        assert str(tmp_path / "a") in str(caught.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="cannot read the archive"):
        read_members(tmp_path / "absent", ["a"])


def test_a_member_too_large_for_memory_is_refused(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "a.zip", {"a": bytes(100)})

    assert read_members(archive, ["a"], max_bytes=100) == {"a": bytes(100)}
    with pytest.raises(DataError, match="too large"):
        read_members(archive, ["a"], max_bytes=99)


def test_a_full_disk_is_reported_in_one_line(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "a.zip", FILES)

    with pytest.raises(DataError, match="No space left"):
        unpack(archive, tmp_path / "out", ArchiveLimits(disk_reserve=1 << 62))
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]
