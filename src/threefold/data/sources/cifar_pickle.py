"""Read CIFAR's pickled batches as plain data, without unpickling them.

A pickle is a program. Its opcodes are interpreted here, and only those are known that make numbers,
strings, lists, tuples, dictionaries and numpy arrays of bytes. The constructors of an array are
recognised by name and never called. Everything else is refused.
"""

from __future__ import annotations

import pickletools
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from threefold.errors import DataError

_GLOBALS = {
    "numpy.core.multiarray _reconstruct": "array",
    "numpy._core.multiarray _reconstruct": "array",
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    "_codecs encode": "encode",
    "__builtin__ bytes": "bytes",
}
_MARK = object()


class _Global(NamedTuple):
    """A name of `_GLOBALS`, which stands for a class or function."""

    name: str


class _Dtype(NamedTuple):
    code: str


class _Array:
    """An array; BUILD gives it its values."""

    values: NDArray[np.uint8] | None = None


class _ForbiddenError(Exception):
    """The pickle asks for more than plain data."""


def read_batch(content: bytes, where: str | Path) -> dict[str, Any]:
    """Read a pickled dictionary of numbers, strings, lists and uint8 arrays.

    Args:
        content: the bytes of the file, in pickle protocol 2 (the official files) to 5.
        where: its name, for messages.

    Returns:
        The dictionary. Keys are str; other strings of Python 2 are bytes.

    Raises:
        DataError: the pickle is damaged, is no dictionary, or asks for anything else.
    """
    try:
        tree = _interpret(content)
    except _ForbiddenError as error:
        raise DataError(
            "the pickle asks for more than plain data",
            where=where,
            got=error,
            fix="do not use this file; threefold data fetch gets the official one and checks it",
        ) from None
    except Exception as error:  # damaged or hostile opcodes reach the stack in any order
        got = str(error)[:200] or type(error).__name__
        raise DataError("cannot read the pickle", where=where, got=got) from None
    if not isinstance(tree, dict):
        raise DataError("the pickle is not a dictionary", where=where, got=type(tree).__name__)
    return {
        _to_str(key): value.values if isinstance(value, _Array) else value
        for key, value in tree.items()
    }


def _interpret(content: bytes) -> Any:
    """Run the opcodes on a stack and a memo, as the pickle protocol defines them."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(content):
        match opcode.name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "MARK":
                stack.append(_MARK)
            case "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINBYTES" | "SHORT_BINBYTES":
                stack.append(argument)
            case "BINSTRING" | "SHORT_BINSTRING":  # of Python 2; pickletools decodes latin-1
                stack.append(argument.encode("latin-1"))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "TUPLE":
                stack.append(tuple(_pop_to_mark(stack)))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(_pop(stack, int(opcode.name[-1]))))
            case "APPEND" | "APPENDS":
                values = _pop(stack, 1) if opcode.name == "APPEND" else _pop_to_mark(stack)
                _require(stack[-1], list).extend(values)
            case "SETITEM" | "SETITEMS":
                values = _pop(stack, 2) if opcode.name == "SETITEM" else _pop_to_mark(stack)
                _require(stack[-1], dict).update(zip(values[::2], values[1::2], strict=True))
            case "GLOBAL":
                stack.append(_find_global(argument))
            case "STACK_GLOBAL":
                stack.append(_find_global(" ".join(map(_to_str, _pop(stack, 2)))))
            case "REDUCE":
                function, arguments = _pop(stack, 2)
                stack.append(_call(function, arguments))
            case "BUILD":
                target, state = _pop(stack, 2)
                _set_state(target, state)
                stack.append(target)
            case name:
                raise _ForbiddenError(f"opcode {name}")
    (value,) = stack
    return value


def _pop(stack: list[Any], count: int) -> list[Any]:
    if count > len(stack):
        raise ValueError("the stack is empty")
    values = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    return values


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    count = next(i for i, value in enumerate(reversed(stack)) if value is _MARK)
    values = _pop(stack, count)
    stack.pop()
    return values


def _require(target: Any, kind: type) -> Any:
    if not isinstance(target, kind):
        raise _ForbiddenError(f"opcode that adds to {type(target).__name__}")
    return target


def _to_str(value: object) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _find_global(name: str) -> _Global:
    if name not in _GLOBALS:
        raise _ForbiddenError(f"the name {name.replace(' ', '.', 1)[:100]}")
    return _Global(_GLOBALS[name])


def _call(function: object, arguments: Any) -> Any:
    """Imitate the calls that the pickle of an array or of a bytes object makes."""
    match function:
        case _Global("array") if arguments[0] == _Global("ndarray"):
            return _Array()
        case _Global("dtype") if isinstance(arguments[0], str | bytes):
            return _Dtype(_to_str(arguments[0]))
        case _Global("encode") if _to_str(arguments[1]) in ("latin1", "latin-1"):
            return arguments[0].encode("latin-1")
        case _Global("bytes") if arguments == ():  # how protocol 2 stores b""
            return b""
    name = function.name if isinstance(function, _Global) else type(function).__name__
    raise _ForbiddenError(f"a call of {name}")


def _set_state(target: object, state: Any) -> None:
    """Set the values of an array; the state of a dtype holds nothing that matters for bytes."""
    if isinstance(target, _Dtype):
        return
    if not isinstance(target, _Array):
        raise _ForbiddenError(f"a state for {type(target).__name__}")
    _, shape, dtype, is_fortran, content = state
    if not isinstance(dtype, _Dtype) or dtype.code.lstrip("|") != "u1":
        code = getattr(dtype, "code", dtype)
        raise _ForbiddenError(f"a state of an array of type {code!s:.20}, expected u1")
    size = len(content) if isinstance(content, bytes) else -1
    if size != prod(shape) or min(shape, default=0) < 0:
        raise ValueError(f"an array of shape {shape} with {size} bytes")
    order: Any = "F" if is_fortran else "C"
    target.values = np.frombuffer(content, np.uint8).reshape(shape, order=order)
