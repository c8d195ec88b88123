"""Files made to harm: code in data, paths that lead elsewhere, sizes that fill the memory."""

import ast
import gzip
import io
import os
import pickle
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedcoe.bundle import load_bundle
from fedcoe.data import untrusted
from fedcoe.data.dataset import load_dataset
from fedcoe.data.fetch import fetch
from fedcoe.data.partition import load_partition
from fedcoe.data.sources import cifar, idx, pickled, tiny_imagenet
from fedcoe.data.sources import folder as folder_module
from fedcoe.data.sources.arrays import from_arrays
from fedcoe.data.sources.client import read_client
from fedcoe.data.sources.folder import from_folder
from fedcoe.data.sources.images import read_images
from fedcoe.errors import FedCoEError
from fedcoe.state import load_state

ROOT = Path(__file__).parents[2]


def refusal(call: Callable[..., object], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(FedCoEError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    return str(caught.value)


@contextmanager
def at_most(mebibytes: int) -> Iterator[None]:
    """The block may not take more memory than this at any time."""

    def peak() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) >> 10

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak()
    yield
    assert peak() - before <= mebibytes


# Code


FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "tarfile"}
FORBIDDEN_CALLS = {
    *("np.load", "numpy.load", "torch.load", "torch.jit.load", "torch.hub.load", "yaml.full_load"),
    *("yaml.unsafe_load", "pd.read_pickle", "eval", "exec", "shutil.unpack_archive", "os.system"),
}


