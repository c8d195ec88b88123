"""Damage to bytes: what rot, a cut download, or somebody with a hex editor does to a file."""

import random
import re
from collections.abc import Callable, Sequence

_INTERESTING = [
    *(0, 1, 2, 3, 7, 8, 16, 63, 64, 127, 128, 255, 256, 1000, 65_535, 65_536, 10**6),
    *(2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 10**12, 2**40, 2**63 - 1, 2**63, 2**64 - 1),
]
_NUMBERS = [
    *(b"-1", b"0", b"1", b"2", b"3", b"255", b"4096", b"65536", b"2147483647", b"4294967295"),
    *(b"1000000000000", b"9223372036854775807", b"99999999999999999999999", b"1e999", b"NaN"),
    *(b"1.5", b"true", b"null", b'"7"', b"[]", b"{}", b"-Infinity", b"9" * 5000),
]
_TOKENS = [
    *(b"[", b"]", b"{", b"}", b"(", b")", b",", b":", b'"', b"'", b"\\", b"\n", b"\0", b"\xff"),
    *(b"../../../etc/passwd", b"/etc/passwd", b"[" * 3000, b"(" * 3000, b'{"a":' * 3000),
    *(b"__class__", b"__reduce__", b"cos\nsystem\n", b"\x89", b"PK\x03\x04", b"\x1f\x8b"),
    *(b"\xed\xa0\x80", b"\\ud800", b"O", b"|O", b"<U0", b"|V0", b"<f8", b"BF16", b"F64", b"I8"),
]


def mutate(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """One to a few changes: bits, bytes, cuts, copies, parts of other files, lengths, numbers."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 4, 8))):
        if not result:
            return bytes(result)
        rng.choice(_CHANGES)(rng, result, others)
    return bytes(result)


def _place(rng: random.Random, data: bytearray) -> int:
    # Headers stand at the front, directories at the end.
    edge = min(len(data), 128)
    return rng.choice(
        (
            rng.randrange(len(data)),
            rng.randrange(edge),
            len(data) - 1 - rng.randrange(edge),
        )
    )


def _bit(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    data[_place(rng, data)] ^= 1 << rng.randrange(8)


def _byte(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    data[_place(rng, data)] = rng.randrange(256)


def _cut(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    del data[_place(rng, data) :]


def _remove(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    start = _place(rng, data)
    del data[start : start + rng.choice((1, 2, 4, 8, 64, 512))]


def _repeat(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    start = _place(rng, data)
    part = data[start : start + rng.choice((1, 2, 4, 16, 64, 512))]
    data[start:start] = part * rng.choice((1, 2, 10, 100))


def _splice(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> None:
    other = rng.choice(others)
    start, size = rng.randrange(max(1, len(other))), rng.choice((1, 4, 16, 128, 1024))
    place = _place(rng, data)
    data[place : place + rng.choice((0, size))] = other[start : start + size]


def _length(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    size = rng.choice((1, 2, 4, 8))
    value = rng.choice(_INTERESTING) + rng.choice((-1, 0, 0, 1))
    place = _place(rng, data)
    order = rng.choice(("little", "big"))
    data[place : place + size] = (value % 2 ** (8 * size)).to_bytes(size, order)


def _number(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    found = list(re.finditer(rb"-?\d+(\.\d+)?", bytes(data[:20_000])))
    if found:
        match = rng.choice(found)
        data[match.start() : match.end()] = rng.choice(_NUMBERS)


def _token(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    place = _place(rng, data)
    data[place : place + rng.choice((0, 1, 4))] = rng.choice(_TOKENS)


def _key(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    """Swap two quoted words, so that the file still parses."""
    found = list(re.finditer(rb'"[^"\n]{1,40}"', bytes(data[:20_000])))
    if len(found) > 1:
        first, second = sorted(rng.sample(found, 2), key=lambda match: match.start())
        data[second.start() : second.end()] = first.group()
        data[first.start() : first.end()] = second.group()


_CHANGES: tuple[Callable[[random.Random, bytearray, Sequence[bytes]], None], ...] = (
    *(_bit, _byte, _cut, _remove, _repeat, _splice, _length, _length, _number, _number),
    *(_token, _key),
)
