"""IFCA (Ghosh et al., NeurIPS 2020): clients sort themselves into clusters, one expert each.

    each round, for the cohort, from the received w_1 .. w_M (that start apart):
        pick            m(k) = the expert with the least training loss on client k
        local train     min F_k(w) from w_m(k)
        aggregate       w_m = mean of those who picked m, weighted by n_k (model averaging)

Personalized prediction: the picked expert alone. The picks of a round are older than the experts
it ends with and cover its cohort only, so for an evaluation every seen client picks again, by the
loss on its validation split; training does not depend on it. A new client with labels picks like
a client in training; without labels it gets the uniform mixture of the experts, and that is also
the global prediction, of which the paper has none.

Communicated: M models down, and up one update and the pick. M = 1 is FedAvg.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedcoe.engine.pool import ClientSide
from fedcoe.faults import ABSENT
from fedcoe.methods.base import LocalResult, Method, Order, Scores
from fedcoe.methods.settings import MethodSettings
from fedcoe.state import ServerState


class IFCASettings(MethodSettings):
    name: Literal["ifca"] = "ifca"
    experts: int = Field(4, ge=1, le=64, description="M, clusters")


class IFCA(Method):
    """`correlation` is one-hot: the last pick; uniform before a client's first."""

    Settings = IFCASettings
    settings: IFCASettings

    def inert(self) -> list[str]:
        alone = ["experts = 1: this is FedAvg"] if self.experts == 1 else []
        return [*super().inert(), *alone]

    def init(self) -> ServerState:
        return replace(super().init(), experts=self.initial_experts(self.experts))

    def dispatch(self, state: ServerState, cohort: Sequence[int]) -> list[Order]:
        """One expert each. Which one, the client says; the order names its last pick."""
        n = self.federation.train_counts[list(cohort)]
        last = state.correlation[list(cohort)].argmax(axis=1)
        return [
            Order(client, (int(m),), (float(weight),))
            for client, m, weight in zip(cohort, last, n / n.sum(), strict=True)
        ]

    def local_train(
        self, side: ClientSide, state: ServerState, orders: Sequence[Order]
    ) -> LocalResult:
        picks = {order.client: self.pick(side, state, order.client) for order in orders}
        result = super().local_train(side, state, _picked(orders, picks))
        result.sketches = {
            client: np.array([m])
            for client, m in picks.items()
            if self.faults.of(state.round + 1, client) not in ABSENT
        }
        return result

    def pick(self, side: ClientSide, state: ServerState, client: int) -> int:
        """The expert with the least training loss on a client; the first of equals."""
        images, labels = side.data.train(client)
        scores = self.score(side.trainer, state, images)
        return int(self.training_losses(scores.experts, labels).mean(axis=0).argmin())

    def aggregate(
        self, state: ServerState, orders: Sequence[Order], results: Sequence[LocalResult]
    ) -> ServerState:
        picks = {k: int(m[0]) for result in results for k, m in result.sketches.items()}
        after = super().aggregate(state, _picked(orders, picks), results)
        return replace(after, correlation=self._one_hot(after, picks))

    def calibrate(
        self, state: ServerState, validation: Mapping[int, tuple[Scores, NDArray[np.int64]]]
    ) -> ServerState:
        """Every seen client picks among the experts as they are now."""
        picks = {
            client: int(self.training_losses(scores.experts, labels).mean(axis=0).argmin())
            for client, (scores, labels) in validation.items()
            if len(labels)
        }
        state = replace(state, correlation=self._one_hot(state, picks))
        return super().calibrate(state, validation)

    def _one_hot(self, state: ServerState, picks: Mapping[int, int]) -> NDArray[np.float64]:
        """[S, M] with the rows of these clients replaced."""
        correlation = state.correlation.copy()
        for client, m in picks.items():
            correlation[client] = np.eye(self.experts)[m]
        return correlation

    def correlation_labelled(
        self, state: ServerState, inputs: Scores, labels: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        losses = self.training_losses(inputs.experts, labels).mean(axis=0)
        return np.asarray(np.eye(self.experts)[losses.argmin()])

    def round_bytes(self, state: ServerState, orders: Sequence[Order]) -> tuple[int, int]:
        size = 4 * state.experts.shape[1]
        return len(orders) * (size + 4), len(orders) * self.experts * size


def _picked(orders: Sequence[Order], picks: Mapping[int, int]) -> list[Order]:
    """Orders for the picked experts; for the last pick of a client that has not told another."""
    return [
        replace(order, experts=(picks.get(order.client, order.experts[0]),)) for order in orders
    ]
