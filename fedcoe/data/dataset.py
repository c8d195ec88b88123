"""The one dataset a project works on: a folder of plain arrays, opened without being read.

`data/` holds `x_train.npy`, `y_train.npy`, `x_test.npy`, `y_test.npy`, for data that comes from
real clients `client_train.npy`, and `dataset.json`, which says what they are. Nothing in the
folder can execute code, and the same dataset is the same bytes on every machine.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    field_validator,
    model_validator,
)

from fedcoe.data.untrusted import MAX_TEXT, one_line, open_npy, read_bytes
from fedcoe.errors import FedCoEError

INFO = "dataset.json"
# Little-endian by name: the bytes must not depend on the machine.
DTYPES = {"x_train": "|u1", "y_train": "<i8", "x_test": "|u1", "y_test": "<i8"}
CLIENT_DTYPE = "<i4"
FILES = frozenset({INFO, *(f"{name}.npy" for name in (*DTYPES, "client_train"))})

Count = Annotated[int, Field(ge=1)]


class DatasetInfo(BaseModel):
    """What `dataset.json` says.

    `shape` is [height, width, channels]; `mean` and `std` are one float a channel, in units where
    a pixel runs from 0 to 1, over the training split, rounded to 6 digits; `clients` names the
    natural clients (empty: the data has none); `hash` is `hash_arrays` of the arrays.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    classes: list[str] = Field(min_length=2)
    shape: list[Count] = Field(min_length=3, max_length=3)
    train: Count
    test: Count
    mean: list[FiniteFloat]
    std: list[Annotated[FiniteFloat, Field(gt=0.0)]]
    clients: list[str]
    source: str
    licence: str
    hash: str = Field(pattern="^[0-9a-f]{64}$")

    @field_validator("name")
    @classmethod
    def _one_part_of_a_path(cls, name: str) -> str:
        # Results and checkpoints lie in folders that begin with it.
        if "/" in name or not name.isprintable() or not name.strip(" ."):
            raise ValueError("must be printable text without /")
        return name

    @model_validator(mode="after")
    def _one_statistic_a_channel(self) -> "DatasetInfo":
        if not len(self.mean) == len(self.std) == self.shape[2]:
            raise ValueError(f"mean and std must have {self.shape[2]} entries, one a channel")
        return self


@dataclass(frozen=True)
class Dataset:
    """An opened dataset; the arrays are read-only maps of the files.

    Attributes:
        x_train, x_test: uint8 [N, height, width, channels].
        y_train, y_test: int64 [N], indices into `info.classes`.
        client_train: int32 [N], indices into `info.clients`, or None without natural clients.
    """

    x_train: NDArray[np.uint8]
    y_train: NDArray[np.int64]
    x_test: NDArray[np.uint8]
    y_test: NDArray[np.int64]
    client_train: NDArray[np.int32] | None
    info: DatasetInfo


@dataclass(frozen=True)
class RawDataset:
    """What a source hands over: arrays as in `Dataset`, labels of any integer type.

    `notes` are sentences for the user about what had to be changed, e.g. resized.
    """

    x_train: NDArray[np.uint8]
    y_train: NDArray[Any]
    x_test: NDArray[np.uint8]
    y_test: NDArray[Any]
    classes: tuple[str, ...]
    source: str
    licence: str
    client_train: NDArray[Any] | None = None
    clients: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def load_dataset(folder: str | Path = "data") -> Dataset:
    """Open a dataset in milliseconds: pixels are mapped, not read, and the hash is not checked.

    Raises:
        FedCoEError: the file, what is wrong with it, and what to run.
    """
    folder = Path(folder)
    info = _load_info(folder / INFO)
    dtypes = DTYPES | ({"client_train": CLIENT_DTYPE} if info.clients else {})
    arrays = {name: _open_array(folder / f"{name}.npy", dtypes[name]) for name in dtypes}
    if not info.clients and (folder / "client_train.npy").exists():
        raise _broken(folder / "client_train.npy", f"is there, but {INFO} names no clients")
    for split, count in (("train", info.train), ("test", info.test)):
        expected = {f"x_{split}": (count, *info.shape), f"y_{split}": (count,)}
        if split == "train" and info.clients:
            expected["client_train"] = (count,)
        for name, shape in expected.items():
            if arrays[name].shape != shape:
                said = f"has shape {arrays[name].shape}, {INFO} says {shape}"
                raise _broken(folder / f"{name}.npy", said)
    _check_ranges(folder, arrays, info)
    return Dataset(
        x_train=arrays["x_train"],
        y_train=arrays["y_train"],
        x_test=arrays["x_test"],
        y_test=arrays["y_test"],
        client_train=arrays.get("client_train"),
        info=info,
    )


