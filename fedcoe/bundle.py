"""A trained run as files: `models/`, and everything needed to predict from it.

experts/expert-<m>.safetensors     global experts, parameters by name
gate.safetensors                   gate and coordination head (methods that have them)
personal/<client>.safetensors      personal experts of seen clients, by client index
personal/clients.json              with privacy: what the rest then lacks of clients
state.json                         settings, classes, label counts, correlation, calibration
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from fedcoe.cold_start import (
    MODES,
    Mode,
    predict_labels,
    predict_none,
    predict_unlabelled,
)
from fedcoe.config import validate_settings
from fedcoe.data.untrusted import one_line, read_json
from fedcoe.durable import sync, write_atomic
from fedcoe.engine.trainer import Trainer
from fedcoe.errors import FedCoEError
from fedcoe.methods.base import Federation, Method, Scores
from fedcoe.methods.settings import method_class
from fedcoe.models import GateNetwork
from fedcoe.models.flat import FlatModel, Layout
from fedcoe.prediction import Log, prior_from_counts
from fedcoe.state import (
    DAMAGED,
    PersonalStore,
    ServerState,
    load_arrays,
    load_model,
    save_arrays,
    save_model,
)

FORMAT = 1
PREDICTING = ("gate", "head")
"""What of a state's `extra` is needed to predict; the rest serves training."""
OWN = "personal/clients.json"
"""With privacy: what of `state.json` clients know and the server does not."""


def layout_of(method: Method) -> Layout:
    """Parameter names and shapes of a method's experts."""
    f = method.federation
    return FlatModel(method.build(f.settings.model.name, f.shape, f.classes, 0)).layout


def export_models(
    folder: Path, method: Method, state: ServerState, personal: PersonalStore
) -> None:
    """Write a trained state to `folder`, replacing what is there.

    Raises:
        FedCoEError: the disk refuses; what was there is as it was.
    """
    target = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(target, ignore_errors=True)
    try:
        _write_models(target, method, state, personal)
        shutil.rmtree(folder, ignore_errors=True)
        target.rename(folder)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    sync(folder.parent)


def _write_models(
    target: Path, method: Method, state: ServerState, personal: PersonalStore
) -> None:
    f = method.federation
    layout = layout_of(method)
    for m, vector in enumerate(state.experts):
        save_model(target / "experts" / f"expert-{m}.safetensors", vector, layout)
    arrays = {name: array for name, array in state.extra.items() if name in PREDICTING}
    if arrays:
        save_arrays(target / "gate.safetensors", arrays)
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
    if method.privacy is not None:
        # What no mechanism covers stays beside personal experts, and goes to no registry.
        private = ("groups", "label_counts", "personal_round", "share")
        own = {name: description[name] for name in private}
        write_atomic(target / OWN, (json.dumps(own) + "\n").encode())
        nothing = {name: np.zeros_like(values).tolist() for name, values in own.items()}
        description |= nothing | {"diagnostics": {}}
    # Read back first: JSON has no tuples, and what is loaded is what is hashed.
    description = json.loads(json.dumps(description))
    text = json.dumps(description | {"hash": _hash(description)}, indent=1, sort_keys=True) + "\n"
    write_atomic(target / "state.json", text.encode())


def _hash(description: dict[str, Any]) -> str:
    text = json.dumps(description, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


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
        shape, images = self.method.federation.shape, np.asarray(images)
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
        for name, given_, modes in (
            ("label_counts", label_counts, ("labels",)),
            ("labels", labels, ("labels",)),
            ("inputs", inputs, ("unlabelled", "labels")),
        ):
            if given_ is not None and mode not in modes:
                raise FedCoEError(f"{name} are for mode {' and '.join(modes)}, not {mode}")
        if labels is not None and label_counts is not None:
            raise FedCoEError("label_counts are for a client without labels; leave one out")
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
        counts = np.asarray(label_counts)
        fit = counts.dtype.kind in "iuf" and counts.shape == (classes,)
        if not fit or counts.min() < 0 or not np.isfinite(counts).all():
            raise FedCoEError(
                f"mode labels needs inputs with labels, or label_counts: {classes} numbers >= 0"
            )
        _, correlation = self.method.join_unlabelled(self.state, given)
        prior = prior_from_counts(counts)
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
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise FedCoEError(f"labels are {labels.dtype} {list(labels.shape)}, not {count} integers")
    if labels.min() < 0 or labels.max() >= classes:
        raise FedCoEError(
            f"labels run from {labels.min()} to {labels.max()}, the model knows 0 to {classes - 1}"
        )
    return labels.astype(np.int64)


Count = Annotated[int, Field(ge=0, lt=2**62)]
Side = Annotated[int, Field(ge=1, le=16_384)]


class _Description(BaseModel):
    """What `state.json` says, as far as it is read."""

    format: int
    round: Count
    settings: dict[str, Any]
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    shape: tuple[Side, Side, Side]
    mean: list[FiniteFloat]
    std: list[Annotated[FiniteFloat, Field(gt=0.0)]]
    classes: list[str] = Field(min_length=2)
    clients: list[str] = Field(min_length=1)
    groups: list[Count]
    label_counts: list[list[Count]]
    correlation: list[list[Annotated[FiniteFloat, Field(ge=0.0)]]]
    dispatched: list[list[Count]]
    personal_round: list[Count]
    share: list[Annotated[FiniteFloat, Field(ge=0.0, le=1.0)]]
    calibration: dict[str, FiniteFloat]
    diagnostics: dict[str, float]


def _shapes_of(method: Method) -> tuple[Layout, int]:
    """Layout of an expert and number of its features, without allocating its weights."""
    f = method.federation
    with torch.device("meta"):
        model = method.build(f.settings.model.name, f.shape, f.classes, 0)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}, model.head.in_features


