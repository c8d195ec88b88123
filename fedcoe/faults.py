"""Client faults: what the server leaves out of what arrives, and faults made on purpose.

`Inbox` is the one place where an update is checked before it counts. `Faults` is the simulation of
the `faults` section; what it makes passes the same check as everything else.

A client fault is something a client sends or fails to send. An exception is none: where clients
are simulated, an unreadable file or a lack of memory is this machine's, so it ends the round rather
than leaving a client out in silence, and a bug is never mistaken for a bad client.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedcoe.config import FAULTS, MAX_NORM, FaultSettings
from fedcoe.models.flat import Vector
from fedcoe.streams import stream

T = TypeVar("T", bound=np.floating[Any])
ABSENT = {"dropout": "no answer", "timeout": "late"}
"""Faults after which nothing of a client counts, and what is said of it."""
EXPLOSION = np.float32(1e6)


@dataclass(frozen=True)
class Update:
    """What a client sends for one expert: [P] trained - sent, labelled with the round."""

    client: int
    expert: int
    round: int
    delta: Vector
    late: bool = False
    """Whether it came after the deadline."""


class Inbox:
    """Checks a round's updates as they arrive; it remembers who has answered.

    Args:
        weights: aggregation weight of every update that was asked for, by (client, expert).
        round: the round they were asked in.
        parameters: P.
        max_norm: an update this long or longer is left out; 0 = only `MAX_NORM`.
    """

    def __init__(
        self,
        weights: Mapping[tuple[int, int], float],
        round: int,
        parameters: int,
        max_norm: float = 0.0,
    ) -> None:
        self.weights = weights
        self._round = round
        self._parameters = parameters
        self._largest = (max_norm or MAX_NORM) ** 2
        self._heard: set[tuple[int, int]] = set()
        self._arrived: set[tuple[int, int]] = set()

    def refuse(self, update: Update) -> str | None:
        """Why an update must not count, or None. Of two equal ones the second is refused."""
        key = (update.client, update.expert)
        if key not in self.weights:
            return "not asked"
        self._heard.add(key)
        if update.round != self._round:
            return "stale"
        if update.late:
            return "late"
        if key in self._arrived:
            return "duplicate"
        self._arrived.add(key)
        if update.delta.shape != (self._parameters,):
            return "wrong shape"
        # False for NaN, and for what overflows.
        if square_norm(update.delta) < self._largest:
            return None
        return "too large" if np.all(np.isfinite(update.delta)) else "not finite"

    def asked(self, client: int) -> int:
        """How many updates a client was asked for."""
        return sum(asked == client for asked, _ in self.weights)

    @property
    def unanswered(self) -> int:
        """Updates that were asked for and of which nothing was heard."""
        return len(self.weights.keys() - self._heard)


def square_norm(delta: Vector) -> float:
    """||delta||^2; not finite where delta is not, or overflows."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(delta @ delta)


def refuse_statistics(design: NDArray[np.float64], targets: NDArray[np.float64]) -> str | None:
    """Why a client's F'F and F'T must not count, or None.

    The constant's row of F'T holds sums of n targets in [0, 1], so that what is out of [0, n] is
    made up. That bounds what one client can do; it does not make the closed form robust.

    Args:
        design: [n, D] F.
        targets: [n, T].
    """
    if not (np.all(np.isfinite(design)) and np.all(np.isfinite(targets))):
        return "not finite"
    sums = targets.sum(axis=0)
    if sums.min() < 0.0 or sums.max() > len(targets) * (1 + 1e-9):
        return "implausible"
    return None


class Faults:
    """The faults of one run. Draws depend on seed, round and client alone: the same whatever the
    method and the number of workers, and off, no other draw is shifted.

    Args:
        clients: number of seen clients.
    """

    def __init__(self, settings: FaultSettings, seed: int, clients: int) -> None:
        self.settings = settings
        self._seed = seed
        count = round(settings.attackers * clients) if settings.attack != "none" else 0
        drawn = stream(seed, "attackers").permutation(clients)[:count]
        self.attackers = frozenset(int(k) for k in drawn)

    def of(self, round: int, client: int) -> str | None:
        """The fault of a client in a round: one of `FAULTS`, or None."""
        bounds = np.cumsum([getattr(self.settings, name) for name in FAULTS])
        if not bounds[-1]:
            return None
        drawn = stream(self._seed, "client faults", round, client).random()
        place = int(np.searchsorted(bounds, drawn, side="right"))
        return FAULTS[place] if place < len(FAULTS) else None

    def answering(self, round: int, clients: Iterable[int]) -> set[int]:
        """Those who send something; the others never start."""
        return {k for k in clients if self.of(round, k) != "dropout"}

    def sent(self, update: Update) -> Iterator[Update]:
        """What arrives instead of a client's own update."""
        if update.client in self.attackers:
            update = replace(update, delta=update.delta * np.float32(self._factor))
        fault = self.of(update.round, update.client)
        if fault == "timeout":
            update = replace(update, late=True)
        elif fault in ("nan", "inf"):
            update = replace(update, delta=self._spoilt(update.delta, fault))
        elif fault == "wrong_shape":
            update = replace(update, delta=update.delta[:-1])
        elif fault == "exploding":
            update = replace(update, delta=update.delta * EXPLOSION)
        elif fault == "stale":
            update = replace(update, round=update.round - 1)
        yield update
        if fault == "duplicate":
            yield update

    def statistics(
        self,
        round: int,
        client: int,
        design: NDArray[np.float64],
        targets: NDArray[np.float64],
    ) -> tuple[NDArray[np.float64], str | None]:
        """[n, T] the targets of a client's gate message as they come after a round, and why the
        message must not count, or None.

        A sign-flipping attacker turns targets around within [0, 1]: negated, they would be noticed.

        Args:
            design: [n, D] features.
            targets: [n, T] in [0, 1].
        """
        fault = self.of(round, client)
        if fault in ("nan", "inf"):
            targets = self._spoilt(targets, fault)
        if self.settings.attack_statistics and client in self.attackers:
            flipped = self.settings.attack == "sign_flip"
            targets = 1.0 - targets if flipped else targets * self._factor
        return targets, ABSENT.get(fault or "") or refuse_statistics(design, targets)

    @property
    def _factor(self) -> float:
        return -1.0 if self.settings.attack == "sign_flip" else self.settings.attack_scale

    @staticmethod
    def _spoilt(values: NDArray[T], fault: str) -> NDArray[T]:
        values = values.copy()
        values.flat[0] = np.nan if fault == "nan" else np.inf
        return values
