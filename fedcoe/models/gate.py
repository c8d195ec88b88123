"""The gate network g(x; phi): a small CNN from an image to a probability for each expert."""

from typing import cast

import torch
from torch import Tensor, nn

from fedcoe.models.experts import Shape


class GateNetwork(nn.Module):
    """Two strided convolutions, global pooling, one linear layer; 5 to 6 thousand parameters.

    `forward` maps [B, C, H, W] to [B, M] scores; softmax of them is g(x).
    """

    def __init__(self, shape: Shape, experts: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Conv2d(shape[2], 16, 3, 2, 1),
                nn.ReLU(),
                nn.Conv2d(16, 32, 3, 2, 1),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(32, experts),
            )
            # All experts start equal: the gate must not prefer one before it has learned to.
            nn.init.zeros_(cast(nn.Linear, self.layers[-1]).weight)
            nn.init.zeros_(cast(nn.Linear, self.layers[-1]).bias)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layers(x))
