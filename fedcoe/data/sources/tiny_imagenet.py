"""Tiny ImageNet (Stanford CS231n): 200 classes of ImageNet at 64x64, read inside its zip.

The images are JPEG: decoders may differ by a grey level between builds of libjpeg, so this is the
one named dataset whose bytes depend on the installed Pillow.
"""

import zipfile
from collections import Counter, defaultdict
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedcoe.data.dataset import RawDataset
from fedcoe.data.sources.download import obtain
from fedcoe.data.untrusted import check_unpacked, one_line, open_zip
from fedcoe.errors import FedCoEError

NAMES = ("tiny-imagenet",)
_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
_ROOT = "tiny-imagenet-200"
_SIDE = 64
_MAX_MEMBER = 4 * 2**20  # words.txt is 2.6 MB, an image 2 kB
_MAX_IMAGES = 200_000
_MAX_CLASSES = 10_000


def build(name: str, download_dir: Path, *, check_md5: bool = True) -> RawDataset:
    """100,000 training images and the 10,000 of the official validation as test, 64x64x3.

    The official test split has no labels. Classes are ordered by their WordNet id.

    Raises:
        FedCoEError: no network and no archive, or one that is not what it should be.
    """
    path = obtain([_URL], _MD5, download_dir / name, check_md5=check_md5)
    try:
        with open_zip(path, 2 * _MAX_IMAGES) as archive:
            return _build(archive, path.stat().st_size)
    except Exception as error:  # zipfile and Pillow meet broken files with any exception
        raise FedCoEError(f"{path}: {one_line(error)}; delete it and fetch again") from None


def _build(archive: zipfile.ZipFile, size: int) -> RawDataset:
    wnids = sorted(_lines(archive, "wnids.txt", _MAX_CLASSES))
    index = {wnid: label for label, wnid in enumerate(wnids)}
    train: dict[str, list[str]] = defaultdict(list)
    for member in sorted(archive.namelist()):
        match PurePosixPath(member).parts:
            case (root, "train", wnid, "images", file) if root == _ROOT and wnid in index:
                if file.endswith(".JPEG"):
                    train[wnid].append(member)
    annotations = _lines(archive, "val/val_annotations.txt", _MAX_IMAGES)
    test = [line.split("\t")[:2] for line in annotations]
    images = len(test) + sum(map(len, train.values()))
    check_unpacked(images * _SIDE * _SIDE * 3, size)
    return RawDataset(
        x_train=_images(archive, [member for wnid in wnids for member in train[wnid]]),
        y_train=np.repeat(np.arange(len(wnids)), [len(train[wnid]) for wnid in wnids]),
        x_test=_images(archive, [f"{_ROOT}/val/images/{file}" for file, _ in test]),
        y_test=np.array([index[wnid] for _, wnid in test], dtype=np.int64),
        classes=_class_names(archive, wnids),
        source=f"{_URL} (Stanford CS231n)",
        licence="ImageNet's terms: non-commercial research and education only",
    )


def _class_names(archive: zipfile.ZipFile, wnids: list[str]) -> tuple[str, ...]:
    lines = _lines(archive, "words.txt", _MAX_IMAGES)
    words = {wnid: name for wnid, _, name in (line.partition("\t") for line in lines)}
    first = {wnid: words[wnid].split(",")[0].strip() for wnid in wnids}
    often = Counter(first.values())
    return tuple(first[w] if often[first[w]] == 1 else f"{first[w]} ({w})" for w in wnids)


def _images(archive: zipfile.ZipFile, members: list[str]) -> NDArray[np.uint8]:
    images = np.empty((len(members), _SIDE, _SIDE, 3), dtype=np.uint8)
    for row, member in enumerate(members):
        _check_size(archive, member)
        with archive.open(member) as file, Image.open(file, formats=("JPEG",)) as image:
            if image.size != (_SIDE, _SIDE):
                raise ValueError(f"{member} is not {_SIDE}x{_SIDE}")
            images[row] = np.asarray(image.convert("RGB"))
    return images


def _lines(archive: zipfile.ZipFile, name: str, most: int) -> list[str]:
    member = f"{_ROOT}/{name}"
    _check_size(archive, member)
    text = archive.read(member)
    if text.count(b"\n") > most:
        raise ValueError(f"{member} has more than {most} lines")
    return text.decode("utf-8").replace("\r", "").strip("\n").split("\n")


def _check_size(archive: zipfile.ZipFile, member: str) -> None:
    # zipfile never returns more than the size declared here.
    if archive.getinfo(member).file_size > _MAX_MEMBER:
        raise ValueError(f"{member} is far too large")
