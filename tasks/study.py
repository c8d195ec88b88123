"""A study on disk: one Optuna journal that any number of processes share and that survives them.

A process that runs trials holds a lock which the kernel lets go of when it dies, however it dies.
So a trial that is marked as running and whose lock is free was abandoned: it counts as failed and
its parameters are tried again. (Optuna's own heartbeat needs a database server.)
"""

import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from fedcoe import __version__
from fedcoe.config import Settings, TuneSettings, fingerprint_of
from fedcoe.locks import Lock
from fedcoe.search_space import Dimension
from fedcoe.streams import stream

optuna.logging.set_verbosity(optuna.logging.WARNING)

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
ATTEMPTS = 3
"""Times that parameters are tried whose process dies; by then they are what kills it."""


@dataclass(frozen=True)
class Plan:
    """What is searched, where and for what; small, so that it travels to other processes."""

    root: Path
    partitions: Path
    settings: Settings
    space: dict[str, Dimension]
    objective: str
    data_hash: str
    dataset: str

    @property
    def tune(self) -> TuneSettings:
        return self.settings.tune

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        return "minimize" if self.objective.endswith("nll") else "maximize"

    @property
    def key(self) -> str:
        """16 hex digits of everything a trial's figures depend on but its parameters."""
        base = self.settings.model_dump(mode="json", exclude={"cold_start": True, "runtime": True})
        values = {
            "settings": base,
            "precision": [self.settings.runtime.engine, self.settings.runtime.precision],
            "tune": self.tune.model_dump(mode="json", exclude={"trials", "space", "objective"}),
            "space": {key: vars(dimension) for key, dimension in self.space.items()},
            "objective": self.objective,
            "data": self.data_hash,
            "version": __version__,
        }
        return fingerprint_of(values)

    @property
    def name(self) -> str:
        return f"{self.settings.method.name}-{self.dataset}-{self.key[:8]}"

    @property
    def folder(self) -> Path:
        """The journal, locks, and what trials keep while they run."""
        return self.root / ".fedcoe" / "tune" / self.name

    @property
    def results(self) -> Path:
        """What people read."""
        return self.root / "results" / "tune" / self.name


@dataclass(frozen=True)
class Progress:
    """How far a study is; `finished` counts pruned trials too."""

    finished: int
    pruned: int
    failed: int
    best: FrozenTrial | None


