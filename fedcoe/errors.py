"""The one exception a user sees: a sentence saying what is wrong, where, and what to do."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class FedCoEError(Exception):
    """A mistake or a lack the user can mend. Faces print it as one line and exit with 2."""


_CURES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space or ask for a larger quota",
    errno.EFBIG: "raise the limit on the size of files (`ulimit -f`)",
    errno.EROFS: "make it writable or work in another folder",
    errno.EACCES: "make it writable or work in another folder",
    errno.EPERM: "make it writable or work in another folder",
    errno.EIO: "look after the disk",
    errno.EMFILE: "raise the limit on open files (`ulimit -n`)",
}


def disk_fault(error: OSError, path: Path | None = None, size: int | None = None) -> FedCoEError:
    """What a disk that refuses to be written means to a user, in one line.

    Args:
        path: what was being written; default: what the error names.
        size: bytes that were to be written.
    """
    name = path or error.filename or "a file"
    asked = "" if size is None else f" for {_mb(size)}"
    free = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT) and (path or error.filename):
        free = f" ({_mb(_free(Path(path or error.filename)))} free)"
    reason = error.strerror or type(error).__name__
    cure = _CURES.get(error.errno or 0, "mend that")
    return FedCoEError(
        f"{name}: cannot be written: {reason}{asked}{free}; {cure}, then run the same command again"
    )


@contextmanager
def said_of_disks() -> Iterator[None]:
    """Say in one line what a disk or its permissions refuse; other errors pass as they are.

    A network that is down also comes as an OSError, and is another matter.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _CURES:
            raise
        raise disk_fault(error) from None


def _free(path: Path) -> int:
    """Bytes that may still be written where the path is, or its nearest folder that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
