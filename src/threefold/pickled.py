"""The pickled batches of CIFAR, read as plain data: no object is built, nothing is imported, nothing is called.

A pickle is a program. Here its opcodes are taken apart (pickletools) and only those are obeyed that make numbers,
strings, lists, tuples, dictionaries, and numpy arrays of bytes; the array's three constructors are known by name and
replaced by a record of their arguments. Everything else is refused before it could act.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from threefold.errors import DataError

_ARRAY = "numpy.core.multiarray _reconstruct"
_NAMES = {
    _ARRAY: _ARRAY,
    "numpy._core.multiarray _reconstruct": _ARRAY,
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    "_codecs encode": "encode",
    "__builtin__ bytes": "bytes",
}


class _Name(NamedTuple):
    """One of the names that may stand in the pickle of an array."""

    name: str


class _Mark:
    """Where a list of arguments begins on the stack."""


class _Array:
    """An array that is still to get its shape and bytes."""

    def __init__(self) -> None:
        self.values: NDArray[np.uint8] | None = None


class _Type(NamedTuple):
    """The element type of an array, as text."""

    code: str


class _Refused(Exception):
    """Why the pickle is not obeyed."""


def read_batch(content: bytes, where: str | Path) -> dict[str, Any]:
    """A pickled dictionary of numbers, strings, lists and uint8 arrays.

    Args:
        content: the bytes of the file (any pickle protocol; the official files have 2).
        where: its name, for messages.

    Returns:
        The dictionary; keys and strings of Python 2 as str and bytes, arrays of uint8 in their shape.

    Raises:
        DataError: the pickle is damaged, is no dictionary, or asks for anything else.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(content):
            machine.obey(opcode.name, argument)
        (tree,) = machine.stack
    except _Refused as refused:
        raise DataError(
            "the pickle asks for more than plain data",
            where=where,
            got=refused,
            fix="do not use this file; get the official one with threefold data fetch, which checks it",
        ) from None
    except Exception as error:  # hostile or damaged opcodes reach the stack in any order
        raise DataError(
            "cannot read the pickle", where=where, got=str(error)[:200] or type(error).__name__
        ) from None
    if not isinstance(tree, dict):
        raise DataError("the pickle is not a dictionary", where=where, got=type(tree).__name__)
    return {
        _text(key): value.values if isinstance(value, _Array) else value
        for key, value in tree.items()
    }


def _text(key: object) -> str:
    return key.decode("latin-1") if isinstance(key, bytes) else str(key)


class _Machine:
    """A stack and a memo, as the pickle protocol has them."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def obey(self, name: str, argument: Any) -> None:
        """One opcode."""
        if name in ("PROTO", "FRAME", "STOP"):
            return
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name](argument))
        elif name in _ACTIONS:
            _ACTIONS[name](self, argument)
        else:
            raise _Refused(f"opcode {name}")

    def since_mark(self) -> list[Any]:
        """What stands above the last mark, which is taken away."""
        at = next(i for i in range(len(self.stack) - 1, -1, -1) if self.stack[i] is _Mark)
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def pop(self, count: int) -> list[Any]:
        """The last values."""
        if count > len(self.stack):
            raise ValueError("the stack is empty")
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return values

    def put(self, at: int | None = None) -> None:
        """Remember the last value."""
        self.memo[len(self.memo) if at is None else at] = self.stack[-1]

    def extend(self, values: list[Any]) -> None:
        """Append to the list below."""
        target = self.stack[-1]
        if not isinstance(target, list):
            raise _Refused(f"appending to {type(target).__name__}")
        target += values

    def update(self, values: list[Any]) -> None:
        """Set keys of the dictionary below."""
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise _Refused(f"setting items of {type(target).__name__}")
        target.update(zip(values[::2], values[1::2], strict=True))

    def name(self, text: str) -> None:
        """A global name, if it is one of those of an array."""
        if text not in _NAMES:
            raise _Refused(f"the name {text.replace(' ', '.', 1)[:100]}")
        self.stack.append(_Name(_NAMES[text]))

    def reduce(self) -> None:
        """A call: only those of an array, which are written down and not made."""
        function, arguments = self.pop(2)
        known = function.name if isinstance(function, _Name) else None
        if known == _ARRAY and arguments[0] == _Name("ndarray"):
            self.stack.append(_Array())
        elif known == "dtype" and isinstance(arguments[0], str | bytes):
            self.stack.append(_Type(_text(arguments[0])))
        elif (
            known == "encode"
            and len(arguments) == 2
            and _text(arguments[1]) in ("latin1", "latin-1")
        ):
            self.stack.append(arguments[0].encode("latin-1"))
        elif known == "bytes" and arguments == ():  # what Python 3 makes of b"" for protocol 2
            self.stack.append(b"")
        else:
            raise _Refused(f"a call of {known or type(function).__name__}")

    def build(self) -> None:
        """The state of an array (version, shape, type, order, bytes) or of its type, which is ignored."""
        target, state = self.pop(2)
        if isinstance(target, _Array):
            _, shape, kind, by_columns, content = state
            if not isinstance(kind, _Type) or kind.code.lstrip("|") != "u1":
                raise _Refused(f"an array of type {getattr(kind, 'code', kind)!s:.20}, expected u1")
            if (
                not isinstance(content, bytes)
                or len(content) != prod(shape)
                or min(shape, default=0) < 0
            ):
                raise ValueError(f"an array of shape {shape} with {len(content)} bytes")
            target.values = np.frombuffer(content, np.uint8).reshape(
                shape, order="F" if by_columns else "C"
            )
        elif not isinstance(target, _Type):
            raise _Refused(f"a state for {type(target).__name__}")
        self.stack.append(target)


_CONSTANTS: dict[str, Callable[[Any], Any]] = {
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_DICT": lambda _: {},
    "EMPTY_LIST": lambda _: [],
    "EMPTY_TUPLE": lambda _: (),
    "MARK": lambda _: _Mark,
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1"), lambda argument: argument),
    **dict.fromkeys(
        ("BINUNICODE", "SHORT_BINUNICODE", "SHORT_BINBYTES", "BINBYTES"), lambda argument: argument
    ),
    # Strings of Python 2, which pickletools decodes as latin-1.
    **dict.fromkeys(("SHORT_BINSTRING", "BINSTRING"), lambda argument: argument.encode("latin-1")),
}
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "BINPUT": lambda machine, at: machine.put(at),
    "LONG_BINPUT": lambda machine, at: machine.put(at),
    "MEMOIZE": lambda machine, _: machine.put(),
    "BINGET": lambda machine, at: machine.stack.append(machine.memo[at]),
    "LONG_BINGET": lambda machine, at: machine.stack.append(machine.memo[at]),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.stack.append(tuple(machine.pop(1))),
    "TUPLE2": lambda machine, _: machine.stack.append(tuple(machine.pop(2))),
    "TUPLE3": lambda machine, _: machine.stack.append(tuple(machine.pop(3))),
    "APPEND": lambda machine, _: machine.extend(machine.pop(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.update(machine.pop(2)),
    "SETITEMS": lambda machine, _: machine.update(machine.since_mark()),
    "GLOBAL": lambda machine, text: machine.name(text),
    "STACK_GLOBAL": lambda machine, _: machine.name(" ".join(map(_text, machine.pop(2)))),
    "REDUCE": lambda machine, _: machine.reduce(),
    "BUILD": lambda machine, _: machine.build(),
}