def test_the_source_has_no_reader_that_can_run_code_or_unpack_to_disk() -> None:
    found = []
    for path in sorted(
        p for top in ("fedcoe", "tasks", "flows") for p in (ROOT / top).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            if {name.split(".")[0] for name in names} & FORBIDDEN_MODULES:
                found.append(f"{path.name}:{node.lineno} imports {names}")
            if isinstance(node, ast.Call) and (
                ast.unparse(node.func) in FORBIDDEN_CALLS
                or ast.unparse(node.func).endswith((".extractall", ".extract"))
                or any(
                    key.arg == "allow_pickle" and ast.unparse(key.value) != "False"
                    for key in node.keywords
                )
            ):
                found.append(f"{path.name}:{node.lineno} {ast.unparse(node)[:60]}")
    assert found == []


class Shell:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def place(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def npy_of(value: object) -> bytes:
    content = io.BytesIO()
    np.save(content, np.array([value], dtype=object), allow_pickle=True)
    return content.getvalue()


def zip_of(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return content.getvalue()


def tar_of(members: dict[str, bytes], *others: tarfile.TarInfo) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for info in others:
            tar.addfile(info)
        for name, member in members.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(member)
            tar.addfile(info, io.BytesIO(member))
    return content.getvalue()


def cifar_members(hostile: bytes) -> dict[str, bytes]:
    family = cifar._FAMILIES["cifar10"]
    batch = pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [0]}, 2)
    meta = pickle.dumps({b"label_names": [b"x", b"y"]}, 2)
    return dict.fromkeys((*family.train, family.test), batch) | {
        family.meta: meta,
        "data_batch_2": hostile,
    }


def cifar10(site: Path) -> object:
    return cifar.build("cifar10", site, check_md5=False)


def arrays_with(site: Path, member: bytes) -> bytes:
    with zipfile.ZipFile(site / "own.npz") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    return zip_of(members | {"y_train.npy": member})


# name: the file, its content given a pickle and a hostile object, who reads it
Making = Callable[[Path, bytes, object], bytes]
DISGUISES: dict[str, tuple[str, Making, Callable[[Path], object]]] = {
    "idx": ("x.gz", lambda s, p, o: gzip.compress(p), lambda s: idx.read_idx(s / "x.gz", 1)),
    "cifar": (
        "cifar10/cifar-10-python.tar.gz",
        lambda s, p, o: tar_of(cifar_members(p)),
        cifar10,
    ),
    "tiny-imagenet": (
        "tiny-imagenet/tiny-imagenet-200.zip",
        lambda s, p, o: zip_of({"tiny-imagenet-200/wnids.txt": p}),
        lambda s: tiny_imagenet.build("tiny-imagenet", s, check_md5=False),
    ),
    "npz": (
        "own.npz",
        lambda s, p, o: arrays_with(s, npy_of(o)),
        lambda s: from_arrays(s / "own.npz"),
    ),
    "npz that is a pickle": ("own.npz", lambda s, p, o: p, lambda s: from_arrays(s / "own.npz")),
    "member of an npz that is a pickle": (
        "own.npz",
        lambda s, p, o: arrays_with(s, p),
        lambda s: from_arrays(s / "own.npz"),
    ),
    "client's npz": (
        "client.npz",
        lambda s, p, o: zip_of({"x.npy": npy_of(o)}),
        lambda s: read_client(s / "client.npz", (8, 8, 1), ("a", "b")),
    ),
    "npz to predict": (
        "x.npz",
        lambda s, p, o: zip_of({"x.npy": npy_of(o)}),
        lambda s: read_images(s / "x.npz", (8, 8, 1)),
    ),
    "image": ("photos/cat/0.png", lambda s, p, o: p, lambda s: from_folder(s / "photos")),
    "dataset.json": ("data/dataset.json", lambda s, p, o: p, lambda s: load_dataset(s / "data")),
    "array of the dataset": (
        "data/y_train.npy",
        lambda s, p, o: npy_of(o),
        lambda s: load_dataset(s / "data"),
    ),
    "partition's manifest": (
        "partitions/manifest.json",
        lambda s, p, o: p,
        lambda s: load_partition(s / "partitions"),
    ),
    "array of the partition": (
        "partitions/client.npy",
        lambda s, p, o: npy_of(o),
        lambda s: load_partition(s / "partitions"),
    ),
    "model's state": ("models/state.json", lambda s, p, o: p, lambda s: load_bundle(s / "models")),
    "expert": (
        "models/experts/expert-0.safetensors",
        lambda s, p, o: p,
        lambda s: load_bundle(s / "models"),
    ),
    "expert of torch.save": (
        "models/experts/expert-0.safetensors",
        lambda s, p, o: zip_of({"archive/data.pkl": p, "archive/version": b"3"}),
        lambda s: load_bundle(s / "models"),
    ),
    "gate": ("models/gate.safetensors", lambda s, p, o: p, lambda s: load_bundle(s / "models")),
    "checkpoint": ("round", lambda s, p, o: p, lambda s: load_state(s / "round")),
}


@pytest.mark.parametrize("reader", DISGUISES)
def test_a_pickle_in_the_place_of_data_runs_nothing(site: Path, reader: str) -> None:
    name, make, read = DISGUISES[reader]
    witness = site / "witness"
    attack = Shell(f"touch {witness}")
    for protocol in (0, 4):
        place(site / name, make(site, pickle.dumps(attack, protocol), attack))
        refusal(read, site)
        assert not witness.exists()
    pickle.loads(pickle.dumps(attack))
    assert witness.exists()  # the attack works where it is let


HEADER = b"\x80\x02"
PICKLES = {
    "bytes that claim 2**62": b"\x8e" + struct.pack("<Q", 2**62) + b".",
    "text that claims 2**31": b"X" + struct.pack("<I", 2**31) + b".",
    "a number of 2**31 bytes": b"\x8b" + struct.pack("<I", 2**31 - 1) + b".",
    "a key of a hundred thousand nested tuples": b"}(" + b")" + b"\x85" * 100_000 + b"K\x01u.",
    "a key that takes 2**60 steps to hash": b"}()" + b"q\x00h\x00\x86" * 60 + b"K\x01u.",
    "a key that is an array": b"}(cnumpy.core.multiarray\n_reconstruct\n"
    b"(cnumpy\nndarray\nNNtRK\x01u.",
    "a class by protocol 0": b"(ios\nsystem\n.",
    "a class made without being called": b"cos\nsystem\n)\x81.",
    "a class called with keywords": b"cos\nsystem\n)}\x92.",
    "a persistent id": b"Pos.system\n.",
    "an entry of the extension registry": b"\x82\x01.",
    "a name reached by dots": b"\x8c\x05numpy\x8c\x0dndarray.dump_\x93.",
    "the codec of another name": b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13tR.",
    "a type that is no byte": b"cnumpy\ndtype\n(U\x02O8K\x00K\x01tR.",
    "an array larger than its bytes": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"
    b"NNtR(K\x01J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86cnumpy\ndtype\n(U\x02u1K\x00K\x01tR\x89C\x01xtb.",
    "the state of a dictionary": b"}}b.",
    "nothing on the stack": b".",
    "no end": b"}" * 1000,
    "more empty lists than there is patience": b"]" * 1_100_000 + b".",
    "an opcode of no protocol": b"\xff.",
}


@pytest.mark.parametrize("attack", PICKLES)
def test_pickles_made_to_harm_are_refused_at_once(attack: str) -> None:
    began = time.monotonic()
    with at_most(256), pytest.raises((ValueError, OverflowError)):
        pickled.read_pickle(HEADER + PICKLES[attack])
    assert time.monotonic() - began < 20


def test_a_memo_index_of_two_thousand_million_takes_no_room() -> None:
    """Python's own unpickler fills 32 GiB with it."""
    with at_most(16):
        assert pickled.read_pickle(HEADER + b"}r\xff\xff\xff\x7f.") == {}


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_of_every_protocol_are_read_as_python_reads_them(protocol: int) -> None:
    value = {
        b"labels": [0, 1, -7, 255, 256, 70_000, -(2**31), 2**40],
        b"names": [b"a'\"\n\\", b"\xff" * 300, "ü".encode()],
        b"more": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), None, True, False, {}, {b"k": [[]]}),
    }
    assert pickled.read_pickle(pickle.dumps(value, protocol)) == value
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for one in (array, np.asfortranarray(array), array[:1]):
        found = pickled.read_pickle(pickle.dumps({b"data": one}, min(protocol, 4)))[b"data"]
        np.testing.assert_array_equal(found, one)


