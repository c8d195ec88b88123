"""FedAvg (McMahan et al., AISTATS 2017): one global model, the n_k-weighted mean of clients'.

Communicated: the model down, its update up. A new client is served by the global model.
"""

from typing import Literal

from fedcoe.methods.base import Method
from fedcoe.methods.settings import MethodSettings


class FedAvgSettings(MethodSettings):
    name: Literal["fedavg"] = "fedavg"


class FedAvg(Method):
    """The base class with one expert is FedAvg."""

    Settings = FedAvgSettings
    private = True
    is_fedavg = True
