"""Images to predict: a folder of image files, or an .npz as a client's; labels are not read."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedcoe.data.sources.arrays import CLIENT, images_of
from fedcoe.data.sources.folder import ignored, read_header, read_pixels
from fedcoe.data.untrusted import one_line, read_npz
from fedcoe.errors import FedCoEError


def read_images(path: Path, shape: tuple[int, int, int]) -> tuple[list[str], NDArray[np.uint8]]:
    """Read images as a model takes them.

    Args:
        path: a folder (searched in depth, in the order of names), one image file, or an .npz.
        shape: height, width, channels; files are resized and converted, arrays must fit.

    Returns:
        Names and uint8 [n, H, W, C].

    Raises:
        FedCoEError: naming the file and what is wrong with it.
    """
    height, width, channels = shape
    if path.suffix == ".npz":
        try:
            pixels = images_of(read_npz(path, (), CLIENT))
        except ValueError as error:
            raise FedCoEError(f"{path}: {one_line(error)}") from None
        return [str(row) for row in range(len(pixels))], pixels
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file() and not ignored(f))
        root = path.resolve()
        for file in files:
            if not str(file.relative_to(path)).isprintable():
                raise FedCoEError(f"{path}: holds {file.name!r}; rename it to printable text")
            if not file.resolve().is_relative_to(root):
                raise FedCoEError(f"{file}: is a link that leaves the folder; copy the file there")
    else:
        files = [path]
    if not files or not path.exists():
        raise FedCoEError(f"{path}: no images there; name a folder, an image or an .npz with x")
    for file in files:
        read_header(file)
    names = [str(file.relative_to(path)) if file != path else file.name for file in files]
    return names, read_pixels(files, (width, height), "L" if channels == 1 else "RGB")
