"""Tasks: score all seen clients and the official test set."""

from collections.abc import Sequence

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE

from fedcoe.evaluate import (
    ClientScores,
    Evaluation,
    evaluate,
    join_scores,
    score_clients,
    score_global,
)
from fedcoe.methods.base import Scores
from fedcoe.state import ServerState
from tasks.retry import PASSING
from tasks.run import Run


@task(
    name="score",
    task_run_name="round {rnd} · score · shard {shard}",
    cache_policy=NO_CACHE,
    **PASSING,
)
def score_shard(
    run: Run,
    rnd: int,
    shard: str,
    state: ServerState,
    clients: Sequence[int],
    rows: tuple[int, int],
) -> tuple[list[ClientScores], Scores]:
    """Run all models over some clients' held-out splits and rows of the official test set."""
    own = run.engine.run(score_clients, run.method, state, clients)
    return own, run.engine.run(score_global, run.method, state, np.arange(*rows))


@task(name="evaluate", task_run_name="round {rnd} · evaluate", cache_policy=NO_CACHE)
def evaluate_state(
    run: Run,
    rnd: int,
    state: ServerState,
    scored: Sequence[tuple[list[ClientScores], Scores]],
) -> tuple[ServerState, Evaluation]:
    """Calibrate on validation, score on test."""
    clients = [client for own, _ in scored for client in own]
    overall = join_scores([part for _, part in scored if part.experts.shape[1]])
    return evaluate(run.method, state, clients, overall, np.asarray(run.data.dataset.y_test))
