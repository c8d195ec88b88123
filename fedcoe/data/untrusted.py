"""What a file from a stranger may claim: sizes are checked before anything of that size exists.

The rule, for every reader: a file may unpack to `MAX_RATIO` times its size, or to `SMALL` where
that is more, and never to more than `MAX_BYTES`; reading takes at most four times what is larger,
the file or what it unpacks to. Text (JSON) takes many times its size as Python objects, so less of
it is read.
"""

import json
import math
import os
import re
import stat
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_BYTES = 16 * 2**30
"""Most bytes of images that sources read into memory; more is taken for a mistake or an attack."""
MAX_RATIO = 100
"""How far real data may have been compressed; a decompression bomb reaches 1,000."""
SMALL = 64 * 2**20
"""Bytes to which the smallest file may unpack, e.g. images of one colour."""
MAX_TEXT = 64 * 2**20
"""Longest JSON that is read, in bytes."""

_MAX_HEADER = 4096  # numpy writes 128 bytes
_CHUNK = 2**20
_MESSAGE = 300  # names and values in messages may come from the file


def one_line(error: BaseException | str) -> str:
    """What went wrong, as one line of bounded length."""
    text = (str(error) or type(error).__name__)[: 10 * _MESSAGE]
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= _MESSAGE else line[:_MESSAGE] + " ..."


def check_unpacked(claimed: int, packed: int) -> None:
    """Refuse what unpacks too far.

    Args:
        claimed: bytes it is said to unpack to.
        packed: bytes it takes now.

    Raises:
        ValueError: a decompression bomb, or more than fits in memory.
    """
    if claimed > MAX_BYTES:
        size = f"{claimed / 2**30:.0f} GiB" if claimed < 2**60 else "more bytes than there are"
        raise ValueError(f"unpacks to {size}, at most {MAX_BYTES >> 30} GiB are read")
    if claimed > max(SMALL, MAX_RATIO * packed):
        raise ValueError(
            f"claims to unpack from {packed} bytes to {claimed}, which real data does not "
            f"(at most {MAX_RATIO} times, or {SMALL >> 20} MiB)"
        )


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        ValueError: no JSON, or too long or too deep.
        OSError: not readable.
    """
    try:
        return json.loads(read_bytes(path, MAX_TEXT))
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def read_bytes(path: Path, most: int) -> bytes:
    """A whole file of at most `most` bytes.

    Raises:
        ValueError: it is longer, or no file.
        OSError: not readable.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > most:
            raise ValueError(f"has more than {most >> 20} MiB")
        return file.read()


