"""One trial: train with its parameters, report validation figures, stop when it looks bad.

Trials run in processes of their own, so that several do at once and one that dies takes nothing
with it. Test images and labels are never opened here; cold start and the official test set neither.
"""

import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any

from optuna.trial import Trial, TrialState

from fedcoe.config import Settings
from fedcoe.engine.devices import hardware
from fedcoe.errors import FedCoEError
from fedcoe.evaluate import score_validation, validate
from fedcoe.rounds import (
    evaluation_due,
    finetune,
    finish_round,
    gate_clients,
    plan_round,
    update_gate,
)
from fedcoe.search_space import with_values
from tasks.run import Run, open_run
from tasks.study import Plan, Study

DEATHS = 3
"""Times in a row that a process may die before its trial can end."""


def validation_curve(run: Run) -> Iterator[tuple[int, dict[str, float]]]:
    """Train as `federated-training` does, and give (round, validation figures) when due."""
    method, engine = run.method, run.engine
    clients = range(method.federation.clients)
    sizes = [int(count) for count in method.federation.train_counts]
    state = method.init()
    while state.round < run.settings.train.rounds:
        before, plan = state, plan_round(method, state, engine)
        results = engine.map(method.local_train, state.for_clients(), over=plan.shards)
        state, _ = finish_round(method, state, plan, results)
        if members := gate_clients(method, state.round):
            state = update_gate(engine, method, state, members, before)
        if evaluation_due(method, state):
            state, _ = finetune(engine, method, state)
            shards, sent = engine.shards(clients, sizes), state.for_clients()
            scored = engine.map(score_validation, method, sent, over=shards)
            state, figures = validate(method, state, [c for shard in scored for c in shard])
            yield state.round, figures
        run.personal.forget({(k, int(r)) for k, r in enumerate(state.personal_round) if r})


def trial_settings(plan: Plan, params: dict[str, Any], processes: int = 1) -> Settings:
    """The settings a trial trains with, when as many trials run at once on this machine.

    Raises:
        FedCoEError: the parameters do not fit together.
    """
    settings = with_values(plan.settings, params)
    values: dict[str, Any] = {"train.rounds": plan.tune.rounds or settings.train.rounds}
    if hardware(settings.runtime) == (False, ("cpu",)):
        cores = settings.runtime.workers or len(os.sched_getaffinity(0))
        values["runtime.workers"] = max(1, cores // processes)
    return with_values(settings, values)


def run_trial(study: Study, trial: Trial, processes: int = 1) -> TrialState:
    """Train, report and end one trial of the study; a trial that diverges has failed."""
    state, value = TrialState.FAIL, None
    try:
        value = _train(study, trial, processes)
        state = TrialState.COMPLETE if value is not None else TrialState.PRUNED
    except FedCoEError as error:
        trial.set_user_attr("error", str(error))
    except Exception as error:
        trial.set_user_attr("error", repr(error))
        raise
    finally:
        shutil.rmtree(study.scratch / ".fedcoe", ignore_errors=True)
        study.optuna.tell(trial, value, state)
    return state


def _train(study: Study, trial: Trial, processes: int) -> float | None:
    """The objective after the last round, or None if the trial was pruned."""
    plan, value, curve = study.plan, math.nan, []
    settings = trial_settings(plan, trial.params, processes)
    with open_run(settings, study.scratch, plan.partitions) as run:
        for round_, figures in validation_curve(run):
            value = figures[plan.objective]
            if not math.isfinite(value):
                raise FedCoEError(f"round {round_}: {plan.objective} is {value}")
            curve.append({"round": round_} | figures)
            trial.set_user_attr("curve", curve)
            trial.report(value, round_)
            if round_ < settings.train.rounds and trial.should_prune():
                return None
    return value


# ------------------------------------------------------- in a process of its own

_study: Study | None = None
_processes = 1


def _start(plan: Plan, processes: int, gpu: str | None) -> None:
    global _study, _processes
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    # Ctrl-C is the parent's to answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: _leave())
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _study, _processes = Study(plan), processes
    (_study.scratch / "data").symlink_to((plan.root / "data").resolve())


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    _leave()


def _leave() -> None:
    # A trial that is not at its end counts as abandoned: its lock goes with the process.
    if _study is not None:
        _study.close()
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(1)


def _next() -> str | None:
    assert _study is not None
    trial = _study.claim()
    return None if trial is None else run_trial(_study, trial, _processes).name


class TrialProcess:
    """A process that runs one trial after another, on one GPU if given; replaced if it dies."""

    def __init__(self, plan: Plan, processes: int, gpu: str | None = None) -> None:
        self.plan, self.processes, self.gpu = plan, processes, gpu
        self._pool: ProcessPoolExecutor | None = None
        self._stopped = False
        self._pid = 0

    def next_trial(self) -> str | None:
        """Run the study's next trial to its end; None when there is none.

        Raises:
            FedCoEError: the process died again and again.
        """
        for _ in range(DEATHS):
            try:
                if self._pool is None:
                    context = multiprocessing.get_context("spawn")
                    given = (self.plan, self.processes, self.gpu)
                    self._pool = ProcessPoolExecutor(1, context, _start, given)
                    self._pid = self._pool.submit(os.getpid).result()
                return self._pool.submit(_next).result()
            except BrokenProcessPool:
                self._pool = None
                if self._stopped:
                    return None
        raise FedCoEError(
            f"a process that ran trials died {DEATHS} times in a row; most often memory ran out: "
            "lower --workers or train.batch_size"
        )

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self._stopped = True
        if self._pool is not None:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGTERM)
            self._pool.shutdown(wait=False, cancel_futures=True)
