"""`fedcoe join` and `fedcoe export` on a trained run."""

import csv
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def client(project: Path, tmp_path: Path) -> Path:
    """1,000 labelled images, half of them of class 3."""
    x, y = (np.load(project / f"data/{name}_train.npy") for name in "xy")
    weights = np.where(y == 3, 9.0, 1.0)
    rows = np.random.default_rng(0).choice(len(y), 1000, p=weights / weights.sum())
    np.savez(tmp_path / "client.npz", x=x[rows], y=y[rows])
    np.savez(tmp_path / "blind.npz", x=x[rows])
    return tmp_path


def test_a_thousand_images_are_answered_with_every_modes_accuracy(
    project: Path, client: Path, fedcoe_here: Command
) -> None:
    done = fedcoe_here(project, "join", "--data", str(client / "client.npz"), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    labels = np.load(client / "client.npz")["y"]
    assert found["mode"] == "labels" and "halves" in found["labels_split"]
    classes = {row["class"]: row for row in found["classes"]}
    assert classes["3"]["counted"] == pytest.approx((labels == 3).mean())
    right = [row["class"] == str(y) for row, y in zip(found["predictions"], labels, strict=True)]
    assert found["modes"]["labels"]["accuracy"] == pytest.approx(np.mean(right))
    assert set(found["modes"]) == {"none", "unlabelled", "labels"}
    assert [row["expert"] for row in found["experts"]] == [0, 1]
    # A client that is half threes is known for one without its labels.
    assert abs(classes["3"]["estimated"] - classes["3"]["counted"]) < 0.15


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_predictions_are_written_where_asked(
    project: Path, client: Path, fedcoe_here: Command, suffix: str
) -> None:
    path = client / f"out.{suffix}"
    done = fedcoe_here(project, "join", "--data", str(client / "blind.npz"), "--out", str(path))
    assert done.returncode == 0, done.stderr
    assert "unlabelled" in done.stdout and "accuracy, mode" not in done.stdout
    text = path.read_text()
    rows = json.loads(text) if suffix == "json" else list(csv.DictReader(text.splitlines()))
    assert len(rows) == 1000
    assert all(set(row) == {"image", "class", "p"} and 0 < float(row["p"]) <= 1 for row in rows)


def test_a_pick_is_exported_and_runs_without_this_package(
    project: Path, tmp_path: Path, fedcoe_here: Command
) -> None:
    import torch

    from fedcoe.bundle import load_bundle

    path = tmp_path / "picked" / "device.pt2"
    done = fedcoe_here(project, "export", "--mixture", "--out", str(path), "--version", "1")
    assert done.returncode == 0, done.stderr
    assert "differ from the model's by at most" in done.stdout
    images = np.load(project / "data/x_test.npy")[:9]
    found = torch.export.load(path).module()(torch.tensor(images)).numpy()
    expected = np.exp(load_bundle(project / "models").predict(images))
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("join", "--data", "nowhere"), "nowhere: is not there"),
        (("join", "--data", "data", "--mode", "magic"), "none, unlabelled, labels"),
        (("join", "--data", "data", "--out", "x.txt"), ".csv or .json"),
        (("join", "--data", "data", "--models", "none"), "dvc repro train"),
        (("export",), "--expert N or --mixture"),
        (("export", "--expert", "0", "--mixture"), "--expert N or --mixture"),
        (("export", "--expert", "5"), "there are 0 to 1"),
        (("predict", "data", "--out", "x.txt"), ".csv or .json"),
        (("export", "--expert", "0", "--out", "x.bin"), "must end in .pt2"),
    ],
)
def test_mistakes_are_one_line(
    project: Path, fedcoe_here: Command, args: tuple[str, ...], said: str
) -> None:
    done = fedcoe_here(project, *args)
    assert done.returncode == 2
    assert said in done.stderr and done.stderr.count("\n") == 1
