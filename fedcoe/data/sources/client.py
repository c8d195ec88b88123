"""One client's images, labelled or not, as a trained model takes them: a folder or an .npz."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedcoe.data.sources.arrays import CLIENT, images_of, one_of
from fedcoe.data.sources.folder import read_header, read_pixels, walk_images
from fedcoe.data.untrusted import one_line, read_npz
from fedcoe.errors import FedCoEError


class ClientImages(NamedTuple):
    """n images of one client."""

    names: list[str]
    images: NDArray[np.uint8]
    """[n, H, W, C]."""
    labels: NDArray[np.int64] | None
    """[n], indices into the model's classes."""


def read_client(path: Path, shape: tuple[int, int, int], classes: Sequence[str]) -> ClientImages:
    """Read a client's data.

    Args:
        path: a folder with images right in it (unlabelled) or in one sub-folder a class, named
            like the model's classes; or an .npz with `x` or `images` and, if labelled, `y` or
            `labels` (indices or names of classes).
        shape: height, width, channels; files are resized and converted, arrays must fit.
        classes: the model's, in their order.

    Raises:
        FedCoEError: naming the file and what is wrong with it.
    """
    if path.is_dir():
        return _folder(path, shape, classes)
    if not path.exists():
        raise FedCoEError(f"{path}: is not there; name a folder of images or an .npz")
    try:
        return _arrays(path, shape, classes)
    except ValueError as error:
        raise FedCoEError(f"{path}: {one_line(error)}") from None


def _folder(path: Path, shape: tuple[int, int, int], classes: Sequence[str]) -> ClientImages:
    root = path.resolve()
    files = list(walk_images(root, root, depth=1))
    if not files:
        raise FedCoEError(f"{path}: holds no images")
    names = [str(file.relative_to(root)) for file in files]
    tops = {file.relative_to(root).parts[:-1] for file in files}
    if () in tops and len(tops) > 1:
        raise FedCoEError(
            f"{path}: has images both in it and in sub-folders; all flat (unlabelled), "
            "or one sub-folder a class"
        )
    if () not in tops:
        spelled = {name.lower(): name for name in classes}
        for top in sorted(tops):
            if len(top) > 1:
                raise FedCoEError(
                    f"{path / Path(*top)}: lies deeper than one sub-folder a class; "
                    "name the folder of one client"
                )
            if top[0] in classes:
                continue
            if known := spelled.get(top[0].lower()):
                raise FedCoEError(
                    f"{path / top[0]}: is spelled {known} in the model; rename the folder"
                )
            raise FedCoEError(
                f"{path / top[0]}: is no class of the model ({_few(classes)}); "
                "images without labels lie flat in the folder"
            )
    for file in files:
        read_header(file)
    height, width, channels = shape
    pixels = read_pixels(files, (width, height), "L" if channels == 1 else "RGB")
    if () in tops:
        return ClientImages(names, pixels, None)
    index = {name: i for i, name in enumerate(classes)}
    return ClientImages(names, pixels, np.array([index[file.parent.name] for file in files]))


def _arrays(path: Path, shape: tuple[int, int, int], classes: Sequence[str]) -> ClientImages:
    arrays = read_npz(path, (), CLIENT)
    pixels = images_of(arrays)
    if pixels.shape[1:] != shape or not len(pixels):
        raise ValueError(f"x is {list(pixels.shape)}, the model takes [n, {_few(shape)}]")
    labels = one_of(arrays, "y", "labels")
    names = [str(row) for row in range(len(pixels))]
    return ClientImages(
        names, pixels, None if labels is None else _labels(labels, len(pixels), classes)
    )


def _labels(labels: NDArray[Any], count: int, classes: Sequence[str]) -> NDArray[np.int64]:
    if labels.shape != (count,) or labels.dtype.kind not in "iuU":
        raise ValueError(
            f"y is {labels.dtype} {list(labels.shape)}, must be {count} indices or names of classes"
        )
    if labels.dtype.kind == "U":
        if unknown := sorted(set(labels.tolist()) - set(classes)):
            raise ValueError(f"y has {unknown[0]!r}, no class of the model ({_few(classes)})")
        index = {name: i for i, name in enumerate(classes)}
        return np.array([index[name] for name in labels.tolist()])
    if labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(
            f"y runs from {labels.min()} to {labels.max()}, "
            f"the model knows 0 to {len(classes) - 1} ({_few(classes)})"
        )
    return labels.astype(np.int64)


def _few(items: Sequence[Any]) -> str:
    return ", ".join(map(str, items[:10])) + ", ..." * (len(items) > 10)
