"""Check a model file before onnxruntime opens it.

The file must be ONNX with a model card of threefold, and must not refer to files outside its
folder. A small reader walks its protobuf without decoding a tensor, so a hostile file costs neither
memory nor time. It needs no `onnx` package and no pickle. Field numbers are those of onnx.proto3
(ONNX IR 10).
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import stat
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from threefold.errors import ExportError, ThreefoldError, refuse_address
from threefold.files import sha256
from threefold.json_files import read_json
from threefold.names import count_of
from threefold.runtime.devices import find_device, require_device
from threefold.runtime.model_card import MAX_MEMBERS, parse_card

CHECKSUM: Final = "threefold.sha256"
"""Key of the checksum in the file's metadata: the SHA-256 of the file without this value."""
MAX_CARD_BYTES: Final = 4 * 2**20
"""Size limit of the model card."""
MAX_FIELDS: Final = 5_000_000
"""Limit on protobuf fields; three members of five folds have about 100,000."""
MAX_DEPTH: Final = 16
"""Limit on the nesting of graphs within graphs."""
MAX_TAG: Final = 2**32
"""Limit on the tag of a field. Protobuf drops the bits above, so a larger tag means another field
to onnxruntime than to this reader."""
MEMORY: Final = 4 * 2**30
"""Bytes that a session may allocate on top of twice the size of its file."""

