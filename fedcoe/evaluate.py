"""Evaluation of a server state on all seen clients and on the official test set.

Two steps: workers run every model once over the images (`score_clients`, `score_global`); the
server turns the outputs into predictions and metrics (`evaluate`). Temperatures, weights and the
personal experts' shares are chosen on validation, figures are those of test.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcoe.engine.clients import TEST, VALIDATION
from fedcoe.engine.pool import ClientSide
from fedcoe.methods.base import Method, Scores
from fedcoe.metrics import Tally, calibration_error, over_clients, tally
from fedcoe.prediction import blend, log_posterior
from fedcoe.state import ServerState


@dataclass(frozen=True)
class ClientScores:
    """One seen client's model outputs and labels on its validation and test splits."""

    client: int
    validation: Scores
    validation_labels: NDArray[np.int64]
    test: Scores
    test_labels: NDArray[np.int64]


@dataclass(frozen=True)
class Evaluation:
    """Figures of one server state; accuracies in [0, 1]."""

    round: int
    overall: dict[str, float]
    """accuracy, nll, ece of the global prediction on the official test set."""
    personalized: dict[str, float]
    """Of the personalized prediction on the clients' test splits, see `metrics.over_clients`."""
    validation: dict[str, float]
    """global (nll, accuracy) and personalized accuracy on validation: the figures to choose by."""
    clients: list[dict[str, Any]]
    """One row a client."""
    experts: list[dict[str, Any]]
    """One row an expert."""


def score_clients(
    side: ClientSide, method: Method, state: ServerState, clients: Sequence[int]
) -> list[ClientScores]:
    """Run all models over the clients' validation and test images, several clients a batch."""
    results: list[ClientScores] = []
    waiting: list[tuple[int, int, NDArray[np.uint8]]] = []

    def flush() -> None:
        if not waiting:
            return
        scores = method.score(
            side.trainer, state, np.concatenate([images for _, _, images in waiting])
        )
        end = 0
        for client, held, images in waiting:
            start, end = end, end + len(images)
            own = method.personal_logits(side, state, client, images)
            mine = replace(scores.rows(slice(start, end)), personal=own)
            results.append(
                ClientScores(
                    client,
                    mine.rows(slice(held)),
                    side.data.labels(client, VALIDATION),
                    mine.rows(slice(held, None)),
                    side.data.labels(client, TEST),
                )
            )
        waiting.clear()

    for client in clients:
        held, test = (side.data.images(client, split) for split in (VALIDATION, TEST))
        waiting.append((client, len(held), np.concatenate([held, test])))
        if sum(len(images) for _, _, images in waiting) >= method.batch_size:
            flush()
    flush()
    return results


def score_global(
    side: ClientSide, method: Method, state: ServerState, rows: NDArray[np.int64]
) -> Scores:
    """Run all global models over rows of the official test set."""
    return method.score(side.trainer, state, side.data.global_test(rows))


def join_scores(parts: Sequence[Scores]) -> Scores:
    """Scores of several workers' images, in order."""

    def joined(name: str, axis: int = 0) -> Any:
        arrays = [getattr(part, name) for part in parts]
        return None if arrays[0] is None else np.concatenate(arrays, axis)

    return Scores(joined("experts", 1), joined("gate"), joined("head"), joined("personal"))