# Paths


def test_links_devices_and_names_that_lead_elsewhere_are_not_followed_in_a_tar(
    tmp_path: Path,
) -> None:
    members = cifar_members(b"")
    del members["data_batch_2"]
    secret = place(tmp_path / "secret", b"secret")
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, b"L", b"S"):
        wanted = tarfile.TarInfo("cifar-10-batches-py/data_batch_2")
        wanted.type, wanted.linkname = kind, str(secret)
        outside = [tarfile.TarInfo(name) for name in ("../evil", "/evil", "a/../../evil")]
        place(tmp_path / "cifar10/cifar-10-python.tar.gz", tar_of(members, wanted, *outside))
        before = sorted(tmp_path.rglob("*"))
        said = refusal(cifar10, tmp_path)
        assert "has no cifar-10-batches-py/data_batch_2" in said
        assert sorted(tmp_path.rglob("*")) == before


def test_names_that_lead_elsewhere_are_not_followed_in_a_zip(site: Path) -> None:
    with zipfile.ZipFile(site / "own.npz") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for name in ("../evil.npy", "/evil.npy", "x_train/../../evil.npy"):
        place(site / "own.npz", zip_of(members | {name: members["x_test.npy"]}))
        before = sorted(site.parent.rglob("*"))
        assert "unknown array" in refusal(from_arrays, site / "own.npz")
        assert sorted(site.parent.rglob("*")) == before


def test_names_of_classes_and_clients_are_never_paths(site: Path) -> None:
    with np.load(site / "own.npz") as file:
        values = dict(file)
    names = np.array(["../../a", "/etc/passwd", "c", "d"])
    np.savez(site / "own.npz", **values, classes=names)
    before = {path for path in site.parent.rglob("*") if "data" not in path.parts}
    info = fetch(from_path=site / "own.npz", target=site / "data").info
    assert info.classes == names.tolist()
    assert {path for path in site.parent.rglob("*") if "data" not in path.parts} == before


# Sizes


def png(width: int, height: int, pixels: bytes = b"", depth: int = 8, colour: int = 0) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def webp(width: int, height: int) -> bytes:
    """The header of a lossless image."""
    bits = (width - 1) | (height - 1) << 14
    body = b"VP8L" + struct.pack("<I", 10) + b"\x2f" + struct.pack("<I", bits) + bytes(5)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def webp_canvas(width: int, height: int) -> bytes:
    """An animation of no frames."""
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + sides
    body += b"ANIM" + struct.pack("<I", 6) + bytes(6)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def webp_lossy(width: int, height: int) -> bytes:
    body = b"VP8 " + struct.pack("<I", 10) + b"\x10\0\0\x9d\x01\x2a"
    body += struct.pack("<HH", width, height)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def bmp(width: int, height: int) -> bytes:
    return (
        b"BM"
        + struct.pack("<IHHI", 58, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 4, 0, 0, 0, 0)
        + bytes(4)
    )


