"""pFedMoE (Yi et al. 2024, arXiv 2402.01350): a private gate mixes shared and own features.

    features(x) = a_g(x) G(x) + a_l(x) F_k(x),   [a_g, a_l] = softmax(W2 s(norm(W1 x)))
    each round, for the cohort, from the received G and the client's own F_k, gate and head:
        local train     all of it together
        aggregate       G alone, weighted by n_k

s is the logistic function, norm a layer normalisation. The paper makes G small, so that clients'
models may differ; here all clients have one architecture and G has it too. Personalized prediction:
the averaged G with the client's own parts. The paper has no model for a client without these: new
clients and the global prediction get the mean of all seen clients' parts, as in FedPer.
Communicated: G, down and up. A step costs two bodies.
"""

from typing import Literal, cast

import torch
from torch import Tensor, nn

from fedcoe.methods.fedper import FedPer
from fedcoe.methods.settings import MethodSettings
from fedcoe.models import Expert, build_expert
from fedcoe.models.experts import Shape

HIDDEN = 32
"""Width of the gate's hidden layer."""


class PFedMoESettings(MethodSettings):
    name: Literal["pfedmoe"] = "pfedmoe"


class TwoBodies(Expert):
    """An expert whose features come from `body` (shared) and `local`, mixed by a gate."""

    def __init__(self, shared: Expert, local: Expert, shape: Shape) -> None:
        nn.Module.__init__(self)
        height, width, channels = shape
        self.body, self.local = shared.body, local.body
        self.gate = nn.Sequential(
            nn.Flatten(),
            nn.Linear(height * width * channels, HIDDEN),
            nn.LayerNorm(HIDDEN),
            nn.Sigmoid(),
            nn.Linear(HIDDEN, 2),
            nn.Softmax(dim=1),
        )
        self.head = shared.head

    def features(self, x: Tensor) -> Tensor:
        share = self.gate(x)
        return cast(Tensor, share[:, :1] * self.body(x) + share[:, 1:] * self.local(x))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.features(x)))


class PFedMoE(FedPer):
    Settings = PFedMoESettings
    own = ("local.", "gate.", "head.")

    @staticmethod
    def build(name: str, shape: Shape, classes: int, seed: int) -> TwoBodies:
        # Two draws: equal extractors would leave the gate nothing to learn.
        shared, local = (build_expert(name, shape, classes, s) for s in (seed, (seed + 1) % 2**31))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return TwoBodies(shared, local, shape)
