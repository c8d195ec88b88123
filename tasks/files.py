"""Write figures where DVC and people look for them."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedcoe.cold_start import NewClient, rows, summary
from fedcoe.config import Settings, fingerprint_of
from fedcoe.durable import sweep, write_atomic
from fedcoe.engine.clients import ClientData
from fedcoe.evaluate import Evaluation
from fedcoe.methods.base import Method
from fedcoe.methods.settings import SWITCHES


def write_json(path: Path, value: Any) -> None:
    """Sorted, indented, floats rounded to 6 digits, atomically."""
    text = json.dumps(_rounded(value), indent=2, sort_keys=True) + "\n"
    sweep(path.parent, path.name)  # DVC hashes whole folders
    write_atomic(path, text.encode())


def write_csv(path: Path, table: Sequence[Mapping[str, Any]]) -> None:
    """One line a row, columns in the order of the first row, floats rounded to 6 digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]) if table else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(_rounded(list(table)))
    sweep(path.parent, path.name)
    write_atomic(path, text.getvalue().encode())


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def footing(settings: Mapping[str, Any], data: str, partition: str) -> str:
    """16 hex digits of what two methods' figures must share to stand beside each other.

    Args:
        settings: a dump of `Settings`.
        data: hash of the data.
        partition: its fingerprint.
    """
    named = ("model", "train", "evaluate", "cold_start", "faults", "privacy")
    shared = {name: settings.get(name) for name in named}
    switches = {name: settings["method"].get(name) for name in (*SWITCHES, "ridge")}
    # As files have them: one side comes out of one.
    return fingerprint_of(_rounded([shared, switches, data, partition]))


def write_evaluation(root: Path, method: Method, data: ClientData, evaluation: Evaluation) -> None:
    """Write `metrics/evaluate.json`, `plots/clients.csv` and `plots/experts.csv`."""
    settings = method.federation.settings
    prints = data.dataset.info.hash, data.partition.fingerprint
    shared = footing(settings.model_dump(mode="json"), *prints)
    figures = evaluation_figures(settings, evaluation) | {"footing": shared}
    write_json(root / "metrics" / "evaluate.json", figures)
    write_tables(root / "plots", evaluation)


def write_tables(folder: Path, evaluation: Evaluation) -> None:
    """Write `clients.csv` and `experts.csv`."""
    write_csv(folder / "clients.csv", evaluation.clients)
    write_csv(folder / "experts.csv", evaluation.experts)


def write_cold_start(root: Path, data: ClientData, clients: Sequence[NewClient]) -> None:
    """Write `metrics/cold_start.json` and `plots/new_clients.csv`."""
    write_json(root / "metrics" / "cold_start.json", summary(clients))
    write_csv(root / "plots" / "new_clients.csv", rows(clients, data))


def evaluation_figures(settings: Settings, evaluation: Evaluation) -> dict[str, Any]:
    """`metrics/evaluate.json`."""
    return {
        "method": settings.method.name,
        "seed": settings.train.seed,
        "global": evaluation.overall,
        "personalized": evaluation.personalized,
        "validation": evaluation.validation,
    }
