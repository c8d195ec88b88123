"""Ditto (Li et al., ICML 2021): FedAvg, and beside it a personal model pulled to the global one.

    each round, for the cohort, from the received w_t:
        local train     w_k: min F_k(w), as FedAvg
                        v_k: min F_k(v) + mu/2 ||v - w_t||^2, from where the client left it
        aggregate       w_t+1 = sum_k n_k w_k / sum_k n_k

mu is the paper's lambda. Personalized prediction: v_k alone; a seen client that no cohort has
included yet has none and gets the global model. A new client is served by the global model.

Communicated: as FedAvg, the model down and its update up; v_k stays with its client. Each client
trains two models, so a round computes twice as much as FedAvg's. mu = 0 is FedAvg beside Local.
"""

from typing import Literal

from pydantic import Field

from fedcoe.engine.pool import ClientSide
from fedcoe.engine.trainer import Fit
from fedcoe.methods.base import Method, Order
from fedcoe.methods.settings import MethodSettings
from fedcoe.state import ServerState


class DittoSettings(MethodSettings):
    name: Literal["ditto"] = "ditto"
    mu: float = Field(
        0.1, ge=0.0, le=100.0, description="Pull of the personal to the received global model"
    )


class Ditto(Method):
    Settings = DittoSettings
    private = True
    settings: DittoSettings
    own_model_alone = True

    def fits(self, side: ClientSide, state: ServerState, order: Order) -> list[Fit]:
        start = self.personal_start(side, state, order.client)
        personal = Fit(order.client, -1, start, anchor=state.experts[0], pull=self.settings.mu)
        return [*super().fits(side, state, order), personal]