def _check_sizes(method: Method, state: ServerState, width: int) -> None:
    """Everything that is combined in predicting fits and is finite.

    Args:
        width: number of an expert's features.

    Raises:
        ValueError: what does not.
    """
    f, experts = method.federation, method.experts
    if not len(f.mean) == len(f.std) == f.shape[2]:
        raise ValueError(f"state.json: mean and std must have {f.shape[2]} entries, one a channel")
    per_client = {
        "label_counts": (f.label_counts, (f.classes,)),
        "groups": (np.array(f.groups), ()),
        "correlation": (state.correlation, (experts,)),
        "dispatched": (state.dispatched, (experts,)),
        "personal_round": (state.personal_round, ()),
        "share": (state.share, ()),
    }
    for name, (array, row) in per_client.items():
        if array.shape != (expected := (len(f.names), *row)):
            raise ValueError(f"state.json: {name} must have shape {expected}")
    for m, expert in enumerate(state.experts):
        if not np.isfinite(expert).all():
            raise ValueError(f"expert-{m} holds NaN or infinite numbers")
    sizes: dict[str, tuple[int, ...]] = {
        "head": (method.columns(width), f.classes),
        "gate": (method.columns(width), experts),
    }
    if getattr(f.settings.method, "gate", None) == "neural":
        with torch.device("meta"):
            network = GateNetwork(f.shape, experts, 0)
        sizes["gate"] = (sum(p.numel() for p in network.parameters()),)
    for name, array in state.extra.items():
        if name not in sizes:
            raise ValueError(f"gate.safetensors: no model has an array {name!r}")
        if array.dtype != np.float32 or array.shape != sizes[name]:
            raise ValueError(
                f"gate.safetensors: {name} is {array.dtype} {list(array.shape)}, "
                f"must be float32 {list(sizes[name])}"
            )
        if not np.isfinite(array).all():
            raise ValueError(f"gate.safetensors: {name} holds NaN or infinite numbers")


def load_bundle(
    folder: str | Path,
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
    folder = Path(folder)
    path = folder / "state.json"
    try:
        raw = read_json(path)
        if isinstance(raw, dict) and raw.get("format") != FORMAT:
            raise ValueError(f"format {raw.get('format')}, this version reads {FORMAT}")
        own = read_json(folder / OWN) if (folder / OWN).exists() else {}
        told = _Description.model_validate(raw | own)
        settings = validate_settings(told.settings, str(path))
        federation = Federation(
            settings,
            told.shape,
            len(told.classes),
            np.array(told.label_counts, np.int64),
            tuple(told.clients),
            tuple(told.groups),
            tuple(told.classes),
            tuple(told.mean),
            tuple(told.std),
        )
        method: Method = method_class(settings.method.name)(federation)
        layout, width = _shapes_of(method)
        experts = np.stack(
            [
                load_model(folder / "experts" / f"expert-{m}.safetensors", layout)
                for m in (range(method.experts) if only is None else [only])
            ]
        )
        gate = folder / "gate.safetensors"
        state = ServerState(
            round=told.round,
            experts=experts,
            momentum=np.zeros((0, 0), np.float32),
            correlation=np.array(told.correlation, np.float64),
            dispatched=np.array(told.dispatched, np.int64),
            personal_round=np.array(told.personal_round, np.int64),
            share=np.array(told.share, np.float64),
            calibration=told.calibration,
            diagnostics=told.diagnostics,
            extra=load_arrays(gate) if gate.exists() and only is None else {},
        )
        _check_sizes(method, state, width)
        # Last, so that mistakes of an edit are named; versions before this had none.
        if raw.pop("hash", None) not in (None, _hash(raw)):
            raise ValueError(f"state.json: {DAMAGED}")
    except FedCoEError:
        raise
    except Exception as error:  # torch and safetensors meet wrong sizes with any exception
        said = f"{error}" if type(error) is ValueError else f"{type(error).__name__}: {error}"
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            said = f"state.json: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise FedCoEError(
            f"{path.parent}: not a whole model ({one_line(said)}); train one: `dvc repro train`"
        ) from None
    trainer = Trainer(
        settings.model.name,
        federation.shape,
        federation.classes,
        federation.mean,
        federation.std,
        precision or told.precision,
        build=method.build,
    )
    return Bundle(method, state, trainer)
