"""The flow: rounds of federated training as Prefect tasks.

Wiring only. What a round does stands in `fedcoe/methods/`; how it is run, in `fedcoe/engine/`.
"""

import itertools
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from prefect import flow, get_run_logger, unmapped
from prefect.runtime import flow_run

from fedcoe.cold_start import NewClient, summary
from fedcoe.config import Settings, load_settings
from fedcoe.errors import said_of_disks
from fedcoe.evaluate import Evaluation
from fedcoe.methods.base import Federation, Method
from fedcoe.methods.settings import method_class, settings_for
from fedcoe.rounds import (
    RoundRecord,
    evaluation_due,
    gate_clients,
    gate_traffic,
    gate_view,
    personalized,
    plan_round,
)
from fedcoe.state import ServerState
from tasks.artifacts import publish_summary
from tasks.checkpoint import History, Resumed, checkpoint, discard, spend
from tasks.checkpoint import resume as find_checkpoint
from tasks.cold_start import cold_start_evaluate
from tasks.evaluate import evaluate_state, score_shard
from tasks.expert_aggregate import expert_aggregate
from tasks.gate_update import gate_statistics, gate_update
from tasks.local_train import local_train
from tasks.locks import locked, reading_data
from tasks.personalize import personalize
from tasks.progress import report_progress
from tasks.results import run_figures, write_figures, write_models
from tasks.run import Run, open_run
from tasks.stop import Stopped, heeded, stop_if_asked
from tasks.tracking import Tracking, register_models, start_tracking
from tasks.trunk import keep_trunk, next_of_trunk


def _name() -> str:
    given = flow_run.parameters
    method = given.get("method") or "training"
    name = method["name"] if isinstance(method, Mapping) else method
    return f"{name} · {given.get('partitions', 'partitions')}"


@flow(name="federated-training", flow_run_name=_name, validate_parameters=False)
def federated_training(
    root: str = ".",
    overrides: Sequence[str] = (),
    method: str | Mapping[str, Any] | None = None,
    figures: str | None = None,
    partitions: str = "partitions",
    notes: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
    resume: bool = False,
    again: Sequence["Again"] = (),
) -> dict[str, float]:
    """Train as params.yaml says and write models, metrics and plots.

    Args:
        root: folder of params.yaml, data/ and partitions/.
        overrides: `section.key=value` settings that win over params.yaml.
        method: train this method instead, with its default settings or those of a mapping, and
            all else equal.
        figures: write no models and plots, only the figures, into this JSON file under `root`.
        partitions: folder of the partition, under `root`.
        notes: what else the JSON file is to say: it becomes a cell of a comparison, which is also
            predicted with reweighting.
        tags: further tags of the MLflow run; a cell without any is not tracked.
        resume: refuse to start anew. An unfinished run of the same settings, data and code is
            always continued.
        again: further cells from the same trained experts.

    Returns:
        The headline figures: accuracies in [0, 1] by name.
    """
    folder = Path(root)
    settings = load_settings(folder / "params.yaml", overrides)
    if isinstance(method, str):
        method = {"name": method} if method != settings.method.name else None
    if method is not None:
        settings = settings.model_copy(update={"method": settings_for(method)})
    with (
        heeded(),
        said_of_disks(),
        reading_data(folder),
        open_run(settings, folder, folder / partitions) as run,
        _alone(run),
    ):
        role = "cell" if notes else "comparison" if figures else "training"
        resumed = find_checkpoint(run, resume, beside=notes is None)
        for sentence in resumed.said:
            get_run_logger().warning("%s", sentence)
        # No tags: the comparison could not reach its store, so its cells do not wait for it either.
        untracked = notes is not None and not tags
        tracking = Tracking() if untracked else start_tracking(run, {"role": role, **(tags or {})})
        try:
            tracking.log_missed(resumed.history.rounds, resumed.history.curves)
            path = folder / figures if figures else None
            headline = _train(run, tracking, settings, path, notes, resumed, again)
        except BaseException as error:
            stopped = isinstance(error, Stopped) or not isinstance(error, Exception)
            tracking.finish("KILLED" if stopped else "FAILED")
            raise
        tracking.finish("FINISHED")
        discard(run)
        tracking.tidy()
        report_progress("end", headline=headline)
    return headline


def _alone(run: Run) -> AbstractContextManager[None]:
    """Equal runs share their checkpoints, so one waits for the other."""
    return locked(run.root, f"run-{run.scratch.name}", "a run with the same settings and data")


