"""Trainings killed at random instants and started again: the bytes of one never killed.

`FEDCOE_KILLS=50 pytest -s tests/flows/test_kill_loop.py` kills fifty times and says at which
instants; `FEDCOE_KILL_SEED` draws others.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedcoe.locks import Lock

REPOSITORY = Path(__file__).parents[2]
# By default one, of `dvc repro`; what is aimed at in CI is in test_resume.py.
KILLS = int(os.environ.get("FEDCOE_KILLS", "1"))
BY_DVC = max(1, KILLS // 6)
SEED = int(os.environ.get("FEDCOE_KILL_SEED", "0"))
A_RUN = 6
"""Most kills of one run; it may then finish, and the next ones hit another."""
ROUNDS = 8
INSTANTS = ("any", "checkpoint", "export")
FILES = ("metrics/train.json", "plots/curves.csv")


@pytest.fixture(scope="module")
def never_killed(
    new_project: Callable[..., Path], run_training: Callable[..., dict[str, float]]
) -> tuple[Path, float]:
    """A finished run, and the seconds it took."""
    root = new_project(train={"rounds": ROUNDS}, evaluate={"every": 4})
    started = time.monotonic()
    run_training(root)
    return root, time.monotonic() - started


@dataclass
class Killer:
    """Starts a command in a process group of its own and kills the group at drawn instants."""

    command: list[str]
    environment: Mapping[str, str]
    life: float
    """Seconds that a run takes from its first round on."""
    rng: random.Random

    def run(self, root: Path, instant: str | None) -> dict[str, Any] | None:
        """One start, killed at an instant of this kind: when and in what it was hit.

        None if it finished before, or was to: then without an error.
        """
        command = list(self.command)
        if command[0] == "fedcoe" and KILLS > 10:  # the number of workers decides nothing
            command += ["-S", f"runtime.workers={self.rng.choice((1, 2))}"]
        log = root.parent / f"{root.name}.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                command, cwd=root, env=self.environment, stdout=file, stderr=file,
                start_new_session=True,
            )  # fmt: skip
        try:
            hit = None if instant is None else self._wait(root, process, instant)
            if hit is not None:
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait(timeout=500)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        if hit is not None and code == -signal.SIGKILL:
            return hit | _seen(root)
        assert code == 0, log.read_text()[-3000:]
        return None

    def _wait(self, root: Path, process: Any, instant: str) -> dict[str, Any] | None:
        while process.poll() is None and not _training(root):
            time.sleep(0.005)
        began, wait = time.monotonic(), self.rng.uniform(0.0, self.life)
        passed, seen = self.rng.randrange(3), set[Path]()
        while process.poll() is None:
            if instant == "any" and time.monotonic() > began + wait:
                break
            if instant == "export" and (root / ".models.new").exists():
                time.sleep(self.rng.uniform(0.0, 0.05))
                break
            if instant == "checkpoint":
                with suppress(FileNotFoundError):  # a run that ends deletes its folder
                    seen |= set((root / ".fedcoe/runs").glob("*/.round-*.tmp"))
                if len(seen) > passed:
                    break
        if process.poll() is not None:
            return None
        return {"instant": instant, "after": round(time.monotonic() - began, 3)}


def _training(root: Path) -> bool:
    """Whether a process holds the lock of its run, which is when rounds begin."""
    for path in (root / ".fedcoe/locks").glob("run-*"):
        try:
            Lock(path, wait=False).close()
        except BlockingIOError:
            return True
    return False


def _seen(root: Path) -> dict[str, Any]:
    """How far the run was when it was killed."""
    runs = root / ".fedcoe/runs"
    kept = sorted(path.name[6:12] for path in runs.glob("*/round-*"))
    return {
        "round": int(kept[-1]) if kept else 0,
        "writing": sorted(p.name for p in runs.rglob(".*.tmp")),
        "models": [name for name in (".models.new", "models") if (root / name).exists()],
    }


def kill_loop(
    killer: Killer,
    new_root: Callable[[], Path],
    kills: int,
    check: Callable[[Path], None],
) -> list[dict[str, Any]]:
    """Kill so many times, and check every run that finishes."""
    hits: list[dict[str, Any]] = []
    order: list[str] = []
    root, here, finished = new_root(), 0, 0
    while True:
        order = order or killer.rng.sample(INSTANTS, len(INSTANTS))
        left = len(hits) < kills and here < A_RUN
        hit = killer.run(root, order.pop() if left else None)
        if hit is not None:
            hits.append(hit)
            here += 1
            print(f"kill {len(hits)}: {hit}", flush=True)
            continue
        check(root)
        finished += 1
        print(f"run {finished} finished after {here} kills: byte-identical", flush=True)
        if len(hits) >= kills:
            return hits
        shutil.rmtree(root)
        root, here = new_root(), 0


@pytest.fixture
def check(
    never_killed: tuple[Path, float], contents: Callable[..., dict[str, bytes]]
) -> Callable[[Path], None]:
    def compare(root: Path) -> None:
        ours, theirs = (contents(r, ("models",)) for r in (root, never_killed[0]))
        assert ours.keys() == theirs.keys()
        assert [name for name in theirs if ours[name] != theirs[name]] == []
        for name in FILES:
            assert (root / name).read_bytes() == (never_killed[0] / name).read_bytes(), name
        assert not list((root / ".fedcoe/runs").iterdir())
        assert not list(root.glob(".models*")) and not list(root.rglob(".*.tmp"))

    return compare


@pytest.fixture
def environment(prefect_api: str) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    return inherited | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PREFECT_API_URL": prefect_api,
        "OMP_NUM_THREADS": "1",
        "DVC_NO_ANALYTICS": "1",
    }


@pytest.mark.skipif(KILLS <= BY_DVC, reason="test_resume.py does; FEDCOE_KILLS=12 does it here too")
@pytest.mark.slow
def test_fedcoe_train_killed_at_random_instants_ends_with_the_same_bytes(
    never_killed: tuple[Path, float],
    new_project: Callable[..., Path],
    check: Callable[[Path], None],
    environment: dict[str, str],
) -> None:
    killer = Killer(["fedcoe", "train"], environment, never_killed[1], random.Random(SEED))

    def new_root() -> Path:
        return new_project(train={"rounds": ROUNDS}, evaluate={"every": 4})

    assert len(kill_loop(killer, new_root, KILLS - BY_DVC, check)) == KILLS - BY_DVC


@pytest.mark.slow
def test_dvc_repro_killed_at_random_instants_ends_with_the_same_bytes(
    never_killed: tuple[Path, float],
    new_project: Callable[..., Path],
    check: Callable[[Path], None],
    environment: dict[str, str],
) -> None:
    def new_root() -> Path:
        root = new_project(train={"rounds": ROUNDS}, evaluate={"every": 4})
        for folder in ("fedcoe", "tasks", "flows"):
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(REPOSITORY / folder, root / folder, ignore=ignore)
        shutil.copy(REPOSITORY / "dvc.yaml", root)
        command = [sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"]
        subprocess.run(command, cwd=root, env=environment, check=True)
        return root

    command = [sys.executable, "-m", "dvc", "repro", "--quiet", "train"]
    killer = Killer(command, environment, never_killed[1], random.Random(SEED))
    assert len(kill_loop(killer, new_root, BY_DVC, check)) == BY_DVC


def test_a_flow_that_prefect_retries_goes_on_and_ends_with_the_same_bytes(
    never_killed: tuple[Path, float],
    new_project: Callable[..., Path],
    check: Callable[[Path], None],
    prefect_api: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flows import federated_training as module

    rng, planned = random.Random(SEED), module.plan_round
    root = new_project(train={"rounds": ROUNDS}, evaluate={"every": 4})
    fails = rng.sample(range(1, ROUNDS + 1), 3)
    rounds: list[int] = []

    def plan_round(method: Any, state: Any, engine: Any) -> Any:
        rounds.append(state.round + 1)
        if state.round + 1 in fails:
            fails.remove(state.round + 1)
            raise RuntimeError("for a moment")
        return planned(method, state, engine)

    monkeypatch.setattr(module, "plan_round", plan_round)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/.fedcoe/mlflow.db")
    retried = module.federated_training.with_options(retries=3, retry_delay_seconds=0)
    retried(str(root))
    assert not fails
    assert len(rounds) == ROUNDS + 3, "a retry trained finished rounds again"
    check(root)
