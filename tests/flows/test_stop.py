"""Ctrl-C and SIGTERM: the round at work is finished and kept, and this is said."""

import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tasks.stop import Stopped, exit_code, heeded, stop_if_asked, stoppable

Start = Callable[..., "subprocess.Popen[str]"]
MAIN = "import sys\nfrom flows.cli import main\nsys.argv[0] = 'fedcoe'\n"
# A round that does not end by itself.
ENDLESS = """
import time
from fedcoe.methods.base import Method
def local_train(self, *_):
    open("in-a-round", "w").close()
    time.sleep(600)
Method.local_train = local_train
"""
ON_THE_POOL = """
from flows.operations import train

if __name__ == "__main__":
    train(runtime={"workers": 2}, overrides=["train.local_epochs=1000"])
"""


@contextmanager
def started(root: Path, script: str, *args: str, **environment: str) -> Iterator[Any]:
    """A process in a group of its own, which ends with the context."""
    inherited = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    with (root / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", script, *args],
            cwd=root,
            env=inherited | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"} | environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(process: Any, condition: Callable[[], Any], log: Path) -> None:
    ends = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < ends, log.read_text()
        time.sleep(0.05)


def tracked(root: Path) -> list[str]:
    """The status of every MLflow run; none before MLflow has made its tables."""
    try:
        path = f"file:{root}/.fedcoe/mlflow.db?mode=ro"
        with closing(sqlite3.connect(path, uri=True)) as database:
            return [status for [status] in database.execute("select status from runs")]
    except sqlite3.OperationalError:
        return []


def test_nothing_stops_where_no_signal_came_and_the_first_one_is_answered_once() -> None:
    said: list[int] = []
    with stoppable(said.append, lambda number: said.append(-number)):
        stop_if_asked(1, 3)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="stopped after round 2 of 3; run the same command"):
            stop_if_asked(2, 3)
        with pytest.raises(Stopped, match="stopped before the first round"):
            stop_if_asked(0, 3)
        assert exit_code() == 143
        os.kill(os.getpid(), signal.SIGINT)
    assert said == [signal.SIGTERM, -signal.SIGINT]
    stop_if_asked(2, 3)  # outside nobody asked


def test_prefects_own_answer_to_sigterm_is_taken_over_only_in_a_stoppable_process() -> None:
    prefects: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: prefects.append(number))
    try:
        with heeded():
            os.kill(os.getpid(), signal.SIGTERM)
        assert prefects == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
    said: list[int] = []
    with stoppable(said.append, said.append):
        inside = signal.signal(signal.SIGTERM, lambda number, _: prefects.append(number))
        with heeded():
            os.kill(os.getpid(), signal.SIGTERM)
        signal.signal(signal.SIGTERM, inside)
    assert (said, len(prefects)) == ([signal.SIGTERM], 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "number", "embedded"),
    [(["train"], signal.SIGTERM, True), (["stage", "train"], signal.SIGINT, False)],
    ids=["SIGTERM with the embedded Prefect", "Ctrl-C to a stage"],
)
def test_a_signal_ends_a_training_after_its_round_with_a_clear_word(
    command: list[str],
    number: int,
    embedded: bool,
    new_project: Callable[..., Path],
    prefect_api: str,
) -> None:
    root = new_project(train={"rounds": 500}, runtime={"workers": 2})
    environment = {} if embedded else {"PREFECT_API_URL": prefect_api}
    with started(root, f"{MAIN}\nmain()", *command, **environment) as process:
        runs = root / ".fedcoe/runs"
        wait_for(process, lambda: list(runs.glob("*/round-000002.*")), root / "log")
        os.killpg(process.pid, number)  # as a terminal, or a machine that is shut down
        assert process.wait(timeout=300) == 128 + number
    log = (root / "log").read_text()
    [after] = re.findall(r"stopped after round (\d+) of 500; run the same command to go on", log)
    assert "Traceback" not in log and "rror" not in log, log
    kept = sorted(path.name[6:12] for path in runs.glob("*/round-*.safetensors"))
    assert kept[-1] == f"{int(after):06d}"
    assert tracked(root) == ["KILLED"]


def test_a_dependent_process_ends_with_a_killed_starter_and_hears_no_signal_to_its_group(
    tmp_path: Path,
) -> None:
    import psutil

    script = (
        "import sys, time\nfrom tasks.processes import Dependent\n"
        "child = Dependent([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\ntime.sleep(600)\n"
    )
    with started(tmp_path, script) as process:
        log = tmp_path / "log"
        wait_for(process, lambda: log.read_text().strip(), log)
        child = psutil.Process(int(log.read_text()))
        assert os.getpgid(child.pid) != os.getpgid(process.pid)
        process.kill()
        process.wait()
        child.wait(timeout=30)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(new_project: Callable[..., Path], prefect_api: str) -> None:
    root = new_project()
    script = f"{MAIN}{ENDLESS}main()"
    with started(root, script, "train", PREFECT_API_URL=prefect_api) as process:
        wait_for(process, lambda: (root / "in-a-round").exists(), root / "log")
        os.killpg(process.pid, signal.SIGINT)
        wait_for(process, lambda: "a second Ctrl-C" in (root / "log").read_text(), root / "log")
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 130
    assert "Traceback" not in (root / "log").read_text()


@pytest.mark.slow
def test_a_run_on_the_pool_ends_at_once_with_its_workers_when_prefect_says_so(
    new_project: Callable[..., Path],
    prefect_api: str,
    fedcoe_command: Callable[..., Any],
) -> None:
    import psutil

    root = new_project()
    with started(root, ON_THE_POOL, PREFECT_API_URL=prefect_api) as process:
        python = psutil.Process(process.pid)
        wait_for(process, lambda: tracked(root) and python.children(recursive=True), root / "log")
        workers = python.children(recursive=True)
        process.terminate()
        assert process.wait(timeout=100) != 0
        psutil.wait_procs(workers, timeout=5)
    assert not [worker for worker in workers if worker.is_running()]
    # In the middle of a record that MLflow was writing, the last one waits in the outbox.
    assert fedcoe_command(root, "sync").returncode == 0
    assert tracked(root) == ["KILLED"]
