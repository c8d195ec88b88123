"""Pure functions from models' outputs to class probabilities, all in logarithms.

n images, C classes, M experts.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax, logsumexp

Log = NDArray[np.float64]


def log_posterior(logits: NDArray[np.floating], sharpness: float = 1.0) -> Log:
    """[..., C] logits to log probabilities; `sharpness` is one over the temperature."""
    return np.asarray(log_softmax(logits.astype(np.float64) * sharpness, axis=-1))


def sample_losses(logits: NDArray[np.floating], labels: NDArray[np.integer]) -> Log:
    """[M, n, C] logits and [n] labels to [n, M] cross-entropies."""
    return np.asarray(-log_posterior(logits)[:, np.arange(len(labels)), labels].T)


def mixture(experts: Log, weights: Log) -> Log:
    """log sum_m w[n, m] p_m(y | x_n).

    Args:
        experts: [M, n, C] log probabilities.
        weights: [n, M] or [M] log weights, normalised over M.
    """
    weights = np.broadcast_to(weights, (experts.shape[1], experts.shape[0]))
    return np.asarray(logsumexp(experts + weights.T[:, :, None], axis=0))


def interpolate(first: Log, second: Log, weight: float) -> Log:
    """Normalised first^(1 - weight) * second^weight (a logarithmic opinion pool)."""
    return np.asarray(log_softmax((1.0 - weight) * first + weight * second, axis=-1))


def blend(first: Log, second: Log, weight: float) -> Log:
    """(1 - weight) * first + weight * second, as probabilities."""
    if weight in (0.0, 1.0):
        return second if weight else first
    return np.asarray(np.logaddexp(first + np.log1p(-weight), second + np.log(weight)))


def reweight(log_p: Log, to: NDArray[np.floating], given: NDArray[np.floating]) -> Log:
    """Bayes' rule for another label prior: p(y | x) * to(y) / given(y), normalised.

    Args:
        log_p: [n, C] under the label prior `given`.
        to, given: [C] positive priors.
    """
    return np.asarray(log_softmax(log_p + np.log(to) - np.log(given), axis=-1))


def prior_from_counts(counts: NDArray[np.number], smoothing: float = 0.1) -> Log:
    """[..., C] label counts to a positive label prior; each class is given `smoothing` samples."""
    smoothed = counts.astype(np.float64) + smoothing
    return np.asarray(smoothed / smoothed.sum(axis=-1, keepdims=True))


def prior_by_em(log_p: Log, given: NDArray[np.floating], steps: int) -> Log:
    """Label prior of unlabelled inputs by expectation maximisation.

    Saerens, Latinne, Decaestecker, Neural Computation 2002. Maximises the likelihood of the
    inputs over the prior, starting from `given`.

    Args:
        log_p: [n, C] posteriors under the label prior `given`.
        given: [C].
    """
    prior = np.asarray(given, np.float64)
    for _ in range(steps):
        posterior = np.exp(reweight(log_p, prior, given))
        prior = posterior.mean(axis=0)
        prior = np.maximum(prior, 1e-8)
        prior /= prior.sum()
    return prior


def coordinate_search(
    loss: Callable[[Mapping[str, float]], float],
    start: Mapping[str, float],
    grids: Mapping[str, Sequence[float]],
    sweeps: int = 2,
) -> dict[str, float]:
    """Minimise a loss over a grid, one coordinate at a time; the first of equals wins."""
    best = dict(start)
    for _ in range(sweeps):
        before = dict(best)
        for name, values in grids.items():
            if len(values) > 1:
                best[name] = min(values, key=lambda value: loss({**best, name: value}))
        if best == before:
            break
    return best
