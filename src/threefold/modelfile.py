"""A model file, looked at before onnxruntime opens it: is it ONNX, is it ours, does it reach for other files?

The file is ONNX's protobuf. A reader of a hundred lines walks it without decoding a tensor, so that a hostile file costs
neither memory nor time: no `onnx` package, which is not needed to predict, and no pickle. Field numbers are those of
onnx.proto3 (ONNX IR 10).
"""

from __future__ import annotations

import json
import math
import mmap
import os
import stat
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from threefold.errors import ExportError

MAX_CARD_BYTES: Final = 4 * 2**20
"""Longest model card that is read."""
MAX_CLASSES: Final = 100_000
MAX_MEMBERS: Final = 1_000
MAX_FIELDS: Final = 5_000_000
"""Most protobuf fields that are looked at; a pipeline of three members and five folds has about 100,000."""
MAX_DEPTH: Final = 16
"""Deepest nesting of graphs within graphs."""
MEMORY: Final = 4 * 2**30
"""Bytes that a session may take beside twice the size of its file; a graph that asks for more is stopped with an error."""

# Which fields of which message hold messages that can hold tensors.
_PARTS: Final[Mapping[str, Mapping[int, str]]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_METADATA, _INPUT, _OUTPUT = 14, 11, 12  # in a model; in its graph
_DIMS, _DATA_TYPE, _RAW, _EXTERNAL_DATA, _DATA_LOCATION = 1, 2, 9, 13, 14  # in a tensor
_BYTES: Final = {
    1: 4,
    2: 1,
    3: 1,
    4: 2,
    5: 2,
    6: 4,
    7: 8,
    9: 1,
    10: 2,
    11: 8,
    12: 4,
    13: 8,
    16: 2,
}  # by data type
_VALUES: Final = (4, 5, 6, 7, 9, 10, 11)  # where a tensor keeps its values
_UINT8, _FLOAT, _INT64 = 2, 1, 7
_LOADING = threading.Lock()


class _Bad(Exception):
    """Why a file is refused."""


def read_card(path: str | Path, key: str) -> dict[str, Any]:
    """The model card of a file, after everything that can be checked without running it has been.

    Checked: a regular file of ONNX's protobuf; every tensor has as many values as its shape says, in this file or in a
    plain file beside it (no folder, no link of either kind); inputs and outputs are a pipeline's and agree with the
    card; the card is a JSON object of bounded size whose classes and members are names.

    Args:
        path: the file.
        key: where the card stands in the file's metadata.

    Raises:
        ExportError: missing, damaged, not a threefold model, or hostile; one line that names the file and the reason.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise _Bad("not a regular file")
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise _Bad("the file is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Reader(content, path.parent).card(key)
    except FileNotFoundError:
        raise ExportError("no such model file", where=path) from None
    except (_Bad, OSError, ValueError) as error:
        raise ExportError(
            "cannot read the model file",
            where=path,
            got=" ".join(str(getattr(error, "strerror", None) or error).split())[:300],
            fix="give a .onnx file that threefold exported",
        ) from None


def bytes_beside(path: Path, card: Mapping[str, Any]) -> int:
    """Bytes of a bundle's data file, as it is on disk; 0 of a single file. `read_card` has checked what the tensors name."""
    bundle = card.get("bundle")
    name = bundle.get("file") if isinstance(bundle, Mapping) else None
    if not isinstance(name, str) or not _is_plain(name):
        return 0
    try:
        found = os.lstat(path.parent / name)
    except OSError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


def open_session(path: Path, threads: int = 0, memory: int = MEMORY, spin: bool = True) -> Any:
    """An onnxruntime session on the CPU whose memory is bounded and whose errors are one line.

    Args:
        path: a file that `read_card` accepts.
        threads: of onnxruntime; 0 = one per core.
        memory: bytes that it may take beside twice the size of its file.
        spin: keep threads busy between operators; faster alone, slower where others need the cores.

    Raises:
        ExportError: onnxruntime cannot read the file; from `run`, a graph that fails or asks for too much memory.
    """
    import onnxruntime

    class Session(onnxruntime.InferenceSession):  # type: ignore[misc]
        def run(self, *args: Any, **words: Any) -> Any:
            try:
                return super().run(*args, **words)
            except Exception as error:
                raise ExportError(
                    "the model cannot answer", where=path, got=_short(error)
                ) from None

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = (
        4  # what goes wrong is raised; printed as well it would be said twice
    )
    options.add_session_config_entry("session.use_env_allocators", "1")
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    where = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    # 1 = ask for what is needed and not for the next power of two; -1 = onnxruntime's default.
    arena = onnxruntime.OrtArenaCfg(memory + 2 * path.stat().st_size, 1, -1, -1)
    try:
        with _LOADING:  # a session keeps the allocator that was registered last when it was made
            onnxruntime.create_and_register_allocator(where, arena)
            return Session(
                str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0
            )  # it would print
    except Exception as error:
        raise ExportError(
            "cannot read the model file",
            where=path,
            got=_short(error),
            fix="give a .onnx file that threefold exported",
        ) from None


def _short(error: Exception) -> str:
    """What onnxruntime says, without its own source paths, in one line."""
    text = " ".join(str(error).split())
    if "smaller than requested bytes" in text or "Failed to allocate memory" in text:
        return "it asks for more memory than it may have"
    return text[:160]


class _Reader:
    """Walks a model file."""

    def __init__(self, content: mmap.mmap, folder: Path) -> None:
        self.content, self.folder, self.fields = content, folder, 0

    def card(self, key: str) -> dict[str, Any]:
        """Check everything; returns the card."""
        head = self.content[:8]
        for magic, kind in (
            (b"\x80", "pickle"),
            (b"PK\x03\x04", "a zip archive"),
            (b"\x93NUMPY", "a NumPy array"),
        ):
            if head.startswith(magic):
                raise _Bad(f"not ONNX: it looks like {kind}, which is never opened")
        whole = (0, len(self.content))
        self.walk("model", *whole)
        entries = [
            self.entry(*span) for number, span in self.messages(*whole) if number == _METADATA
        ]
        cards = [value for name, value in entries if name == key.encode()]
        if not cards:
            raise _Bad("an ONNX file without threefold's metadata: not a threefold model")
        card = _parse_card(cards)
        self.check_ends([span for number, span in self.messages(*whole) if number == 7], card)
        return card

    def scan(self, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Fields of a message: number, wire type, and where its value begins and ends (a varint: value, value)."""
        while begin < end:
            self.fields += 1
            if self.fields > MAX_FIELDS:
                raise _Bad(f"more than {MAX_FIELDS:,} fields")
            tag, begin = self.varint(begin, end)
            number, kind = tag >> 3, tag & 7
            if kind == 0 and number:
                value, begin = self.varint(begin, end)
                yield number, kind, value, value
                continue
            size = {1: 8, 5: 4}.get(kind, -1)
            if kind == 2:
                size, begin = self.varint(begin, end)
            if number == 0 or size < 0 or size > end - begin:
                raise _Bad("not ONNX, or damaged or truncated")
            yield number, kind, begin, begin + size
            begin += size

    def varint(self, begin: int, end: int) -> tuple[int, int]:
        """A number and where it ends."""
        value = 0
        for place in range(begin, min(begin + 10, end)):
            byte = self.content[place]
            value |= (byte & 127) << 7 * (place - begin)
            if byte < 128:
                return value, place + 1
        raise _Bad("not ONNX, or damaged or truncated")

    def messages(self, begin: int, end: int) -> Iterator[tuple[int, tuple[int, int]]]:
        """Fields that hold bytes: number, and where they begin and end."""
        return ((number, (a, b)) for number, kind, a, b in self.scan(begin, end) if kind == 2)

    def walk(self, kind: str, begin: int, end: int, depth: int = 0) -> None:
        """Check every tensor below a message."""
        if depth > 3 * MAX_DEPTH + 4:  # a graph in a graph is three messages deeper
            raise _Bad(f"graphs nested more than {MAX_DEPTH} deep")
        if kind == "tensor":
            self.check_tensor(begin, end)
            return
        parts = _PARTS[kind]
        for number, span in self.messages(begin, end):
            if number in parts:
                self.walk(parts[number], *span, depth + 1)

    def check_tensor(self, begin: int, end: int) -> None:
        """A tensor has the values that its shape promises, and they are where they may be."""
        dims: list[int] = []
        held, bits, raw, outside = 0, 4, False, False  # no type of ONNX has fewer than 4 bits
        location: list[tuple[bytes, bytes]] = []
        for number, kind, a, b in self.scan(begin, end):
            if number == _DIMS:
                dims += [a] if kind == 0 else self.packed(a, b)
            elif number in _VALUES:
                held += 8 if kind == 0 else max(b - a, 1)
                raw |= number == _RAW
            elif number == _DATA_TYPE and kind == 0:
                bits = 8 * _BYTES[a] if a in _BYTES else 4
            elif number == _EXTERNAL_DATA and kind == 2:
                location.append(self.entry(a, b))
            elif number == _DATA_LOCATION and kind == 0:
                outside |= a != 0
        if outside or location:
            held = _outside_bytes(self.folder, location)
        elif not raw:  # written one by one, numbers may be shorter than their type
            bits = 4
        if len(dims) > 64 or max(dims, default=0) >= 2**40 or math.prod(dims) * bits > 8 * held:
            raise _Bad(f"a tensor of shape {dims[:8]} with only {held:,} bytes of values")

    def packed(self, begin: int, end: int) -> list[int]:
        """Several numbers in one field."""
        values = []
        while begin < end:
            value, begin = self.varint(begin, end)
            values.append(value)
            if len(values) > 64:
                raise _Bad("a tensor of more than 64 dimensions")
        return values

    def entry(self, begin: int, end: int) -> tuple[bytes, bytes]:
        """Key and value of a StringStringEntryProto, cut to one byte more than a card may have."""
        found = {1: b"", 2: b""}
        for number, (a, b) in self.messages(begin, end):
            if number in found:
                found[number] = self.content[a : min(b, a + MAX_CARD_BYTES + 1)]
        return found[1], found[2]

    def check_ends(self, graphs: list[tuple[int, int]], card: dict[str, Any]) -> None:
        """The graph takes images and gives the probabilities that the card names."""
        ends: dict[tuple[int, str], tuple[int, list[int]]] = {}
        for span in graphs:
            for number, value in self.messages(*span):
                if number in (_INPUT, _OUTPUT):
                    name, kind, shape = self.value(*value)
                    ends[number, name] = kind, shape
        k, m, stages = len(card["classes"]), len(card["members"]), _stages(card)
        wanted = {
            (_INPUT, "images"): (_UINT8, [-1, -1, -1, 3]),
            (_OUTPUT, "probs"): (_FLOAT, [-1, k]),
            (_OUTPUT, "member_probs"): (_FLOAT, [-1, m, k]),
        }
        if stages:
            wanted |= {
                (_INPUT, "stop"): (_FLOAT, [stages - 1]),
                (_OUTPUT, "stages_used"): (_INT64, [-1]),
            }
        inputs = [name for number, name in ends if number == _INPUT]
        if len(inputs) != (2 if stages else 1) or any(ends.get(e) != v for e, v in wanted.items()):
            raise _Bad(
                f"inputs or outputs are not those of a pipeline with {m} members and {k} classes"
            )

    def value(self, begin: int, end: int) -> tuple[str, int, list[int]]:
        """Name, element type and shape (-1 = any) of a ValueInfoProto."""
        name, kind, shape = "", 0, []
        for number, span in self.messages(begin, end):
            if number == 1:
                name = self.content[span[0] : min(span[1], span[0] + 64)].decode(errors="replace")
            for inner, tensor in self.messages(*span) if number == 2 else ():
                for field, wire, a, b in self.scan(*tensor) if inner == 1 else ():
                    if field == 1 and wire == 0:
                        kind = a
                    elif field == 2 and wire == 2:
                        shape = [self.dim(*part) for axis, part in self.messages(a, b) if axis == 1]
        return name, kind, shape

    def dim(self, begin: int, end: int) -> int:
        """A fixed length, or -1."""
        return next(
            (a for number, kind, a, _ in self.scan(begin, end) if (number, kind) == (1, 0)), -1
        )


def _is_plain(name: str) -> bool:
    """A name of a file in the same folder, and of nothing else."""
    return name not in ("", ".", "..") and not any(sign in name for sign in "/\\:\0")


def _outside_bytes(folder: Path, entries: list[tuple[bytes, bytes]]) -> int:
    """How many bytes a plain file beside the model has for a tensor; everything but a plain file is refused."""
    names = [value for key, value in entries if key == b"location"]
    if len(names) != 1:
        raise _Bad("a tensor outside the file with no or several locations")
    name = os.fsdecode(names[0])
    if not _is_plain(name):
        raise _Bad(f"external data that is not a plain file beside the model: {name[:100]!a}")
    try:
        found = os.lstat(folder / name)
    except OSError:
        raise _Bad(f"external data that is not there: {name[:100]!a}") from None
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        raise _Bad(f"external data that is a link, or not a regular file: {name[:100]!a}")
    numbers = {key: int(value[:20]) for key, value in entries if key in (b"offset", b"length")}
    offset = numbers.get(b"offset", 0)
    length = numbers.get(b"length", found.st_size - offset)
    if offset < 0 or length < 0 or offset + length > found.st_size:
        raise _Bad(f"external data beyond the end of its file: {name[:100]!a}")
    return length


def _parse_card(found: list[bytes]) -> dict[str, Any]:
    """The card as a tree, its names checked."""
    if len(found) > 1 or len(found[0]) > MAX_CARD_BYTES:
        raise _Bad(
            f"the model card is there {len(found)} times, or longer than {MAX_CARD_BYTES // 2**20} MB"
        )
    try:
        card = json.loads(found[0].decode())
    except (ValueError, RecursionError) as error:
        raise _Bad(f"the model card is damaged ({type(error).__name__})") from None
    if not isinstance(card, dict):
        raise _Bad("the model card is not an object")
    for key, most in (("classes", MAX_CLASSES), ("members", MAX_MEMBERS)):
        names = card.get(key)
        if not (isinstance(names, list) and 1 <= len(names) <= most and all(map(_is_name, names))):
            raise _Bad(f"the model card has no {key}, or some that are not names")
        if len(set(names)) != len(names):
            raise _Bad(f"the model card has two {key} of one name")
    return card


def _stages(card: Mapping[str, Any]) -> int:
    """How many stages the card's cascade has; 0 without one."""
    told = card.get("cascade")
    if told is None:
        return 0
    try:
        stages = len(told["state"]["stages"])
    except (KeyError, TypeError, IndexError):
        stages = 0
    if not 2 <= stages <= MAX_MEMBERS:
        raise _Bad("the model card has a cascade without stages")
    return stages


def _is_name(name: Any) -> bool:
    """Text that can be shown anywhere: no control characters, which terminals obey."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= 1000
        and not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in name)
    )
