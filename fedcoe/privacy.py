"""Client-level differential privacy: a client's messages are bounded, their sums are noised.

Two federations are neighbours if one client's data is replaced by nothing: its messages become
zeros and everything else stays, the schedule of cohorts included (zero-out adjacency). Every kind
of message is a Gaussian mechanism, `z` its noise over its sensitivity:

    updates      a client's K expert updates of a round, together no longer than `clip`
    statistics   its mean of F'F and F'[Q|Y] in a gate update, together no longer than 2
    correlation  its label mix once, and its mean losses in gate updates before the last round,
                 each scaled to length 1 at most: about one client alone, so noised alone

A composition of Gaussian mechanisms, chosen adaptively, is one Gaussian mechanism with
1/z^2 = sum of the 1/z_i^2 (Dong, Roth, Su, JRSS B 2022), whose epsilon at delta is known exactly
(Balle, Wang, ICML 2018): that is what dp-accounting computes here. No amplification by sampling is
claimed: the server knows the cohorts. What follows from noised messages costs nothing more.

What each message reveals, and what is not covered: docs/privacy.md.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.linalg.blas import dsyrk
from threadpoolctl import threadpool_limits

from fedcoe.analytic import Statistics
from fedcoe.config import PrivacySettings
from fedcoe.models.flat import Vector
from fedcoe.streams import stream

STATISTICS_NORM = 2.0
"""Sensitivity of a gate update's statistics, upper triangle of F'F and F'[Q|Y] side by side."""
MARGIN = 1.0 - 1e-6
"""What is clipped stays this far below its bound, so that float32 and the grid of exact sums never
carry it across."""


@dataclass(frozen=True)
class Messages:
    """One number for each kind of message: how many, or how much noise."""

    updates: float = 0.0
    statistics: float = 0.0
    correlation: float = 0.0

    def values(self) -> list[float]:
        return [float(getattr(self, item.name)) for item in fields(self)]


def multipliers(settings: PrivacySettings, planned: Messages) -> Messages:
    """Noise over sensitivity of each kind of message, so that a client that sends as many as
    planned is protected by exactly (epsilon, delta); 0 for kinds that nobody sends.

    Shares of the budget are shares of the sum of 1/z^2. A kind that is not sent leaves its share
    to the others in proportion.
    """
    # Not at the top: a second of import that a run without privacy must not pay.
    from dp_accounting import get_sigma_gaussian

    sigma = get_sigma_gaussian(settings.epsilon, settings.delta) * (1 + 1e-9)
    given = 1.0 - settings.gate_share - settings.correlation_share
    shares = [given, settings.gate_share, settings.correlation_share]
    counts = planned.values()
    total = sum(share for share, count in zip(shares, counts, strict=True) if count)
    return Messages(
        *(
            float(sigma * np.sqrt(count * total / share))
            for share, count in zip(shares, counts, strict=True)
        )
    )


def epsilon(z: Messages, sent: Iterable[Messages], delta: float) -> float:
    """The epsilon at `delta` of the client that has sent most; 0 before anything was sent.

    Args:
        z: noise over sensitivity.
        sent: one `Messages` of counts a client.
    """
    from dp_accounting import get_epsilon_gaussian

    loss = max(
        sum(n / m**2 for n, m in zip(mine.values(), z.values(), strict=True) if n) for mine in sent
    )
    return float(get_epsilon_gaussian(loss**-0.5, delta)) if loss else 0.0


