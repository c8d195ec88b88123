"""The dataset folder: what is written is read back, and what is broken is named."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from fedcoe.data.dataset import (
    RawDataset,
    channel_statistics,
    load_dataset,
    verify_dataset,
    write_dataset,
)
from fedcoe.errors import FedCoEError


def raw_dataset(**changes: object) -> RawDataset:
    rng = np.random.default_rng(0)
    raw = RawDataset(
        x_train=rng.integers(0, 256, (12, 4, 5, 3), dtype=np.uint8),
        y_train=np.arange(12) % 3,
        x_test=rng.integers(0, 256, (6, 4, 5, 3), dtype=np.uint8),
        y_test=np.arange(6) % 3,
        classes=("cat", "dog", "jérboa"),
        source="made up",
        licence="none",
        client_train=np.arange(12) % 4,
        clients=("a", "b", "c", "d"),
    )
    return dataclasses.replace(raw, **changes)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "data", "toy", raw_dataset())
    return tmp_path / "data"


def test_a_written_dataset_is_read_back_with_the_stated_types(folder: Path) -> None:
    dataset, raw = verify_dataset(folder), raw_dataset()
    assert dataset.client_train is not None
    for name, dtype in (("x_train", "u1"), ("y_train", "i8"), ("x_test", "u1"), ("y_test", "i8")):
        array = getattr(dataset, name)
        assert array.dtype == dtype and not array.flags.writeable
        np.testing.assert_array_equal(array, getattr(raw, name))
    np.testing.assert_array_equal(dataset.client_train, raw.client_train)
    assert dataset.client_train.dtype == "i4"
    info = dataset.info
    assert (info.name, info.train, info.test, info.shape) == ("toy", 12, 6, [4, 5, 3])
    assert info.classes == ["cat", "dog", "jérboa"] and info.clients == ["a", "b", "c", "d"]


def test_mean_and_deviation_are_numpys_over_the_training_images_only(folder: Path) -> None:
    info, pixels = load_dataset(folder).info, raw_dataset().x_train / 255
    np.testing.assert_allclose(info.mean, pixels.mean(axis=(0, 1, 2)), atol=6e-7)
    np.testing.assert_allclose(info.std, pixels.std(axis=(0, 1, 2)), atol=6e-7)


def test_statistics_of_several_blocks_equal_those_of_one() -> None:
    # 2**22 pixels are one block: nine images of 2**19 pixels make two.
    images = np.zeros((9, 512, 1024, 1), dtype=np.uint8)
    images[0], images[8] = 30, 60
    assert channel_statistics(images) == ([round(10 / 255, 6)], [round(20 / 255, 6)])


def test_a_constant_channel_gets_a_deviation_that_can_be_divided_by() -> None:
    assert channel_statistics(np.full((2, 3, 3, 1), 7, np.uint8))[1] == [round(1 / 255, 6)]


def test_the_memory_layout_of_the_input_does_not_change_the_bytes(tmp_path: Path) -> None:
    raw = raw_dataset()
    twisted = dataclasses.replace(
        raw,
        x_train=np.asfortranarray(raw.x_train),
        y_train=raw.y_train.astype(">i2"),
    )
    write_dataset(tmp_path / "a", "toy", raw)
    write_dataset(tmp_path / "b", "toy", twisted)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": np.zeros((12, 4, 5, 3))}, "x_train must be uint8"),
        ({"x_train": np.zeros((12, 4, 5), np.uint8)}, "x_train must be uint8"),
        ({"x_test": np.zeros((0, 4, 5, 3), np.uint8), "y_test": np.arange(0)}, "test split has no"),
        ({"y_train": np.arange(12)}, "y_train runs from 0 to 11, must be 0..2"),
        ({"y_test": np.arange(6) - 1}, "y_test runs from -1 to 4"),
        ({"y_test": np.zeros(6)}, "y_test must be 6 integers, got float64"),
        ({"y_train": np.zeros(11, int)}, "y_train must be 12 integers"),
        ({"x_test": np.zeros((6, 4, 4, 3), np.uint8)}, "training images are [4, 5, 3], test"),
        ({"classes": ("cat", "dog", "cat")}, "class names are equal"),
        ({"classes": ("cat",), "y_train": np.zeros(12, int), "y_test": np.zeros(6, int)}, "two cl"),
        ({"client_train": np.arange(12) % 3}, "every id 0..3"),
        ({"clients": ()}, "must come together"),
        ({"client_train": None}, "must come together"),
    ],
)
def test_bad_arrays_are_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(FedCoEError, match=re.escape(message)):
        write_dataset(tmp_path / "data", "toy", raw_dataset(**changes))
    assert not (tmp_path / "data").exists()


def edit_info(folder: Path, **changes: object) -> None:
    info = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(info | changes))


def one_line(folder: Path) -> str:
    with pytest.raises(FedCoEError) as caught:
        load_dataset(folder)
    message = str(caught.value)
    assert "\n" not in message and "run `fedcoe fetch`" in message
    return message


def test_a_missing_folder_says_what_to_run(tmp_path: Path) -> None:
    assert "no dataset here" in one_line(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["x_train", "y_train", "x_test", "y_test", "client_train"])
def test_missing_truncated_and_garbled_arrays_are_named(folder: Path, name: str) -> None:
    file = folder / f"{name}.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert f"{name}.npy: is not a whole .npy file" in one_line(folder)
    file.write_bytes(b"")
    assert f"{name}.npy: is not a whole .npy file" in one_line(folder)
    file.unlink()
    assert f"{name}.npy: is missing" in one_line(folder)


def test_arrays_of_objects_are_never_unpickled(folder: Path) -> None:
    np.save(folder / "y_train.npy", np.array([print] * 12), allow_pickle=True)
    assert "y_train.npy" in one_line(folder)


def test_types_order_shapes_and_ranges_are_checked(folder: Path) -> None:
    good = np.load(folder / "x_train.npy")
    np.save(folder / "x_train.npy", good.astype(np.int16))
    assert "has dtype int16, must be uint8" in one_line(folder)
    np.save(folder / "x_train.npy", np.asfortranarray(good))
    assert "not in C order" in one_line(folder)
    np.save(folder / "x_train.npy", good[:-1])
    assert "has shape (11, 4, 5, 3), dataset.json says (12, 4, 5, 3)" in one_line(folder)
    np.save(folder / "x_train.npy", good)
    np.save(folder / "y_test.npy", np.full(6, 3))
    assert "y_test.npy: has values outside 0..2" in one_line(folder)


def test_the_description_is_checked_key_by_key(folder: Path) -> None:
    edit_info(folder, colour="red")
    assert "dataset.json: colour: Extra inputs" in one_line(folder)
    edit_info(folder, name="../elsewhere")
    assert "dataset.json: name: Value error, must be printable text without /" in one_line(folder)
    (folder / "dataset.json").write_text("{")
    assert "dataset.json: Invalid JSON" in one_line(folder)


def test_statistics_must_be_one_a_channel(folder: Path) -> None:
    edit_info(folder, mean=[0.5])
    assert "must have 3 entries" in one_line(folder)


def test_clients_without_names_are_noticed(folder: Path) -> None:
    edit_info(folder, clients=[])
    assert "client_train.npy: is there, but" in one_line(folder)


def test_one_changed_pixel_passes_loading_but_not_verifying(folder: Path) -> None:
    pixels = np.load(folder / "x_test.npy")
    pixels[0, 0, 0, 0] ^= 1
    np.save(folder / "x_test.npy", pixels)
    load_dataset(folder)
    with pytest.raises(FedCoEError, match="do not have the hash"):
        verify_dataset(folder)
