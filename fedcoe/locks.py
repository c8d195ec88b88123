"""Locks between processes. The kernel lets go of them when their holder dies, however it dies."""

import fcntl
import os
from pathlib import Path
from types import TracebackType


class Lock:
    """A file, made if need be, or a folder, held until `close` or the end of a `with`.

    Args:
        shared: any number may hold it so, as long as none holds it alone.
        wait: until it is free, or raise BlockingIOError.
    """

    def __init__(self, path: Path, shared: bool = False, wait: bool = True) -> None:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        made = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
        self.descriptor = os.open(path, made, 0o666)
        try:
            fcntl.flock(self.descriptor, kind if wait else kind | fcntl.LOCK_NB)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of it; a second time does nothing, least of all to another file of that number."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
