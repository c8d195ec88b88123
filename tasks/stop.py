"""Stopping a training between two rounds, because a signal asks for it."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from fedcoe.errors import FedCoEError

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_asked: list[int] = []
_handler: Callable[[int, FrameType | None], None] | None = None


class Stopped(FedCoEError):
    """A training ended early as it was asked to; its last round is kept."""


@contextmanager
def stoppable(first: Callable[[int], None], again: Callable[[int], None]) -> Iterator[None]:
    """Take SIGINT and SIGTERM as the wish to stop after the round at work.

    Args:
        first: called with the number of the first signal.
        again: called with that of any further one.
    """
    global _handler

    def handle(number: int, frame: FrameType | None) -> None:
        _asked.append(number)
        (first if len(_asked) == 1 else again)(number)

    _asked.clear()
    with _handling(handle):
        _handler = handle
        try:
            yield
        finally:
            _handler = None


@contextmanager
def heeded() -> Iterator[None]:
    """Inside a flow: Prefect takes SIGTERM for itself there. Where nobody made the process
    stoppable it keeps it: that is how its workers end a run."""
    if _handler is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    with _handling(_handler):
        yield


def stop_if_asked(finished: int, rounds: int) -> None:
    """Raises Stopped if a signal asked for it; `finished` of `rounds` are done."""
    if _asked and _handler is not None:
        after = f"after round {finished} of {rounds}" if finished else "before the first round"
        raise Stopped(f"stopped {after}; run the same command to go on")


def exit_code() -> int:
    """What shells expect of a process that a signal ended."""
    return 128 + _asked[0] if _asked else 1


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
