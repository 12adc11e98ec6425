"""Name what a file is from its first bytes: the images that are read, and what is none."""

from __future__ import annotations

from typing import Final

HEAD: Final = 64
"""Bytes to look at."""

_IMAGES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
)
_AVIF_BRANDS = {b"avif", b"avis"}
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}

_OTHERS = (
    (b"version https://git-lfs", "a Git LFS pointer in place of the image; run git lfs pull"),
    (b"<!doctype html", "an HTML page, as a failed download leaves it"),
    (b"<html", "an HTML page, as a failed download leaves it"),
    (b"<head", "an HTML page, as a failed download leaves it"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "an XML file"),
    (b"{", "a JSON file"),
    (b"%pdf-", "a PDF document"),
    (b"8bps", "a Photoshop file"),
    (b"\x1aE\xdf\xa3".lower(), "a video (Matroska or WebM)"),
    (b"\0\0\1\xba", "a video (MPEG)"),
    (b"\0\0\1\xb3", "a video (MPEG)"),
    (b"flv\1", "a video (Flash)"),
    (b"oggs", "a video or a sound (Ogg)"),
    (b"pk\3\4", "a zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\0\0\0\x0cjp  ", "a JPEG 2000 image"),
    (b"\xffO\xffQ".lower(), "a JPEG 2000 image"),
    (b"\0\0\0\x0cjxl ", "a JPEG XL image"),
    (b"\xff\n", "a JPEG XL image"),
    (b"\0\0\1\0", "an icon"),
)
"""First bytes in lower case, and what they begin."""


def find_format(head: bytes) -> str:
    """Return the image format that the first `HEAD` bytes of a file indicate; "" for others."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[4:8] == b"ftyp":
        length = int.from_bytes(head[:4], "big")
        brands = {head[8:12], *(head[i : i + 4] for i in range(16, min(length, len(head)) - 3, 4))}
        if brands & _AVIF_BRANDS:
            return "AVIF"
        return "HEIF" if brands & _HEIF_BRANDS else ""
    return next((name for magic, name in _IMAGES if head.startswith(magic)), "")


def describe_other(head: bytes) -> str:
    """Say what a file is that is no image, from its first `HEAD` bytes; "" if that is unknown."""
    if not head.strip(b"\0"):
        return "nothing but zero bytes, as an unfinished copy leaves them"
    if head[4:8] == b"ftyp":
        return "a video (MP4 or QuickTime)"
    if head[:4] == b"RIFF":
        return "a video (AVI)" if head[8:12] == b"AVI " else "a RIFF file"
    text = head.removeprefix(b"\xef\xbb\xbf").lower()
    for start in (text, text.lstrip(b" \t\r\n")):
        for magic, what in _OTHERS:
            if start.startswith(magic):
                return what
    return ""
