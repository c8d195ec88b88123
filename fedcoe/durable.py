"""Writing files so that a crash, or a loss of power, leaves nothing half."""

import os
from pathlib import Path

from fedcoe.errors import disk_fault


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that a crash at any instant leaves the old or the new one whole.

    Raises:
        FedCoEError: the disk refuses; the old file is as it was and nothing else is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)
    except OSError as error:
        raise disk_fault(error, path, len(content)) from None


def sweep(folder: Path, name: str = "*") -> None:
    """Delete what killed processes left of `write_atomic` in a folder.

    Args:
        name: of the file that was to be written.
    """
    for path in folder.glob(f".{name}.*.tmp"):
        pid = path.name.rsplit(".", 2)[1]
        try:
            os.kill(int(pid), 0)
        except (ProcessLookupError, ValueError):
            path.unlink(missing_ok=True)
        except PermissionError:
            pass  # somebody else's, and alive


def sync(path: Path) -> None:
    """Make a file's content, or what was renamed into a folder, outlast a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