def _train(
    run: Run,
    tracking: Tracking,
    settings: Settings,
    figures: Path | None,
    notes: Mapping[str, Any] | None,
    resumed: Resumed,
    again: Sequence["Again"],
) -> dict[str, float]:
    method, shared = run.method, unmapped(run)
    state, history, _ = resumed
    for sentence in method.inert():
        get_run_logger().warning("no effect: %s", sentence)
    half, batch = int(np.median(method.federation.train_counts)), settings.train.batch_size
    if half < batch:
        get_run_logger().warning(
            "half of the clients have at most %d training images, less than train.batch_size = %d: "
            "one step an epoch; lower it, or train more rounds",
            half,
            batch,
        )
    if state.round:
        get_run_logger().info("resuming after round %d of run %s", state.round, run.key)
    report_progress("start", run=run, round=state.round, rounds=settings.train.rounds)
    evaluated: Evaluated | None = None
    while state.round < settings.train.rounds:
        stop_if_asked(state.round, settings.train.rounds)
        before, started = state, time.perf_counter()
        # Rounds that another cell of the comparison has made already are not made again.
        made = next_of_trunk(run, state) if notes is not None else None
        seconds, speed = 0.0, {}
        if made is not None:
            state, (*passed, record) = made
            for earlier in passed:
                _add_round(method, history, state, earlier)
            tracking.log_missed(history.rounds, history.curves)
            started = time.perf_counter()
        else:
            plan = plan_round(method, state, run.engine)
            rnd, sent = unmapped(plan.round), unmapped(state.for_clients())
            each = _numbered(plan.shards)
            trained = local_train.map(shared, rnd, each, sent, plan.shards).result()
            state, record = expert_aggregate(run, plan.round, state, plan, trained)
            seconds = time.perf_counter() - started
            speed = {"images_per_second": record.images / seconds, "train_seconds": seconds}

        if members := gate_clients(method, state.round):
            state = _update_gate(run, before, state, members)
        spend(run, seconds, time.perf_counter() - started - seconds)
        due = evaluation_due(method, state)
        if due and method.finetune_epochs:
            started = time.perf_counter()
            state, images = _personalize(run, state)
            # Earlier fine-tuning is for the curves only; it is no part of the method's work.
            last = state.round == settings.train.rounds
            spend(run, 0.0, (time.perf_counter() - started) * last)
            record = replace(record, images=record.images + images * last)
        row = _add_round(method, history, state, record) | speed
        if due:
            state, evaluation, new = evaluated = _evaluate(run, state)
            also = {**state.diagnostics, **method.privacy_spent(state)}
            # The round's own figures win over sums so far of the same name.
            row = history.add_evaluation(evaluation, new, also) | row
        checkpoint(run, state.round, state, history)
        if notes is not None and (due or state.round == method.trunk_rounds):
            keep_trunk(run, state, history)
        tracking.log_metrics(row, state.round)
        if due:
            tracking.log_evaluation(evaluation)
        report_progress("round", **row)
    stop_if_asked(state.round, settings.train.rounds)
    # A run killed between its last checkpoint and its results evaluates the last state again.
    state, evaluation, new = evaluated or _evaluate(run, state)
    for other in again:  # before this run's own results: a cell that is there ends the training
        _predict_again(run, state, history, other)
    return _finish(run, tracking, state, history, evaluation, new, figures, notes)


Evaluated = tuple[ServerState, Evaluation, list[NewClient]]


def _add_round(
    method: Method, history: History, state: ServerState, record: RoundRecord
) -> dict[str, Any]:
    return history.add_round(record, gate_traffic(method, state, record.round))


def _update_gate(
    run: Run, before: ServerState, state: ServerState, clients: Sequence[int]
) -> ServerState:
    sizes = [int(run.method.federation.train_counts[k]) for k in clients]
    shards = run.engine.shards(clients, sizes)
    rnd, sent = unmapped(state.round), unmapped(gate_view(run.method, before, state))
    messages = gate_statistics.map(unmapped(run), rnd, _numbered(shards), sent, shards).result()
    return gate_update(run, state.round, state, messages)


def _personalize(run: Run, state: ServerState) -> tuple[ServerState, int]:
    counts = [int(n) for n in run.method.federation.train_counts]
    shards = run.engine.shards(range(len(counts)), counts)
    rnd, sent = unmapped(state.round), unmapped(state.for_clients())
    done = personalize.map(unmapped(run), rnd, _numbered(shards), sent, shards).result()
    return personalized(state, done)


