"""FedAdam (Reddi et al., ICLR 2021, algorithm 2): Adam on the server, SGD on clients.

    each round, with d the cohort's mean update sum_k n_k (w_k - w_t) / sum_k n_k:
        m <- beta1 m + (1 - beta1) d
        v <- beta2 v + (1 - beta2) d^2
        w <- w + eta m / (sqrt v + tau)

As in the paper there is no bias correction, m starts at 0 and v at tau^2.

Communicated: as FedAvg, the model down and its update up. A new client is served by the global
model.
"""

from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedcoe.methods.base import Method
from fedcoe.methods.settings import MethodSettings
from fedcoe.state import ServerState


class FedAdamSettings(MethodSettings):
    name: Literal["fedadam"] = "fedadam"
    server_lr: float = Field(0.01, gt=0.0, le=10.0, description="eta, step of the server's Adam")
    server_momentum: float = Field(
        0.9, ge=0.0, lt=1.0, description="beta1, decay of the mean of updates"
    )
    second_momentum: float = Field(
        0.99, ge=0.0, lt=1.0, description="beta2, decay of the mean of squared updates"
    )
    adaptivity: float = Field(
        1e-3, gt=0.0, le=1.0, description="tau, added to the root; smaller = more adaptive"
    )


class FedAdam(Method):
    Settings = FedAdamSettings
    heavy_ball = False
    private = True
    settings: FedAdamSettings

    def init(self) -> ServerState:
        state = super().init()
        return state.with_extra(server_second_moment=np.full_like(state.experts, self._tau**2))

    @property
    def _tau(self) -> float:
        return self.settings.adaptivity

    def server_step(self, state: ServerState, update: NDArray[np.float64]) -> ServerState:
        if not update.any():
            # Nobody's update was valid: the second moment stays as well.
            return state
        s = self.settings
        m = s.server_momentum * state.momentum + (1 - s.server_momentum) * update
        v = state.extra["server_second_moment"]
        v = s.second_momentum * v + (1 - s.second_momentum) * update**2
        experts = state.experts + s.server_lr * m / (np.sqrt(v) + self._tau)
        after = replace(state, experts=experts.astype(np.float32), momentum=m.astype(np.float32))
        return after.with_extra(server_second_moment=v.astype(np.float32))
