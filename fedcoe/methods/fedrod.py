"""FedRoD (Chen, Chao, ICLR 2022): one body, a generic head for all, a private head on top.

    each round, for the cohort, from the received body and generic head, and the own private head:
        local train     body and generic head on balanced softmax;
                        the private head on plain cross-entropy of generic + private logits,
                        whose gradient reaches nothing but the private head
                        (one `train.clip_norm` covers all parts together)
        aggregate       body and generic head, weighted by n_k

Here the private head starts at zero and is linear (the paper's hypernetwork variant is not built).
Personalized prediction: the averaged body and generic head, plus the client's private head. Global
prediction and new clients: the generic head. Communicated: body and generic head, down and up.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from fedcoe.methods.fedper import FedPer
from fedcoe.methods.settings import MethodSettings
from fedcoe.models import Expert, build_expert
from fedcoe.models.experts import Shape


class FedRoDSettings(MethodSettings):
    name: Literal["fedrod"] = "fedrod"
    balanced_softmax: bool = Field(True, description="Of the generic head (part of the method)")


class TwoHeads(Expert):
    """An expert with a private head beside its own: `head` is the generic one."""

    def __init__(self, expert: Expert) -> None:
        nn.Module.__init__(self)
        self.body = expert.body
        self.private = nn.Linear(expert.head.in_features, expert.head.out_features)
        nn.init.zeros_(self.private.weight)
        nn.init.zeros_(self.private.bias)
        self.head = expert.head

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        hidden = self.features(x)
        generic: Tensor = self.head(hidden)
        return generic, generic.detach() + self.private(hidden.detach())

    def personal(self, hidden: Tensor) -> Tensor:
        """[B, D] features to [B, C] of both heads together."""
        logits: Tensor = self.head(hidden) + self.private(hidden)
        return logits


class FedRoD(FedPer):
    Settings = FedRoDSettings
    own = ("private.",)
    personal_head = "personal"

    @staticmethod
    def build(name: str, shape: Shape, classes: int, seed: int) -> TwoHeads:
        return TwoHeads(build_expert(name, shape, classes, seed))

    def personal_shift(self, client: int) -> NDArray[np.float32] | None:
        """None: a client's own logits are trained on plain cross-entropy."""
        return None
