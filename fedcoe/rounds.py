"""One round on the server: plan it, and turn the clients' results into the next state.

`train_round` strings the steps together in plain Python; `flows/federated_training.py` does the
same as Prefect tasks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedcoe.engine.pool import Engine
from fedcoe.errors import FedCoEError
from fedcoe.methods.base import LocalResult, Method, Order, drift, merged
from fedcoe.state import ServerState


@dataclass(frozen=True)
class RoundPlan:
    """Who trains what in a round, dealt to workers."""

    round: int
    orders: list[Order]
    shards: list[list[Order]]


@dataclass(frozen=True)
class RoundRecord:
    """What happened in a round; JSON-able through `dataclasses.asdict`."""

    round: int
    cohort: int
    train_loss: float
    """Mean over samples of experts' losses in their last local epoch."""
    images: int
    """Images trained on, each time one model sees one image once."""
    bytes_up: int
    bytes_down: int
    dropped: dict[str, int]
    """Updates left out, by reason."""
    drift: list[float]
    """[M] see `methods.base.drift`."""
    load_entropy: float
    """Entropy of experts' shares of this round's dispatch over log M; 1 = even."""
    churn: float
    """Share of this round's (client, expert) pairs that had not been dispatched before."""


def plan_round(method: Method, state: ServerState, engine: Engine) -> RoundPlan:
    """Sample the cohort, dispatch experts, and deal clients to workers by their load."""
    cohort = method.cohort(state)
    orders = method.dispatch(state, cohort)
    counts = method.federation.train_counts
    sizes = [int(counts[o.client]) * len(o.experts) for o in orders]
    by_client = {o.client: o for o in orders}
    shards = [[by_client[k] for k in shard] for shard in engine.shards(list(by_client), sizes)]
    return RoundPlan(state.round + 1, orders, shards)


def finish_round(
    method: Method, state: ServerState, plan: RoundPlan, results: Sequence[LocalResult]
) -> tuple[ServerState, RoundRecord]:
    """Aggregate a round's results.

    Raises:
        FedCoEError: too many updates were invalid (`train.quorum`), or the server step broke the
            model; the state stays as it was.
    """
    total = merged(results)
    asked = sum(len(order.experts) for order in plan.orders)
    quorum = method.federation.settings.train.quorum
    if total.valid < quorum * asked:
        said = f" ({reasons(total.dropped)})" if total.dropped else ""
        lr = method.federation.settings.train.lr
        diverged = total.dropped["not finite"] + total.dropped["too large"]
        cause = f"; most often train.lr ({lr:g}) is too high" if diverged else ""
        raise FedCoEError(
            f"round {plan.round}: only {total.valid} of {asked} updates are valid{said}, "
            f"train.quorum asks for {quorum:g}{cause}"
        )
    after = method.aggregate(state, plan.orders, [total])
    if not np.isfinite(after.experts).all():
        raise FedCoEError(
            f"round {plan.round}: all {total.valid} updates are finite, but after the server step "
            f"of {method.settings.name} the model is not; lower method.server_lr or mend that step"
        )
    # From the state: with IFCA clients say only then which expert they trained.
    given = after.dispatched - state.dispatched
    load = given.sum(axis=0) / given.sum()
    up, down = method.round_bytes(state, plan.orders)
    return after, RoundRecord(
        round=plan.round,
        cohort=len(plan.orders),
        train_loss=total.train_loss,
        images=total.images,
        bytes_up=up,
        bytes_down=down,
        dropped=dict(sorted(total.dropped.items())),
        drift=[float(d) for d in drift(total)],
        load_entropy=evenness(load),
        churn=float((state.dispatched[given > 0] == 0).mean()) if state.round else 0.0,
    )


def left_out(plan: RoundPlan, record: RoundRecord) -> str | None:
    """One line on what of a round did not count; None if all did."""
    if not record.dropped:
        return None
    asked = sum(len(order.experts) for order in plan.orders)
    return f"round {plan.round}: left out {reasons(record.dropped)}; asked for {asked} updates"


def reasons(dropped: Mapping[str, int]) -> str:
    """How many were left out for what, for people."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))


def evaluation_due(method: Method, state: ServerState) -> bool:
    """Whether this state is to be evaluated: every `evaluate.every` rounds and at the end."""
    return method.evaluation_due(state.round)


def gate_clients(method: Method, round_: int) -> list[int]:
    """Clients of the gate update after a round; empty if none is due.

    Every seen client when an evaluation follows or the method needs them all, the cohort when only
    `gate_every` asks for it.
    """
    if not method.gate_due(round_):
        return []
    if method.everybody_reports(round_):
        return list(range(method.federation.clients))
    return method.cohort_of(round_)


def gate_traffic(method: Method, state: ServerState, round_: int) -> tuple[int, int]:
    """Bytes (up, down) of the gate update after a round over all its clients; 0 if none is due."""
    clients = gate_clients(method, round_)
    return method.gate_bytes(state, len(clients), round_) if clients else (0, 0)


def train_round(
    engine: Engine, method: Method, state: ServerState
) -> tuple[ServerState, RoundRecord]:
    """Plan, train and aggregate one round."""
    plan = plan_round(method, state, engine)
    results = engine.map(method.local_train, state.for_clients(), over=plan.shards)
    return finish_round(method, state, plan, results)


def gate_view(method: Method, before: ServerState, after: ServerState) -> ServerState:
    """The state that clients fit the gate to: with the new experts, unless the method says not."""
    seen = replace(after, experts=before.experts) if method.gate_before_aggregation else after
    return seen.for_clients()


def update_gate(
    engine: Engine,
    method: Method,
    state: ServerState,
    clients: Sequence[int],
    before: ServerState | None = None,
) -> ServerState:
    """One gate update with these clients; `before` is the state the round began with."""
    shards = engine.shards(clients, [int(method.federation.train_counts[k]) for k in clients])
    view = gate_view(method, before or state, state)
    messages = engine.map(method.gate_message, view, over=shards)
    return method.gate_update(state, messages)


def personalized(
    state: ServerState, results: Sequence[tuple[list[int], int]]
) -> tuple[ServerState, int]:
    """The state after fine-tuning, and the images that took, from `Method.personalize`'s shards."""
    rounds = state.personal_round.copy()
    for clients, _ in results:
        rounds[clients] = state.round
    return replace(state, personal_round=rounds), sum(images for _, images in results)


def finetune(engine: Engine, method: Method, state: ServerState) -> tuple[ServerState, int]:
    """Fine-tune on every seen client, where the method does: the state and images trained on."""
    if not method.finetune_epochs:
        return state, 0
    counts = [int(n) for n in method.federation.train_counts]
    shards = engine.shards(range(len(counts)), counts)
    return personalized(state, engine.map(method.personalize, state.for_clients(), over=shards))


def evenness(load: Any) -> float:
    """Entropy of [M] shares over log M; 1 = even."""
    if len(load) == 1:
        return 1.0
    positive = load[load > 0]
    return float(-(positive * np.log(positive)).sum() / np.log(len(load)))
