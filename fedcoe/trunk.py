"""The trunk: the first rounds of a method in which it trains one model as FedAvg does.

A pool that branches later, and FedAvg itself, walk the same trunk when they have the same switches,
seed and data, so several trainings need to walk it only once. What is kept of it has one expert;
a method's own things (correlation, gate, personal experts) stay those it had.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedcoe.config import Settings
from fedcoe.methods.base import Method
from fedcoe.methods.settings import PREDICTION, MethodSettings
from fedcoe.rounds import RoundRecord, evenness
from fedcoe.state import ServerState


def trunk_settings(settings: Settings) -> dict[str, Any]:
    """What decides a trunk, JSON-able: equal values, equal trunks on the same data."""
    named = settings.model_dump(
        mode="json",
        exclude={
            "method": True, "data": True, "evaluate": True, "cold_start": True, "tune": True,
            "runtime": {"workers"},
        },
    )  # fmt: skip
    every = set(MethodSettings.model_fields) - PREDICTION - {"name"}
    return named | {"method": settings.method.model_dump(mode="json", include=every)}


def cut(state: ServerState) -> ServerState:
    """What a trunk keeps of a state in it: the one model and how often clients trained it."""
    seen = len(state.dispatched)
    return ServerState(
        round=state.round,
        experts=state.experts[:1],
        momentum=state.momentum[:1],
        correlation=np.ones((seen, 1)),
        dispatched=state.dispatched[:, :1].copy(),
        personal_round=np.zeros(seen, np.int64),
        share=np.zeros(seen),
    )


def onward(
    method: Method, state: ServerState, trunk: ServerState, records: Sequence[RoundRecord]
) -> tuple[ServerState, list[RoundRecord]]:
    """A method's state in the trunk, moved on to a later round of it, and the rounds between.

    Args:
        trunk: what `cut` kept of the later round.
        records: every round up to there.
    """
    experts, rest = method.experts, np.zeros((len(trunk.dispatched), method.experts - 1), np.int64)
    after = replace(
        state,
        round=trunk.round,
        experts=np.tile(trunk.experts, (experts, 1)),
        momentum=np.tile(trunk.momentum, (experts, 1)),
        dispatched=np.concatenate([trunk.dispatched, rest], axis=1),
    )
    load = np.eye(experts)[0]
    return after, [
        replace(record, drift=record.drift[:1] + [0.0] * (experts - 1), load_entropy=evenness(load))
        for record in records[state.round :]
    ]
