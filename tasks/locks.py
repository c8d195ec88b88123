"""Locks between processes. The kernel lets go of them when their holder dies, however it dies."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger


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
    path = root / ".fedcoe" / "locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with path.open("a") as file:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise
            with suppress(MissingContextError):  # outside a flow nobody would read it
                get_run_logger().warning("waiting for %s", what)
            fcntl.flock(file, kind)
        yield
