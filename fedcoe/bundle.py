"""A trained run as files: `models/`, and everything needed to predict from it.

experts/expert-<m>.safetensors     global experts, parameters by name
gate.safetensors                   gate and coordination head (methods that have them)
personal/<client>.safetensors      personal experts of seen clients, by client index
state.json                         settings, classes, label counts, correlation, calibration
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from fedcoe.cold_start import (
    MODES,
    Mode,
    predict_labels,
    predict_none,
    predict_unlabelled,
)
from fedcoe.config import validate_settings
from fedcoe.engine.trainer import Trainer
from fedcoe.errors import FedCoEError
from fedcoe.methods.base import Federation, Method, Scores
from fedcoe.methods.settings import method_class
from fedcoe.models.flat import FlatModel, Layout
from fedcoe.prediction import Log, prior_from_counts
from fedcoe.state import PersonalStore, ServerState, load_model, save_model, write_atomic

FORMAT = 1
PREDICTING = ("gate", "head")
"""What of a state's `extra` is needed to predict; the rest serves training."""


def layout_of(method: Method) -> Layout:
    """Parameter names and shapes of a method's experts."""
    f = method.federation
    return FlatModel(method.build(f.settings.model.name, f.shape, f.classes, 0)).layout


def export_models(
    folder: Path, method: Method, state: ServerState, personal: PersonalStore
) -> None:
    """Write a trained state to `folder`, replacing what is there."""
    f = method.federation
    layout = layout_of(method)
    target = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(target, ignore_errors=True)
    for m, vector in enumerate(state.experts):
        save_model(target / "experts" / f"expert-{m}.safetensors", vector, layout)
    arrays = {
        name: np.ascontiguousarray(array)
        for name, array in state.extra.items()
        if name in PREDICTING
    }
    if arrays:
        write_atomic(target / "gate.safetensors", save(arrays))
    exported = PersonalStore(target / "personal", layout)
    for client, last in enumerate(state.personal_round):
        if last and method.personal_models:
            exported.save(client, int(last), personal.load(client, int(last)))
    description = {
        "format": FORMAT,
        "round": state.round,
        "settings": f.settings.model_dump(mode="json", exclude={"runtime"}),
        "precision": f.settings.runtime.precision,
        "shape": f.shape,
        "mean": f.mean,
        "std": f.std,
        "classes": f.class_names,
        "clients": f.names,
        "groups": f.groups,
        "label_counts": f.label_counts.tolist(),
        "correlation": state.correlation.tolist(),
        "dispatched": state.dispatched.tolist(),
        "personal_round": state.personal_round.tolist(),
        "share": state.share.tolist(),
        "calibration": dict(state.calibration),
        "diagnostics": dict(state.diagnostics),
    }
    text = json.dumps(description, indent=1, sort_keys=True) + "\n"
    write_atomic(target / "state.json", text.encode())
    shutil.rmtree(folder, ignore_errors=True)
    target.rename(folder)


@dataclass(frozen=True)
class Bundle:
    """A trained run, loaded: a method and its state, and a trainer to run the experts with."""

    method: Method
    state: ServerState
    trainer: Trainer

    def score(self, images: NDArray[np.uint8]) -> Scores:
        """Run every global model once over uint8 images [n, H, W, C].

        Raises:
            FedCoEError: another type or shape than the model was trained on.
        """
        shape = self.method.federation.shape
        if images.ndim == 3 and shape[2] == 1:
            # `[..., None]` strides otherwise, which changes the last bits of convolutions.
            images = images.reshape(*images.shape, 1)
        if images.dtype != np.uint8 or images.shape[1:] != shape or not len(images):
            raise FedCoEError(
                f"images are {images.dtype} {list(images.shape)}, "
                f"the model takes uint8 [n, {', '.join(map(str, shape))}]"
            )
        if len(self.state.experts) < self.method.experts:
            return Method.score(self.method, self.trainer, self.state, images)
        return self.method.score(self.trainer, self.state, images)

    def predict(
        self,
        images: NDArray[np.uint8],
        mode: Mode = "none",
        label_counts: NDArray[np.int64] | None = None,
        inputs: NDArray[np.uint8] | None = None,
        labels: NDArray[np.int64] | None = None,
    ) -> Log:
        """[n, C] log probabilities for a client that never took part.

        Args:
            images: uint8 [n, H, W, C] to predict.
            mode: `none` knows nothing; `unlabelled` reads the client's `inputs`; `labels` reads
                `inputs` and their `labels`, or, where counts are all there is, `label_counts`:
                then what the experts are worth to the client is taken from `inputs` alone.
            label_counts: [C].
            inputs: uint8 [i, H, W, C] to read; default: the images themselves.
            labels: [i] classes of the inputs.

        Raises:
            FedCoEError: arguments that do not fit the model or the mode.
        """
        if mode not in MODES:
            raise FedCoEError(f"mode {mode!r}: there are {', '.join(MODES)}")
        self.check_whole()
        scores = self.score(images)
        if mode == "none":
            return predict_none(self.method, self.state, scores)
        given = scores if inputs is None else self.score(inputs)
        if mode == "unlabelled":
            return predict_unlabelled(self.method, self.state, scores, given)
        classes = self.method.federation.classes
        if labels is not None:
            count = given.experts.shape[1]
            checked = check_labels(labels, count, classes)
            return predict_labels(self.method, self.state, scores, given, checked)
        if label_counts is None or label_counts.shape != (classes,) or label_counts.min() < 0:
            raise FedCoEError(
                f"mode labels needs inputs with labels, or label_counts: {classes} numbers >= 0"
            )
        _, correlation = self.method.join_unlabelled(self.state, given)
        prior = prior_from_counts(label_counts)
        return self.method.predict_with(self.state, scores, prior, correlation)

    def check_whole(self) -> None:
        """Refuse to predict for a client with a part of a model.

        Raises:
            FedCoEError: one expert was loaded alone, or there is no global model.
        """
        if len(self.state.experts) < self.method.experts:
            raise FedCoEError("this bundle holds one expert alone; load it whole to predict")
        if not self.method.has_global:
            name = self.method.federation.settings.method.name
            raise FedCoEError(f"{name} trains no global model, so it has none for new clients")


