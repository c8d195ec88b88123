"""CIFAR-10 and CIFAR-100 from their official archives, whose pickles are read without trust."""

import pickle
import tarfile
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedcoe.data.dataset import RawDataset
from fedcoe.data.sources.download import obtain
from fedcoe.errors import FedCoEError

_MAX_MEMBER = 256 * 2**20  # CIFAR-100's training file is 155 MB
_MAX_ARCHIVE = 2 * _MAX_MEMBER


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
    """The wanted files by exact name; nothing is ever extracted to disk."""
    found: dict[str, bytes] = {}
    total = 0
    try:
        with tarfile.open(archive, "r|gz") as tar:
            for member in tar:
                total += member.size
                if member.size > _MAX_MEMBER or total > _MAX_ARCHIVE:
                    raise FedCoEError(f"{archive}: {member.name} is far too large; delete it")
                name = member.name.removeprefix(f"{folder}/")
                if name != member.name and name in names and member.isreg():
                    file = tar.extractfile(member)
                    found[name] = file.read() if file else b""
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise FedCoEError(f"{archive}: not a whole archive ({error}); delete it") from None
    if missing := [name for name in names if name not in found]:
        raise FedCoEError(f"{archive}: has no {folder}/{missing[0]}; delete it and fetch again")
    return found


def _images_and_labels(
    archive: Path, member: str, content: bytes, labels_key: bytes
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    batch = _unpickle(archive, member, content)
    data, labels = batch.get(b"data"), batch.get(labels_key)
    pixels = data.value if isinstance(data, _Array) else None
    if (
        pixels is None
        or pixels.shape[1:] != (3072,)
        or not isinstance(labels, list)
        or len(labels) != len(pixels)
        or not all(type(label) is int and 0 <= label < 2**31 for label in labels)
    ):
        raise FedCoEError(f"{archive}: {member} does not hold [N, 3072] bytes and N labels")
    # Stored as one plane a colour.
    images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return images, np.array(labels, dtype=np.int64)


class _Array:
    """Stands in for numpy.ndarray while a pickle is read: takes its state, runs none of its code.

    `value` is the uint8 array that the state describes.
    """

    value: NDArray[np.uint8] | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        if not isinstance(dtype, _Dtype):
            raise pickle.UnpicklingError("an array without a type")
        flat = np.frombuffer(content, dtype=np.uint8)
        self.value = flat.reshape(shape, order="F" if fortran else "C")


class _Dtype:
    """Stands in for numpy.dtype: only unsigned bytes occur in these files."""

    def __init__(self, code: str | bytes, *_: object) -> None:
        if code not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"an array of {code!r}, not of bytes")

    def __setstate__(self, state: object) -> None:
        pass


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _encode(text: str, *_: object) -> bytes:
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    """Knows the few names that a pickled array consists of, and answers with harmless stand-ins."""

    _NAMES: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _encode,  # how Python 3 writes bytes in old protocols
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._NAMES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def _unpickle(archive: Path, member: str, content: bytes) -> dict[Any, Any]:
    try:
        value = _Unpickler(BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a hostile pickle can provoke any exception
        raise FedCoEError(
            f"{archive}: {member} is not the pickle it should be ({error}); delete it"
        ) from None
    if not isinstance(value, dict):
        raise FedCoEError(f"{archive}: {member} does not hold a dictionary; delete it")
    return value
