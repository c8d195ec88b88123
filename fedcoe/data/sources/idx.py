"""MNIST and Fashion-MNIST, which share the idx file format (http://yann.lecun.com/exdb/mnist)."""

import gzip
import math
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedcoe.data.dataset import RawDataset
from fedcoe.data.sources.download import obtain
from fedcoe.data.untrusted import check_unpacked, one_line, open_regular
from fedcoe.errors import FedCoEError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where the Debian package dataset-fashion-mnist puts its files."""

_MAX_RATIO = 1032  # deflate cannot compress further
_MAX_BYTES = 256 * 2**20  # MNIST's images are 47 MB


class _Family(NamedTuple):
    mirrors: tuple[str, ...]
    files: tuple[tuple[str, str], ...]  # name, md5: as torchvision.datasets states them
    classes: tuple[str, ...]
    source: str
    licence: str


_FAMILIES = {
    "fashion-mnist": _Family(
        mirrors=("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
        files=(
            ("train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
            ("train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe"),
            ("t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79"),
            ("t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310"),
        ),
        classes=(
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
        source="Fashion-MNIST (Xiao, Rasul and Vollgraf 2017), zalandoresearch/fashion-mnist",
        licence="MIT, (c) 2017 Zalando SE",
    ),
    "mnist": _Family(
        mirrors=(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "http://yann.lecun.com/exdb/mnist/",
        ),
        files=(
            ("train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
            ("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432"),
            ("t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
            ("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
        ),
        classes=tuple("0123456789"),
        source="MNIST (LeCun, Cortes and Burges)",
        licence="states none of its own (often given as CC BY-SA 3.0)",
    ),
}
NAMES = tuple(_FAMILIES)


def build(name: str, download_dir: Path, *, check_md5: bool = True) -> RawDataset:
    """60,000 training and 10,000 test images, 28x28x1, in the official order.

    Raises:
        FedCoEError: no network and no files, or files that are not what they should be.
    """
    family = _FAMILIES[name]
    if name == "fashion-mnist" and all((DEBIAN / file).is_file() for file, _ in family.files):
        # Debian compresses the same bytes anew, so torchvision's checksums do not apply.
        paths = [DEBIAN / file for file, _ in family.files]
    else:
        paths = [
            # Both families use the same file names, hence a folder each.
            obtain(
                [mirror + file for mirror in family.mirrors],
                md5,
                download_dir / name,
                check_md5=check_md5,
            )
            for file, md5 in family.files
        ]
    x_train, y_train, x_test, y_test = (
        read_idx(path, dims) for path, dims in zip(paths, (3, 1, 3, 1), strict=True)
    )
    return RawDataset(
        x_train=x_train[..., np.newaxis],
        y_train=y_train,
        x_test=x_test[..., np.newaxis],
        y_test=y_test,
        classes=family.classes,
        source=family.source,
        licence=family.licence,
    )


def read_idx(path: Path, dims: int) -> NDArray[np.uint8]:
    """Read a gzipped idx file of unsigned bytes.

    The size that the header claims is checked against what the file could possibly hold before
    anything of that size is allocated, and never more than that is decompressed.

    Args:
        path: the .gz file.
        dims: how many dimensions it must have (3 for images, 1 for labels).

    Raises:
        FedCoEError: wrong magic number, impossible sizes, too few or too many bytes, bad gzip.
    """

    def refuse(what: str) -> FedCoEError:
        return FedCoEError(f"{path}: {what}; delete it and fetch again")

    try:
        with open_regular(path) as packed, gzip.open(packed) as file:
            header = file.read(4 + 4 * dims)
            if len(header) != 4 + 4 * dims or header[:4] != bytes((0, 0, 8, dims)):
                raise refuse(f"is not an idx file of {dims}-dimensional unsigned bytes")
            shape = struct.unpack(f">{dims}I", header[4:])
            size = math.prod(shape)
            if size > min(_MAX_BYTES, _MAX_RATIO * path.stat().st_size):
                raise refuse(f"claims {size} bytes, more than it can hold")
            check_unpacked(size, path.stat().st_size)
            content = file.read(size + 1)
    except FedCoEError:
        raise
    except Exception as error:  # gzip and zlib meet broken files with any exception
        raise refuse(f"cannot be read ({one_line(error)})") from None
    if len(content) != size:
        raise refuse(f"holds {'fewer' if len(content) < size else 'more'} than {size} bytes")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)
