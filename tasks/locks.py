"""Locks of a project, under `.fedcoe/locks/`; see `fedcoe.locks` for what a crash leaves: none."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from fedcoe.errors import FedCoEError, disk_fault
from fedcoe.locks import Lock


@contextmanager
def locked(
    root: Path, name: str, what: str, shared: bool = False, wait: bool = True
) -> Iterator[None]:
    """Hold `.fedcoe/locks/<name>` under `root`; wait for it, and say so, where another holds it.

    Args:
        what: ends the sentence "waiting for ...".
        shared: any number may hold it so, as long as none holds it alone.
        wait: or raise BlockingIOError.
    """
    path = _path(root, name)
    try:
        lock = Lock(path, shared, wait=False)
    except BlockingIOError:
        if not wait:
            raise
        from prefect.exceptions import MissingContextError
        from prefect.logging import get_run_logger

        with suppress(MissingContextError):  # outside a flow nobody would read it
            get_run_logger().warning("waiting for %s", what)
        lock = Lock(path, shared)
    with lock:
        yield


def reading_data(root: Path) -> AbstractContextManager[None]:
    """Keep data/ as it is; any number may."""
    return locked(root, "data", "data being fetched", shared=True)


@contextmanager
def replacing_data(root: Path) -> Iterator[None]:
    """Be alone with data/.

    Raises:
        FedCoEError: something trains on it.
    """
    try:
        lock = Lock(_path(root, "data"), wait=False)
    except BlockingIOError:
        raise FedCoEError(
            f"{root / 'data'}: a training reads it; fetch again when that has ended"
        ) from None
    with lock:
        yield


@contextmanager
def sole(root: Path, name: str, what: str) -> Iterator[None]:
    """Hold `.fedcoe/locks/<name>` under `root`, which says whose it is.

    Args:
        what: begins the sentence "... is at work in this folder".

    Raises:
        FedCoEError: another process holds it.
    """
    path = _path(root, name)
    try:
        lock = Lock(path, wait=False)
    except BlockingIOError:
        holder = path.read_text().strip()
        end, process = (f" or `kill {holder}`", f" (process {holder})") if holder else ("", "")
        raise FedCoEError(
            f"{what} is at work in {root.resolve()}{process}: wait for it{end}, "
            "or work in another folder"
        ) from None
    with lock:
        try:
            path.write_text(f"{os.getpid()}\n")
        except OSError as error:
            raise disk_fault(error, path) from None
        try:
            yield
        finally:
            path.write_text("")


def _path(root: Path, name: str) -> Path:
    path = root / ".fedcoe" / "locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
