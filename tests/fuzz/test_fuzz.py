"""The fuzzers for a second a reader; ten minutes each: `python tests/fuzz/fuzz_readers.py`."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

FUZZER = Path(__file__).parent / "fuzz_readers.py"


@pytest.mark.slow
def test_damaged_files_are_read_or_refused_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, str(FUZZER), "--seconds", "1"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 8
    for line in lines:  # damage must neither pass always nor be refused always
        assert " read" in line and " refused" in line, line


@pytest.mark.slow
def test_the_fuzzer_finds_what_it_is_there_to_find(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(FUZZER.parent)
    import fuzz_readers
    import readers

    from fedcoe.errors import FedCoEError

    class Faulty(readers.Reader):
        def __init__(self, folder: Path) -> None:
            super().__init__(folder)
            self.seeds = [b"\0"]

        def damaged(self, rng: random.Random) -> bytes:
            return bytes((order.index(rng.random()),))  # the number of the input

        def read(self, data: bytes) -> None:
            match data:
                case b"\0":
                    raise FedCoEError("one line")
                case b"\1":
                    raise FedCoEError("two\nlines")
                case b"\2":
                    raise KeyError("x")
                case b"\3":
                    len(b"x" * (300 * 2**20))
                case b"\4":
                    os.kill(os.getpid(), signal.SIGKILL)
                case b"\5":
                    time.sleep(60)
                case b"\6":
                    raise FedCoEError("hidden") from MemoryError()

    order = [random.Random(f"0 faulty {i}").random() for i in range(7)]
    monkeypatch.setitem(fuzz_readers.READERS, "faulty", Faulty)
    monkeypatch.setattr(fuzz_readers, "HANG", 3)
    result = fuzz_readers.fuzz("faulty", 60, count=7, keep=tmp_path)
    assert (result.inputs, result.outcomes) == (7, {"read": 0, "refused": 1, "finding": 6})
    found = "\n".join(result.findings)
    for i, words in enumerate(
        ("several lines", "KeyError", "bytes of memory", "died (-9)", "hangs", "allocate"), start=1
    ):
        [finding] = [line for line in result.findings if f"input {i} " in line]
        assert words in finding, found
    assert len(list(tmp_path.glob("*.bin"))) == 6
