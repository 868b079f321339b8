"""Pickles of plain data, read by a machine that can do nothing else.

`pickle.load` runs whatever a file says, and even with its globals restricted CPython's unpickler reserves memory at the
word of a single opcode. Here the opcodes come from `pickletools.genops`, which only parses, and those that build data
are carried out below: numbers, strings, bytes, lists, tuples, dicts, and NumPy's arrays and scalars as lists and
numbers. Nothing is imported and nothing called.
"""

from __future__ import annotations

import pickletools
import re
from typing import Any

import numpy as np

_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_GLOBALS = {  # NumPy 1 and 2 call their modules differently
    "numpy dtype": "dtype",
    "numpy ndarray": "ndarray",
    "_codecs encode": "encode",
    "__builtin__ bytes": "bytes",
    **{f"numpy.{core}.multiarray {name}": name for core in ("core", "_core") for name in ("scalar", "_reconstruct")},
    **{f"numpy.{core}.numeric _frombuffer": "_frombuffer" for core in ("core", "_core")},
}
_MARK = object()

MAX_STEPS = 20_000_000
"""Opcodes, and bytes of arrays: RefCOCO's largest file takes some 6 million. It bounds the memory that a small file can
ask for, by making one array over and over."""


class _Global(str):
    """The name of a function of `_GLOBALS`; it is never looked up."""


class _Type:
    """A NumPy type of numbers or of strings."""

    def __init__(self, code: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[biufSU]\d{1,6}", code):
            raise ValueError(f"arrays must hold numbers or strings, got type {code!r:.40}")
        self.type = np.dtype(code)

    def set_state(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.type = self.type.newbyteorder(state[1])


class _Array(list):
    def set_state(self, state: Any) -> None:
        _, shape, kind, fortran, data = state
        self[:] = _array(data, kind, shape, "F" if fortran else "C")


def load(content: bytes) -> Any:
    """What a pickle of any protocol holds. Raises ValueError that says what in it is more than plain data, or that it
    is no pickle."""
    try:
        return _run(content)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, MemoryError, RecursionError) as error:
        raise ValueError(f"not a pickle of plain data: {error}") from None


def _run(content: bytes) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        at = len(stack) - 1
        while stack[at] is not _MARK:  # an IndexError where there is none, after as many steps as entries
            at -= 1
        since = stack[at + 1 :]
        del stack[at:]
        return since

    steps = 0
    for opcode, value, _ in pickletools.genops(content):
        name = opcode.name
        steps += 1
        if name in ("REDUCE", "BUILD"):
            steps += sum(len(argument) for argument in _only(tuple, stack[-1]) if isinstance(argument, (str, bytes)))
        if steps > MAX_STEPS:
            raise ValueError(f"it takes more than {MAX_STEPS} steps")
        if name in _VALUES:
            if isinstance(value, int) and value.bit_length() > 10_000:  # too many digits to be shown
                raise ValueError("it holds an integer of more than 10,000 bits")
            stack.append(value)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[value] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[value])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("EMPTY_LIST", "EMPTY_DICT"):
            stack.append([] if name == "EMPTY_LIST" else {})
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            at = len(stack) - _TUPLES[name]
            stack[at:] = [tuple(stack[at:])]
        elif name in ("LIST", "TUPLE", "DICT"):
            items = since_mark()
            stack.append(items if name == "LIST" else tuple(items) if name == "TUPLE" else _pairs(items))
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else since_mark()
            _only(list, stack[-1]).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else since_mark()
            _only(dict, stack[-1]).update(_pairs(items))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            named = value if name == "GLOBAL" else " ".join((stack.pop(-2), stack.pop()))
            if named not in _GLOBALS:
                raise ValueError(f"it wants to use {named!r:.80}")
            stack.append(_Global(_GLOBALS[named]))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(_make(stack.pop(), arguments))
        elif name == "BUILD":
            state = stack.pop()
            if not isinstance(stack[-1], (_Type, _Array)):
                raise ValueError("it wants to set the state of an object")
            stack[-1].set_state(state)
        elif name == "POP":
            stack.pop()
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"it wants to make objects, by {name}")
    raise ValueError("it has no end")


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))


def _only(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"expected a {kind.__name__}, got a {type(value).__name__}")
    return value


def _make(name: Any, arguments: tuple[Any, ...]) -> Any:
    """What a function of `_GLOBALS` would return, as plain data."""
    if type(name) is not _Global:
        raise ValueError(f"it wants to call a {type(name).__name__}")
    if name == "dtype":
        return _Type(arguments[0])
    if name == "encode":  # of bytes, by protocols that have none
        return _only(str, arguments[0]).encode("latin1")
    if name == "bytes" and not arguments:
        return b""
    if name == "_reconstruct":
        return _Array()
    if name == "_frombuffer":
        return _array(*arguments)
    if name == "scalar":
        kind, data = arguments
        return _array(data, kind, (), "C")
    raise ValueError(f"it wants to call {name}")


def _array(data: Any, kind: Any, shape: Any, order: Any) -> Any:
    """Nested lists, or one value where the shape is ()."""
    data = data.encode("latin1") if isinstance(data, str) else data  # Python 2's
    array = np.frombuffer(data, _only(_Type, kind).type).reshape(shape, order=order)
    return array.tolist() if array.size else []  # else (1000000000, 0) is as many lists
