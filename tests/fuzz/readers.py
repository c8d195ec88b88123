"""Every reader of files that a user may be handed: whole files to start from, and how to read.

Compressed and checksummed formats are damaged inside as well as outside: damage that a checksum
finds tests the checksum alone.
"""

import gzip
import io
import json
import pickle
import random
import re
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mutate import mutate
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load, save

from fedcoe import bundle, state
from fedcoe.bundle import export_models, load_bundle
from fedcoe.config import validate_settings
from fedcoe.data.dataset import RawDataset, load_dataset, write_dataset
from fedcoe.data.partition import load_partition, make_partition, save_partition
from fedcoe.data.sources import cifar, idx, tiny_imagenet
from fedcoe.data.sources.arrays import from_arrays
from fedcoe.data.sources.client import read_client
from fedcoe.data.sources.folder import from_folder
from fedcoe.data.sources.images import read_images
from fedcoe.engine.clients import ClientData
from fedcoe.errors import FedCoEError
from fedcoe.methods.base import Federation
from fedcoe.methods.settings import method_class
from fedcoe.state import PersonalStore, load_state, save_state

RNG = np.random.default_rng(0)


class Reader:
    """Files of one kind: `seeds` are whole ones, `read` is what the project does with one."""

    seeds: list[bytes]

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def damaged(self, rng: random.Random) -> bytes:
        return mutate(rng, rng.choice(self.seeds), self.seeds)

    def read(self, data: bytes) -> None:
        raise NotImplementedError

    def file(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path


class Idx(Reader):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.inner = []
        for shape in ((5, 6, 7), (9,), (40, 28, 28)):
            header = bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape)
            self.inner.append(header + RNG.integers(0, 256, shape, np.uint8).tobytes())
        self.seeds = [gzip.compress(content) for content in self.inner]

    def damaged(self, rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            return super().damaged(rng)
        return gzip.compress(mutate(rng, rng.choice(self.inner), self.inner), 1)

    def read(self, data: bytes) -> None:
        path = self.file("x.gz", data)
        _all([lambda: idx.read_idx(path, 3), lambda: idx.read_idx(path, 1)])


def _tar(members: Mapping[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, member in members.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(member)
            tar.addfile(info, io.BytesIO(member))
    return content.getvalue()


class Cifar(Reader):
    """CIFAR-10's archive with batches of two images."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        pixels = RNG.integers(0, 256, (2, 3072), np.uint8)
        names = cifar._FAMILIES["cifar10"]
        members = [*names.train, names.test]
        self.members, self.pickles = [], []
        for protocol in (0, 1, 2, 3, 4, 5):
            batch = {b"batch_label": b"one", b"labels": [1, 0], b"data": pixels}
            batch |= {b"filenames": [b"a.png", b"b.png"]}
            batch = pickle.dumps(batch, protocol)
            meta = pickle.dumps({b"label_names": [b"plane", b"car"], b"num_vis": 3072}, protocol)
            self.members.append({name: batch for name in members} | {names.meta: meta})
            self.pickles += [batch, meta]
        self.tars = [_tar(each) for each in self.members]
        self.seeds = [gzip.compress(tar, 1) for tar in self.tars]

    def damaged(self, rng: random.Random) -> bytes:
        kind = rng.random()
        if kind < 0.1:
            return super().damaged(rng)
        if kind < 0.8:
            members = dict(rng.choice(self.members))
            name = rng.choice(list(members))
            members[name] = mutate(rng, members[name], self.pickles)
            return gzip.compress(_tar(members), 1)
        tar = bytearray(mutate(rng, rng.choice(self.tars), self.tars))
        start = 0
        while start + 512 <= len(tar):  # right checksums, so that what is damaged is looked at
            if rng.random() < 0.5:
                block = tar[start : start + 512]
                block[148:156] = b" " * 8
                tar[start + 148 : start + 156] = b"%06o\0 " % sum(block)
            size = bytes(tar[start + 124 : start + 136]).split(b"\0")[0]
            blocks = (int(size, 8) + 511) // 512 if re.fullmatch(rb"[0-7]+", size) else 0
            start += 512 * (1 + blocks)
        return gzip.compress(bytes(tar), 1)

    def read(self, data: bytes) -> None:
        self.file("cifar10/cifar-10-python.tar.gz", data)
        cifar.build("cifar10", self.folder, check_md5=False)


def _npy(array: np.ndarray[Any, Any]) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


class Npz(Reader):
    """Arrays to train with, a client's arrays, and arrays to predict."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        x = RNG.integers(0, 256, (8, 4, 4), np.uint8)
        train = {"x_train": x, "y_train": np.arange(8) % 2, "x_test": x, "y_test": np.arange(8) % 2}
        names = {"classes": np.array(["a", "b"]), "client_train": np.arange(8) // 4}
        client = {"x": x, "y": np.array(["a", "b"] * 4)}
        self.members = [
            {f"{name}.npy": _npy(array) for name, array in arrays.items()}
            for arrays in (train, train | names, client, {"x": x}, client | {"y": np.arange(8) % 2})
        ]
        self.arrays = [content for members in self.members for content in members.values()]
        self.seeds = [_zip(each, method) for each in self.members for method in (0, 8)]

    def damaged(self, rng: random.Random) -> bytes:
        if rng.random() < 0.4:
            return super().damaged(rng)
        members = dict(rng.choice(self.members))
        name = rng.choice(list(members))
        content = members[name]
        if rng.random() < 0.5:  # in the header, keeping its length right
            header = mutate(rng, content[10:128], [each[10:128] for each in self.arrays])
            content = content[:8] + struct.pack("<H", len(header) % 2**16) + header + content[128:]
        else:
            content = mutate(rng, content, self.arrays)
        members[name] = content
        return _zip(members, rng.choice((0, 8)))

    def read(self, data: bytes) -> None:
        path = self.file("x.npz", data)
        calls: list[Callable[[], object]] = [
            lambda: write_dataset(self.folder / "out", "x", from_arrays(path)),
            lambda: read_client(path, (4, 4, 1), ("a", "b")),
            lambda: read_images(path, (4, 4, 1)),
        ]
        _all(calls)
        shutil.rmtree(self.folder / "out", ignore_errors=True)


def _zip(members: Mapping[str, bytes], method: int) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as file:
        for name, member in members.items():
            file.writestr(zipfile.ZipInfo(name), member, method)
    return content.getvalue()


def _all(calls: list[Callable[[], object]]) -> None:
    """Every call once; refused if each of them refuses."""
    refusals = []
    for call in calls:
        try:
            call()
        except FedCoEError as error:
            refusals.append(error)
            if "\n" in str(error) or len(str(error)) > 1000:
                raise
    if len(refusals) == len(calls):
        raise refusals[0]


class Images(Reader):
    """A folder of images to train with, of a client, and to predict; and Tiny ImageNet's zip."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        colours = Image.fromarray(RNG.integers(0, 256, (9, 11, 3), np.uint8))
        self.seeds = []
        for form, mode in (
            *(("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
            *(("JPEG", mode) for mode in ("L", "RGB", "CMYK")),
            *(("BMP", mode) for mode in ("1", "L", "P", "RGB")),
            *(("WEBP", mode) for mode in ("RGB", "RGBA")),
        ):
            content = io.BytesIO()
            image = colours.convert("L").convert(mode) if mode == "I;16" else colours.convert(mode)
            image.save(content, form)
            self.seeds.append(content.getvalue())
        self.seeds.append(_rle_bmp())
        for form, options in (
            ("PNG", {"interlace": 1, "exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0", "dpi": (3, 3)}),
            ("JPEG", {"progressive": True, "comment": b"hello", "icc_profile": bytes(200)}),
            ("WEBP", {"lossless": True}),
            ("PNG", {"save_all": True, "append_images": [colours, colours]}),
            ("WEBP", {"save_all": True, "append_images": [colours, colours]}),
        ):
            content = io.BytesIO()
            colours.save(content, form, **options)
            self.seeds.append(content.getvalue())

    def damaged(self, rng: random.Random) -> bytes:
        data = super().damaged(rng)
        if data[:8] == b"\x89PNG\r\n\x1a\n" and rng.random() < 0.7:
            return _png_checksums(data)
        return data

    def read(self, data: bytes) -> None:
        if data[:4] == b"RIFF":
            suffix = "webp"
        else:
            suffix = {b"\x89P": "png", b"\xff\xd8": "jpg", b"BM": "bmp"}.get(data[:2], "png")
        photos = self.folder / "photos"
        shutil.rmtree(photos, ignore_errors=True)
        for label in ("a", "b"):
            self.file(f"photos/{label}/0.{suffix}", data)
            self.file(f"photos/{label}/1.bmp", self.seeds[11])
        _all(
            [
                lambda: from_folder(photos),
                lambda: read_client(photos, (8, 8, 1), ("a", "b")),
                lambda: read_images(photos, (8, 8, 3)),
            ]
        )


def _rle_bmp() -> bytes:
    """8x4 in BMP's run-length coding: a run, a literal, a jump, the end."""
    pixels = b"\x08\x01\x00\x00\x00\x04\x01\x02\x03\x04\x04\x05\x00\x02\x02\x01\x02\x07\x00\x01"
    palette = bytes(range(256)) * 4
    header = struct.pack("<IiiHHIIiiII", 40, 8, 4, 1, 8, 1, len(pixels), 0, 0, 256, 0)
    start = 14 + len(header) + len(palette)
    return (
        b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + header + palette + pixels
    )


def _png_checksums(data: bytes) -> bytes:
    result, start = bytearray(data), 8
    while start + 12 <= len(result):
        (size,) = struct.unpack(">I", result[start : start + 4])
        end = start + 8 + size
        if end + 4 > len(result):
            break
        result[end : end + 4] = struct.pack(">I", zlib.crc32(result[start + 4 : end]))
        start = end + 4
    return bytes(result)


class TinyImageNet(Reader):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        content = io.BytesIO()
        Image.fromarray(RNG.integers(0, 256, (64, 64), np.uint8)).save(content, "JPEG")
        jpeg = content.getvalue()
        self.members = {
            f"tiny-imagenet-200/{name}": member
            for name, member in {
                "wnids.txt": b"n01\nn02\n",
                "words.txt": b"n01\tcrane\nn02\tcrane, lifting device\n",
                "train/n01/images/n01_0.JPEG": jpeg,
                "train/n02/images/n02_0.JPEG": jpeg,
                "val/val_annotations.txt": b"val_0.JPEG\tn02\t0\t0\t9\t9\n",
                "val/images/val_0.JPEG": jpeg,
            }.items()
        }
        self.seeds = [_zip(self.members, method) for method in (0, 8)]

    def damaged(self, rng: random.Random) -> bytes:
        if rng.random() < 0.4:
            return super().damaged(rng)
        members = dict(self.members)
        name = rng.choice(list(members))
        members[name] = mutate(rng, members[name], list(self.members.values()))
        return _zip(members, rng.choice((0, 8)))

    def read(self, data: bytes) -> None:
        self.file("tiny-imagenet/tiny-imagenet-200.zip", data)
        tiny_imagenet.build("tiny-imagenet", self.folder, check_md5=False)


class Project(Reader):
    """A folder with a dataset, a partition, a trained model and a checkpoint.

    The first byte of an input says which file the rest of it stands for.
    """

    files: tuple[str, ...]

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        labels = np.arange(60) % 2
        images = RNG.integers(0, 256, (60, 8, 8, 1), np.uint8)
        raw = RawDataset(
            *(images, labels, images[:9], labels[:9], ("a", "b"), "made up", "CC0"),
            client_train=np.arange(60) // 20,
            clients=("x", "y", "z"),
        )
        write_dataset(folder / "data", "made-up", raw)
        settings = validate_settings(
            {
                "partition": {"scheme": "natural", "min_samples": 4, "new_clients": 0.34},
                "model": {"name": "gn_cnn"},
                "method": {"name": "fedcoe", "experts": 2, "gate_features": 4},
            },
            "params.yaml",
        )
        partition = make_partition(
            settings.partition, labels, 9, 2, raw.client_train, ("x", "y", "z")
        )
        save_partition(partition, settings.partition, labels, ("a", "b"), folder / "partitions")
        data = ClientData(load_dataset(folder / "data"), load_partition(folder / "partitions"))
        method = method_class("fedcoe")(Federation.of(settings, data))
        trained = method.init()
        gate, head = RNG.normal(size=(2, 9, 2)).astype(np.float32)
        trained = trained.with_extra(gate=gate, head=head)
        export_models(folder / "models", method, trained, PersonalStore(folder / "personal"))
        save_state(folder / "checkpoint", trained, history={"rounds": [], "curves": []})
        self.whole = [(folder / name).read_bytes() for name in self.files]
        self.seeds = [bytes((i,)) + content for i, content in enumerate(self.whole)]

    def damaged(self, rng: random.Random) -> bytes:
        which = rng.randrange(len(self.files))
        return bytes((which,)) + self.change(rng, self.whole[which])

    def change(self, rng: random.Random, content: bytes) -> bytes:
        return mutate(rng, content, self.whole)

    def read(self, data: bytes) -> None:
        which = data[0] % len(self.files)
        path = self.file(self.files[which], data[1:])
        try:
            self.load(path)
        finally:
            path.write_bytes(self.whole[which])

    def load(self, path: Path) -> None:
        raise NotImplementedError


class Manifests(Project):
    """dataset.json, the partition's manifest, state.json of a model; and the arrays beside them."""

    files = (
        "data/dataset.json",
        "partitions/manifest.json",
        "models/state.json",
        "data/y_train.npy",
        "partitions/client.npy",
        "partitions/test_group.npy",
    )

    def change(self, rng: random.Random, content: bytes) -> bytes:
        content = super().change(rng, content)
        try:
            values = json.loads(content)
        except (ValueError, RecursionError):
            return content
        if isinstance(values, dict) and values.pop("hash", None) and "settings" in values:
            return json.dumps(values | {"hash": bundle._hash(values)}).encode()
        return content

    def load(self, path: Path) -> None:
        if path.parent.name == "data":
            load_dataset(path.parent)
        elif path.parent.name == "partitions":
            partition = load_partition(path.parent)
            ClientData(load_dataset(self.folder / "data"), partition)
        else:
            load_bundle(path.parent).predict(np.zeros((2, 8, 8, 1), np.uint8), "unlabelled")


def _in_header(rng: random.Random, content: bytes, others: list[bytes]) -> bytes:
    """Damage the JSON at the front of a safetensors file, its length put right."""
    (size,) = struct.unpack("<Q", content[:8])
    header = mutate(rng, content[8 : 8 + size], [other[8:2000] for other in others])
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


class Safetensors(Project):
    """A model's experts and gate."""

    files = ("models/experts/expert-0.safetensors", "models/gate.safetensors")

    def change(self, rng: random.Random, content: bytes) -> bytes:
        if rng.random() < 0.7:
            content = save(load(content))  # without the hash, as older versions wrote them
        if rng.random() < 0.6:
            return _in_header(rng, content, self.whole)
        return super().change(rng, content)

    def load(self, path: Path) -> None:
        load_bundle(self.folder / "models").predict(np.zeros((2, 8, 8, 1), np.uint8), "unlabelled")


class Checkpoint(Project):
    """The state of a run in the middle."""

    files = ("checkpoint",)

    def change(self, rng: random.Random, content: bytes) -> bytes:
        kind = rng.random()
        if kind < 0.4:  # what the hash covers, with a right hash
            arrays = load(content)
            with safe_open(self.folder / "checkpoint", framework="np") as file:
                text = file.metadata()["fedcoe"].partition(" ")[2]
            text = mutate(rng, text.encode(), self.whole).decode("utf-8", "replace")
            return save(arrays, {"fedcoe": f"{state._digest(text, arrays)} {text}"})
        if kind < 0.8:
            return _in_header(rng, content, self.whole)
        return super().change(rng, content)

    def load(self, path: Path) -> None:
        load_state(path)


READERS: dict[str, type[Reader]] = {
    "idx": Idx,
    "cifar": Cifar,
    "npz": Npz,
    "images": Images,
    "tiny-imagenet": TinyImageNet,
    "safetensors": Safetensors,
    "manifests": Manifests,
    "checkpoint": Checkpoint,
}
