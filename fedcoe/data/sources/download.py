"""Files that must come over the network, or be placed by hand where there is none."""

import hashlib
import http.client
import socket
from collections.abc import Sequence
from pathlib import Path

from fedcoe.data.torchvision_import import import_torchvision
from fedcoe.errors import FedCoEError

_TIMEOUT = 30.0  # seconds; torchvision sets none, and a silent firewall would hang for ever


def obtain(urls: Sequence[str], md5: str, folder: Path, *, check_md5: bool = True) -> Path:
    """The file of these URLs: the one already in `folder`, else downloaded by torchvision.

    Args:
        urls: places of the same file, the best first; they end in its name.
        md5: its checksum, 32 hex digits.
        folder: where it is, or goes; created if need be.
        check_md5: tests on made-up files switch the check off.

    Raises:
        FedCoEError: unreachable, or not the right file; what to place where by hand.
    """
    file = folder / urls[0].rsplit("/", 1)[1]
    if not file.is_file():
        _download(urls, md5 if check_md5 else None, file)
    elif check_md5:
        with file.open("rb") as stream:
            actual = hashlib.file_digest(
                stream, lambda: hashlib.md5(usedforsecurity=False)
            ).hexdigest()
        if actual != md5:
            raise FedCoEError(
                f"{file}: md5 is {actual}, must be {md5}; delete it and fetch again, "
                f"or place an intact copy of {urls[0]} there"
            )
    return file


def _download(urls: Sequence[str], md5: str | None, file: Path) -> None:
    # Under another name until it is whole: a file in place is always a finished one.
    partial = file.with_name(file.name + ".part")
    timeout = socket.getdefaulttimeout()
    reasons = []
    try:
        import_torchvision()
        from torchvision.datasets.utils import download_url

        file.parent.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(_TIMEOUT)
        for url in urls:
            partial.unlink(missing_ok=True)
            try:
                download_url(url, file.parent, partial.name, md5)
                partial.replace(file)
                return
            except (OSError, RuntimeError, http.client.HTTPException) as error:
                reasons.append(" ".join(str(error).split()) or type(error).__name__)
    except (OSError, ImportError) as error:
        reasons.append(" ".join(str(error).split()))
    finally:
        socket.setdefaulttimeout(timeout)
        partial.unlink(missing_ok=True)
    raise FedCoEError(
        f"{urls[0]}: cannot download ({reasons[0]}); place the file at {file} by hand, or run "
        "`fedcoe fetch mnist5k`, which needs no network, or `fedcoe fetch --from PATH`"
    )
