"""The flow: methods x seeds on the same footing, and the table of what came out."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from prefect import flow
from prefect.artifacts import create_markdown_artifact

from fedcoe.config import fingerprint_of, load_settings
from fedcoe.data.dataset import load_dataset
from fedcoe.errors import FedCoEError
from fedcoe.methods.settings import method_class, method_names
from fedcoe.state import write_atomic
from flows.federated_training import federated_training
from flows.pipeline import partition_data
from tasks.results import write_csv

COLUMNS = {
    "global": ("evaluate", "global", "accuracy"),
    "personalized": ("evaluate", "personalized", "accuracy"),
    "worst tenth": ("evaluate", "personalized", "worst10"),
    "cold start, none": ("cold_start", "none", "accuracy"),
    "cold start, unlabelled": ("cold_start", "unlabelled", "accuracy"),
    "cold start, labels": ("cold_start", "labels", "accuracy"),
}


@flow(name="compare", validate_parameters=False)
def compare_methods(
    root: str = ".",
    overrides: Sequence[str] = (),
    methods: Sequence[str] = ("fedcoe", "fedavg"),
    seeds: Sequence[int] = (0, 1, 2),
    name: str | None = None,
) -> str:
    """Train every method with every seed and write `results/<name>/`.

    A seed decides partition, cohorts, initial weights and batch order, the same for all methods.
    A cell is one file; cells whose file says the same settings and data are not trained again.

    Returns:
        The table, in Markdown.
    """
    folder = Path(root)
    for method in methods:
        if method not in method_names():
            raise FedCoEError(f"no method {method!r}; there are: {', '.join(method_names())}")
    info = load_dataset(folder / "data").info
    results = Path("results") / (name or info.name)
    for seed in seeds:
        own = [*overrides, f"partition.seed={seed}", f"train.seed={seed}"]
        settings = load_settings(folder / "params.yaml", own)
        partitions = f".fedcoe/partitions/{settings.fingerprint('partition')}-{info.hash[:8]}"
        if not (folder / partitions).exists():
            partition_data(folder, own, partitions)
        for method in methods:
            file = results / "cells" / f"{method}-seed{seed}.json"
            used = settings.model_dump(mode="json", exclude={"runtime": {"workers"}})
            key = fingerprint_of([used, info.hash, method])
            if _key(folder / file) != key:
                federated_training(root, own, method, str(file), partitions)
                cell = json.loads((folder / file).read_text()) | {"key": key}
                text = json.dumps(cell, indent=1, sort_keys=True) + "\n"
                write_atomic(folder / file, text.encode())
    return _write_table(folder / results, methods, seeds)


def _key(path: Path) -> str | None:
    try:
        return str(json.loads(path.read_text()).get("key"))
    except (OSError, ValueError):
        return None


def _write_table(results: Path, methods: Sequence[str], seeds: Sequence[int]) -> str:
    rows, lines = [], []
    for method in methods:
        cells = [
            json.loads((results / "cells" / f"{method}-seed{seed}.json").read_text())
            for seed in seeds
        ]
        row: dict[str, Any] = {"method": method, "seeds": len(cells)}
        shown = [method]
        for column, path in COLUMNS.items():
            values = 100 * np.array([_at(cell, path) for cell in cells])
            if "personalized" not in path and not method_class(method).has_global:
                values = np.full(len(cells), np.nan)
            spread = values.std(ddof=1) if len(values) > 1 else float("nan")
            row |= {column: float(values.mean()), f"{column} std": float(spread)}
            found = f"{values.mean():.2f} ± {spread:.2f}"
            shown.append("-" if np.isnan(values.mean()) else found)
        rows.append(row)
        lines.append("| " + " | ".join(shown) + " |")
    head = f"| method | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}\n"
    table = head + "\n".join(lines) + "\n"
    write_csv(results / "table.csv", rows)
    write_atomic(results / "table.md", table.encode())
    create_markdown_artifact(key="comparison", markdown=table)
    return table


def _at(cell: Any, path: Sequence[str]) -> float:
    for name in path:
        cell = cell.get(name, {}) if isinstance(cell, dict) else {}
    return float(cell) if isinstance(cell, int | float) else float("nan")
