"""MLflow "model from code": the mixture, the gate or one expert, from safetensors artifacts.

Nothing is unpickled: this file and the artifacts are all there is.
"""

import base64
import binascii
import functools
import gc
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from numpy.typing import NDArray

from fedcoe.bundle import Bundle, load_bundle
from fedcoe.errors import FedCoEError
from fedcoe.prediction import log_posterior

MAX_IMAGES = 16_384
"""Most images in a request, and most it may bring to be read."""
MAX_BYTES = 64 * 2**20
"""Longest request that is parsed; as Python lists it takes up to 22 times that."""


class Predictor:
    """uint8 images [n, H, W, C] to probabilities [n, classes] (gate: [n, experts]).

    The mixture takes params: `mode` (none, unlabelled, labels); `inputs`, images of the client to
    read, as base64 of their uint8 bytes [i, H, W, C] (default: the images to predict); in mode
    `labels` the inputs' `labels` [i], or `label_counts` [classes].
    """

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
        _refuse_in_one_line()

    # Without type hints, and in a class of its own: MLflow takes hints for a schema, warns of the
    # lack of them, and does neither with what a PythonModel inherits. Ours is in the signature.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        try:
            images = _few(np.asarray(model_input))
            if self.config["part"] == "mixture":
                return np.asarray(np.exp(self._mixture(images, params or {})))
            scores = self.bundle.score(images)
            if self.config["part"] == "gate":
                return np.asarray(np.exp(self.bundle.method.log_gate(self.bundle.state, scores)))
            return np.asarray(np.exp(log_posterior(scores.experts[0])))
        except FedCoEError as error:
            raise MlflowException(str(error), INVALID_PARAMETER_VALUE) from None

    def _mixture(self, images: NDArray[np.uint8], params: Mapping[str, Any]) -> NDArray[np.float64]:
        mode = params.get("mode", "none")
        counts, labels = (_integers(params, name) for name in ("label_counts", "labels"))
        inputs = self._inputs(params["inputs"]) if params.get("inputs") else None
        # Models used to be registered with zeros as the default.
        given = counts if counts is not None and counts.any() else None
        return self.bundle.predict(images, mode, given, inputs, labels)

    def _inputs(self, text: str) -> NDArray[np.uint8]:
        shape = self.bundle.method.federation.shape
        said = f"base64 of uint8 bytes [i, {', '.join(map(str, shape))}]"
        try:
            pixels = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise FedCoEError(f"inputs must be {said}") from None
        size = int(np.prod(shape))
        if not pixels or len(pixels) % size:
            raise FedCoEError(
                f"inputs hold {len(pixels)} bytes, not a multiple of {size}; they must be {said}"
            )
        return _few(np.frombuffer(pixels, np.uint8).reshape(-1, *shape))