class Study:
    """One study, opened by one process; `close` when it ends."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.worker = uuid.uuid4().hex[:12]
        self.scratch = _workers(plan) / self.worker
        journal = plan.folder / "journal.log"
        journal_lock = _JournalLock(plan.folder / "journal.lock")
        _workers(plan).mkdir(parents=True, exist_ok=True)
        with self._claiming():
            self.scratch.mkdir()
            self._alive = Lock(self.scratch / "alive")
            journal_lock.acquire()
            _mend(journal)
            journal_lock.release()
            storage = JournalStorage(JournalFileBackend(str(journal), journal_lock))  # type: ignore[arg-type]
            self.optuna = optuna.create_study(
                study_name=plan.name,
                storage=storage,
                direction=plan.direction,
                pruner=_pruner(plan.tune),
                load_if_exists=True,
            )

    def close(self) -> None:
        self._alive.close()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def claim(self) -> Trial | None:
        """The next trial with its parameters, or None once there are enough.

        Waits while the last ones run elsewhere: whoever runs them may die.
        """
        while True:
            with self._claiming():
                self._requeue_abandoned()
                trials = self.trials()
                finished = sum(t.state in FINISHED for t in trials)
                running = sum(t.state == TrialState.RUNNING for t in trials)
                asked = self.plan.tune.trials
                if finished >= asked or failures(trials) >= asked:
                    return None
                if finished + running < asked:
                    return self._ask(trials)
            time.sleep(0.3)

    def _ask(self, trials: list[FrozenTrial]) -> Trial:
        # A stream for each trial, numbered without abandoned ones: a study that was interrupted
        # goes on with the parameters it would have had.
        tune, given_up = self.plan.tune, _retried(trials)
        number = sum(t.number not in given_up and t.state != TrialState.WAITING for t in trials)
        seed = int(stream(tune.seed, "tune", number).integers(2**32))
        self.optuna.sampler = TPESampler(seed=seed, n_startup_trials=tune.startup_trials)
        trial = self.optuna.ask()
        trial.set_user_attr("worker", self.worker)
        for key, dimension in self.plan.space.items():
            suggest(trial, key, dimension)
        return trial

    def _requeue_abandoned(self) -> None:
        trials = self.trials()
        given_up = _retried(trials)
        for trial in trials:
            worker = trial.user_attrs.get("worker", "")
            if trial.state != TrialState.RUNNING or (worker and alive(self.plan, worker)):
                continue
            attempt = trial.user_attrs.get("attempt", 1)
            if attempt < ATTEMPTS and trial.number not in given_up:
                again = {"retry_of": trial.number, "attempt": attempt + 1}
                self.optuna.enqueue_trial(trial.params, user_attrs=again)
            self.optuna.tell(trial.number, state=TrialState.FAIL)
        for folder in _workers(self.plan).iterdir():
            if not alive(self.plan, folder.name):
                shutil.rmtree(folder, ignore_errors=True)

    def trials(self) -> list[FrozenTrial]:
        return self.optuna.get_trials(deepcopy=False)

    def progress(self) -> Progress:
        trials = self.trials()
        done = [t for t in trials if t.state == TrialState.COMPLETE]
        pruned = sum(t.state == TrialState.PRUNED for t in trials)
        best = self.optuna.best_trial if done else None
        return Progress(len(done) + pruned, pruned, failures(trials), best)

    def ended(self) -> list[FrozenTrial]:
        """Trials that ended by themselves, in the order they were started."""
        trials = self.trials()
        given_up, states = _retried(trials), (*FINISHED, TrialState.FAIL)
        return [t for t in trials if t.state in states and t.number not in given_up]

    @contextmanager
    def _claiming(self) -> Iterator[None]:
        with Lock(self.plan.folder / "claim.lock"):
            yield


def suggest(trial: Trial, key: str, dimension: Dimension) -> Any:
    """The trial's value for one setting."""
    d = dimension
    if d.choices:
        return trial.suggest_categorical(key, d.choices)
    if d.whole:
        return trial.suggest_int(key, int(d.low), int(d.high), step=int(d.step or 1), log=d.log)
    return trial.suggest_float(key, d.low, d.high, step=d.step, log=d.log)


def failures(trials: list[FrozenTrial]) -> int:
    """Trials that failed by themselves, not because their process was killed."""
    given_up = _retried(trials)
    return sum(t.state == TrialState.FAIL and t.number not in given_up for t in trials)


def _retried(trials: list[FrozenTrial]) -> set[int]:
    return {t.user_attrs["retry_of"] for t in trials if "retry_of" in t.user_attrs}


def _pruner(tune: TuneSettings) -> BasePruner:
    if tune.pruner == "none":
        return NopPruner()
    return MedianPruner(tune.startup_trials, n_warmup_steps=tune.warmup_rounds)


def _workers(plan: Plan) -> Path:
    return plan.folder / "workers"


def alive(plan: Plan, worker: str) -> bool:
    """Whether the process that opened the study under this name still runs."""
    try:
        Lock(_workers(plan) / worker / "alive", wait=False).close()
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


class _JournalLock:
    """Optuna's own lock files outlive a killed process; others then wait for half a minute."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def acquire(self) -> bool:
        self.file = Lock(self.path)
        return True

    def release(self) -> None:
        self.file.close()


def _mend(journal: Path) -> None:
    """Cut off a last line that a killed process did not finish; Optuna would refuse the file."""
    if journal.exists():
        text = journal.read_bytes()
        if not text.endswith(b"\n"):
            with journal.open("r+b") as file:
                file.truncate(text.rfind(b"\n") + 1)