def open_regular(path: Path) -> IO[bytes]:
    """Open a file for reading; never wait for a pipe, never read a device.

    Raises:
        ValueError: it is no file.
        OSError: not readable.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("is not a file")
    return open(descriptor, "rb")


class NpyHeader(NamedTuple):
    """What a .npy file says of itself; `size` is the header's own length."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    size: int

    @property
    def bytes(self) -> int:
        """Length of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


_ENTRY = re.compile(
    r"\s*['\"](descr|fortran_order|shape)['\"]\s*:\s*"
    r"(?:['\"]([<>|=]?[a-zA-Z]\d{0,9})['\"]|(True|False)|\(([\d,\sL]*)\))\s*(?:,|$)"
)


def npy_header(file: IO[bytes]) -> NpyHeader:
    """Read the header of an array of plain numbers or strings; evaluates nothing.

    Raises:
        ValueError: it is none.
    """
    start = file.read(8)
    if start[:6] != b"\x93NUMPY" or len(start) != 8:
        raise ValueError("is not a .npy array")
    if start[6:] not in (b"\1\0", b"\2\0"):
        raise ValueError(f"is stored in npy format {start[6]}.{start[7]}, must be 1 or 2")
    width = 2 if start[6] == 1 else 4
    length = int.from_bytes(file.read(width), "little")
    if length > _MAX_HEADER:
        raise ValueError(f"has a header of {length} bytes, at most {_MAX_HEADER} are read")
    header = file.read(length)
    text = header.decode("latin1").strip()
    values: dict[str, re.Match[str]] = {}
    position = 1
    while position < len(text) - 1 and (match := _ENTRY.match(text[:-1], position)):
        values[match[1]] = match
        position = match.end()
    if (
        len(header) != length
        or (text[:1], text[-1:], text[position:].strip()) != ("{", "}", "}")
        or len(values) != 3
        or None in (values["descr"][2], values["fortran_order"][3], values["shape"][4])
    ):
        raise ValueError("has no plain .npy header")
    sides = [side.strip(" L") for side in values["shape"][4].split(",")]
    if not sides[-1]:  # (3,) and ()
        sides.pop()
    if len(sides) > 8 or not all(re.fullmatch(r"\d{1,15}", side) for side in sides):
        raise ValueError("has an impossible shape")
    shape = tuple(map(int, sides))
    try:
        dtype = np.dtype(values["descr"][2])
    except (TypeError, ValueError):
        raise ValueError(f"has an unknown dtype {values['descr'][2]!r}") from None
    if dtype.hasobject:
        raise ValueError("holds Python objects; save plain numbers or strings")
    if not dtype.itemsize:
        raise ValueError(f"has the dtype {dtype.str!r}, of no bytes")
    return NpyHeader(
        shape, dtype, values["fortran_order"][3] == "True", len(start) + width + length
    )


def read_npy(file: IO[bytes], size: int) -> NDArray[Any]:
    """Read an array of a .npy file that has `size` bytes in all.

    Raises:
        ValueError: it is none, or its header claims another size.
    """
    header = npy_header(file)
    if header.bytes != size - header.size:
        raise ValueError(
            f"claims {header.bytes} bytes, which the file does not hold ({size - header.size})"
        )
    array = np.empty(math.prod(header.shape), header.dtype)
    content = array.view(np.uint8).data if array.size else memoryview(b"")
    filled = 0
    while chunk := file.read(_CHUNK):  # to the end: archives compare their checksum there
        if filled + len(chunk) > len(content):
            raise ValueError("holds more than it claims")
        content[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    if filled != len(content):
        raise ValueError("ends in the middle of its data")
    if header.dtype.kind == "U" and array.size:
        points = array.view(np.dtype("u4").newbyteorder(header.dtype.byteorder))
        if points.max() > 0x10FFFF:
            raise ValueError("holds text that is none")
    return array.reshape(header.shape, order="F" if header.fortran else "C")


def open_npy(path: Path) -> NDArray[Any]:
    """Map a .npy file read-only, without reading it.

    Raises:
        ValueError: it is none, or of another length than its header says.
        OSError: not readable.
    """
    with open_regular(path) as file:
        header, size = npy_header(file), os.fstat(file.fileno()).st_size
        if header.bytes != size - header.size:
            raise ValueError(
                f"claims {header.bytes} bytes, which the file does not hold ({size - header.size})"
            )
        if not header.bytes:
            return np.empty(header.shape, header.dtype)
        flat = np.memmap(file, header.dtype, "r", header.size)
        array: NDArray[Any] = flat.reshape(header.shape, order="F" if header.fortran else "C")
        return array


def open_zip(path: Path, most: int) -> zipfile.ZipFile:
    """Open a zip of at most about `most` members, none compressed but by deflate.

    Raises:
        ValueError, zipfile.BadZipFile: it is none.
        OSError: not readable.
    """
    with open_regular(path) as file:
        # zipfile makes an object of every entry: count them before.
        file.seek(max(0, os.fstat(file.fileno()).st_size - SMALL))
        entries, tail = 0, b""
        while chunk := file.read(_CHUNK):
            entries += (tail + chunk).count(b"PK\1\2")
            tail = chunk[-3:]
    if entries > most + 1000:  # four bytes of data can look like an entry
        raise ValueError(f"lists more than {most} files")
    archive = zipfile.ZipFile(path)
    try:
        if len(archive.infolist()) > most:
            raise ValueError(f"lists more than {most} files")
        for info in archive.infolist():
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{info.filename} is compressed by other means than deflate")
    except BaseException:
        archive.close()
        raise
    return archive


def read_npz(
    path: Path, required: Iterable[str] = (), optional: Iterable[str] = ()
) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz; nothing in it can execute code.

    Args:
        required: names that must be there.
        optional: names that may be there; others are refused.

    Raises:
        ValueError: what is wrong with it, in one line, whatever it is.
    """
    required, optional = tuple(required), tuple(optional)
    try:
        return _read_npz(path, required, optional)
    except Exception as error:  # zipfile and zlib meet broken files with any exception
        raise ValueError(one_line(error)) from error


def _read_npz(
    path: Path, required: tuple[str, ...], optional: tuple[str, ...]
) -> dict[str, NDArray[Any]]:
    with open_zip(path, 100) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        if len(members) != len(archive.infolist()):
            raise ValueError("has two arrays of the same name")
        if missing := [name for name in required if name not in members]:
            raise ValueError(f"has no array {missing[0]}; needs {', '.join(required)}")
        if unknown := sorted(members.keys() - {*required, *optional}):
            hint = f"; {', '.join(optional)} are optional" if optional else ""
            raise ValueError(f"has an unknown array {unknown[0]!r}{hint}")
        size = path.stat().st_size
        # Each against its own share of the file, as far as that can be: shares may overlap.
        for name, info in members.items():
            if info.compress_size > size or (
                info.compress_type == zipfile.ZIP_STORED and info.file_size > size
            ):
                raise ValueError(
                    f"{name} claims {info.file_size} bytes, which the file does not hold"
                )
        check_unpacked(sum(info.file_size for info in members.values()), size)
        arrays = {}
        for name, info in members.items():
            with archive.open(info) as file:
                try:
                    arrays[name] = read_npy(file, info.file_size)
                except ValueError as error:
                    raise ValueError(f"{name} {error}") from None
        return arrays
