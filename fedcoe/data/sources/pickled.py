"""Pickles of plain data and byte arrays, as CIFAR's archives hold them, read without unpickling.

Python's unpickler can be told to know few names, but a file then still chooses how much it
allocates (memo indices, lengths), how deep it nests and how long hashing a key takes. This reader
knows the opcodes that occur in such files and builds nothing but None, bool, int, bytes, list,
tuple, dict and uint8 arrays, none larger than the file.
"""

import codecs
import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

MAX_OPCODES = 1_000_000
"""CIFAR-100's training file has 260,000; each may make an object of some hundred bytes."""

_MARK = object()


class _Name:
    """A name that a pickle may mention; calling it is for `_reduce` to imitate."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Dtype:
    """numpy's uint8; no other occurs."""


class _Array:
    """An array whose state is still to come."""

    value: NDArray[np.uint8] | None = None


_NAMES = {
    name: _Name(name.rsplit(".", 1)[1])
    for name in (
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray._reconstruct",
        "numpy.ndarray",
        "numpy.dtype",
        "_codecs.encode",  # how Python 3 writes bytes in old protocols
    )
}


def read_pickle(content: bytes) -> dict[bytes, Any]:
    """The dictionary in a pickle of protocol 0 to 5.

    Keys are bytes, text becomes bytes (UTF-8), arrays are uint8 and read-only.

    Raises:
        ValueError: anything else than such data.
    """
    value = _Reader(content).load()
    if not isinstance(value, dict):
        raise ValueError("it holds no dictionary")
    return {key: item.value if isinstance(item, _Array) else item for key, item in value.items()}


