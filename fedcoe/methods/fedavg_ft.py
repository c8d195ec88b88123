"""FedAvg + fine-tuning (FedAvg+; Wang et al. 2019, arXiv 1910.10252): the global model, adapted.

    each round              as FedAvg
    before an evaluation    every seen client trains the global model for some epochs

Personalized prediction: the fine-tuned model alone, trained on plain cross-entropy at the peak
learning rate. A new client is served by the global model. Communicated: as FedAvg. The epochs of
fine-tuning count among images trained once, at the end.
"""

from typing import Literal

from pydantic import Field

from fedcoe.methods.base import Method
from fedcoe.methods.settings import MethodSettings


class FedAvgFTSettings(MethodSettings):
    name: Literal["fedavg_ft"] = "fedavg_ft"
    finetune_epochs: int = Field(5, ge=1, le=1000, description="Epochs of fine-tuning")


class FedAvgFT(Method):
    """The base class fine-tunes; only the setting is new."""

    Settings = FedAvgFTSettings
    private = True
    is_fedavg = True
    own_model_alone = True
