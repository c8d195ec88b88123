"""CIFAR-10 and CIFAR-100 from their official archives, whose pickles are read without trust."""

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedcoe.data.dataset import RawDataset
from fedcoe.data.sources.download import obtain
from fedcoe.data.sources.pickled import read_pickle
from fedcoe.data.untrusted import check_unpacked, one_line, open_regular
from fedcoe.errors import FedCoEError

_MAX_MEMBER = 256 * 2**20  # CIFAR-100's training file is 155 MB
_MAX_ARCHIVE = 2 * _MAX_MEMBER
_MAX_MEMBERS = 1000
_BLOCK = 512  # bytes; a tar pads everything to them


class _Family(NamedTuple):
    archive: str
    md5: str  # as torchvision.datasets states it
    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels: bytes
    names: bytes


_FAMILIES = {
    "cifar10": _Family(
        archive="cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
        folder="cifar-10-batches-py",
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test="test_batch",
        meta="batches.meta",
        labels=b"labels",
        names=b"label_names",
    ),
    "cifar100": _Family(
        archive="cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        folder="cifar-100-python",
        train=("train",),
        test="test",
        meta="meta",
        labels=b"fine_labels",
        names=b"fine_label_names",
    ),
}
NAMES = tuple(_FAMILIES)


def build(name: str, download_dir: Path, *, check_md5: bool = True) -> RawDataset:
    """50,000 training and 10,000 test images, 32x32x3, in the official order.

    Raises:
        FedCoEError: no network and no archive, or one that is not what it should be.
    """
    family = _FAMILIES[name]
    url = f"https://www.cs.toronto.edu/~kriz/{family.archive}"
    archive = obtain([url], family.md5, download_dir / name, check_md5=check_md5)
    members = _read_members(archive, family.folder, (*family.train, family.test, family.meta))
    parts = [
        _images_and_labels(archive, member, members[member], family.labels)
        for member in (*family.train, family.test)
    ]
    names = _unpickle(archive, family.meta, members[family.meta]).get(family.names)
    if not isinstance(names, list) or not all(isinstance(item, bytes) for item in names):
        raise FedCoEError(f"{archive}: {family.meta} has no list of class names")
    return RawDataset(
        x_train=np.concatenate([images for images, _ in parts[:-1]]),
        y_train=np.concatenate([labels for _, labels in parts[:-1]]),
        x_test=parts[-1][0],
        y_test=parts[-1][1],
        classes=tuple(item.decode("ascii", "replace") for item in names),
        source=f"{url} (Krizhevsky 2009)",
        licence="none stated by the authors; they ask that Krizhevsky 2009 be cited",
    )


def _read_members(archive: Path, folder: str, names: tuple[str, ...]) -> dict[str, bytes]:
    """The wanted files by exact name; nothing is ever extracted to disk.

    A walk over the tar's blocks: tarfile itself reads extended headers of any size into memory.
    """
    wanted = {f"{folder}/{name}".encode(): name for name in names}
    found: dict[str, bytes] = {}
    total = 0
    try:
        with open_regular(archive) as packed, gzip.open(packed) as tar:
            for title, regular, size in _headers(tar):
                total += size
                if size > _MAX_MEMBER or total > _MAX_ARCHIVE:
                    raise ValueError(f"{title.decode('ascii', 'replace')} is far too large")
                check_unpacked(total, archive.stat().st_size)
                if regular and title in wanted:
                    found[wanted[title]] = _exactly(tar, size)
                    _skip(tar, -size % _BLOCK)
                else:
                    _skip(tar, size + -size % _BLOCK)
    except Exception as error:  # gzip and zlib meet broken files with any exception
        said = one_line(error)
        raise FedCoEError(f"{archive}: not a whole archive ({said}); delete it") from None
    if missing := [name for name in names if name not in found]:
        raise FedCoEError(f"{archive}: has no {folder}/{missing[0]}; delete it and fetch again")
    return found


def _headers(tar: gzip.GzipFile) -> Iterator[tuple[bytes, bool, int]]:
    """Name, whether it is a file, and size of every member; the caller reads past its content."""
    for _ in range(_MAX_MEMBERS):
        header = _exactly(tar, _BLOCK)
        if not any(header):
            return
        checksum = sum(header[:148]) + 8 * ord(" ") + sum(header[156:])
        if _octal(header[148:156]) != checksum:
            raise ValueError("a header's checksum is wrong")
        yield header[:100].split(b"\0")[0], header[156:157] in b"0\0", _octal(header[124:136])
    raise ValueError(f"has more than {_MAX_MEMBERS} members")


def _octal(text: bytes) -> int:
    digits = text.split(b"\0")[0].strip()
    if digits[:1] >= b"\x80":
        raise ValueError("a member is far too large")  # sizes from 8 GiB on are binary
    return int(digits, 8)


def _exactly(tar: gzip.GzipFile, size: int) -> bytes:
    content = tar.read(size)
    if len(content) != size:
        raise ValueError("ends in the middle")
    return content


def _skip(tar: gzip.GzipFile, size: int) -> None:
    while size:
        size -= len(_exactly(tar, min(size, 2**20)))


def _images_and_labels(
    archive: Path, member: str, content: bytes, labels_key: bytes
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    batch = _unpickle(archive, member, content)
    data, labels = batch.get(b"data"), batch.get(labels_key)
    if (
        not isinstance(data, np.ndarray)
        or data.ndim != 2
        or data.shape[1] != 3072
        or not isinstance(labels, list)
        or len(labels) != len(data)
        or not all(type(label) is int and 0 <= label < 2**31 for label in labels)
    ):
        raise FedCoEError(f"{archive}: {member} does not hold [N, 3072] bytes and N labels")
    # Stored as one plane a colour.
    images = data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return images, np.array(labels, dtype=np.int64)


def _unpickle(archive: Path, member: str, content: bytes) -> dict[bytes, Any]:
    try:
        return read_pickle(content)
    except (ValueError, OverflowError) as error:
        raise FedCoEError(
            f"{archive}: {member} is not the pickle it should be ({one_line(error)}); delete it"
        ) from None