class _Reader:
    def __init__(self, content: bytes) -> None:
        self.whole = content
        self.content = memoryview(content)
        self.position = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def load(self) -> Any:
        for _ in range(MAX_OPCODES):
            opcode = bytes(self.take(1))
            if opcode == b".":
                return self.pop()
            action = self._ACTIONS.get(opcode)
            if action is None:
                raise ValueError(f"it has the opcode {opcode!r}, which plain data does not need")
            action(self)
        raise ValueError(f"it has more than {MAX_OPCODES} opcodes")

    def take(self, size: int) -> memoryview:
        part = self.content[self.position : self.position + size]
        if size < 0 or len(part) != size:
            raise ValueError("it ends too early")
        self.position += size
        return part

    def number(self, width: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(width), "little", signed=signed)

    def line(self) -> bytes:
        end = self.whole.find(b"\n", self.position)
        if end < 0:
            raise ValueError("it ends too early")
        text = bytes(self.take(end - self.position))
        self.position += 1
        return text

    def decimal(self) -> int:
        text = self.line()
        if len(text) > 20:
            raise ValueError("it has an impossible number")
        return int(text.removesuffix(b"L"))

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise ValueError("it takes from an empty stack")
        return self.stack.pop()

    def to_mark(self) -> list[Any]:
        items = []
        while self.stack and self.stack[-1] is not _MARK:
            items.append(self.stack.pop())
        if not self.stack:
            raise ValueError("it has no mark")
        self.stack.pop()
        return items[::-1]

    def top(self, kind: type) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise ValueError(f"it adds to something that is no {kind.__name__.strip('_').lower()}")
        return self.stack[-1]

    # ---------------------------------------------------------------- opcodes

    def push_line_string(self) -> None:
        text = self.line().strip()
        if len(text) < 2 or text[:1] not in b"'\"" or text[:1] != text[-1:]:
            raise ValueError("it has a string without quotes")
        self.stack.append(codecs.escape_decode(text[1:-1])[0])

    def push_line_unicode(self) -> None:
        self.stack.append(str(self.line(), "raw-unicode-escape").encode("utf-8"))

    def push_int_line(self) -> None:
        start = self.position
        line = self.line()
        if line in (b"00", b"01"):
            self.stack.append(line == b"01")
        else:
            self.position = start
            self.stack.append(self.decimal())

    def push_long(self) -> None:
        size = self.number(1)
        if size > 8:
            raise ValueError("it has an impossible number")
        self.stack.append(self.number(size, signed=True))

    def name(self, module: bytes, name: bytes) -> None:
        said = f"{module.decode('utf-8', 'replace')}.{name.decode('utf-8', 'replace')}"
        if said not in _NAMES:
            raise ValueError(f"it asks for {said}")
        self.stack.append(_NAMES[said])

    def stack_name(self) -> None:
        name, module = self.pop(), self.pop()
        if type(name) is not bytes or type(module) is not bytes:
            raise ValueError("it asks for something without a name")
        self.name(module, name)

    def add_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        if len(items) % 2:
            raise ValueError("it has a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not bytes:  # hashing nested tuples can take for ever
                raise ValueError(f"it has a key that is {type(key).__name__}, not text")
            target[key] = value

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.add_items([key, value])

    def push_dict(self) -> None:
        items = self.to_mark()
        self.stack.append({})
        self.add_items(items)

    def extend(self) -> None:
        items = self.to_mark()
        self.top(list).extend(items)

    def append(self) -> None:
        item = self.pop()
        self.top(list).append(item)

    def push_tuple(self, size: int) -> None:
        items = [self.pop() for _ in range(size)]
        self.stack.append(tuple(items[::-1]))

    def put(self, index: int) -> None:
        if not self.stack or self.stack[-1] is _MARK:
            raise ValueError("it remembers nothing")
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise ValueError("it recalls what it has not remembered")
        self.stack.append(self.memo[index])

    def reduce(self) -> None:
        arguments, name = self.pop(), self.pop()
        if not isinstance(name, _Name) or type(arguments) is not tuple:
            raise ValueError("it calls something that is no name")
        match name.name, arguments:
            case "_reconstruct", (_Name(name="ndarray"), _, _):
                self.stack.append(_Array())
            case "dtype", (b"u1", *_):
                self.stack.append(_Dtype())
            case "dtype", (bytes(code), *_):
                raise ValueError(f"an array of {code[:20]!r}, not of bytes")
            case "encode", (bytes(text), b"latin1"):
                self.stack.append(text.decode("utf-8").encode("latin1"))
            case _:
                raise ValueError(f"it calls {name.name} in another way than arrays do")

    def build(self) -> None:
        state = self.pop()
        if self.stack and isinstance(self.stack[-1], _Dtype):
            return
        target = self.top(_Array)
        match state:
            case (_, tuple(shape), _Dtype(), bool(fortran), bytes(pixels)):
                if not all(type(side) is int and side >= 0 for side in shape) or (
                    math.prod(shape) != len(pixels) or len(shape) > 4
                ):
                    raise ValueError("an array whose shape does not fit its bytes")
                flat = np.frombuffer(pixels, np.uint8)
                target.value = flat.reshape(shape, order="F" if fortran else "C")
            case _:
                raise ValueError("an array that is not of bytes")

    def push_bytes(self, width: int) -> None:
        self.stack.append(bytes(self.take(self.number(width))))

    def push(self, value: Any) -> None:
        self.stack.append(value)

    _ACTIONS: ClassVar[dict[bytes, Callable[["_Reader"], Any]]] = {
        b"\x80": lambda r: r.take(1),  # protocol
        b"\x95": lambda r: r.take(8),  # frame
        b"(": lambda r: r.push(_MARK),
        b"0": lambda r: r.pop(),
        b"N": lambda r: r.push(None),
        b"\x88": lambda r: r.push(True),
        b"\x89": lambda r: r.push(False),
        b"I": push_int_line,
        b"L": lambda r: r.push(r.decimal()),
        b"J": lambda r: r.push(r.number(4, signed=True)),
        b"K": lambda r: r.push(r.number(1)),
        b"M": lambda r: r.push(r.number(2)),
        b"\x8a": push_long,
        b"S": push_line_string,
        b"V": push_line_unicode,
        b"T": lambda r: r.push_bytes(4),
        b"U": lambda r: r.push_bytes(1),
        b"X": lambda r: r.push_bytes(4),
        b"\x8c": lambda r: r.push_bytes(1),
        b"\x8d": lambda r: r.push_bytes(8),
        b"B": lambda r: r.push_bytes(4),
        b"C": lambda r: r.push_bytes(1),
        b"\x8e": lambda r: r.push_bytes(8),
        b"]": lambda r: r.push([]),
        b"l": lambda r: r.push(r.to_mark()),
        b"a": append,
        b"e": extend,
        b"}": lambda r: r.push({}),
        b"d": push_dict,
        b"s": set_item,
        b"u": lambda r: r.add_items(r.to_mark()),
        b")": lambda r: r.push(()),
        b"t": lambda r: r.push(tuple(r.to_mark())),
        b"\x85": lambda r: r.push_tuple(1),
        b"\x86": lambda r: r.push_tuple(2),
        b"\x87": lambda r: r.push_tuple(3),
        b"p": lambda r: r.put(r.decimal()),
        b"q": lambda r: r.put(r.number(1)),
        b"r": lambda r: r.put(r.number(4)),
        b"\x94": lambda r: r.put(len(r.memo)),
        b"g": lambda r: r.get(r.decimal()),
        b"h": lambda r: r.get(r.number(1)),
        b"j": lambda r: r.get(r.number(4)),
        b"c": lambda r: r.name(r.line(), r.line()),
        b"\x93": stack_name,
        b"R": reduce,
        b"b": build,
    }