def verify_dataset(folder: str | Path = "data") -> Dataset:
    """`load_dataset`, and read every byte to compare it with the hash in `dataset.json`.

    Raises:
        FedCoEError: as `load_dataset`, or if the arrays are not those that were written.
    """
    dataset = load_dataset(folder)
    arrays = {name: getattr(dataset, name) for name in (*DTYPES, "client_train")}
    if hash_arrays(arrays) != dataset.info.hash:
        raise _broken(Path(folder), f"the arrays do not have the hash that {INFO} states")
    return dataset


def write_dataset(folder: str | Path, name: str, raw: RawDataset) -> DatasetInfo:
    """Check a dataset and write it, flushed to disk; equal input gives equal bytes.

    Args:
        folder: a folder that does not exist yet.
        name: what the dataset is called from now on.
        raw: arrays and descriptions; see `RawDataset`.

    Raises:
        FedCoEError: what is wrong with the arrays, in one line. Nothing is written then.
        OSError: the disk's complaint.
    """
    folder = Path(folder)
    _validate(name, raw)
    arrays = {
        key: np.ascontiguousarray(getattr(raw, key), dtype=dtype) for key, dtype in DTYPES.items()
    }
    if raw.client_train is not None:
        arrays["client_train"] = np.ascontiguousarray(raw.client_train, dtype=CLIENT_DTYPE)
    mean, std = channel_statistics(arrays["x_train"])
    info = DatasetInfo(
        name=name,
        classes=list(raw.classes),
        shape=list(raw.x_train.shape[1:]),
        train=len(raw.x_train),
        test=len(raw.x_test),
        mean=mean,
        std=std,
        clients=list(raw.clients),
        source=raw.source,
        licence=raw.licence,
        hash=hash_arrays(arrays),
    )
    folder.mkdir(parents=True)
    for key, array in arrays.items():
        with (folder / f"{key}.npy").open("xb") as file:
            np.save(file, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
    with (folder / INFO).open("x", encoding="utf-8", newline="\n") as text:
        text.write(json.dumps(info.model_dump(), indent=2, ensure_ascii=False) + "\n")
        text.flush()
        os.fsync(text.fileno())
    return info


def hash_arrays(arrays: Mapping[str, NDArray[Any] | None]) -> str:
    """sha256 over names, types, shapes and bytes, in the order of the names; None is left out."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        if array is not None:
            digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
            digest.update(array.data.cast("B"))
    return digest.hexdigest()


def channel_statistics(images: NDArray[np.uint8]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of every channel, in units where a pixel runs from 0 to 1.

    Counting grey levels makes the sums exact integers, so the result depends neither on the size
    of the blocks nor on the machine. A constant channel gets a deviation of one grey level:
    dividing by it is then harmless.

    Args:
        images: uint8 [N, height, width, channels], N >= 1.
    """
    _, height, width, channels = images.shape
    levels = np.zeros((channels, 256), dtype=np.int64)
    block = max(1, 2**22 // (height * width))  # bincount widens pixels to 8 bytes each
    for start in range(0, len(images), block):
        for channel in range(channels):
            pixels = images[start : start + block, :, :, channel].ravel()
            levels[channel] += np.bincount(pixels, minlength=256)
    pixels_each = len(images) * height * width
    mean, std = [], []
    for row in levels.tolist():
        total = sum(level * count for level, count in enumerate(row))
        squares = sum(level * level * count for level, count in enumerate(row))
        variance = (squares * pixels_each - total * total) / pixels_each**2
        mean.append(round(total / pixels_each / 255, 6))
        std.append(round(max(variance**0.5, 1.0) / 255, 6))
    return mean, std


def _load_info(path: Path) -> DatasetInfo:
    try:
        return DatasetInfo.model_validate_json(read_bytes(path, MAX_TEXT))
    except FileNotFoundError:
        raise FedCoEError(f"{path}: no dataset here; run `fedcoe fetch`") from None
    except OSError as error:
        raise _broken(path, error.strerror or str(error)) from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        said = f"{key}: {first['msg']}" if key else first["msg"]
        raise _broken(path, one_line(said)) from None
    except ValueError as error:
        raise _broken(path, one_line(error)) from None


def _open_array(path: Path, dtype: str) -> NDArray[Any]:
    try:
        array = open_npy(path)
    except FileNotFoundError:
        raise _broken(path, "is missing") from None
    except (OSError, ValueError) as error:
        raise _broken(path, f"is not a whole .npy file ({one_line(error)})") from None
    if array.dtype.str != dtype:
        raise _broken(path, f"has dtype {array.dtype}, must be {np.dtype(dtype)}")
    if not array.flags.c_contiguous:
        raise _broken(path, "is not in C order")
    return array


def _check_ranges(folder: Path, arrays: Mapping[str, NDArray[Any]], info: DatasetInfo) -> None:
    for name, count in (
        ("y_train", len(info.classes)),
        ("y_test", len(info.classes)),
        ("client_train", len(info.clients)),
    ):
        if name in arrays and not _within(arrays[name], count):
            raise _broken(folder / f"{name}.npy", f"has values outside 0..{count - 1}")


def _validate(name: str, raw: RawDataset) -> None:
    def refuse(what: str) -> FedCoEError:
        return FedCoEError(f"dataset {name!r}: {what}")

    for split, x, y in (("train", raw.x_train, raw.y_train), ("test", raw.x_test, raw.y_test)):
        if x.dtype != np.uint8 or x.ndim != 4:
            raise refuse(f"x_{split} must be uint8 [N,H,W,C], got {x.dtype} {list(x.shape)}")
        if not x.size:
            raise refuse(f"the {split} split has no images")
        if y.shape != (len(x),) or y.dtype.kind not in "iu":
            raise refuse(f"y_{split} must be {len(x)} integers, got {y.dtype} {list(y.shape)}")
        if not _within(y, len(raw.classes)):
            raise refuse(
                f"y_{split} runs from {y.min()} to {y.max()}, must be 0..{len(raw.classes) - 1}"
            )
    if raw.x_train.shape[1:] != raw.x_test.shape[1:]:
        train, test = (list(x.shape[1:]) for x in (raw.x_train, raw.x_test))
        raise refuse(f"training images are {train}, test images {test}")
    if len(raw.classes) < 2:
        raise refuse("needs at least two classes")
    for what, names in (("class", raw.classes), ("client", raw.clients)):
        if len(set(names)) != len(names):
            raise refuse(f"two entries of the {what} names are equal")
        if odd := [name for name in names if not name.isprintable() or not name.strip()]:
            raise refuse(f"the {what} name {odd[0][:50]!r} is no printable text")
    if (raw.client_train is None) != (not raw.clients):
        raise refuse("client_train and the names of the clients must come together")
    if raw.client_train is not None:
        ids = raw.client_train
        if ids.shape != raw.y_train.shape or ids.dtype.kind not in "iu":
            raise refuse(f"client_train must be {len(raw.y_train)} integers")
        if np.unique(ids).tolist() != list(range(len(raw.clients))):
            raise refuse(
                f"client_train must use every id 0..{len(raw.clients) - 1} and no other; "
                f"got {ids.min()}..{ids.max()}, {len(np.unique(ids))} different"
            )


def _within(values: NDArray[Any], count: int) -> bool:
    return bool(values.min() >= 0 and values.max() < count)


def _broken(path: Path, what: str) -> FedCoEError:
    return FedCoEError(f"{path}: {what}; run `fedcoe fetch` to build the dataset anew")