def gif(width: int, height: int) -> bytes:
    content = io.BytesIO()
    Image.new("L", (1, 1)).save(content, "GIF")
    return content.getvalue()[:6] + struct.pack("<HH", width, height) + content.getvalue()[10:]


def jpeg(width: int, height: int) -> bytes:
    content = io.BytesIO()
    Image.new("L", (16, 16)).save(content, "JPEG")
    data = content.getvalue()
    start = data.index(b"\xff\xc0") + 5
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]


@pytest.mark.parametrize(
    ("content", "suffix"),
    [
        (png(60_000, 60_000), "png"),
        (png(2**31 - 1, 2**31 - 1), "png"),
        (png(12_000, 5_000), "png"),
        (png(7_000, 7_000, bytes(7_000 * 7_001)), "png"),  # whole: 49 MB of zeros in 48 kB
        (png(5_000, 5_000, bytes(5_000 * 5_001), colour=3), "png"),
        (webp(16_383, 16_383), "webp"),
        (webp_lossy(16_383, 16_383), "webp"),
        (webp_canvas(16_383, 16_383), "webp"),
        (bmp(30_000, 30_000), "bmp"),
        (bmp(7_000, -7_000), "bmp"),
        (gif(60_000, 60_000), "png"),
        (jpeg(65_000, 65_000), "jpg"),
        (jpeg(8_000, 8_000), "jpg"),
    ],
    ids=lambda value: f"{len(value)} bytes" if isinstance(value, bytes) else value,
)
def test_small_files_of_giant_images_are_refused_undecoded(
    site: Path, content: bytes, suffix: str
) -> None:
    path = place(site / f"photos/cat/bomb.{suffix}", content)
    for read in (
        lambda: from_folder(site / "photos"),
        lambda: read_client(site / "photos", (8, 8, 1), ("cat", "dog")),
        lambda: read_images(path, (8, 8, 1)),
    ):
        with at_most(48):
            assert path.name in refusal(read)


@pytest.mark.parametrize("make", [webp, webp_lossy, webp_canvas])
def test_the_size_of_webp_is_known_before_pillow_allocates_it(make: Callable[..., bytes]) -> None:
    assert folder_module._webp_size(make(9_000, 16_000)) == (9_000, 16_000)


def test_a_folder_of_small_files_cannot_fill_the_memory(site: Path) -> None:
    blank = png(4_000, 4_000, bytes(4_000 * 4_001))  # 16 MB in 16 kB: alone it is let through
    for i in range(40):
        place(site / f"photos/cat/blank-{i}.png", blank)
    with at_most(48):
        assert "which real data does not" in refusal(from_folder, site / "photos")


def header(shape: str, dtype: str = "|u1", version: int = 1) -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    width = "<H" if version == 1 else "<I"
    return b"\x93NUMPY" + bytes((version, 0)) + struct.pack(width, len(text)) + text


NPY = {
    "10**12 numbers": header("(1000000000000,)"),
    "sides that overflow": header("(4294967296, 4294967296, 4294967296)"),
    "a side of thirty digits": header(f"(0, {'9' * 30})"),
    "a side below zero": header("(-5, -5)") + bytes(25),
    "a quintillion empty strings": header("(1000000000000000,)", "<U0"),
    "one string of 2**31 characters": header("(1,)", "<U536870911"),
    "a header of 4 GiB": b"\x93NUMPY\2\0\xff\xff\xff\xff" + bytes(100),
    "a header that nests": header("(" * 3000 + ")" * 3000),
    "a header that calculates": header("(9**9**9,)"),
    "a header with code": header("(__import__('os').system('true'),)"),
    "records": header("(3,)").replace(b"'|u1'", b"[('a', '|O')]"),
    "objects": header("(3,)", "|O") + pickle.dumps([1, 2, 3]),
    "another version": b"\x93NUMPY\7\0" + bytes(100),
    "nothing": b"",
}


