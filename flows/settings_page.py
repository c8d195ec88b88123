"""docs/settings.md from the settings models: `python -m flows.settings_page > docs/settings.md`."""

import typing
from typing import Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedcoe.config import Settings
from fedcoe.methods.settings import MethodSettings, method_class, method_names


def settings_page() -> str:
    """Every section of params.yaml, every key with its default, range and meaning."""
    parts = [
        "# Settings\n\n"
        "Every key of `params.yaml`. Unknown keys and impossible values are refused in one line; "
        "keys that only another method has may stay in the section `method` and change nothing.\n"
        "`fedcoe train -S section.key=value` changes one for a run, and so does `dvc exp run -S`, "
        "which wants `-S +section.key=value` for a key that is not in the file.\n"
        "*Default*: what holds where the file has no such key; the committed one sets some "
        "otherwise.\n"
        "\nThis page is made by `python -m flows.settings_page > docs/settings.md`.\n"
    ]
    for section, field in Settings.model_fields.items():
        model: Any = field.annotation
        if section == "method":
            parts.append(_table("method", MethodSettings, "Every method takes these."))
            for name in method_names():
                own = method_class(name).Settings
                parts.append(_table(f"method, name: {name}", own, "", set(_shared(own))))
        else:
            parts.append(_table(section, model, ""))
    return "\n".join(parts)


def _shared(own: type[BaseModel]) -> list[str]:
    """Keys a method takes over unchanged."""
    return [
        name
        for name, field in MethodSettings.model_fields.items()
        if field.default == own.model_fields[name].default or name == "name"
    ]


def _table(
    title: str,
    model: type[BaseModel],
    intro: str,
    left_out: set[str] = frozenset(),  # type: ignore[assignment]
) -> str:
    rows = [
        f"| `{name}` | {_default(field)} | {_allowed(field)} | {field.description or ''} |"
        for name, field in model.model_fields.items()
        if name not in left_out
    ]
    if not rows:
        return f"## {title}\n\nNo settings of its own.\n"
    head = "| key | default | allowed | meaning |\n|---|---|---|---|\n"
    return f"## {title}\n\n" + (f"{intro}\n\n" if intro else "") + head + "\n".join(rows) + "\n"


def _default(field: FieldInfo) -> str:
    return (
        "required" if field.is_required() else f"`{field.get_default(call_default_factory=True)}`"
    )


def _allowed(field: FieldInfo) -> str:
    values = typing.get_args(field.annotation)
    if values and typing.get_origin(field.annotation) is typing.Literal:
        return ", ".join(f"`{value}`" for value in values)
    signs = {Ge: "≥", Gt: ">", Le: "≤", Lt: "<"}
    bounds = [
        f"{sign} {getattr(rule, kind.__name__.lower()):g}"
        for rule in field.metadata
        for kind, sign in signs.items()
        if isinstance(rule, kind)
    ]
    return ", ".join(bounds) or getattr(field.annotation, "__name__", str(field.annotation))


if __name__ == "__main__":
    print(settings_page(), end="")
