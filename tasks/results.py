"""Tasks: write figures and models where DVC and people look for them.

Nothing written here holds a time, a speed, a path of the machine or a run id.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from prefect import task
from prefect.cache_policies import NO_CACHE

from fedcoe.bundle import export_models
from fedcoe.cold_start import NewClient, summary
from fedcoe.config import Settings
from fedcoe.evaluate import Evaluation
from fedcoe.state import ServerState, write_atomic
from tasks import figures
from tasks.checkpoint import History
from tasks.run import Run


def write_json(path: Path, value: Any) -> None:
    """Sorted, indented, floats rounded to 6 digits, atomically."""
    text = json.dumps(_rounded(value), indent=2, sort_keys=True) + "\n"
    write_atomic(path, text.encode())


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line a row, columns in the order of the first row, floats rounded to 6 digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(_rounded(list(rows)))
    write_atomic(path, text.getvalue().encode())


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def train_figures(history: History) -> dict[str, Any]:
    """`metrics/train.json`."""
    return {
        "rounds": len(history.rounds),
        "best_round": history.best_round,
        "images_trained": history.total("images"),
        "bytes_up": history.total("bytes_up"),
        "bytes_down": history.total("bytes_down"),
    }


def evaluation_figures(settings: Settings, evaluation: Evaluation) -> dict[str, Any]:
    """`metrics/evaluate.json`."""
    return {
        "method": settings.method.name,
        "seed": settings.train.seed,
        "global": evaluation.overall,
        "personalized": evaluation.personalized,
        "validation": evaluation.validation,
    }


def run_figures(run: Run, history: History, evaluation: Evaluation) -> dict[str, Figure]:
    """The figures MLflow keeps, by name."""
    clients, info = pd.DataFrame(evaluation.clients), run.data.dataset.info
    counts = run.data.partition.label_counts(run.data.dataset.y_train, len(info.classes))
    return {
        "learning_curves": figures.learning_curves(
            pd.DataFrame(history.curves), method=run.settings.method.name
        ),
        "correlation": figures.correlation_heatmap(clients),
        "expert_client_accuracy": figures.expert_client_accuracy(clients),
        "clients_by_classes": figures.clients_by_classes(
            counts, info.classes, run.data.partition.seen
        ),
    }


@task(name="write results", cache_policy=NO_CACHE)
def write_models(run: Run, state: ServerState, history: History) -> Path:
    """Write `models/`, `metrics/train.json` and `plots/curves.csv`."""
    models = run.root / "models"
    export_models(models, run.method, state, run.personal)
    write_json(run.root / "metrics" / "train.json", train_figures(history))
    write_csv(run.root / "plots" / "curves.csv", history.curves)
    return models


@task(name="write figures", cache_policy=NO_CACHE)
def write_figures(
    run: Run, path: Path, history: History, evaluation: Evaluation, new: Sequence[NewClient]
) -> None:
    """Write everything measured in a run into one JSON file."""
    write_json(
        path,
        {
            "train": train_figures(history),
            "evaluate": evaluation_figures(run.settings, evaluation),
            "cold_start": summary(new),
            "clients": [row["accuracy"] for row in evaluation.clients],
            "curves": history.curves,
            "settings": run.settings.model_dump(mode="json", exclude={"runtime"}),
            "dataset": run.data.dataset.info.name,
            "data_hash": run.data.dataset.info.hash,
            "partition_fingerprint": run.data.partition.fingerprint,
        },
    )