class Privacy:
    """The mechanisms of one run.

    Args:
        seed: root of the noise's streams. Who knows it can take the noise away again: `noise:
            secure` draws from the operating system instead, and no run can be repeated.
        planned: most messages any client sends in the whole run.
    """

    def __init__(self, settings: PrivacySettings, seed: int, planned: Messages) -> None:
        self.settings = settings
        self.planned = planned
        self.z = multipliers(settings, planned)
        self._seed = seed

    # --------------------------------------------------------------- clients

    def clip(self, delta: Vector, experts: int) -> Vector:
        """[P] one of the `experts` updates a client sends in a round, shortened so that all of
        them together are no longer than `clip`."""
        return clipped(delta, self.settings.clip / experts**0.5)

    @staticmethod
    def add(total: Statistics, design: NDArray[np.float64], targets: NDArray[np.float64]) -> None:
        """Add one client's mean statistics: F [n, D] and [Q|Y] [n, T]. Every client counts once,
        however many samples it has."""
        gram, cross = dsyrk(1.0 / len(design), design.T), design.T @ targets / len(design)
        length = float(np.sqrt((gram**2).sum() + (cross**2).sum()))
        scale = min(1.0, STATISTICS_NORM * MARGIN / max(length, 1e-12))
        total.gram.add(gram, scale)
        total.targets.add(cross, scale)
        total.count += 1

    # ---------------------------------------------------------------- server

    def noised(
        self, means: NDArray[np.float64], asked: NDArray[np.int64], round_: int
    ) -> NDArray[np.float64]:
        """[M, P] means of clipped updates, with noise.

        Args:
            means: sums over those who answered, divided by those who were asked: how many
                answered would be one more message.
            asked: [M] clients that an expert was dispatched to; one of nobody stays as it is.
        """
        std = self.z.updates * self.settings.clip / np.maximum(asked, 1)
        noise = std[:, None] * self._normal("updates", round_, means.shape)
        return np.asarray(np.where(asked[:, None] > 0, means + noise, 0.0))

    def solve(self, statistics: Statistics, ridge: float, round_: int) -> NDArray[np.float64]:
        """`Statistics.solve` on noised sums. The ridge is raised to the norm the noise has, and
        what the noise makes negative of F'F is cut off."""
        std = self.z.statistics * STATISTICS_NORM
        gram, cross = statistics.gram.value(), statistics.targets.value()
        width = len(gram)
        gram += std * np.triu(self._normal("gram", round_, gram.shape))
        cross += std * self._normal("targets", round_, cross.shape)
        # The edge of the noise's spectrum (Wigner) is 2 std sqrt(D).
        strength = ridge * statistics.count + 2.0 * std * width**0.5
        with threadpool_limits(1):  # as in `Statistics.solve`
            values, vectors = eigh(gram, lower=False)
            scaled = (vectors.T @ cross) / (np.maximum(values, 0.0) + strength)[:, None]
            return np.asarray(vectors @ scaled)

    def report(self, points: NDArray[np.float64], name: str, round_: int) -> NDArray[np.float64]:
        """[S, D] one message a client, as the server gets it: at most of length 1, noised, and
        shrunk by what of its square is noise (on average; no client's data decides it)."""
        bounded = points * (MARGIN / np.maximum(1.0, np.linalg.norm(points, axis=1, keepdims=True)))
        noised = bounded + self.z.correlation * self._normal(name, round_, points.shape)
        return np.asarray(noised / (1.0 + self.z.correlation**2 * points.shape[1]))

    def _normal(self, name: str, round_: int, shape: tuple[int, ...]) -> NDArray[np.float64]:
        if self.settings.noise == "secure":
            return secure_normal(shape)
        return stream(self._seed, f"privacy {name}", round_).standard_normal(shape)


def clipped(delta: Vector, norm: float) -> Vector:
    """[P] an update, shortened to `norm` if it is longer."""
    length = float(np.sqrt(np.square(delta, dtype=np.float64).sum()))
    if length <= norm * MARGIN:
        return delta
    return np.asarray(delta * np.float32(norm * MARGIN / length))


def secure_normal(shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Standard normal draws from the operating system's secure source (Box, Muller 1958)."""
    count = int(np.prod(shape))
    bits = np.frombuffer(os.urandom(16 * count), np.uint64).reshape(2, count) >> np.uint64(11)
    first, second = (bits + 0.5) * 2.0**-53  # in (0, 1)
    return np.asarray(np.sqrt(-2.0 * np.log(first)) * np.cos(2.0 * np.pi * second)).reshape(shape)
