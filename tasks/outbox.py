"""What a run has to tell MLflow, on disk until MLflow has it: one folder a run.

`.fedcoe/outbox/<run>/records.jsonl` only grows, a record a line, each durable before training goes
on; the files a record names lie beside it. What is known to have arrived stands in `sent`. That
note may be lost: `tasks/delivery.py` sends nothing twice.
"""

import json
import os
import secrets
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcoe.durable import sync
from fedcoe.locks import Lock

Record = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """How far an outbox has been sent, and to where."""

    store: str
    run_id: str | None = None
    """MLflow's name of the run; None until it exists there."""
    offset: int = 0
    """Bytes of `records.jsonl` that have arrived."""


class Outbox:
    """The records of one MLflow run, in the order they came up."""

    def __init__(self, root: Path, name: str) -> None:
        self.root, self.name = root, name
        self.folder = root / ".fedcoe" / "outbox" / name
        self._keys: set[str] | None = None
        self._writing = threading.Lock()

    @staticmethod
    def new_name() -> str:
        """Names sort by the time they were made."""
        return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(8)}"

    @property
    def files(self) -> Path:
        """Where files that records name are kept."""
        return self.folder / "files"

    @property
    def _records(self) -> Path:
        return self.folder / "records.jsonl"

    def has(self, key: str) -> bool:
        """Whether a record with this key (`keys`) was put here, also before a kill."""
        if self._keys is None:
            self._keys = {key for record, _ in self.read() for key in keys(record)}
        return key in self._keys

    def put(self, record: Record) -> int:
        """Append a record; it is on the disk when this returns. Returns the place after it."""
        line = json.dumps(record).encode() + b"\n"
        with self._writing:
            new = not self._records.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._records.open("ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # torn by a kill; it must not tear this one too
                        line = b"\n" + line
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
                end = file.tell()
            if new:
                for folder in (self.folder, self.folder.parent):
                    sync(folder)
            if self._keys is not None:
                self._keys |= keys(record)
        return end

    def read(self, offset: int = 0) -> Iterator[tuple[Record, int]]:
        """Records from a place on, each with the place after it; torn lines are left out."""
        with suppress(FileNotFoundError), self._records.open("rb") as file:
            file.seek(offset)
            for line in file:
                offset += len(line)
                if not line.endswith(b"\n"):
                    return
                with suppress(ValueError):
                    record = json.loads(line)
                    if isinstance(record, dict):
                        yield record, offset

    def first(self) -> Record:
        """The record that describes the run; empty if there is none."""
        return next((record for record, _ in self.read()), {})

    def place(self, store: str) -> Place:
        """How far it has been sent to this store; another store gets all of it."""
        with suppress(OSError, ValueError, TypeError):
            place = Place(**json.loads((self.folder / "sent").read_text()))
            if place.store == store:
                return place
        return Place(store)

    def note(self, place: Place) -> None:
        """Remember how far it has been sent."""
        temporary = self.folder / ".sent.tmp"
        temporary.write_text(json.dumps(vars(place)))
        temporary.replace(self.folder / "sent")

    def waiting(self, store: str) -> Counter[str]:
        """How many records of each kind have not arrived."""
        return Counter(record["kind"] for record, _ in self.read(self.place(store).offset))

    def keep(self, name: str, write: Callable[[Path], object]) -> str:
        """Have a file or folder written under `files`, whole or not at all, durably.

        Args:
            write: is given the path to write.

        Returns:
            Its path under `files`.
        """
        target = self.files / name
        temporary = target.with_name(f".tmp-{target.name}")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        write(temporary)
        for path in [temporary, *temporary.rglob("*")]:
            sync(path)
        _remove(target)
        temporary.replace(target)
        sync(target.parent)
        return name

    @contextmanager
    def sending(self, wait: float = 0.0) -> Iterator[bool]:
        """Let one process at a time send it; False where another still does after some seconds."""
        lock, ends = None, time.monotonic() + wait
        while lock is None:
            try:
                lock = Lock(self.folder, wait=False)
            except BlockingIOError:
                if time.monotonic() > ends:
                    break
                time.sleep(0.1)
        try:
            yield lock is not None
        finally:
            if lock is not None:
                lock.close()

    def discard(self, store: str) -> None:
        """Delete it, if all has arrived and no run will add to it."""
        first = self.first()
        if first and not self._awaits_more(first) and not self.waiting(store):
            shutil.rmtree(self.folder, ignore_errors=True)

    def _awaits_more(self, first: Record) -> bool:
        """Whether the file that an interrupted run finds its outbox by still names this one; with
        no such file, whether its run has not ended."""
        if first.get("memo") is None:
            last = first
            for record, _ in self.read():
                last = record
            return bool(last["kind"] != "status" or last["status"] == "RUNNING")
        with suppress(OSError):
            return bool((self.root / first["memo"]).read_text() == self.name)
        return False


def keys(record: Record) -> set[str]:
    """What `Outbox.has` finds a record by: kind and name; for metrics, names and step."""
    if record["kind"] == "metrics":
        return {f"{name}@{record['step']}" for name in record["values"]}
    return {f"{record['kind']} {record.get('name')}"}


def outboxes(root: Path) -> list[Outbox]:
    """All that are there, oldest first."""
    folder = root / ".fedcoe" / "outbox"
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return [Outbox(root, name) for name in names]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
