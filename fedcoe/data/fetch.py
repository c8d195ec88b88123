"""Build the dataset folder: whole or not at all, and the same bytes wherever it is built."""

import filecmp
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedcoe.data.dataset import FILES, DatasetInfo, RawDataset, write_dataset
from fedcoe.data.sources import sources
from fedcoe.data.sources.arrays import from_arrays
from fedcoe.data.sources.folder import from_folder
from fedcoe.durable import sync
from fedcoe.errors import FedCoEError
from fedcoe.locks import Lock


@dataclass(frozen=True)
class FetchResult:
    """`notes` are sentences for the user; `changed` is False if the folder already held this."""

    info: DatasetInfo
    notes: tuple[str, ...]
    changed: bool


def fetch(
    name: str | None = None,
    from_path: str | Path | None = None,
    target: str | Path = Path("data"),
    download_dir: str | Path = Path(".fedcoe/downloads"),
) -> FetchResult:
    """Build a dataset and put it in the place of the one that is there.

    Args:
        name: one of `sources()`; with `from_path`, what to call the own data (default: the name
            of the file or folder).
        from_path: own data, a folder of images or an .npz file.
        target: the dataset folder. The old one stays as it is until the new one is on disk, and
            is not touched at all where both are the same bytes.
        download_dir: where downloads are kept, and where files placed by hand are looked for.

    Raises:
        FedCoEError: one line; the old dataset is then untouched.
    """
    # A folder that is a link elsewhere, to a larger disk say, stays there.
    target = Path(target).resolve()
    _refuse_foreign_files(target)
    try:
        name, raw = _build(name, from_path, Path(download_dir))
        target.parent.mkdir(parents=True, exist_ok=True)
        with _staging(target) as stage:
            info = write_dataset(stage / "new", name, raw)
            changed = not _same(stage / "new", target)
            if changed:
                _swap(stage, target)
    except ImportError as error:
        raise FedCoEError(f"{name}: needs the package {error.name}, not installed") from None
    except OSError as error:
        raise FedCoEError(
            f"{error.filename or target}: {error.strerror or error}; {target} is as it was"
        ) from None
    return FetchResult(info, raw.notes, changed)


def _build(
    name: str | None, from_path: str | Path | None, download_dir: Path
) -> tuple[str, RawDataset]:
    known = sources()
    if from_path is None:
        if name not in known:
            asked = f"{name!r}: no such dataset" if name else "no dataset named"
            raise FedCoEError(f"{asked}; choose {', '.join(known)}, or `fedcoe fetch --from PATH`")
        return name, known[name].build(name, download_dir)
    path = Path(from_path).resolve()
    name = name or path.stem
    if name in known:
        raise FedCoEError(f"{name!r} is the name of a built-in dataset; give your own data another")
    if path.is_dir():
        return name, from_folder(path)
    if path.suffix == ".npz" and path.is_file():
        return name, from_arrays(path)
    what = "neither a folder nor an .npz file" if path.exists() else "no such file or folder"
    raise FedCoEError(f"{from_path}: {what}; --from takes a folder of images or an .npz file")


def _refuse_foreign_files(target: Path) -> None:
    """The folder is replaced as a whole: what fetch did not write must not vanish with it."""
    if not target.exists():
        return
    if not target.is_dir():
        raise FedCoEError(f"{target}: is a file; a dataset needs a folder of that name")
    if foreign := sorted({entry.name for entry in target.iterdir()} - FILES):
        raise FedCoEError(
            f"{target / foreign[0]}: is no part of a dataset and would be deleted; move it away"
        )


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A folder beside the target, ours alone; clears up after a fetch that was killed."""
    stage = target.with_name(f".{target.name}.fetch")
    stage.mkdir(exist_ok=True)
    try:
        lock = Lock(stage, wait=False)
    except BlockingIOError:
        raise FedCoEError(f"{target}: another fetch is at work; wait for it") from None
    with lock:
        if (stage / "old").exists() and not target.exists():
            (stage / "old").rename(target)  # killed between the two renames of _swap
        for left in stage.iterdir():
            shutil.rmtree(left)
        try:
            yield stage
        finally:
            # Never the last copy: _swap may have failed to put the old dataset back.
            if target.exists() or not (stage / "old").exists():
                shutil.rmtree(stage)


def _same(new: Path, old: Path) -> bool:
    names = sorted(entry.name for entry in new.iterdir())
    if not old.is_dir() or names != sorted(entry.name for entry in old.iterdir()):
        return False
    return filecmp.cmpfiles(new, old, names, shallow=False)[0] == names


def _swap(stage: Path, target: Path) -> None:
    sync(stage / "new")
    if target.exists():
        target.rename(stage / "old")
    try:
        (stage / "new").rename(target)
    except BaseException:
        if (stage / "old").exists():
            (stage / "old").rename(target)
        raise
    sync(target.parent)
