"""What is measured on predictions. Accuracies in [0, 1], likelihoods in nats."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcoe.prediction import Log


@dataclass(frozen=True)
class Tally:
    """Sums over one client's (or the global) test images; enough for every metric."""

    count: int
    correct: int
    nll: float
    """Sum of -log p(true class), each at most -log 1e-12."""

    @property
    def accuracy(self) -> float:
        return self.correct / max(self.count, 1)


def tally(log_p: Log, labels: NDArray[np.int64]) -> Tally:
    """Score [n, C] log probabilities against [n] labels."""
    true = log_p[np.arange(len(labels)), labels]
    nll = -np.maximum(true, np.log(1e-12)).sum()
    return Tally(len(labels), int((log_p.argmax(1) == labels).sum()), float(nll))


def calibration_error(log_p: Log, labels: NDArray[np.int64], bins: int = 15) -> float:
    """Expected calibration error over equal-width bins (Guo et al., ICML 2017)."""
    confidence = np.exp(log_p.max(1))
    hit = log_p.argmax(1) == labels
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    gap = np.bincount(index, confidence - hit, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))


def over_clients(tallies: Sequence[Tally]) -> dict[str, float]:
    """Summary over clients.

    Returns:
        accuracy (sample-weighted), mean, std and worst10 (mean of the worst tenth, at least one)
        over clients, nll (sample-weighted).
    """
    count = sum(t.count for t in tallies)
    each = np.sort([t.accuracy for t in tallies])
    worst = each[: max(1, round(len(each) / 10))]
    return {
        "accuracy": sum(t.correct for t in tallies) / count,
        "mean": float(each.mean()),
        "std": float(each.std()),
        "worst10": float(worst.mean()),
        "nll": sum(t.nll for t in tallies) / count,
    }
