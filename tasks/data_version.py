"""Task: the version of the data that data.dvc names, brought here by DVC."""

import os
import subprocess
import sys
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from fedcoe.data.dataset import load_dataset
from fedcoe.errors import FedCoEError
from tasks.locks import locked


@task(name="fetch data", cache_policy=NO_CACHE)
def fetch_data(root: Path) -> str:
    """Pull from the DVC remote, or check out from the cache where there is none.

    Waits for whatever reads the data: trainings, comparisons and searches. Without a DVC project it
    stays what it is.

    Returns:
        The data's hash.

    Raises:
        FedCoEError: DVC could not; the data is as it was.
    """
    if not (root / "data.dvc").exists():
        get_run_logger().warning("no data.dvc here: training on data/ as it is")
    else:
        with locked(root, "data", "runs that read the data"):
            remote = _dvc(root, "remote", "list").strip()
            _dvc(root, "pull" if remote else "checkout", "data.dvc")
    return load_dataset(root / "data").info.hash


def _dvc(root: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *words],
        cwd=root,
        env=os.environ | {"DVC_NO_ANALYTICS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise FedCoEError(f"`dvc {' '.join(words)}` failed: {' '.join(done.stderr.split())}")
    return done.stdout
