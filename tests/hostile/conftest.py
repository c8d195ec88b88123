"""A whole project, small: settings, dataset, partition, model, own images and a client's arrays."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedcoe.bundle import export_models
from fedcoe.state import PersonalStore


@pytest.fixture(scope="session")
def whole(
    world: Any, make_method: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    for name in ("data", "partitions"):
        shutil.copytree(world.folder / name, folder / name)
    method = make_method()
    rng = np.random.default_rng(0)
    gate, head = (rng.normal(size=(17, n)).astype(np.float32) for n in (2, 4))
    state = method.init().with_extra(gate=gate, head=head)
    export_models(folder / "models", method, state, PersonalStore(folder / "none"))
    (folder / "params.yaml").write_text("train: {rounds: 3}\n")
    for label in ("cat", "dog"):
        for i in range(3):
            path = folder / "photos" / label / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(path)
    x, y = np.array(world.dataset.x_test), np.array(world.dataset.y_test)
    np.savez(folder / "own.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    np.savez(folder / "client.npz", x=x, y=y)
    return folder


@pytest.fixture
def site(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "site"))
