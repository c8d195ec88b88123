"""FedRep (Collins et al., ICML 2021): first the client's head, then the common body.

    each round, for the cohort, from the received body and the client's own head:
        local train     the head for `head_epochs`, body frozen; then the body, head frozen
        aggregate       bodies, weighted by n_k; heads stay

Prediction, new clients and bytes: as FedPer. Images trained count both phases; epochs of the head
cost a forward pass, not a whole step.
"""

from dataclasses import replace
from typing import Literal

from pydantic import Field

from fedcoe.engine.pool import ClientSide
from fedcoe.engine.trainer import Fit, Phase
from fedcoe.methods.base import Order
from fedcoe.methods.fedper import FedPer
from fedcoe.methods.settings import MethodSettings
from fedcoe.state import ServerState


class FedRepSettings(MethodSettings):
    name: Literal["fedrep"] = "fedrep"
    head_epochs: int = Field(
        1, ge=1, le=1000, description="Epochs of the head, before train.local_epochs of the body"
    )


class FedRep(FedPer):
    Settings = FedRepSettings
    settings: FedRepSettings

    def fits(self, side: ClientSide, state: ServerState, order: Order) -> list[Fit]:
        epochs = self.work(state.round + 1).epochs
        phases = (Phase(self.settings.head_epochs, "head"), Phase(epochs, "body"))
        return [replace(fit, phases=phases) for fit in super().fits(side, state, order)]
