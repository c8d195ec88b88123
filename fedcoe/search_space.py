"""From `tune.space` to what a method can be searched over, checked before anything is trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedcoe.config import Searched, Settings, load_settings, validate_settings
from fedcoe.errors import FedCoEError
from fedcoe.methods.settings import method_class, method_names

SECTIONS = ("model", "method", "train")
ELSEWHERE = {
    "method.name": "give --method, or compare methods with `fedcoe compare`",
    "train.rounds": "set tune.rounds: trials are compared round by round",
    "train.seed": "a seed is no setting to choose by its figures",
}


@dataclass(frozen=True)
class Dimension:
    """One setting that is searched: whole or real numbers from `low` to `high`, or `choices`."""

    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None
    whole: bool = False


def search_space(
    settings: Settings, source: str = "params.yaml"
) -> tuple[dict[str, Dimension], list[str]]:
    """The dimensions of `tune.space`, and the keys left out because the method lacks them.

    Raises:
        FedCoEError: a key that is no setting, or a value that the setting does not take.
    """
    space: dict[str, Dimension] = {}
    dropped = []
    for key, searched in settings.tune.space.items():
        where = f"{source}: tune.space: {key}"
        section, _, name = key.partition(".")
        if section not in SECTIONS:
            raise FedCoEError(f"{where}: only keys of {', '.join(SECTIONS)} can be searched")
        if key in ELSEWHERE:
            raise FedCoEError(f"{where}: cannot be searched; {ELSEWHERE[key]}")
        fields = type(getattr(settings, section)).model_fields
        if name not in fields:
            if section == "method" and _some_method_has(name):
                dropped.append(key)
                continue
            raise FedCoEError(f"{where}: no such setting; there are: {', '.join(fields)}")
        kind = fields[name].annotation
        if not searched.choices and kind not in (int, float):
            raise FedCoEError(f"{where}: is no number; give {{choices: [...]}}")
        space[key] = _dimension(searched, whole=kind is int)
        dimension = space[key]
        if dimension.whole and (dimension.step or 1) % 1:
            raise FedCoEError(f"{where}: step = {dimension.step}: must be a whole number")
        for value in dimension.choices or (dimension.low, dimension.high):
            _check(settings, section, name, value, where)
    if not space:
        said = f" (method {settings.method.name} has none of {', '.join(dropped)})"
        raise FedCoEError(f"{source}: tune.space: nothing to search{said if dropped else ''}")
    return space, dropped


def _dimension(searched: Searched, whole: bool) -> Dimension:
    if searched.choices:
        return Dimension(searched.choices)
    assert searched.low is not None
    assert searched.high is not None
    return Dimension((), searched.low, searched.high, searched.log, searched.step, whole)


def _some_method_has(name: str) -> bool:
    return any(name in method_class(method).Settings.model_fields for method in method_names())


def _check(settings: Settings, section: str, name: str, value: Any, where: str) -> None:
    """Refuse a value its own field refuses; what does not fit together fails in its trial."""
    try:
        Settings.model_validate(_changed(settings, {f"{section}.{name}": value}))
    except ValidationError as error:
        for item in error.errors():
            if item["loc"] == (section, name):
                said = item["msg"].removeprefix("Value error, ")
                raise FedCoEError(f"{where} = {_shown(value)}: {said}") from None


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else repr(value)


def with_values(
    settings: Settings, values: Mapping[str, Any], source: str = "params.yaml"
) -> Settings:
    """The settings with other values for some `section.key`.

    Raises:
        FedCoEError: the values do not fit together.
    """
    changed = validate_settings(_changed(settings, values), source)
    return changed.model_copy(update={"tune": settings.tune})


def _changed(settings: Settings, values: Mapping[str, Any]) -> dict[str, Any]:
    changed: dict[str, Any] = settings.model_dump()
    for key, value in values.items():
        section, _, name = key.partition(".")
        changed[section][name] = value
    return changed


def overlay(settings: Settings, path: str | Path) -> dict[str, Any]:
    """What to set, as `section.key`, so that the file at `path` means these settings.

    `runtime` and `tune` are left as they are in the file.
    """
    found: dict[str, Any] = {}
    base = load_settings(path)
    if base.method.name != settings.method.name:
        found["method.name"] = settings.method.name
        base = load_settings(path, [f"method.name={settings.method.name}"])
    before, after = (s.model_dump(mode="json", exclude={"runtime"}) for s in (base, settings))
    for section, values in after.items():
        for name, value in values.items():
            if before[section][name] != value:
                found[f"{section}.{name}"] = value
    return found
