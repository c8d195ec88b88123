"""FedEM (Marfoq et al., NeurIPS 2021): every client's data is a mixture of M shared components.

    each round, for the cohort, from the received w_1 .. w_M (that start apart):
        E-step          q[x,m] ~ pi[k,m] exp(-loss of w_m on x)
        M-step          pi[k] = mean of q over client k's samples
                        w_km: min sum_x q[x,m] loss / sum_x q[x,m], for every m
        aggregate       w_m = sum_k n_k w_km / sum_k n_k

Departure: the authors' code divides a batch's q-weighted loss by the batch size, the trainer here
by the sum of q. The minimum is the same, but a component that suits a client badly moves as far
there as one that suits it well.

Personalized prediction: sum_m pi[k,m] p_m(y|x). There is no gate on x. A new client with labels
takes one E-step from a uniform pi; without labels it gets the uniform mixture, and that is also the
global prediction, of which the paper has none.

Communicated: M models down, M updates and pi[k] up. A round trains M models a client. M = 1 is
FedAvg.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.special import softmax

from fedcoe.engine.pool import ClientSide
from fedcoe.engine.trainer import Fit
from fedcoe.methods.base import LocalResult, Method, Order, Scores
from fedcoe.methods.settings import MethodSettings
from fedcoe.models.flat import Vector
from fedcoe.state import ServerState


class FedEMSettings(MethodSettings):
    name: Literal["fedem"] = "fedem"
    experts: int = Field(3, ge=1, le=64, description="M, components (the paper: 3)")


class FedEM(Method):
    """`correlation` is pi."""

    Settings = FedEMSettings
    settings: FedEMSettings

    def inert(self) -> list[str]:
        alone = ["experts = 1: this is FedAvg"] if self.experts == 1 else []
        return [*super().inert(), *alone]

    def init(self) -> ServerState:
        return replace(super().init(), experts=self.initial_experts(self.experts))

    def dispatch(self, state: ServerState, cohort: Sequence[int]) -> list[Order]:
        """Every client trains every component; pi does not count in the mean."""
        even = np.full_like(state.correlation, 1.0 / self.experts)
        return super().dispatch(replace(state, correlation=even), cohort)

    def responsibilities(
        self,
        logits: NDArray[np.float32],
        labels: NDArray[np.int64],
        pi: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """E-step: [M, n, C] logits, [n] labels and [M] pi to [n, M] q."""
        losses = self.training_losses(logits, labels)
        return np.asarray(softmax(np.log(np.maximum(pi, 1e-300)) - losses, axis=1))

    def fits(self, side: ClientSide, state: ServerState, order: Order) -> list[Fit]:
        images, labels = side.data.train(order.client)
        logits = self.score(side.trainer, state, images).experts
        q = self.responsibilities(logits, labels, state.correlation[order.client])
        return [
            replace(fit, sample_weights=q[:, fit.name].astype(np.float32))
            for fit in super().fits(side, state, order)
        ]

    def note(
        self,
        side: ClientSide,
        state: ServerState,
        result: LocalResult,
        fit: Fit,
        delta: Vector,
    ) -> None:
        """M-step for pi, one component at a time."""
        assert fit.sample_weights is not None
        pi = result.sketches.setdefault(fit.client, np.full(self.experts, np.nan))
        pi[fit.name] = fit.sample_weights.mean(dtype=np.float64)

    def aggregate(
        self, state: ServerState, orders: Sequence[Order], results: Sequence[LocalResult]
    ) -> ServerState:
        after = super().aggregate(state, orders, results)
        correlation = after.correlation.copy()
        for result in results:
            for client, pi in result.sketches.items():
                # One whose update of a component was dropped keeps its old pi.
                if np.all(np.isfinite(pi)):
                    correlation[client] = pi / pi.sum()
        return replace(after, correlation=correlation)

    def correlation_labelled(
        self, state: ServerState, inputs: Scores, labels: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        uniform = np.full(self.experts, 1.0 / self.experts)
        return np.asarray(self.responsibilities(inputs.experts, labels, uniform).mean(axis=0))