@pytest.mark.parametrize("claim", NPY)
def test_headers_of_arrays_are_neither_believed_nor_evaluated(site: Path, claim: str) -> None:
    for name, read in (
        ("data/y_train.npy", lambda: load_dataset(site / "data")),
        ("partitions/client.npy", lambda: load_partition(site / "partitions")),
    ):
        old = (site / name).read_bytes()
        place(site / name, NPY[claim])
        with at_most(16):
            assert Path(name).name in refusal(read)
        place(site / name, old)
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        place(site / "x.npz", zip_of({"x.npy": NPY[claim]}, method))
        with at_most(16):
            assert "x.npz" in refusal(read_images, site / "x.npz", (8, 8, 1))


def test_an_npz_that_unpacks_a_thousandfold_is_refused_unread(site: Path) -> None:
    zeros = header("(70000000,)").ljust(128) + bytes(7 * 10**7)
    place(site / "x.npz", zip_of({"x.npy": zeros}, zipfile.ZIP_DEFLATED))
    assert (site / "x.npz").stat().st_size < 200_000
    del zeros
    with at_most(16):
        assert "real data does not" in refusal(read_images, site / "x.npz", (8, 8, 1))


def test_an_honest_npz_of_zeros_is_still_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", x=np.zeros((500, 64, 64, 3), np.uint8))
    assert (tmp_path / "x.npz").stat().st_size < 10_000
    assert read_images(tmp_path / "x.npz", (64, 64, 3))[1].shape == (500, 64, 64, 3)


def test_an_npz_of_a_million_members_is_refused_unlisted(tmp_path: Path) -> None:
    entry = b"PK\1\2" + bytes(24) + struct.pack("<H", 1) + bytes(16) + b"x"
    count = 500_000
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 65_535, 65_535, count * len(entry), 0, 0)
    place(tmp_path / "x.npz", entry * count + end)
    with at_most(64):
        assert "lists more than" in refusal(read_images, tmp_path / "x.npz", (8, 8, 1))


def test_members_of_an_npz_that_overlap_do_not_unpack_twice(tmp_path: Path) -> None:
    """Many entries for one stored member, as in Fifield's "A better zip bomb" (2019)."""
    x = np.zeros((64, 64, 64, 3), np.uint8)
    content = io.BytesIO()
    np.save(content, x)
    whole = zip_of({"x.npy": content.getvalue()})
    start = whole.index(b"PK\1\2")
    entry = whole[start : whole.index(b"PK\5\6")]
    many = [entry.replace(b"x.npy", name) for name in (b"x.npy", b"y.npy")]
    end = struct.pack("<HHHHIIH", 0, 0, 2, 2, 2 * len(entry), start, 0)
    place(tmp_path / "x.npz", whole[:start] + b"".join(many) + b"PK\5\6" + end)
    refusal(read_client, tmp_path / "x.npz", (64, 64, 3), ("a", "b"))


@pytest.mark.parametrize("count", [2**31, 2**32 - 1, 200_000])
def test_an_idx_file_that_declares_too_many_images_is_refused(tmp_path: Path, count: int) -> None:
    content = bytes((0, 0, 8, 3)) + struct.pack(">3I", count, 28, 28) + bytes(28 * 28)
    place(tmp_path / "x.gz", gzip.compress(content))
    with at_most(16):
        assert "claims" in refusal(idx.read_idx, tmp_path / "x.gz", 3)


def test_an_idx_file_that_unpacks_a_thousandfold_is_refused(tmp_path: Path) -> None:
    content = bytes((0, 0, 8, 3)) + struct.pack(">3I", 90_000, 28, 28) + bytes(90_000 * 28 * 28)
    place(tmp_path / "x.gz", gzip.compress(content, 9))
    del content
    with at_most(16):
        assert "real data does not" in refusal(idx.read_idx, tmp_path / "x.gz", 3)


def test_a_tar_of_zeros_or_of_an_endless_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cifar10/cifar-10-python.tar.gz"
    for kind, name in (
        (b"x", "pax"),
        (b"L", "long name"),
        (b"0", "cifar-10-batches-py/test_batch"),
    ):
        info = tarfile.TarInfo(name)
        info.type, info.size = kind, 70 * 2**20
        content = io.BytesIO()
        with gzip.GzipFile(fileobj=content, mode="wb", compresslevel=1) as packed:
            packed.write(info.tobuf(tarfile.USTAR_FORMAT))
            for _ in range(70):
                packed.write(bytes(2**20))
        place(path, content.getvalue())
        with at_most(16):
            assert "real data does not" in refusal(cifar10, tmp_path)


