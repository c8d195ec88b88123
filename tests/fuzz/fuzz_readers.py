"""Feed damaged files to every reader: each must succeed or say in one line what is wrong.

    python tests/fuzz/fuzz_readers.py --reader npz --seconds 600

A finding is another exception, a crash, more than `HANG` seconds, memory beyond `memory_limit`,
an attempt to allocate what does not fit, or a message of several lines. Inputs follow from the
seed and their number alone: `--seed S --first N --count 1` repeats one; `--keep` keeps findings.
"""

import argparse
import json
import mmap
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).parent))
# A forked child waits for ever for OpenMP's threads, which its parent alone has.
os.environ["OMP_NUM_THREADS"] = "1"

from readers import READERS, Reader

from fedcoe.errors import FedCoEError

SHARED = struct.Struct("<qdqq")
HANG = 5
"""Seconds an input may take."""

ADDRESS_SPACE = 2 * 2**30
"""Bytes that a process reading inputs may map beyond what it has mapped at the start."""


def memory_limit(size: int) -> int:
    """Most bytes that reading a file of `size` bytes may take: four times the file, or four
    times the 64 MiB that even the smallest compressed file may hold."""
    return 4 * max(size, 64 * 2**20)


@dataclass
class Result:
    """What became of the inputs of one reader."""

    inputs: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)


class _Hang(BaseException):
    pass


def fuzz(
    name: str,
    seconds: float,
    seed: int = 0,
    first: int = 0,
    count: int | None = None,
    keep: Path | None = None,
) -> Result:
    """Read damaged files for a while, in a process of its own that may die.

    Args:
        name: a key of `READERS`.
        seconds: how long; with `count`, at most so long.
        keep: folder for inputs that are findings.
    """
    result = Result()
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        reader = READERS[name](Path(folder))
        # Number of the input being read, when it was begun, how many were read and refused: a
        # child that is killed has left its counts here.
        shared = mmap.mmap(-1, SHARED.size)
        while time.monotonic() < end and (count is None or first < count):
            shared[:] = SHARED.pack(first, time.monotonic(), 0, 0)
            report = Path(folder) / "report"
            child = os.fork()
            if not child:
                with report.open("w", encoding="utf-8") as lines:
                    _read_inputs(reader, name, seed, first, count, end, shared, lines)
                os._exit(0)
            died = _watch(child, shared)
            for line in report.read_text(encoding="utf-8").splitlines():
                _note(result, json.loads(line), keep, reader, name, seed)
            last, _, read, refused = SHARED.unpack(shared[:])
            result.outcomes.update(read=read, refused=refused)
            result.inputs += read + refused
            if died:
                row = {"input": last, "finding": died, "outcome": "finding"}
                _note(result, row, keep, reader, name, seed)
            first = last + 1
    return result


def _watch(child: int, shared: mmap.mmap) -> str:
    """Wait for the child; how it died, or an empty string."""
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return "" if status == 0 else f"died ({os.waitstatus_to_exitcode(status)})"
        begun = SHARED.unpack(shared[:])[1]
        if time.monotonic() - begun > 3 * HANG:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "hangs where no signal reaches it"
        time.sleep(0.02)


def _note(
    result: Result, row: dict[str, Any], keep: Path | None, reader: Reader, name: str, seed: int
) -> None:
    result.inputs += 1
    result.outcomes["finding"] += 1
    result.findings.append(f"{name} input {row['input']} (seed {seed}): {row['finding']}")
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        data = _input(reader, name, seed, row["input"])
        (keep / f"{name}-{seed}-{row['input']}.bin").write_bytes(data)
        (keep / f"{name}-{seed}-{row['input']}.txt").write_text(row["finding"])


def _read_inputs(
    reader: Reader,
    name: str,
    seed: int,
    number: int,
    count: int | None,
    end: float,
    shared: mmap.mmap,
    report: TextIO,
) -> None:
    warnings.simplefilter("ignore")
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    signal.signal(signal.SIGALRM, _alarm)
    for whole in reader.seeds:  # what is imported and cached on the first call is no finding
        with suppress(FedCoEError):
            reader.read(whole)
    size = _status("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_SPACE, size + ADDRESS_SPACE))
    counts: Counter[str] = Counter()
    while time.monotonic() < end and (count is None or number < count):
        shared[:] = SHARED.pack(number, time.monotonic(), counts["read"], counts["refused"])
        data = _input(reader, name, seed, number)
        outcome, finding = _read_one(reader, data)
        if finding:
            print(json.dumps({"input": number, "finding": finding}), file=report, flush=True)
        else:
            counts[outcome] += 1
        number += 1
    shared[:] = SHARED.pack(number - 1, time.monotonic(), counts["read"], counts["refused"])


def _input(reader: Reader, name: str, seed: int, number: int) -> bytes:
    """Whole files first, then damaged ones."""
    if number < len(reader.seeds):
        return reader.seeds[number]
    return reader.damaged(random.Random(f"{seed} {name} {number}"))


def _read_one(reader: Reader, data: bytes) -> tuple[str, str]:
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the memory of this instant
    before = _status("VmHWM")
    try:
        signal.alarm(HANG)
        try:
            reader.read(data)
        finally:
            signal.alarm(0)
        outcome, finding = "read", ""
    except FedCoEError as error:
        outcome, finding = "refused", "a message of several lines" if "\n" in str(error) else ""
        if len(str(error)) > 2000:
            finding = f"a message of {len(str(error))} characters: {str(error)[:200]}"
        cause: BaseException | None = error
        while cause is not None and not finding:
            if isinstance(cause, MemoryError):
                finding = "tried to allocate too much: " + "".join(
                    traceback.format_exception(cause)
                )
            cause = cause.__cause__ or cause.__context__
    except _Hang:
        outcome, finding = "", "hangs: " + traceback.format_exc()[-1500:]
    except BaseException:
        outcome, finding = "", traceback.format_exc()[-3000:]
    taken = _status("VmHWM") - before
    if not finding and taken > memory_limit(len(data)):
        finding = f"{taken} bytes of memory for a file of {len(data)}"
    return outcome, finding


def _alarm(number: int, frame: FrameType | None) -> None:
    raise _Hang


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith(name + ":"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reader", choices=[*READERS, "all"], default="all")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int)
    parser.add_argument("--keep", type=Path)
    given = parser.parse_args()
    found = 0
    for name in READERS if given.reader == "all" else [given.reader]:
        last = None if given.count is None else given.first + given.count
        result = fuzz(name, given.seconds, given.seed, given.first, last, given.keep)
        outcomes = ", ".join(f"{value} {key}" for key, value in sorted(result.outcomes.items()))
        print(f"{name}: {result.inputs} inputs in {given.seconds:g} s: {outcomes}", flush=True)
        for finding in result.findings[:10]:
            print(finding, flush=True)
        found += len(result.findings)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
