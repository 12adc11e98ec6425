"""Formats beside the usual ones, and files that are no images named for what they are."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from threefold.data.images import check, decode, measure
from threefold.extras import install_command

HEIC = base64.b85decode(
    "0000SW^{RQXk}?*00000ZE0pPXk}?*ZE0a<0005LZDn*}000000000XXk=`10000000000aA{+70000000000000"
    "0000000G-+&aV*mgE07O6l0ssL300001;s5~v000000052v0ssI200M9T0RR9100000Bme*aIB98aW&i*H000620"
    "00$fZf0cy000000RRAKc4ILB0000LX>Mj^0ssI300IC2MR;ju000004sdC7Z2$lO00031008}IaB^?}007--aAR)"
    "(004Gqc4I>U18@KU0FVFx0000U@BsY%`1k+-4+CHT0RR|40Sp2E{{wIU00RJ!0009300RIXx&lC90096hLID8-Z~"
    "y=U0FVFx0{{R603M(qfd!W8<fgf}2xu@M00096AOHXZ03l)k0RRR>0l{;?i2wiq6Ju{|a&BX6cmM$a4FCp!0000K"
    "X>)L8000000000$0000$0000eV{Bn?0000W000010000$00001|NsBs0000200000000020000GaA|mH000000|*"
    "ER0000OX>e^}0000000001009Mo0s{qv0000QX>w&|000000000EV`Ot<00IC3009610J?2tVRQfh0E#F9uL<BGI"
    "W!;t@;kr(^00PayhoeY|2qcV{YY*9`2z^W!bM*HDc0ugJtNe8jAZV&jU#uvi$qV=pfz|(g?G*975T_ROi#C9`}}%"
    "U|Jcq@Df;~Orf>I9BCXsy5<5*?-;S=6nV_br50YG!@1sj3w_A`UeY{>4-P3B=NlE5LqKZY)(B+fB00006MR;ju00"
    "2!*04e|g00;m90TKWM0000100sa600000"
)
"""64 rows of 32 pixels: red and blue above green and white."""


def quarters() -> np.ndarray:
    colours = np.array([[[255, 0, 0], [0, 0, 255]], [[0, 255, 0], [255, 255, 255]]], np.uint8)
    return np.repeat(np.repeat(colours, 32, 0), 16, 1)


def test_heic(tmp_path: Path) -> None:
    pytest.importorskip("pi_heif")
    (tmp_path / "photo.HEIC").write_bytes(HEIC)

    pixels = decode(tmp_path / "photo.HEIC")

    assert np.abs(pixels.astype(int) - quarters()).max() <= 2
    assert measure(HEIC) == (32, 64)
    assert check(tmp_path / "photo.HEIC") is None


def test_heic_without_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pi_heif", None)
    (tmp_path / "photo.heic").write_bytes(HEIC)

    bad = check(tmp_path / "photo.heic")

    assert bad is not None
    assert f"needs {install_command('heif')}" in bad.reason


def test_avif_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    stream = io.BytesIO()
    Image.fromarray(quarters()).save(stream, "AVIF", quality=95, exif=exif)
    (tmp_path / "photo.avif").write_bytes(stream.getvalue())

    pixels = decode(tmp_path / "photo.avif")

    inner = (slice(4, -4, 8), slice(4, -4, 8))
    expected = np.rot90(quarters(), -1)[inner].astype(int)
    assert np.abs(pixels[inner] - expected).max() <= 12
    assert check(tmp_path / "photo.avif") is None


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\n <!DOCTYPE html><html><body>404</body></html>", "an HTML page"),
        (b"\xef\xbb\xbf<html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12", "run git lfs pull"),
        (b"\0\0\0\x18ftypisom\0\0\2\0isomiso2", "a video (MP4 or QuickTime)"),
        (b"\0\0\0\x14ftypqt  \0\0\0\0qt  ", "a video (MP4 or QuickTime)"),
        (b"\x1aE\xdf\xa3\x01\0\0", "a video (Matroska or WebM)"),
        (b"RIFF\x10\0\0\0AVI LIST", "a video (AVI)"),
        (b'{"error": 403}', "a JSON file"),
        (b"%PDF-1.7", "a PDF document"),
        (b"8BPS\0\1", "a Photoshop file"),
        (b"\0" * 5000, "nothing but zero bytes"),
        (b"", "the file is empty"),
        (b"hello", "not an image (the content is none of JPEG, PNG"),
    ],
)
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "photo.jpg").write_bytes(content)

    bad = check(tmp_path / "photo.jpg")

    assert bad is not None
    assert what in bad.reason
    assert not bad.readable