def _evaluate(run: Run, state: ServerState) -> Evaluated:
    """Score all seen clients and the official test set, then serve the new clients."""
    partition, engine = run.data.partition, run.engine
    samples = np.bincount(partition.client, minlength=partition.clients)
    rnd, sent = unmapped(state.round), unmapped(state.for_clients())

    shards = engine.shards(range(partition.seen), [int(n) for n in samples[: partition.seen]])
    ends = np.linspace(0, len(run.data.dataset.y_test), len(shards) + 1).astype(int)
    rows = [(int(a), int(b)) for a, b in itertools.pairwise(ends)]
    scored = score_shard.map(unmapped(run), rnd, _numbered(shards), sent, shards, rows).result()
    state, evaluation = evaluate_state(run, state.round, state, scored)

    new = range(partition.seen, partition.clients)
    shards = engine.shards(new, [int(samples[k]) for k in new])
    sent = unmapped(state.for_clients())
    served = cold_start_evaluate.map(unmapped(run), rnd, _numbered(shards), sent, shards).result()
    return state, evaluation, [client for shard in served for client in shard]


def _evaluate_reweighted(run: Run, state: ServerState) -> tuple[Evaluation, list[NewClient]] | None:
    """The same models, their predictions reweighted by label prior; None where they are already.

    The switch decides nothing in training, so this is the figure a training with it would give.
    """
    if run.settings.method.reweighting:
        return None
    settings = run.settings.model_copy(
        update={
            "method": run.settings.method.model_copy(update={"reweighting": True}),
            "cold_start": run.settings.cold_start.model_copy(update={"few_shot_epochs": 0}),
        }
    )
    _, evaluation, new = _evaluate(_predicting(run, settings), state)
    return evaluation, new


def _predicting(run: Run, settings: Settings) -> Run:
    """The same run, its models to predict with other settings."""
    method = method_class(settings.method.name)(Federation.of(settings, run.data))
    return replace(run, settings=settings, method=method)


@dataclass(frozen=True)
class Again:
    """A cell whose training another cell's is: its settings differ in what only predicts."""

    method: Mapping[str, Any]
    """All settings of the method."""
    figures: str
    notes: Mapping[str, Any]


def _predict_again(run: Run, state: ServerState, history: History, cell: Again) -> None:
    """Write a cell from another's experts: the figures that its own training would give.

    Only its curves are shorter: they have the last evaluation.
    """
    settings = run.settings.model_copy(update={"method": settings_for(cell.method)})
    there = _predicting(run, settings)
    solved = {k: v for k, v in state.extra.items() if k not in ("gate", "head")}
    bare = replace(state, extra=solved, calibration={}, diagnostics={})
    updated = _update_gate(there, bare, bare, range(run.data.partition.seen))
    # The experts' losses have moved the correlation in this round's own gate update.
    updated = replace(updated, correlation=state.correlation)
    state, evaluation, new = _evaluate(there, updated)
    rounds = [_as_sent(row, run.method, there.method, state) for row in history.rounds]
    own = History(rounds)
    own.add_evaluation(evaluation, new, dict(state.diagnostics))
    write_figures(there, run.root / cell.figures, own, evaluation, new, None, cell.notes)


def _as_sent(
    row: Mapping[str, Any], trained: Method, predicting: Method, state: ServerState
) -> dict[str, Any]:
    """A round's row with the bytes of another method's gate update in place of those sent."""
    row = dict(row)
    sent, would = (gate_traffic(m, state, row["round"]) for m in (trained, predicting))
    row["bytes_up"] += would[0] - sent[0]
    row["bytes_down"] += would[1] - sent[1]
    return row


def _finish(
    run: Run,
    tracking: Tracking,
    state: ServerState,
    history: History,
    evaluation: Evaluation,
    new: list[NewClient],
    figures: Path | None,
    notes: Mapping[str, Any] | None,
) -> dict[str, float]:
    cold_start = summary(new)
    if figures is not None:
        from tasks.comparison import measures, metrics

        again = _evaluate_reweighted(run, state) if notes is not None else None
        found = write_figures(run, figures, history, evaluation, new, again, notes)
        tracking.log_metrics({"final": metrics(measures(found, found))}, state.round)
    else:
        # Another run may write here too: what is registered is what this one wrote.
        with locked(run.root, "models", "another run's models being written"):
            models = write_models(run, state, history, evaluation, new)
            drift = history.rounds[-1]["drift"]
            register_models(run, tracking, models, evaluation, cold_start, drift)
    tracking.log_figures(run_figures(run, history, evaluation))
    publish_summary(run, evaluation, cold_start, tracking.label)
    return {
        "global": evaluation.overall["accuracy"],
        "personalized": evaluation.personalized["accuracy"],
    } | {f"cold start, {mode}": of["accuracy"] for mode, of in cold_start.items()}


def _numbered(shards: Sequence[Any]) -> list[str]:
    return [f"{i + 1}/{len(shards)}" for i in range(len(shards))]
