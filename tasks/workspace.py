"""A folder of its own for every training on the work pool, so that runs cannot collide.

`models/`, `metrics/` and the rest of a project belong to who works in it by hand and to DVC. A run
on the pool gets a folder like a project, with its settings written out, under `.fedcoe/pool/`.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ruamel.yaml import YAML

from fedcoe.config import Settings, fingerprint_of
from fedcoe.data.dataset import load_dataset
from tasks.locks import locked, reading_data

KEEP = 10
"""Folders that stay; the models of all are in the registry."""


@contextmanager
def workspace(root: Path, settings: Settings) -> Iterator[Path]:
    """The folder of these settings and of the data that is there now; an equal run waits for it.

    `data/`, `data.dvc` and `.fedcoe/` lead to the project's own: the data is not fetched anew
    meanwhile, and a run that was killed resumes.
    """
    root = root.resolve()
    with reading_data(root):
        key = fingerprint_of([settings.fingerprint(), load_dataset(root / "data").info.hash])
        name = f"{settings.method.name}-{key}"
        with locked(root, f"pool-{name}", "a run with the same settings"):
            folder = root / ".fedcoe" / "pool" / name
            folder.mkdir(parents=True, exist_ok=True)
            os.utime(folder)
            for shared in ("data", "data.dvc", ".fedcoe"):
                if (root / shared).exists() and not (folder / shared).is_symlink():
                    (folder / shared).symlink_to(root / shared)
            YAML().dump(settings.model_dump(mode="json"), folder / "params.yaml")
            _forget_old(root, folder)
            yield folder


def _forget_old(root: Path, newest: Path) -> None:
    folders = sorted(newest.parent.iterdir(), key=lambda f: f.stat().st_mtime, reverse=True)
    for folder in [f for f in folders if f != newest][KEEP - 1 :]:
        with (
            suppress(BlockingIOError),  # at work
            locked(root, f"pool-{folder.name}", "", wait=False),
        ):
            shutil.rmtree(folder)  # links are removed, not followed