def evaluate(
    method: Method,
    state: ServerState,
    clients: Sequence[ClientScores],
    overall: Scores,
    labels: NDArray[np.int64],
) -> tuple[ServerState, Evaluation]:
    """Calibrate on validation, then score on test.

    Args:
        clients: outputs for all seen clients.
        overall: outputs on the official test set, `labels` its [n] classes.

    Returns:
        The state with its calibration and the personal experts' shares, and the figures.
    """
    clients = sorted(clients, key=lambda c: c.client)
    state = method.calibrate(
        state, {c.client: (c.validation, c.validation_labels) for c in clients}
    )
    shares = np.zeros(method.federation.clients)
    for c in clients:
        shares[c.client] = _share(method, state, c)
    state = replace(state, share=shares)

    global_log_p = method.predict_global(state, overall)
    total = tally(global_log_p, labels)
    rows, own, held, held_global = [], [], [], []
    for c in clients:
        share = float(shares[c.client])
        mine = tally(method.predict_client(state, c.client, c.test, share), c.test_labels)
        own.append(mine)
        held.append(
            tally(method.predict_client(state, c.client, c.validation, share), c.validation_labels)
        )
        held_global.append(tally(method.predict_global(state, c.validation), c.validation_labels))
        rows.append(
            {
                "client": method.federation.names[c.client],
                "kind": "seen",
                "samples": int(method.federation.train_counts[c.client]),
                "test_samples": len(c.test_labels),
                "feature_group": int(method.federation.groups[c.client]),
                "accuracy_global": tally(
                    method.predict_global(state, c.test), c.test_labels
                ).accuracy,
                "accuracy": mine.accuracy,
                "personal_share": share,
            }
            | {f"correlation_{m}": float(v) for m, v in enumerate(state.correlation[c.client])}
            | {f"gate_{m}": float(v) for m, v in enumerate(method.mean_gate(state, c.test))}
            | {
                f"expert_accuracy_{m}": float((logits.argmax(1) == c.test_labels).mean())
                for m, logits in enumerate(c.test.experts)
            }
        )
    return state, Evaluation(
        round=state.round,
        overall={
            "accuracy": total.accuracy,
            "nll": total.nll / total.count,
            "ece": calibration_error(global_log_p, labels),
        },
        personalized=over_clients(own),
        validation=_validation(held_global, held),
        clients=rows,
        experts=_expert_rows(method, state, overall, labels),
    )


def _share(method: Method, state: ServerState, c: ClientScores) -> float:
    """Weight of a client's personal expert with the least validation loss; smallest of equals."""
    if c.validation.personal is None:
        return 0.0
    alone = replace(c.validation, personal=None)
    rest = method.predict_client(state, c.client, alone, 0.0)
    own = log_posterior(c.validation.personal)
    losses = [tally(blend(rest, own, b), c.validation_labels).nll for b in method.shares]
    # Rounded: models that predict the same differ in the last bits.
    return float(method.shares[int(np.argmin(np.round(losses, 9)))])


def _validation(overall: Sequence[Tally], own: Sequence[Tally]) -> dict[str, float]:
    everyone, personal = over_clients(overall), over_clients(own)
    return {
        "global_nll": everyone["nll"],
        "global_accuracy": everyone["accuracy"],
        "personalized_accuracy": personal["accuracy"],
        "personalized_nll": personal["nll"],
    }


def _expert_rows(
    method: Method, state: ServerState, overall: Scores, labels: NDArray[np.int64]
) -> list[dict[str, Any]]:
    load = state.dispatched.sum(axis=0) / max(int(state.dispatched.sum()), 1)
    best = np.bincount(state.correlation.argmax(axis=1), minlength=len(load))
    rows = []
    for m, logits in enumerate(overall.experts):
        hit = logits.argmax(1) == labels
        row: dict[str, Any] = {
            "expert": m,
            "load": float(load[m]),
            "clients": int(best[m]),
            "accuracy": float(hit.mean()),
        }
        for index, name in enumerate(method.federation.class_names):
            mine = labels == index
            row[f"accuracy_class_{name}"] = float(hit[mine].mean()) if mine.any() else float("nan")
        rows.append(row)
    return rows


def score_validation(
    side: ClientSide, method: Method, state: ServerState, clients: Sequence[int]
) -> list[ClientScores]:
    """`score_clients` on validation images alone: no test image or label is opened."""
    results = []
    for client in clients:
        images = side.data.images(client, VALIDATION)
        own = method.personal_logits(side, state, client, images)
        scores = replace(method.score(side.trainer, state, images), personal=own)
        labels = side.data.labels(client, VALIDATION)
        results.append(ClientScores(client, scores, labels, scores.rows(slice(0)), labels[:0]))
    return results


def validate(
    method: Method, state: ServerState, clients: Sequence[ClientScores]
) -> tuple[ServerState, dict[str, float]]:
    """`evaluate` without its test half: the state it returns, and `Evaluation.validation`."""
    clients = sorted(clients, key=lambda c: c.client)
    state = method.calibrate(
        state, {c.client: (c.validation, c.validation_labels) for c in clients}
    )
    shares = np.zeros(method.federation.clients)
    overall, own = [], []
    for c in clients:
        shares[c.client] = share = _share(method, state, c)
        overall.append(tally(method.predict_global(state, c.validation), c.validation_labels))
        log_p = method.predict_client(state, c.client, c.validation, share)
        own.append(tally(log_p, c.validation_labels))
    return replace(state, share=shares), _validation(overall, own)
