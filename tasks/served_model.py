"""MLflow "model from code": the mixture, the gate or one expert, from safetensors artifacts.

Nothing is unpickled: this file and the artifacts are all there is.
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from fedcoe.bundle import Bundle, load_bundle
from fedcoe.errors import FedCoEError
from fedcoe.prediction import log_posterior


class Predictor:
    """uint8 images [n, H, W, C] to probabilities [n, classes] (gate: [n, experts])."""

    def load_context(self, context: PythonModelContext) -> None:
        self.config = json.loads(Path(context.artifacts["part"]).read_text())
        with tempfile.TemporaryDirectory() as folder:
            models = Path(folder)
            shutil.copy(context.artifacts["state"], models / "state.json")
            if "gate" in context.artifacts:
                shutil.copy(context.artifacts["gate"], models / "gate.safetensors")
            experts = context.artifacts.get("experts") or context.artifacts["expert"]
            only = self.config["expert"] if self.config["part"] == "expert" else None
            if only is None:
                shutil.copytree(experts, models / "experts")
            else:
                (models / "experts").mkdir()
                shutil.copy(experts, models / "experts")
            self.bundle: Bundle = load_bundle(models, only=only)

    # Without type hints, and in a class of its own: MLflow takes hints for a schema, warns of the
    # lack of them, and does neither with what a PythonModel inherits. Ours is in the signature.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        try:
            images = np.asarray(model_input)
            if self.config["part"] == "mixture":
                given = params or {}
                counts = given.get("label_counts")
                log_p = self.bundle.predict(
                    images,
                    given.get("mode", "none"),
                    None if counts is None else np.asarray(counts, np.int64),
                )
                return np.asarray(np.exp(log_p))
            scores = self.bundle.score(images)
            if self.config["part"] == "gate":
                return np.asarray(np.exp(self.bundle.method.log_gate(self.bundle.state, scores)))
            return np.asarray(np.exp(log_posterior(scores.experts[0])))
        except FedCoEError as error:
            raise MlflowException(str(error), INVALID_PARAMETER_VALUE) from None


class ServedModel(Predictor, PythonModel):
    """What MLflow loads."""


set_model(ServedModel())
