"""Robust aggregation: one update of an expert from those of its clients, some of which may lie.

    norm_clip       sum_k a_k d_k min(1, c / ||d_k||) / sum_k a_k     (Sun et al. 2019,
                    arXiv 1911.07963); c fixed, or the median of the round's ||d_k||
    trimmed_mean    by coordinate, without the ceil(trim n) smallest and largest of n values
    median          by coordinate

Trimmed mean and median (Yin et al., ICML 2018) have no sample counts: every client counts once,
whatever it says of its data. That is their point, and with uneven clients also their price. Each
expert is treated by itself, over the clients that trained it.

A fixed c is applied as updates arrive, and they are streamed into exact sums as ever. All else
needs the single updates side by side: cohort x K x P numbers on the server, and no secure
aggregation, which would hide them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcoe.exact_sum import ExactSum
from fedcoe.faults import square_norm
from fedcoe.methods.settings import MethodSettings
from fedcoe.models.flat import Vector

_BLOCK = 2**16
"""Coordinates sorted at once."""


@dataclass(frozen=True)
class Single:
    """One client's update [P] of one expert, and its weight in a weighted mean."""

    expert: int
    weight: float
    delta: Vector


def needs_singles(settings: MethodSettings) -> bool:
    """Whether the server must see single updates."""
    fixed = settings.robust == "norm_clip" and settings.robust_clip > 0
    return settings.robust != "none" and not fixed


def shortened(delta: Vector, longest: float) -> Vector:
    """[P] the update, at most this long; itself, to the bit, if it is not longer."""
    norm = math.sqrt(square_norm(delta))
    return delta if norm <= longest else delta * np.float32(longest / norm)


def combine(
    settings: MethodSettings, singles: Sequence[Single], shape: tuple[int, int]
) -> NDArray[np.float64]:
    """[M, P] one update an expert, whatever the order of clients; 0 where nobody trained."""
    combined = np.zeros(shape)
    for expert in range(shape[0]):
        own = [single for single in singles if single.expert == expert]
        if not own:
            continue
        deltas = [single.delta for single in own]
        if settings.robust == "median":
            combined[expert] = median(deltas)
        elif settings.robust == "trimmed_mean":
            combined[expert] = trimmed_mean(deltas, settings.robust_trim)
        else:
            combined[expert] = clipped_mean(deltas, [single.weight for single in own])
    return combined


def clipped_mean(deltas: Sequence[Vector], weights: Sequence[float]) -> NDArray[np.float64]:
    """[P] weighted mean of n updates [P], each at most as long as their median length."""
    longest = float(np.median([math.sqrt(square_norm(delta)) for delta in deltas]))
    total, weight = ExactSum.zeros(deltas[0].shape), ExactSum.zeros(1)
    for delta, own in zip(deltas, weights, strict=True):
        total.add(shortened(delta, longest), own)
        weight.add(np.ones(1), own)
    return total.value() / weight.value()


def median(deltas: Sequence[Vector]) -> NDArray[np.float64]:
    """[P] by coordinate; of an even number the mean of the two in the middle."""
    return _without_ends(deltas, (len(deltas) - 1) // 2)


def trimmed_mean(deltas: Sequence[Vector], trim: float) -> NDArray[np.float64]:
    """[P] mean by coordinate of what is left without ceil(trim n) values on either side.

    Rounded up, as a few clients an expert are the rule here and one liar is enough; at least one
    value, or two of an even number, are left.
    """
    # Less a trifle: 0.28 * 25 is a little more than 7.
    ends = math.ceil(trim * len(deltas) - 1e-9)
    return _without_ends(deltas, min(ends, (len(deltas) - 1) // 2))


def _without_ends(deltas: Sequence[Vector], ends: int) -> NDArray[np.float64]:
    found = np.empty(len(deltas[0]))
    for start in range(0, len(found), _BLOCK):
        part = slice(start, start + _BLOCK)
        # Sorted, so that the order of clients cannot show in the last bit.
        values = np.sort(np.stack([delta[part] for delta in deltas]), axis=0)
        found[part] = values[ends : len(deltas) - ends].mean(axis=0, dtype=np.float64)
    return found
