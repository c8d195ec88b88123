"""FedBABU (Oh, Kim, Yun, ICLR 2022): only the body is learned together; the head waits.

    each round, for the cohort, from the received body and the head everyone starts with:
        local train             the body, head frozen at its initial values
        aggregate               bodies, weighted by n_k
    before an evaluation        every seen client fine-tunes body and head on its own data

Personalized prediction: the fine-tuned model alone. A new client is served by the averaged body
under the initial head. Communicated: the body alone, down and up. The epochs of fine-tuning count
among images trained once, at the end.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field

from fedcoe.engine.pool import ClientSide
from fedcoe.engine.trainer import Fit, Phase
from fedcoe.methods.base import Method, Order, head_size
from fedcoe.methods.settings import MethodSettings
from fedcoe.state import ServerState


class FedBABUSettings(MethodSettings):
    name: Literal["fedbabu"] = "fedbabu"
    finetune_epochs: int = Field(5, ge=1, le=1000, description="Epochs of fine-tuning")


class FedBABU(Method):
    Settings = FedBABUSettings
    own_model_alone = True

    def fits(self, side: ClientSide, state: ServerState, order: Order) -> list[Fit]:
        phases = (Phase(self.work(state.round + 1).epochs, "body"),)
        return [replace(fit, phases=phases) for fit in super().fits(side, state, order)]

    def round_bytes(self, state: ServerState, orders: Sequence[Order]) -> tuple[int, int]:
        up, down = super().round_bytes(state, orders)
        head = 4 * head_size(self) * len(orders)
        return up - head, down - head
