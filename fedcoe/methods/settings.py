"""Settings every method takes, and how `method:` in params.yaml finds the class for its name.

A method is one file in this package. It defines one `Method` subclass, whose `Settings` names its
`MethodSettings`; the file's name is the method's name. Nothing else is edited to add one.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fedcoe.errors import FedCoEError

_NOT_METHODS = {"settings", "base"}


class MethodSettings(BaseModel):
    """Switches any method can take, so that all are compared on one footing."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    name: str = Field(description="File name of the method in fedcoe/methods/")
    balanced_softmax: bool = Field(
        False,
        description="Train experts on logits + log label prior (Ren et al., NeurIPS 2020)",
    )
    server_lr: float = Field(1.0, gt=0.0, le=10.0, description="Step of the expert aggregate")
    server_momentum: float = Field(
        0.0, ge=0.0, lt=1.0, description="Heavy ball on the aggregate (FedAvgM, Hsu et al. 2019)"
    )
    reweighting: bool = Field(
        False, description="Reweight predictions for a client by its label prior"
    )
    coordination_head: bool = Field(
        False,
        description="Closed-form global classifier on all experts' features (Fed3R, ICML 2024), "
        "pooled with their own outputs",
    )
    # Left out of dumps when off: keys of results from before there was a choice stay as they were.
    patch_filters: int = Field(
        0,
        ge=0,
        le=4096,
        description="The coordination head also sees 8 random patch features for each of these "
        "filters (Coates, Ng, 2011; fedcoe/patches.py); 0 = none",
        exclude_if=lambda value: value == 0,
    )
    balanced_head: bool = Field(
        False,
        description="What is solved in closed form counts samples of every class as much as those "
        "of any other, not as often as seen clients have it",
        exclude_if=lambda value: not value,
    )
    blend: bool = Field(
        False,
        description="Clients that a method predicts with their own models alone (Ditto, FedRep, "
        "...) weigh them against the global prediction on validation, as FedCoE's always do",
        exclude_if=lambda value: not value,
    )
    ridge: float = Field(
        1e-5, gt=0.0, le=100.0, description="Regularisation of what is solved in closed form"
    )
    robust: Literal["none", "norm_clip", "trimmed_mean", "median"] = Field(
        "none",
        description="How an expert's updates are combined; trimmed mean and median are by "
        "coordinate and count clients equally (Yin et al., ICML 2018)",
        exclude_if=lambda value: value == "none",
    )
    robust_clip: float = Field(
        0.0,
        ge=0.0,
        allow_inf_nan=False,
        description="norm_clip: updates are shortened to this; 0 = the median length of those of "
        "the same expert and round",
        exclude_if=lambda value: value == 0.0,
    )
    robust_trim: float = Field(
        0.2,
        ge=0.0,
        lt=0.5,
        description="trimmed_mean: share of clients left out on either side, rounded up",
        exclude_if=lambda value: value == 0.2,
    )


def described(name: str) -> str:
    """What a switch is, for methods that have another default."""
    return MethodSettings.model_fields[name].description or ""


SWITCHES = (
    "balanced_softmax",
    "server_momentum",
    "reweighting",
    "coordination_head",
    "patch_filters",
    "balanced_head",
)
"""What every method can have, and comparisons turn on or off for all alike."""

PREDICTION = frozenset(
    {"reweighting", "coordination_head", "patch_filters", "balanced_head", "blend", "ridge"}
)
"""Of these, what only decides how trained experts predict, as long as no method learns from it."""


def method_names() -> list[str]:
    """Names of all methods: the files of this package, but those that begin with `_`."""
    package = importlib.import_module("fedcoe.methods")
    names = (module.name for module in pkgutil.iter_modules(package.__path__))
    return sorted(name for name in names if name not in _NOT_METHODS and name[0] != "_")


@cache
def method_class(name: str) -> Any:
    """The `Method` subclass that a method's file defines.

    Raises:
        FedCoEError: the file cannot be imported, or defines none or several.
    """
    file = f"fedcoe/methods/{name}.py"
    try:
        module = importlib.import_module(f"fedcoe.methods.{name}")
    except SyntaxError as error:
        raise FedCoEError(f"{error.filename or file}, line {error.lineno}: {error.msg}") from None
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and value.__module__ == module.__name__
        and issubclass(getattr(value, "Settings", object), MethodSettings)
    ]
    if len(found) != 1:
        named = ", ".join(kind.__name__ for kind in found) or "none"
        raise FedCoEError(
            f"{file}: must define one subclass of Method, found {named}; what methods share goes "
            "into a file whose name begins with _"
        )
    return found[0]


def settings_for(values: Mapping[str, Any]) -> MethodSettings:
    """Build the settings class of the named method (default: fedcoe).

    Keys of other methods are left out rather than refused, so that
    `dvc exp run -S method.name=fedavg` works on a file that also holds FedCoE's keys; keys that
    no method has are errors.

    Raises:
        ValueError: unknown method.
        pydantic.ValidationError: a key or value the method does not take.
    """
    name = values.get("name", "fedcoe")
    if name not in method_names():
        raise ValueError(f"no method {name!r}; there are: {', '.join(method_names())}")
    own: type[MethodSettings] = method_class(name).Settings
    known_elsewhere = {
        key for other in method_names() for key in method_class(other).Settings.model_fields
    } - set(own.model_fields)
    return own.model_validate(
        {"name": name} | {key: v for key, v in values.items() if key not in known_elsewhere}
    )
