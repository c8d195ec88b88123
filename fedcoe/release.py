"""Whether a candidate may replace the champion: both predict the same images, and are compared.

Clients' training splits are what a model may read of them, forward only; graded are the validation
splits, of seen and of new clients: test splits are for figures that nothing was chosen by. Versions
compare that were trained on different clients, and personal experts, which never leave their
clients, play no part.

The interval is that of a paired bootstrap over images, drawn anew within each client: how much a
figure would change if these clients had brought other images. It does not say what other clients
would bring.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcoe.cold_start import predict_labels, predict_none, predict_unlabelled
from fedcoe.engine.clients import TRAIN, VALIDATION
from fedcoe.engine.pool import ClientSide
from fedcoe.errors import FedCoEError
from fedcoe.methods.base import Method, Scores
from fedcoe.prediction import Log
from fedcoe.state import ServerState
from fedcoe.streams import stream

FIGURES = {
    "validation_none": "seen clients' validation, nothing read",
    "validation_labels": "seen clients' validation, labels read forward-only",
    "new_none": "new clients, nothing read",
    "new_unlabelled": "new clients, unlabelled images read",
    "new_labels": "new clients, labels read forward-only",
}
"""The headline figures: accuracies over images."""
CONFIDENCE = 0.95
DRAWS = 10_000

Hits = NDArray[np.bool_]


@dataclass(frozen=True)
class Graded:
    """Which of one client's graded images a model gets right, by headline figure."""

    client: int
    hits: dict[str, Hits]


@dataclass(frozen=True)
class Difference:
    """One headline figure of both models, and the interval of candidate minus champion."""

    figure: str
    images: int
    champion: float
    candidate: float
    low: float
    high: float

    @property
    def falls(self) -> bool:
        """Beyond its interval: no change at all is not inside it."""
        return self.high < 0

    @property
    def rises(self) -> bool:
        return self.low > 0

    def row(self) -> dict[str, Any]:
        """For tables; accuracies in [0, 1]."""
        return {
            "figure": FIGURES[self.figure],
            "images": self.images,
            "champion": round(self.champion, 4),
            "candidate": round(self.candidate, 4),
            "change": round(self.candidate - self.champion, 4),
            "low": round(self.low, 4),
            "high": round(self.high, 4),
            "verdict": "falls" if self.falls else "rises" if self.rises else "unchanged",
        }


def grade_clients(
    side: ClientSide, method: Method, state: ServerState, clients: Sequence[int]
) -> list[Graded]:
    """Grade a model on a shard of clients."""
    return [_grade(side, method, state, client) for client in clients]


def _grade(side: ClientSide, method: Method, state: ServerState, client: int) -> Graded:
    data = side.data
    new = client >= data.partition.seen
    inputs, images = data.images(client, TRAIN), data.images(client, VALIDATION)
    truth, labels = data.labels(client, VALIDATION), data.labels(client, TRAIN)
    if not len(images):
        return Graded(client, {})
    both = method.score(side.trainer, state, np.concatenate([inputs, images]))
    read, graded = both.rows(slice(len(inputs))), both.rows(slice(len(inputs), None))
    ways: dict[str, Callable[[Scores], Log]] = {
        "none": lambda scores: predict_none(method, state, scores),
        "unlabelled": lambda scores: predict_unlabelled(method, state, scores, read),
        "labels": lambda scores: predict_labels(method, state, scores, read, labels),
    }
    group = "new" if new else "validation"
    return Graded(
        client,
        {
            f"{group}_{mode}": predict(graded).argmax(axis=1) == truth
            for mode, predict in ways.items()
            if f"{group}_{mode}" in FIGURES
        },
    )


def compare(champion: Sequence[Graded], candidate: Sequence[Graded]) -> list[Difference]:
    """Headline figures of both models on the same clients' same images.

    Raises:
        FedCoEError: nothing was graded.
    """
    theirs = {graded.client: graded.hits for graded in champion}
    pairs: dict[str, list[tuple[Hits, Hits]]] = {}
    for graded in sorted(candidate, key=lambda graded: graded.client):
        for figure, hits in graded.hits.items():
            pairs.setdefault(figure, []).append((theirs[graded.client][figure], hits))
    if not pairs:
        raise FedCoEError("there is no validation image and no new client to compare models on")
    differences = []
    for figure in FIGURES:
        if figure in pairs:
            before, after = (np.concatenate(hits) for hits in zip(*pairs[figure], strict=True))
            changes = [new.astype(np.int64) - old for old, new in pairs[figure]]
            low, high = interval(changes)
            differences.append(
                Difference(figure, len(after), float(before.mean()), float(after.mean()), low, high)
            )
    return differences


def interval(changes: Sequence[NDArray[np.int64]]) -> tuple[float, float]:
    """Bootstrap interval of the mean change, images drawn anew within each client.

    Args:
        changes: per client [n], candidate's hit minus champion's: -1, 0 or 1.
    """
    rng = stream(0, "release bootstrap")
    total = np.zeros(DRAWS, np.int64)
    for change in changes:
        worse, same, better = (int((change == value).sum()) for value in (-1, 0, 1))
        # Drawing n images with replacement is drawing how many of them are worse, same, better.
        drawn = rng.multinomial(len(change), np.array([worse, same, better]) / len(change), DRAWS)
        total += drawn[:, 2] - drawn[:, 0]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(total / sum(map(len, changes)), [tail, 1 - tail])
    return float(low), float(high)


def promotes(differences: Sequence[Difference]) -> bool:
    """No headline figure falls beyond its interval, and at least one rises."""
    falls, rises = ([getattr(d, way) for d in differences] for way in ("falls", "rises"))
    return any(rises) and not any(falls)