def check_labels(labels: NDArray[Any], count: int, classes: int) -> NDArray[np.int64]:
    """[n] labels as int64.

    Raises:
        FedCoEError: not `count` integers in 0..`classes` - 1.
    """
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise FedCoEError(f"labels are {labels.dtype} {list(labels.shape)}, not {count} integers")
    if labels.min() < 0 or labels.max() >= classes:
        raise FedCoEError(
            f"labels run from {labels.min()} to {labels.max()}, the model knows 0 to {classes - 1}"
        )
    return labels.astype(np.int64)


def load_bundle(
    folder: Path,
    precision: Literal["auto", "fp32", "bf16"] | None = None,
    only: int | None = None,
) -> Bundle:
    """Load what `export_models` wrote; executes nothing that is in the files.

    Args:
        precision: of the computation; default: as in training.
        only: load just this expert. `score` then gives its outputs alone.

    Raises:
        FedCoEError: missing, damaged, or of another format.
    """
    path = folder / "state.json"
    try:
        description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if description["format"] != FORMAT:
            raise ValueError(f"format {description['format']}, this version reads {FORMAT}")
        settings = validate_settings(description["settings"], str(path))
        height, width, channels = (int(side) for side in description["shape"])
        federation = Federation(
            settings,
            (height, width, channels),
            len(description["classes"]),
            np.array(description["label_counts"], np.int64),
            tuple(description["clients"]),
            tuple(description["groups"]),
            tuple(description["classes"]),
            tuple(description["mean"]),
            tuple(description["std"]),
        )
        method: Method = method_class(settings.method.name)(federation)
        layout = layout_of(method)
        experts = np.stack(
            [
                load_model(folder / "experts" / f"expert-{m}.safetensors", layout)
                for m in (range(method.experts) if only is None else [only])
            ]
        )
        gate = folder / "gate.safetensors"
        state = ServerState(
            round=int(description["round"]),
            experts=experts,
            momentum=np.zeros((0, 0), np.float32),
            correlation=np.array(description["correlation"], np.float64),
            dispatched=np.array(description["dispatched"], np.int64),
            personal_round=np.array(description["personal_round"], np.int64),
            share=np.array(description["share"], np.float64),
            calibration=description["calibration"],
            diagnostics=description["diagnostics"],
            extra=load_file(gate) if gate.exists() and only is None else {},
        )
        rows = {"correlation": (method.experts,), "dispatched": (method.experts,)}
        for name in ("correlation", "dispatched", "personal_round", "share"):
            expected = (federation.clients, *rows.get(name, ()))
            if getattr(state, name).shape != expected:
                raise ValueError(f"{name} must have shape {expected}")
    except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
        raise FedCoEError(
            f"{path.parent}: not a whole model ({type(error).__name__}: {error}); "
            "train one: `dvc repro train`"
        ) from None
    trainer = Trainer(
        settings.model.name,
        federation.shape,
        federation.classes,
        federation.mean,
        federation.std,
        precision or description.get("precision", "auto"),
        build=method.build,
    )
    return Bundle(method, state, trainer)
