"""Engines: where the clients' side of a method runs on this machine.

An engine holds clients' data and a trainer and runs functions beside them. Methods hand it
functions of a `ClientSide`; they never know how many processes there are. Results are the same
bytes whatever the number of workers where each model is trained by itself, by one thread: sums are
exact. Where many are trained at once (vectorized), on GPUs, they are the same to rounding.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from fedcoe.data.dataset import load_dataset
from fedcoe.data.partition import load_partition
from fedcoe.engine.clients import ClientData
from fedcoe.engine.devices import no_memory, set_up
from fedcoe.engine.trainer import Build, Trainer
from fedcoe.engine.vectorized import VectorizedTrainer
from fedcoe.errors import FedCoEError
from fedcoe.models import build_expert
from fedcoe.state import PersonalStore

R = TypeVar("R")


@dataclass(frozen=True)
class ClientSide:
    """What client functions may touch: clients' data, a trainer, personal experts on disk."""

    data: ClientData
    trainer: Trainer
    personal: PersonalStore


@dataclass(frozen=True)
class Site:
    """Where a worker finds what it needs; small, so that it travels to new processes."""

    data: Path
    partitions: Path
    personal: Path
    model: str
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    exported: bool = False
    """Whether `personal` is the folder of a trained run's models."""
    vectorized: bool = False
    devices: tuple[str, ...] = ("cpu",)
    """Worker i computes on device i modulo their number."""
    build: Build = build_expert
    """What makes the models: `Method.build`."""
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    """Mean and std by channel that models were trained with; None: those of the data."""

    def open(self, worker: int = 0) -> ClientSide:
        device = self.devices[worker % len(self.devices)]
        set_up(device, len(self.devices))
        dataset = load_dataset(self.data)
        info = dataset.info
        height, width, channels = info.shape
        mean, std = self.normalisation or (info.mean, info.std)
        kind = VectorizedTrainer if self.vectorized else Trainer
        trainer = kind(
            self.model,
            (height, width, channels),
            len(info.classes),
            mean,
            std,
            self.precision,
            device,
            self.build,
        )
        return ClientSide(
            ClientData(dataset, load_partition(self.partitions)),
            trainer,
            PersonalStore(self.personal, trainer.flat.layout if self.exported else None),
        )


_side: ClientSide | None = None


_GROUP_SIGNALS = {signal.SIGINT, signal.SIGTERM}


def _start(site: Site, started: Any) -> None:
    global _side
    # Signals to the whole group (Ctrl-C, a machine that is shut down) are the parent's to answer;
    # workers end with it, also when it is killed. SIGTERM stays for the pool, which ends with it
    # what is left of a broken one.
    for number in _GROUP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # one that came while it started is gone, too
    os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _GROUP_SIGNALS)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with started.get_lock():
        worker, started.value = started.value, started.value + 1
    _side = site.open(worker)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _NoMemory(Exception):
    """A worker got no memory, and still lives to say so."""


def _call(function: Callable[..., R], args: tuple[object, ...]) -> R:
    assert _side is not None
    return _within_memory(_side, function, args)


def _within_memory(side: ClientSide, function: Callable[..., R], args: tuple[object, ...]) -> R:
    try:
        return function(side, *args)
    except (MemoryError, RuntimeError) as error:
        if no_memory(error):
            raise _NoMemory(str(error).splitlines()[0] if str(error) else "") from None
        raise


_LESS = "lower runtime.workers, train.batch_size or evaluate.batch_size"


class Engine:
    """Persistent worker processes, one a core or GPU; with one worker, this process.

    Use as a context manager; workers end with it. They run the caller's script again, up to
    its `if __name__ == "__main__":`, under which a script of one's own must open it.
    """

    def __init__(self, site: Site, workers: int = 0) -> None:
        self.site = site
        on_cores = site.devices == ("cpu",) and not site.vectorized
        self.workers = workers or (len(os.sched_getaffinity(0)) if on_cores else len(site.devices))
        self._lock = threading.Lock()
        self._inline: ClientSide | None = None
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            # A worker that is at its caller's script: it would start workers without end.
            sys.exit('open the Engine under `if __name__ == "__main__":`, or with workers=1')
        if self.workers == 1:
            self._inline = self.site.open()
        else:
            self._pool = self._new_pool()
            # Workers import torch while the caller goes on.
            for _ in range(self.workers):
                self._submit(self._pool, os.getpid)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        pool, self._pool, self._inline = self._pool, None, None
        if pool is None:
            return
        if kind is not None and not issubclass(kind, Exception):
            # Asked to end now, by Ctrl-C or Prefect: not after what workers are at.
            for worker in list(pool._processes.values()):
                worker.kill()
        pool.shutdown(cancel_futures=True)

    def _new_pool(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(
            self.workers, context, _start, (self.site, context.Value("i", 0))
        )

    def _submit(self, pool: ProcessPoolExecutor, *call: Any) -> Future[Any]:
        # A worker that starts now does so deaf to what would end it before `_start`.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
        try:
            return pool.submit(*call)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def run(self, function: Callable[..., R], *args: object) -> R:
        """Call `function(side, *args)` in a worker and wait; safe to call from several threads.

        Raises:
            FedCoEError: a worker process died, or got no memory, twice at this work. Once is
                passed over in silence: a passing lack of memory must not end a long run.
        """
        if self._inline is not None:
            with self._lock:
                try:
                    return _within_memory(self._inline, function, args)
                except _NoMemory as error:
                    raise FedCoEError(f"memory ran out ({error}): {_LESS}") from None
        reason = ""
        for _ in range(2):
            pool = self._pool
            if pool is None:
                raise FedCoEError("the engine is not open, or was closed while this was at work")
            try:
                done: R = self._submit(pool, _call, function, args).result()
                return done
            except _NoMemory as error:
                reason = f"memory ran out twice at the same work ({error}): {_LESS}"
            except BrokenProcessPool:
                reason = (
                    "a worker process died twice at the same work; most often memory ran out: "
                    f"{_LESS}, or a script of one's own lacks its guard (see Engine)"
                )
                with self._lock:
                    if self._pool is pool:
                        pool.shutdown(wait=False)
                        self._pool = self._new_pool()
        raise FedCoEError(reason)

    def map(self, function: Callable[..., R], *args: object, over: Sequence[object]) -> list[R]:
        """`function(side, *args, item)` for every item, at once; results in the items' order."""
        with ThreadPoolExecutor(max(len(over), 1)) as threads:
            return list(threads.map(lambda item: self.run(function, *args, item), over))

    def shards(self, clients: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
        """Deal clients to workers so that the sums of their sizes are nearly equal.

        Largest first, each to the least loaded worker. Empty shards are left out.
        """
        loads = [0] * self.workers
        shards: list[list[int]] = [[] for _ in loads]
        for client, size in sorted(zip(clients, sizes, strict=True), key=lambda c: (-c[1], c[0])):
            least = loads.index(min(loads))
            loads[least] += size
            shards[least].append(client)
        return [shard for shard in shards if shard]
