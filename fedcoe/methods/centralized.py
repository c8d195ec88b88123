"""Centralized: one model on the seen clients' training data in one place. Not federated.

The limit of what federation can reach: as many images as FedAvg sees, with no clients to drift.

    each round:
        train    w on as many images as the cohort has, drawn from the pooled data of all

Communicated: the clients' data, once, which is what federated learning is there to avoid; counted
as nothing, but for a coordination head's statistics. Balanced softmax takes the label prior of the
pool. Client momentum starts anew each round, as it does everywhere. A new client is served by the
model. No client sends anything, so none of the simulated faults concerns it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedcoe import prediction
from fedcoe.engine.clients import TRAIN, ClientData
from fedcoe.engine.pool import ClientSide
from fedcoe.methods.base import LocalResult, Method, Order
from fedcoe.methods.settings import MethodSettings
from fedcoe.state import ServerState
from fedcoe.streams import stream


class CentralizedSettings(MethodSettings):
    name: Literal["centralized"] = "centralized"


@dataclass(frozen=True)
class Pooled(ClientData):
    """Clients' data, with the training splits of the first `seen` of them as one."""

    seen: int = 0
    rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Places in the pool that are trained on."""

    def train_rows(self, client: int) -> NDArray[np.int64]:
        """[n] places of the chosen rows in the dataset, whoever is asked for."""
        pool = [self.partition.indices(k, TRAIN) for k in range(self.seen)]
        return np.concatenate(pool)[self.rows]

    def train(self, client: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """[n, H, W, C] images and [n] labels of the chosen rows, whoever is asked for."""
        images = np.concatenate([self.images(k, TRAIN) for k in range(self.seen)])
        labels = np.concatenate([self.labels(k, TRAIN) for k in range(self.seen)])
        return images[self.rows], labels[self.rows]


class Centralized(Method):
    """FedAvg with one client that has everybody's data; the first of the cohort stands for it."""

    Settings = CentralizedSettings
    sends_updates = False

    def dispatch(self, state: ServerState, cohort: Sequence[int]) -> list[Order]:
        return self.orders(state, cohort[:1], np.zeros((1, 1), np.int64))

    def local_train(
        self, side: ClientSide, state: ServerState, orders: Sequence[Order]
    ) -> LocalResult:
        f, data = self.federation, side.data
        size = int(f.train_counts[self.cohort(state)].sum())
        rng = stream(f.settings.train.seed, "pool", state.round + 1)
        rows = np.sort(rng.choice(int(f.train_counts.sum()), size, replace=False))
        pooled = Pooled(data.dataset, data.partition, f.clients, rows)
        return super().local_train(replace(side, data=pooled), state, orders)

    def logit_shift(self, client: int) -> NDArray[np.float32] | None:
        if not self.settings.balanced_softmax:
            return None
        pool = prediction.prior_from_counts(self.federation.label_counts.sum(axis=0))
        return np.log(pool).astype(np.float32)

    def round_bytes(self, state: ServerState, orders: Sequence[Order]) -> tuple[int, int]:
        return 0, 0
