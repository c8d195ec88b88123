"""Your own data as a tree of images: one sub-folder a class, or one a client with classes inside.

The tree is taken to come from a stranger: links out of it, images that unpack to gigabytes and
files that are no images are refused by name.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fedcoe.data.dataset import RawDataset
from fedcoe.data.untrusted import MAX_BYTES, check_unpacked, one_line, read_bytes
from fedcoe.errors import FedCoEError
from fedcoe.streams import stream

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
_IGNORED = frozenset({".txt", ".md"})
_GRAY = frozenset({"1", "L", "LA"})
_COLOUR = frozenset({"P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})
_MAX_PIXELS = 64_000_000
_MAX_FILE = 256 * 2**20
_TEST = 0.2
_MAX_SAID = 10


_Read = TypeVar("_Read")


class _Item(NamedTuple):
    client: str  # "" without clients
    label: str
    path: Path


def from_folder(path: str | Path, seed: int = 0) -> RawDataset:
    """Read a folder of images (png, jpg, jpeg, bmp, webp).

    Layouts: `class/image` or `client/class/image`, told apart by depth. With `train/` and `test/`
    at the top each of them has one of these layouts; without, a fifth of every class is drawn as
    test, evenly over the clients, and every client keeps training images. Classes and clients are
    numbered in the order of their names. Images of another size than the most common one are
    resized to it, colours are kept unless every image is gray; `notes` of the result say so.

    Args:
        path: the folder.
        seed: of the drawn split.

    Raises:
        FedCoEError: naming the file or folder and what is wrong with it.
    """
    path = Path(path)
    try:
        root = path.resolve(strict=True)
        tops = {entry.name for entry in root.iterdir() if not ignored(entry)}
        if not {"train", "test"} <= tops:
            if tops in ({"train"}, {"test"}):
                raise FedCoEError(f"{path}: has {tops.pop()}/ alone; needs train/ and test/")
            items = _items(root, root)
            test = _draw_test(path, items, seed)
            trained = [item for item, out in zip(items, test, strict=True) if not out]
            tested = [item for item, out in zip(items, test, strict=True) if out]
        elif tops > {"train", "test"}:
            other = sorted(tops - {"train", "test"})[0]
            raise FedCoEError(f"{path / other}: stands beside train/ and test/; move it away")
        else:
            for split in (root / "train", root / "test"):
                if split.is_symlink():
                    raise FedCoEError(f"{split}: is a link; put the folder itself there")
            trained, tested = (_items(root / split, root) for split in ("train", "test"))
    except OSError as error:
        raise FedCoEError(f"{error.filename or path}: {error.strerror or error}") from None
    return _assemble(root, trained, tested)


def _assemble(root: Path, trained: list[_Item], tested: list[_Item]) -> RawDataset:
    classes = sorted({item.label for item in trained})
    clients = sorted({item.client for item in trained} - {""})
    index = {label: i for i, label in enumerate(classes)}
    for item in tested:
        if item.label not in index:
            raise FedCoEError(f"{item.path}: class {item.label!r} has no training image")
    headers = _each([item.path for item in (*trained, *tested)], read_header)
    sizes = Counter(size for size, _ in headers)
    size = max(sizes, key=lambda key: (sizes[key], key))
    mode = "L" if all(gray for _, gray in headers) else "RGB"
    total = len(headers) * size[0] * size[1] * len(mode)
    if total > MAX_BYTES:
        raise FedCoEError(
            f"{root}: {len(headers)} images of {size[0]}x{size[1]} need {total / 2**30:.0f} GiB, "
            f"at most {MAX_BYTES >> 30} are read; make the images smaller"
        )
    notes = []
    if others := len(headers) - sizes[size]:
        notes.append(
            f"{others} of {len(headers)} images resized to the most common size, "
            f"{size[0]}x{size[1]}"
        )
    if mode == "RGB" and (grays := sum(gray for _, gray in headers)):
        notes.append(f"{grays} of {len(headers)} images are gray and were turned into RGB")
    return RawDataset(
        x_train=read_pixels([item.path for item in trained], size, mode),
        y_train=np.array([index[item.label] for item in trained]),
        x_test=read_pixels([item.path for item in tested], size, mode),
        y_test=np.array([index[item.label] for item in tested]),
        classes=tuple(classes),
        source=f"folder {root.name}",
        licence="not stated (own data)",
        client_train=(
            np.searchsorted(clients, [item.client for item in trained]) if clients else None
        ),
        clients=tuple(clients),
        notes=tuple(notes),
    )


def _each(paths: Sequence[Path], read: Callable[[Path], _Read]) -> list[_Read]:
    """Read all files before anything is said, so that all that are broken are named at once."""
    found, bad = [], []
    for path in paths:
        try:
            found.append(read(path))
        except FedCoEError as error:
            bad.append(str(error))
    if bad:
        more = [f"and {len(bad) - _MAX_SAID} more"] if len(bad) > _MAX_SAID else []
        raise FedCoEError("; ".join(bad[:_MAX_SAID] + more))
    return found


def _items(folder: Path, root: Path) -> list[_Item]:
    files = list(walk_images(folder, root, depth=1))
    if not files:
        raise FedCoEError(f"{folder}: holds no images ({', '.join(sorted(_SUFFIXES))})")
    by_depth = {len(file.relative_to(folder).parts): file for file in files}
    if len(by_depth) > 1:
        one, other = (by_depth[depth] for depth in sorted(by_depth)[:2])
        raise FedCoEError(
            f"{folder}: mixes layouts ({one.relative_to(folder)} and {other.relative_to(folder)}); "
            "use class/image or client/class/image throughout"
        )
    if 1 in by_depth:
        raise FedCoEError(f"{by_depth[1]}: is in no class; use class/image or client/class/image")
    return [
        _Item("" if len(parts) == 2 else parts[0], parts[-2], file)
        for file in files
        for parts in (file.relative_to(folder).parts,)
    ]


def ignored(entry: Path) -> bool:
    """What may lie among images without being one: hidden files and notes."""
    return entry.name.startswith(".") or entry.suffix.lower() in _IGNORED


def walk_images(folder: Path, root: Path, depth: int) -> Iterator[Path]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if ignored(entry):
            continue
        if not entry.name.isprintable():
            raise FedCoEError(f"{folder}: holds {entry.name!r}; rename it to printable text")
        if entry.is_symlink():
            target = entry.resolve()
            if not target.is_relative_to(root):
                raise FedCoEError(f"{entry}: is a link that leaves the folder; copy the file there")
            if not target.is_file():
                raise FedCoEError(f"{entry}: is a link, but not to an image; remove it")
        if entry.is_dir():
            if depth > 2:
                raise FedCoEError(
                    f"{entry}: is too deep; use class/image or client/class/image throughout"
                )
            yield from walk_images(entry, root, depth + 1)
        elif entry.suffix.lower() in _SUFFIXES and entry.is_file():
            yield entry
        else:
            raise FedCoEError(
                f"{entry}: is not an image ({', '.join(sorted(_SUFFIXES))}); move it away"
            )


def _draw_test(path: Path, items: list[_Item], seed: int) -> NDArray[np.bool_]:
    labels = np.array([item.label for item in items])
    clients = np.array([item.client for item in items])
    test = np.zeros(len(items), dtype=bool)
    shuffled = stream(seed, "folder_split").permutation(len(items))
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        if len(members) < 2:
            raise FedCoEError(f"{path}: class {label} has one image; training and test need two")
        # In the order of the clients, evenly spaced picks take the same share of each of them.
        members = members[np.argsort(clients[members], kind="stable")]
        count = max(1, round(_TEST * len(members)))
        test[members[((np.arange(count) + 0.5) * len(members) / count).astype(int)]] = True
    for client in np.unique(clients):
        own = np.flatnonzero(clients == client)
        if test[own].all():
            test[own[0]] = False
    return test


def read_header(path: Path) -> tuple[tuple[int, int], bool]:
    """(width, height) and whether it is gray, without decoding."""
    with _open(path) as image:
        pixels = image.width * image.height
        try:
            # Pillow keeps colours in four bytes.
            check_unpacked(4 * pixels, path.stat().st_size)
        except ValueError as error:
            raise FedCoEError(
                f"{path}: {image.width}x{image.height} pixels, far too large: {error}"
            ) from None
        if pixels > _MAX_PIXELS:
            raise FedCoEError(f"{path}: {image.width}x{image.height} pixels, far too large")
        if image.mode not in _GRAY | _COLOUR:
            raise FedCoEError(f"{path}: has more than 8 bits a channel; convert it to 8 bits")
        return image.size, image.mode in _GRAY


def read_pixels(paths: Sequence[Path], size: tuple[int, int], mode: str) -> NDArray[np.uint8]:
    """Images resized to `size` (width, height) in PIL's `mode` (L or RGB): [n, H, W, C].

    Raises:
        FedCoEError: naming the file that is no readable image.
    """
    shape = (len(paths), size[1], size[0], len(mode))
    try:
        check_unpacked(math.prod(shape), sum(path.stat().st_size for path in paths))
    except ValueError as error:
        raise FedCoEError(f"{paths[0].parent}: {len(paths)} images: {error}") from None
    pixels = np.empty(shape, dtype=np.uint8)
    rows = iter(pixels)

    def decode(path: Path) -> None:
        with _open(path) as image:
            try:
                image = image.convert(mode)
            except Exception as error:  # decoders meet broken files with any exception
                raise _unreadable(path, error) from None
            if image.size != size:
                image = image.resize(size, Image.Resampling.BILINEAR)
            next(rows)[:] = np.asarray(image).reshape(pixels.shape[1:])

    _each(paths, decode)
    return pixels


def _open(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # From memory: Pillow believes lengths in the file, and files allocate what is asked.
            content = read_bytes(path, _MAX_FILE)
            if content[:4] == b"RIFF":
                width, height = _webp_size(content)
                check_unpacked(4 * width * height, len(content))
            return Image.open(BytesIO(content), formats=_FORMATS)
    except Exception as error:  # decoders meet broken files with any exception
        raise _unreadable(path, error) from None


def _webp_size(content: bytes) -> tuple[int, int]:
    """Width and height: Pillow allocates the pixels of WebP before it tells them."""
    match content[12:16]:
        case b"VP8X":
            sides = content[24:27], content[27:30]
            return 1 + int.from_bytes(sides[0], "little"), 1 + int.from_bytes(sides[1], "little")
        case b"VP8L":
            bits = int.from_bytes(content[21:25], "little")
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    sides = content[26:28], content[28:30]
    return int.from_bytes(sides[0], "little") & 0x3FFF, int.from_bytes(sides[1], "little") & 0x3FFF


def _unreadable(path: Path, error: Exception) -> FedCoEError:
    formats = ", ".join(_FORMATS)
    known = not isinstance(error, UnidentifiedImageError)
    said = one_line(error) if known else f"it is none of {formats}"
    return FedCoEError(f"{path}: not readable as an image ({said})")