def _few(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if len(images) > MAX_IMAGES:
        raise FedCoEError(f"{len(images)} images in one request; at most {MAX_IMAGES}")
    return images


def _integers(params: Mapping[str, Any], name: str) -> NDArray[np.int64] | None:
    values = params.get(name)
    if values is None or not len(values):
        return None
    try:
        found = np.asarray(values)
        if found.dtype.kind not in "iuO" or found.ndim != 1:
            raise FedCoEError(f"{name} must be a list of integers")
        return found.astype(np.int64)
    except OverflowError:
        raise FedCoEError(f"{name} has a number that is too large") from None
    except (TypeError, ValueError):
        raise FedCoEError(f"{name} must be a list of integers") from None


def _refuse_in_one_line() -> None:
    """Make MLflow's scoring server, where this process is one, refuse requests in plain words.

    By itself it casts what JSON holds to the signature's uint8, so that 0.7 becomes 0 and is
    predicted; copies nested lists number by number, which takes longer than predicting; ignores
    params it does not know; and answers some mistakes with a stack trace.
    """
    server = sys.modules.get("mlflow.pyfunc.scoring_server")
    served: Callable[..., Any] | None = getattr(server, "invocations", None)
    if served is not None and not hasattr(served, "strict"):
        server.invocations = strict(served)  # type: ignore[union-attr]


def strict(served: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap MLflow's `invocations(data, content_type, model, input_schema)`."""
    from mlflow.pyfunc.scoring_server import InvocationsResponse

    @functools.wraps(served)
    def invocations(data: bytes, content_type: str | None, model: Any, input_schema: Any) -> Any:
        if (content_type or "").split(";")[0].strip() != "application/json":
            return InvocationsResponse("send application/json", 415, "text/plain")
        if len(data) > MAX_BYTES:
            said = f"the request has {len(data)} bytes, at most {MAX_BYTES} are taken"
            return InvocationsResponse(said, 413, "text/plain")
        try:
            known = {spec.name for spec in model.metadata.get_params_schema() or ()}
            # A list a pixel sets the collector off over and over: nine tenths of the time.
            gc.disable()
            try:
                request = _parse(data, known)
            finally:
                gc.enable()
            # MLflow takes requests that are parsed already.
            return served(request, content_type, model, input_schema)
        except FedCoEError as error:
            raise MlflowException(str(error), INVALID_PARAMETER_VALUE) from None
        except MlflowException as error:
            if trace := error.json_kwargs.pop("stack_trace", None):
                logging.getLogger(__name__).error("%s\n%s", error.message, trace)
            # What comes before is the whole request, printed.
            error.message = error.message.rsplit("Error: ", 1)[-1]
            raise

    invocations.strict = True  # type: ignore[attr-defined]
    return invocations


def _parse(data: bytes, known: set[str]) -> dict[str, Any]:
    def refuse(number: str) -> None:
        raise FedCoEError(f"{number} is in the request; numbers must be integers, pixels 0 to 255")

    try:
        request = json.loads(data, parse_float=refuse, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise FedCoEError(f"the request is no JSON: {error}") from None
    if not isinstance(request, dict) or len({"inputs", "instances"} & set(request)) != 1:
        raise FedCoEError('the request must be {"inputs": images [, "params": {...}]}')
    params = request.get("params") or {}
    if not isinstance(params, dict):
        raise FedCoEError("params must be an object")
    if unknown := sorted({*request} - {"inputs", "instances", "params"}) + sorted(
        f"params.{name}" for name in set(params) - known
    ):
        raise FedCoEError(f"{unknown[0]} is unknown; params: {', '.join(sorted(known)) or 'none'}")
    if params.get("inputs") is not None and not isinstance(params["inputs"], str):
        raise FedCoEError("params.inputs must be a string: base64 of uint8 images")
    for name, value in params.items():
        if isinstance(value, list) and any(type(item) is not int for item in value):
            raise FedCoEError(f"params.{name} must be a list of integers")
    images = _pixels(request.get("inputs", request.get("instances")))
    return {"inputs": list(images), "params": params}


def _pixels(images: Any) -> NDArray[np.uint8]:
    if not isinstance(images, list) or not images:
        raise FedCoEError("inputs must be a list of images, at least one")
    # As objects: left to choose, NumPy gives every entry the room of the longest text among them.
    pixels = np.array(images, dtype=object)
    kinds = set(map(type, pixels.ravel()))
    if list in kinds:
        raise FedCoEError("inputs must be images of one shape; rows differ in length")
    if kinds - {int}:
        raise FedCoEError("inputs must hold integers, pixels 0 to 255, and nothing else")
    try:
        pixels = pixels.astype(np.int64)
    except OverflowError:
        raise FedCoEError("inputs hold a number that is too large; pixels are 0 to 255") from None
    low, high = pixels.min(initial=255), pixels.max(initial=0)
    if low < 0 or high > 255:
        raise FedCoEError(f"inputs hold {low if low < 0 else high}; pixels are 0 to 255")
    return pixels.astype(np.uint8)


class ServedModel(Predictor, PythonModel):
    """What MLflow loads."""


set_model(ServedModel())
