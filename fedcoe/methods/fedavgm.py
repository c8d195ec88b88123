"""FedAvgM (Hsu, Qi, Brown 2019, arXiv 1909.06335): FedAvg with momentum on the server.

    each round, with d the cohort's mean update sum_k n_k (w_k - w_t) / sum_k n_k:
        v_t+1 = beta v_t + d
        w_t+1 = w_t + v_t+1

Communicated: as FedAvg, the model down and its update up. A new client is served by the global
model. beta = 0 is FedAvg. Any method takes `server_momentum`; this one has it on.
"""

from typing import Literal

from pydantic import Field

from fedcoe.methods.base import Method
from fedcoe.methods.settings import MethodSettings


class FedAvgMSettings(MethodSettings):
    name: Literal["fedavgm"] = "fedavgm"
    server_momentum: float = Field(
        0.9, ge=0.0, lt=1.0, description="beta: heavy ball on the aggregate"
    )


class FedAvgM(Method):
    """The base class has the step; only the default differs."""

    Settings = FedAvgMSettings
    private = True