# The fields of each message that can contain tensors, directly or in nested messages.
_PARTS: Final[Mapping[str, Mapping[int, str]]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_GRAPH, _METADATA = 7, 14  # in a model
_INPUT, _OUTPUT = 11, 12  # in a graph
_DIMS, _DATA_TYPE, _RAW, _EXTERNAL_DATA, _DATA_LOCATION = 1, 2, 9, 13, 14  # in a tensor
# Data types of TensorProto by the bytes of one value.
_TYPES_OF_SIZE: Final = {1: (2, 3, 9), 2: (4, 5, 10, 16), 4: (1, 6, 12), 8: (7, 11, 13)}
_TYPE_BYTES: Final = {kind: size for size, kinds in _TYPES_OF_SIZE.items() for kind in kinds}
_VALUES: Final = (4, 5, 6, 7, 9, 10, 11)  # fields that hold a tensor's values
_UINT8, _FLOAT, _INT64 = 2, 1, 7  # types of values
_VARINT, _BYTES = 0, 2  # wire types of fields
_MANIFEST = "manifest.json"  # of `predictions.manifest`, which takes longer to import
_LOADING = threading.Lock()


class _RefusedError(Exception):
    """Why a file is refused."""


def read_card(path: str | Path, key: str) -> dict[str, Any]:
    """Read the model card after checking all that can be checked without running the model.

    The file is a regular file of ONNX's protobuf. Every tensor has as many values as its shape
    says, in this file or in a plain file in the same folder (no path, no symbolic or hard link).
    Inputs and outputs are those of a pipeline and agree with the card. The card is a JSON object
    of limited size, with valid names for classes and members.

    Args:
        path: the file.
        key: key of the card in the file's metadata.

    Raises:
        ExportError: the file is missing, damaged, hostile, or not a threefold model; one line.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise _RefusedError("not a regular file")
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise _RefusedError("the file is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Reader(content, path.parent).card(key)
    except FileNotFoundError:
        refuse_address(path, ExportError)
        raise ExportError("no such model file", where=path) from None
    except (_RefusedError, OSError, ValueError) as error:
        raise ExportError(
            "cannot read the model file",
            where=path,
            got=" ".join(str(getattr(error, "strerror", None) or error).split())[:300],
            fix="give a .onnx file that threefold exported",
        ) from None


def check_manifest(path: Path) -> None:
    """Compare a file in a run folder with the SHA-256 in the run's manifest.json.

    A file of another run in its place is a valid model, so that nothing else would notice. Where
    the manifest is missing, damaged or does not name the file, there is nothing to compare with.

    Raises:
        ExportError: the file is not the one that the run has exported.
    """
    try:
        files = read_json(path.parent / _MANIFEST)["files"]
        hashes = [text for text in files[path.name] if text]
    except (ThreefoldError, KeyError, TypeError):
        return
    found = sha256(path)
    if hashes and found not in hashes:
        raise ExportError(
            "the file is not the one that this run has exported",
            where=path,
            expected=f"SHA-256 {hashes[0][:12]}, as in {_MANIFEST}",
            got=f"SHA-256 {found[:12]}",
            fix="export the run again, or keep the file in another folder",
        )


def bytes_beside(path: Path, card: Mapping[str, Any]) -> int:
    """Size on disk of a bundle's data file; 0 for a single file."""
    data = _data_path(path.parent, card)
    return 0 if data is None else data.stat().st_size


def _data_path(folder: Path, card: Mapping[str, Any]) -> Path | None:
    """Return the data file of a bundle; None for a single file, or if it is not a plain file."""
    bundle = card.get("bundle")
    name = bundle.get("file") if isinstance(bundle, Mapping) else None
    if not isinstance(name, str) or not _is_plain(name):
        return None
    try:
        status = os.lstat(folder / name)
    except OSError:
        return None
    return folder / name if stat.S_ISREG(status.st_mode) else None


def open_session(
    path: Path, threads: int = 0, memory: int = MEMORY, spin: bool = True, device: str = "cpu"
) -> Any:
    """Open an onnxruntime session with limited memory on the CPU and one-line errors.

    Args:
        path: a file that `read_card` accepts.
        threads: of onnxruntime; 0 = one per core.
        memory: bytes that the session may allocate on top of twice the size of its file.
        spin: let threads spin between operators: faster alone, slower if others need the cores.
        device: a name of `devices.DEVICES`. Operators that it lacks run on the CPU.

    Raises:
        ExportError: onnxruntime cannot read the file or lacks the device. `run` of the session
            raises it too, if the graph fails or needs too much memory.
    """
    import onnxruntime

    found = find_device(device)

    class Session(onnxruntime.InferenceSession):  # type: ignore[misc]
        def run(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().run(*args, **kwargs)
            except Exception as error:
                raise ExportError(
                    "the model cannot answer", where=path, got=_short(error)
                ) from None

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are raised, so they need no log line
    options.add_session_config_entry("session.use_env_allocators", "1")
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    cpu = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    # 1 = allocate what is needed, not the next power of two; -1 = onnxruntime's default.
    arena = onnxruntime.OrtArenaCfg(memory + 2 * path.stat().st_size, 1, -1, -1)
    try:
        with _LOADING:  # a new session takes the allocator that was registered last
            onnxruntime.create_and_register_allocator(cpu, arena)
            if device != "cpu":  # what its libraries log is raised below
                onnxruntime.set_default_logger_severity(4)
            # The fallback would print a warning.
            providers = [(found.provider, dict(found.options))]
            session = Session(str(path), options, providers=providers, enable_fallback=0)
    except Exception as error:
        raise ExportError(
            "cannot read the model file" if device == "cpu" else f"{device} cannot open the model",
            where=path,
            got=_short(error),
            fix="give a .onnx file that threefold exported"
            if device == "cpu"
            else "leave --device out to answer on the CPU",
        ) from None
    require_device(session, device)
    return session


def _short(error: Exception) -> str:
    """The message of an onnxruntime error in one line."""
    text = " ".join(str(error).split())
    if "smaller than requested bytes" in text or "Failed to allocate memory" in text:
        return "it needs more memory than allowed"
    return text[:160]


class _Reader:
    """Walks a model file; `begin` and `end` are byte positions in it."""

    def __init__(self, content: mmap.mmap, folder: Path) -> None:
        self.content, self.folder, self.fields = content, folder, 0

    def card(self, key: str) -> dict[str, Any]:
        """Check the whole file and return the card."""
        head = self.content[:8]
        for magic, kind in (
            (b"\x80", "pickle"),
            (b"PK\x03\x04", "a zip archive"),
            (b"\x93NUMPY", "a NumPy array"),
        ):
            if head.startswith(magic):
                raise _RefusedError(f"not ONNX: it looks like {kind}, which is never opened")
        self.walk("model", 0, len(self.content))
        entries, graphs = [], []
        for number, span in self.messages(0, len(self.content)):
            if number == _METADATA:
                entries.append(self.entry(*span))
                if entries[-1][0] == CHECKSUM.encode():
                    self.check_checksum(*span)
            elif number == _GRAPH:
                graphs.append(span)
        cards = [value for name, value in entries if name == key.encode()]
        if not cards:
            raise _RefusedError("an ONNX file without threefold's metadata: not a threefold model")
        card = _single_card(cards)
        self.check_interface(graphs, card)
        _check_bundle(self.folder, card)
        return card

    def check_checksum(self, begin: int, end: int) -> None:
        """Compare the checksum, a StringStringEntryProto, with that of the rest of the file."""
        for number, (a, b) in self.messages(begin, end):
            if number == 2:
                with memoryview(self.content) as view:
                    digest = hashlib.sha256(view[:a])
                    digest.update(view[b:])
                if digest.hexdigest().encode() != self.content[a:b]:
                    raise _RefusedError("its content does not have its checksum: it is damaged")

    def scan(self, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield the fields of a message: number, wire type, begin and end of the value.

        For a varint, begin and end are both the value itself.
        """
        while begin < end:
            self.fields += 1
            if self.fields > MAX_FIELDS:
                raise _RefusedError(f"more than {MAX_FIELDS:,} fields")
            tag, begin = self.varint(begin, end)
            if tag >= MAX_TAG:
                raise _RefusedError("not ONNX, or damaged: a field with a tag of more than 32 bits")
            number, wire = tag >> 3, tag & 7
            if wire == _VARINT and number:
                value, begin = self.varint(begin, end)
                yield number, wire, value, value
                continue
            size = {1: 8, 5: 4}.get(wire, -1)
            if wire == _BYTES:
                size, begin = self.varint(begin, end)
            if number == 0 or size < 0 or size > end - begin:
                raise _RefusedError("not ONNX, or damaged or truncated")
            yield number, wire, begin, begin + size
            begin += size

    def varint(self, begin: int, end: int) -> tuple[int, int]:
        """Read a variable-length integer; returns it and the position after it."""
        value = 0
        for position in range(begin, min(begin + 10, end)):
            byte = self.content[position]
            value |= (byte & 127) << 7 * (position - begin)
            if byte < 128 and value < 2**64:
                return value, position + 1
        raise _RefusedError("not ONNX, or damaged or truncated")

    def messages(self, begin: int, end: int) -> Iterator[tuple[int, tuple[int, int]]]:
        """Yield the length-delimited fields of a message: number, and span of the value."""
        for number, wire, a, b in self.scan(begin, end):
            if wire == _BYTES:
                yield number, (a, b)

    def walk(self, kind: str, begin: int, end: int, depth: int = 0) -> None:
        """Check every tensor in a message and the messages nested in it."""
        if depth > 3 * MAX_DEPTH + 4:  # a graph in a graph is three messages deeper
            raise _RefusedError(f"graphs nested more than {MAX_DEPTH} deep")
        if kind == "tensor":
            self.check_tensor(begin, end)
            return
        parts = _PARTS[kind]
        for number, span in self.messages(begin, end):
            if number in parts:
                self.walk(parts[number], *span, depth + 1)

    def check_tensor(self, begin: int, end: int) -> None:
        """Check that a tensor has the values that its shape needs, in an allowed place."""
        dims: list[int] = []
        size, bits, raw, external = 0, 4, False, False  # no type of ONNX has fewer than 4 bits
        location: list[tuple[bytes, bytes]] = []
        for number, wire, a, b in self.scan(begin, end):
            if number == _DIMS:
                dims += [a] if wire == _VARINT else self.packed(a, b)
            elif number in _VALUES:
                size += 8 if wire == _VARINT else max(b - a, 1)
                raw |= number == _RAW
            elif number == _DATA_TYPE and wire == _VARINT:
                bits = 8 * _TYPE_BYTES[a] if a in _TYPE_BYTES else 4
            elif number == _EXTERNAL_DATA and wire == _BYTES:
                location.append(self.entry(a, b))
            elif number == _DATA_LOCATION and wire == _VARINT:
                external |= a != 0
        if external or location:
            size = _external_bytes(self.folder, location)
        elif not raw:  # varints may be shorter than their type
            bits = 4
        if len(dims) > 64 or max(dims, default=0) >= 2**40 or math.prod(dims) * bits > 8 * size:
            raise _RefusedError(f"a tensor of shape {dims[:8]} with only {size:,} bytes of values")

    def packed(self, begin: int, end: int) -> list[int]:
        """Read the integers of a packed field."""
        values = []
        while begin < end:
            value, begin = self.varint(begin, end)
            values.append(value)
            if len(values) > 64:
                raise _RefusedError("a tensor of more than 64 dimensions")
        return values

    def entry(self, begin: int, end: int) -> tuple[bytes, bytes]:
        """Read key and value of a StringStringEntryProto, cut above the size limit of a card."""
        parts = {1: b"", 2: b""}
        for number, (a, b) in self.messages(begin, end):
            if number in parts:
                parts[number] = self.content[a : min(b, a + MAX_CARD_BYTES + 1)]
        return parts[1], parts[2]

    def check_interface(self, graphs: list[tuple[int, int]], card: dict[str, Any]) -> None:
        """Check that inputs and outputs have the names, types and shapes that the card implies."""
        actual: dict[tuple[int, str], tuple[int, list[int]]] = {}
        for span in graphs:
            for number, value in self.messages(*span):
                if number in (_INPUT, _OUTPUT):
                    name, kind, shape = self.value(*value)
                    actual[number, name] = kind, shape
        k, m, stages = len(card["classes"]), len(card["members"]), _stages(card)
        side = card.get("fixed_size") or -1
        expected = {
            (_INPUT, "images"): (_UINT8, [-1, side, side, 3]),
            (_OUTPUT, "probs"): (_FLOAT, [-1, k]),
            (_OUTPUT, "member_probs"): (_FLOAT, [-1, m, k]),
        }
        if stages:
            expected |= {
                (_INPUT, "stop"): (_FLOAT, [stages - 1]),
                (_OUTPUT, "stages_used"): (_INT64, [-1]),
            }
        num_inputs = sum(number == _INPUT for number, _ in actual)
        as_expected = all(actual.get(key) == value for key, value in expected.items())
        if num_inputs != (2 if stages else 1) or not as_expected:
            raise _RefusedError(
                f"inputs or outputs are not those of a pipeline with "
                f"{count_of(m, 'member')} and {count_of(k, 'class', 'classes')}"
            )

    def value(self, begin: int, end: int) -> tuple[str, int, list[int]]:
        """Read name, element type and shape (-1 = any length) of a ValueInfoProto."""
        name, kind = "", 0
        shape: list[int] = []
        for number, (a, b) in self.messages(begin, end):
            if number == 1:
                name = self.content[a : min(b, a + 64)].decode(errors="replace")
            elif number == 2:
                for inner, span in self.messages(a, b):
                    if inner == 1:
                        kind, shape = self.tensor_type(*span)
        return name, kind, shape

    def tensor_type(self, begin: int, end: int) -> tuple[int, list[int]]:
        """Read element type and shape (-1 = any length) of a TypeProto.Tensor."""
        kind = 0
        shape: list[int] = []
        for number, wire, a, b in self.scan(begin, end):
            if number == 1 and wire == _VARINT:
                kind = a
            elif number == 2 and wire == _BYTES:
                shape = [self.dim(*span) for axis, span in self.messages(a, b) if axis == 1]
        return kind, shape

    def dim(self, begin: int, end: int) -> int:
        """Read the length of an axis; -1 if it is not fixed."""
        for number, wire, value, _ in self.scan(begin, end):
            if number == 1 and wire == _VARINT:
                return value
        return -1


def _is_plain(name: str) -> bool:
    """Whether a name can only be that of a file in the same folder."""
    return name not in ("", ".", "..") and not any(sign in name for sign in "/\\:\0")


def _external_bytes(folder: Path, entries: list[tuple[bytes, bytes]]) -> int:
    """Bytes of an external tensor; its location must be a plain file beside the model."""
    names = [value for key, value in entries if key == b"location"]
    if len(names) != 1:
        raise _RefusedError("an external tensor needs exactly one location")
    name = os.fsdecode(names[0])
    if not _is_plain(name):
        raise _RefusedError(
            f"external data that is not a plain file beside the model: {name[:100]!a}"
        )
    try:
        status = os.lstat(folder / name)
    except OSError:
        raise _RefusedError(f"external data that is not there: {name[:100]!a}") from None
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        raise _RefusedError(f"external data that is a link, or not a regular file: {name[:100]!a}")
    numbers = {key: int(value[:20]) for key, value in entries if key in (b"offset", b"length")}
    offset = numbers.get(b"offset", 0)
    length = numbers.get(b"length", status.st_size - offset)
    if offset < 0 or length < 0 or offset + length > status.st_size:
        raise _RefusedError(f"external data beyond the end of its file: {name[:100]!a}")
    return length


def _check_bundle(folder: Path, card: Mapping[str, Any]) -> None:
    """Compare the data file of a bundle with the checksum in the card."""
    path = _data_path(folder, card)
    if path is not None and sha256(path) != card["bundle"].get("sha256"):
        raise _RefusedError(f"{path.name} beside it does not have its checksum: it is damaged")


def _single_card(cards: list[bytes]) -> dict[str, Any]:
    """Parse the only card."""
    if len(cards) > 1 or len(cards[0]) > MAX_CARD_BYTES:
        raise _RefusedError(
            f"the model card is there {len(cards)} times, "
            f"or longer than {MAX_CARD_BYTES // 2**20} MB"
        )
    return parse_card(cards[0])


def _stages(card: Mapping[str, Any]) -> int:
    """The number of stages of the card's cascade; 0 without one."""
    cascade = card.get("cascade")
    if cascade is None:
        return 0
    try:
        stages = len(cascade["state"]["stages"])
    except (KeyError, TypeError, IndexError):
        stages = 0
    if not 2 <= stages <= MAX_MEMBERS:
        raise _RefusedError("the model card has a cascade without stages")
    return stages