def tensors(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


F32 = b'{"dtype":"F32","shape":[%s],"data_offsets":[%d,%d]}'
SAFETENSORS = {
    "a header of 2**62 bytes": tensors(b"{}", length=2**62),
    "a header longer than the file": tensors(b"{}", length=10**6),
    "a header of 110 MB": tensors(b"{}" + b" " * (110 * 10**6)),
    "offsets beyond the file": tensors(b'{"w":' + F32 % (b"4", 0, 16) + b"}", bytes(8)),
    "offsets that overlap": tensors(
        b'{"v":' + F32 % (b"2", 0, 8) + b',"w":' + F32 % (b"2", 4, 12) + b"}", bytes(12)
    ),
    "offsets backwards": tensors(b'{"w":' + F32 % (b"2", 8, 0) + b"}", bytes(8)),
    "a shape that overflows": tensors(
        b'{"w":' + F32 % (b"4294967296,4294967296", 0, 8) + b"}", bytes(8)
    ),
    "a hole": tensors(b'{"w":' + F32 % (b"1", 8, 12) + b"}", bytes(12)),
    "more than it says": tensors(b'{"w":' + F32 % (b"1", 0, 4) + b"}", bytes(400)),
    "the same name twice": tensors(
        b'{"w":' + F32 % (b"1", 0, 4) + b',"w":' + F32 % (b"1", 0, 4) + b"}", bytes(4)
    ),
    "nesting": tensors(b'{"__metadata__":' + b'{"a":' * 5000),
    "no JSON": tensors(b"\xff\xfe\x00"),
    "nothing": b"",
}


@pytest.mark.parametrize("claim", SAFETENSORS)
def test_headers_of_safetensors_are_not_believed(site: Path, claim: str) -> None:
    content = SAFETENSORS[claim]
    for name in ("models/experts/expert-1.safetensors", "models/gate.safetensors", "round"):
        old = (site / name).read_bytes() if (site / name).exists() else b""
        place(site / name, content)
        with at_most(16 + 4 * len(content) // 2**20):
            said = refusal(
                load_state if name == "round" else load_bundle, site / name.split("/")[0]
            )
        assert name.split("/")[0] in said
        place(site / name, old)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("data/dataset.json", lambda site: load_dataset(site / "data")),
        ("partitions/manifest.json", lambda site: load_partition(site / "partitions")),
        ("models/state.json", lambda site: load_bundle(site / "models")),
    ],
    ids=["dataset", "partition", "model"],
)
def test_an_enormous_manifest_is_refused_unread(
    site: Path, name: str, read: Callable[[Path], object]
) -> None:
    with (site / name).open("wb") as file:
        file.truncate(untrusted.MAX_TEXT + 1)
    with at_most(128):
        assert "has more than 64 MiB" in refusal(read, site)


def test_a_zip_of_tiny_imagenet_that_lists_one_image_over_and_over_is_refused(
    tmp_path: Path,
) -> None:
    content = io.BytesIO()
    Image.new("L", (64, 64)).save(content, "JPEG")
    root = "tiny-imagenet-200"
    members = {
        f"{root}/wnids.txt": b"n1\nn2\n",
        f"{root}/words.txt": b"n1\ta\nn2\tb\n",
        f"{root}/train/n1/images/0.JPEG": content.getvalue(),
        f"{root}/train/n2/images/0.JPEG": content.getvalue(),
        f"{root}/val/images/0.JPEG": content.getvalue(),
        f"{root}/val/val_annotations.txt": b"0.JPEG\tn1\n" * 150_000,
    }
    path = place(
        tmp_path / "tiny-imagenet/tiny-imagenet-200.zip", zip_of(members, zipfile.ZIP_DEFLATED)
    )
    with at_most(128):
        said = refusal(tiny_imagenet.build, "tiny-imagenet", tmp_path, check_md5=False)
    assert "real data does not" in said and str(path) in said


def test_messages_hold_no_control_characters_and_end(tmp_path: Path) -> None:
    said = untrusted.one_line("a\x1b[31m\n\x00\u2028b" + "x" * 1000)
    assert said.startswith("a [31m b") and len(said) < 400
