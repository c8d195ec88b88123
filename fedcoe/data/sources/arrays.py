"""Your own data as one .npz file: x_train, y_train, x_test, y_test [, client_train] [, classes]."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcoe.data.dataset import RawDataset
from fedcoe.data.untrusted import one_line, read_npz
from fedcoe.errors import FedCoEError

_REQUIRED = ("x_train", "y_train", "x_test", "y_test")
_OPTIONAL = ("client_train", "classes")
_MAX_CLASSES = 65_536


def from_arrays(path: str | Path) -> RawDataset:
    """Read an arrays file.

    Images are uint8, [N,H,W], [N,H,W,C] or, where one reading alone is possible, [N,C,H,W] with
    C 1 or 3. Labels are integers 0..C-1 and clients integers 0..K-1, none left out in training;
    with `classes` (one string a class) a class may be absent.

    Raises:
        FedCoEError: what is wrong with the file, in one line.
    """
    path = Path(path)
    try:
        return _read(path)
    except ValueError as error:
        raise FedCoEError(f"{path}: {one_line(error)}") from None


def _read(path: Path) -> RawDataset:
    arrays = read_npz(path, _REQUIRED, _OPTIONAL)
    x_train, x_test = (as_images(name, arrays[name]) for name in ("x_train", "x_test"))
    if x_train.shape[1:] != x_test.shape[1:]:
        raise ValueError(
            f"x_train has images of {list(x_train.shape[1:])} (H,W,C), "
            f"x_test of {list(x_test.shape[1:])}"
        )
    classes = _classes(arrays)
    y_train = _ids("y_train", arrays["y_train"], len(x_train), len(classes))
    y_test = _ids("y_test", arrays["y_test"], len(x_test), len(classes))
    if "classes" not in arrays:
        _check_contiguous("y_train", y_train)
    client_train, clients = None, 0
    if "client_train" in arrays:
        client_train = _ids("client_train", arrays["client_train"], len(x_train))
        _check_contiguous("client_train", client_train)
        clients = int(client_train.max()) + 1
    return RawDataset(
        x_train=x_train,
        y_train=y_train,
        x_test=x_test,
        y_test=y_test,
        classes=classes,
        source=f"file {path.name}",
        licence="not stated (own data)",
        client_train=client_train,
        clients=tuple(str(client) for client in range(clients)),
    )


def as_images(name: str, images: NDArray[Any]) -> NDArray[np.uint8]:
    if images.dtype != np.uint8:
        hint = "; for floats in 0..1: (x * 255).round().astype('uint8')"
        raise ValueError(
            f"{name} is {images.dtype}, must be uint8 (0..255){hint * (images.dtype.kind == 'f')}"
        )
    if images.ndim == 3:
        return images[..., np.newaxis]
    if images.ndim == 4:
        first, last = images.shape[1] in (1, 3), images.shape[3] in (1, 3)
        if last and not first:
            return images
        if first and not last:
            return images.transpose(0, 2, 3, 1)
    raise ValueError(
        f"{name} has shape {list(images.shape)}, must be [N,H,W], [N,H,W,C] or [N,C,H,W] "
        "with C 1 or 3, and only one of them possible"
    )


def _classes(arrays: dict[str, NDArray[Any]]) -> tuple[str, ...]:
    if "classes" not in arrays:
        labels = arrays["y_train"]
        integers = labels.size and labels.dtype.kind in "iu" and 0 <= labels.max() < len(labels)
        # Where this guess is wrong, the check of y_train says how.
        return tuple(str(label) for label in range(int(labels.max()) + 1 if integers else 0))
    classes = arrays["classes"]
    if classes.ndim != 1 or classes.dtype.kind != "U" or len(classes) > _MAX_CLASSES:
        raise ValueError(
            f"classes is {classes.dtype} {list(classes.shape)}, must be a list of strings, "
            f"at most {_MAX_CLASSES}"
        )
    return tuple(classes.tolist())


def _ids(name: str, ids: NDArray[Any], count: int, limit: int | None = None) -> NDArray[Any]:
    if ids.dtype.kind not in "iu" or ids.shape != (count,):
        raise ValueError(f"{name} is {ids.dtype} {list(ids.shape)}, must be {count} integers")
    if not count:
        raise ValueError(f"{name} is empty")
    limit = count if limit is None else limit
    if ids.min() < 0 or ids.max() >= limit:
        raise ValueError(
            f"{name} runs from {ids.min()} to {ids.max()}; number them 0, 1, 2, ... "
            "without gaps (np.unique(y, return_inverse=True)[1] does)"
        )
    return ids


def _check_contiguous(name: str, ids: NDArray[Any]) -> None:
    missing = np.flatnonzero(np.bincount(ids.astype(np.int64)) == 0)
    if missing.size:
        raise ValueError(
            f"{name} has {missing[0]} nowhere, but goes up to {ids.max()}; number them "
            "0, 1, 2, ... without gaps (np.unique(y, return_inverse=True)[1] does)"
        )


CLIENT = ("x", "images", "y", "labels")
"""Arrays that the .npz of one client may have."""


def images_of(arrays: dict[str, NDArray[Any]]) -> NDArray[np.uint8]:
    """uint8 [n, H, W, C] of a client's arrays.

    Raises:
        ValueError: there are none, or of another type.
    """
    images = one_of(arrays, "x", "images")
    if images is None:
        raise ValueError("has no array x (or images)")
    # A copy: transposed views would change the last bits of convolutions.
    return np.array(as_images("x", images), order="C")


def one_of(arrays: dict[str, NDArray[Any]], *names: str) -> NDArray[Any] | None:
    """The one that is there of several names for the same; None: there is none."""
    found = [name for name in names if name in arrays]
    if len(found) > 1:
        raise ValueError(f"has both {found[0]} and {found[1]}; leave one out")
    return arrays[found[0]] if found else None
