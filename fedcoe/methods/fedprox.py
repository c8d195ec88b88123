"""FedProx (Li et al., MLSys 2020): FedAvg whose clients are held near the model they received.

    each round, for the cohort, from the received w_t:
        local train     min F_k(w) + mu/2 ||w - w_t||^2
        aggregate       w_t+1 = sum_k n_k w_k / sum_k n_k

Communicated: as FedAvg, the model down and its update up. A new client is served by the global
model. mu = 0 is FedAvg. The paper's second part, accepting the partial work of slow clients, does
not arise: every client here finishes its epochs.
"""

from dataclasses import replace
from typing import Literal

from pydantic import Field

from fedcoe.engine.pool import ClientSide
from fedcoe.engine.trainer import Fit
from fedcoe.methods.base import Method, Order
from fedcoe.methods.settings import MethodSettings
from fedcoe.state import ServerState


class FedProxSettings(MethodSettings):
    name: Literal["fedprox"] = "fedprox"
    mu: float = Field(
        0.01, ge=0.0, le=100.0, description="Pull to the received model (the paper: 0.001 to 1)"
    )


class FedProx(Method):
    Settings = FedProxSettings
    private = True
    settings: FedProxSettings

    def fits(self, side: ClientSide, state: ServerState, order: Order) -> list[Fit]:
        return [
            replace(fit, anchor=fit.start, pull=self.settings.mu)
            for fit in super().fits(side, state, order)
        ]
