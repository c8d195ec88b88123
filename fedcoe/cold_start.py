"""Serving clients that never took part, without a gradient step.

Three modes, always reported apart, by what they may read of the new client:

    none         nothing: the global prediction
    unlabelled   its training images, no label
    labels       its training images and labels, forward only

`few_shot` is a reference row that does train (it fine-tunes the best expert), never mixed in.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fedcoe.engine.clients import TEST, TRAIN, ClientData
from fedcoe.engine.pool import ClientSide
from fedcoe.engine.trainer import Fit
from fedcoe.methods.base import Method, Scores
from fedcoe.metrics import Tally, over_clients, tally
from fedcoe.prediction import Log, log_posterior
from fedcoe.state import ServerState

Mode = Literal["none", "unlabelled", "labels"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True)
class NewClient:
    """Figures of one new client by mode, on its test split."""

    client: int
    samples: int
    tallies: dict[str, Tally]
    correlation: NDArray[np.float64]
    """[M] in mode `labels`."""


def predict_none(method: Method, state: ServerState, test: Scores) -> Log:
    """[n, C] log probabilities, nothing known of the client."""
    return method.predict_global(state, test)


def predict_unlabelled(method: Method, state: ServerState, test: Scores, inputs: Scores) -> Log:
    """[n, C] log probabilities, given outputs on the client's unlabelled `inputs`."""
    prior, correlation = method.join_unlabelled(state, inputs)
    return method.predict_with(state, test, prior, correlation)


def predict_labels(
    method: Method,
    state: ServerState,
    test: Scores,
    inputs: Scores,
    labels: NDArray[np.int64],
) -> Log:
    """[n, C] log probabilities, given outputs on `inputs` and their labels."""
    prior, correlation = method.join_labelled(state, inputs, labels)
    return method.predict_with(state, test, prior, correlation)


def serve_clients(
    side: ClientSide, method: Method, state: ServerState, clients: Sequence[int]
) -> list[NewClient]:
    """Serve a shard of new clients in every mode."""
    return [_serve(side, method, state, client) for client in clients]


def _serve(side: ClientSide, method: Method, state: ServerState, client: int) -> NewClient:
    data = side.data
    inputs, images = data.images(client, TRAIN), data.images(client, TEST)
    both = method.score(side.trainer, state, np.concatenate([inputs, images]))
    given, test = both.rows(slice(len(inputs))), both.rows(slice(len(inputs), None))
    labels = data.labels(client, TRAIN)
    predictions = {
        "none": predict_none(method, state, test),
        "unlabelled": predict_unlabelled(method, state, test, given),
        "labels": predict_labels(method, state, test, given, labels),
    }
    _, correlation = method.join_labelled(state, given, labels)
    epochs = method.federation.settings.cold_start.few_shot_epochs
    if epochs:
        work = replace(method.work(1), epochs=epochs)
        start = state.experts[int(correlation.argmax())]
        [(_, trained)] = side.trainer.fit([Fit(client, 0, start)], work, data)
        logits, _ = side.trainer.outputs(trained.vector, images, method.batch_size)
        predictions["few_shot"] = log_posterior(logits)
    truth = data.labels(client, TEST)
    tallies = {mode: tally(log_p, truth) for mode, log_p in predictions.items()}
    return NewClient(client, len(inputs), tallies, correlation)


def summary(clients: Sequence[NewClient]) -> dict[str, dict[str, float]]:
    """Mode to the figures of `metrics.over_clients`; the order of clients does not matter."""
    modes = clients[0].tallies if clients else {}
    ordered = sorted(clients, key=lambda c: c.client)
    return {mode: over_clients([c.tallies[mode] for c in ordered]) for mode in modes}


def rows(clients: Sequence[NewClient], data: ClientData) -> list[dict[str, Any]]:
    """One table row a new client."""
    return [
        {
            "client": data.partition.names[c.client],
            "samples": c.samples,
            "test_samples": c.tallies["none"].count,
            "feature_group": int(data.partition.group[c.client]),
        }
        | {mode: t.accuracy for mode, t in c.tallies.items()}
        | {f"correlation_{m}": float(v) for m, v in enumerate(c.correlation)}
        for c in sorted(clients, key=lambda c: c.client)
    ]
