"""Tasks: write figures and models where DVC and people look for them.

Nothing written here holds a time, a speed, a path of the machine or a run id; cells of comparisons
alone say how long their training took. matplotlib comes with the first figure: what is stopped
before does not wait for it.
"""

import os
import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE

from fedcoe.bundle import export_models
from fedcoe.cold_start import NewClient, summary
from fedcoe.cold_start import rows as new_client_rows
from fedcoe.evaluate import Evaluation
from fedcoe.state import ServerState
from tasks.checkpoint import History, spent
from tasks.files import (
    evaluation_figures,
    write_cold_start,
    write_csv,
    write_evaluation,
    write_json,
)
from tasks.run import Run
from tasks.tracking import git_commit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PRIVACY = ("epsilon", "delta")
"""Names of a curve's columns that only runs with privacy have."""


def train_figures(history: History) -> dict[str, Any]:
    """`metrics/train.json`; with the updates left out by reason and the privacy spent, if any."""
    dropped = sum((Counter(row["dropped"]) for row in history.rounds), Counter[str]())
    spent = {name: history.curves[-1][name] for name in PRIVACY if name in history.curves[-1]}
    return {
        "rounds": len(history.rounds),
        "best_round": history.best_round,
        "images_trained": history.total("images"),
        "bytes_up": history.total("bytes_up"),
        "bytes_down": history.total("bytes_down"),
        **spent,
    } | ({"dropped": dict(dropped)} if dropped else {})


def run_figures(run: Run, history: History, evaluation: Evaluation) -> dict[str, "Figure"]:
    """The figures MLflow keeps, by name."""
    import pandas as pd

    from tasks import figures

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
def write_models(
    run: Run,
    state: ServerState,
    history: History,
    evaluation: Evaluation,
    new: Sequence[NewClient],
) -> Path:
    """Write `models/` and all its figures, in `metrics/` and `plots/`."""
    models = run.root / "models"
    export_models(models, run.method, state, run.personal)
    write_json(run.root / "metrics" / "train.json", train_figures(history))
    write_csv(run.root / "plots" / "curves.csv", history.curves)
    # Stages of the pipeline write the same from models/; without it nothing else would.
    write_evaluation(run.root, run.method, run.data, evaluation)
    write_cold_start(run.root, run.data, new)
    return models


@task(name="write figures", cache_policy=NO_CACHE)
def write_figures(
    run: Run,
    path: Path,
    history: History,
    evaluation: Evaluation,
    new: Sequence[NewClient],
    reweighted: tuple[Evaluation, Sequence[NewClient]] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write everything measured in a run into one JSON file: a cell of a comparison.

    A record, so unlike all else here it says how long it took and on what machine.

    Args:
        reweighted: the same models' figures when predictions are reweighted by label prior.
        notes: what else the file is to say.
    """
    values = {
        "train": train_figures(history),
        **_scored(run, evaluation, new),
        "curves": history.curves,
        "has_global": run.method.has_global,
        "settings": run.settings.model_dump(mode="json", exclude={"runtime": {"workers"}}),
        "dataset": run.data.dataset.info.name,
        "data_hash": run.data.dataset.info.hash,
        "partition_fingerprint": run.data.partition.fingerprint,
        "commit": git_commit(run.root),
        "code": run.code,
        "timing": {"train_seconds": sum(spent(run)), **_machine(run)},
    }
    if reweighted:
        values["reweighted"] = _scored(run, *reweighted)
    values |= notes or {}
    write_json(path, values)
    return values


def _scored(run: Run, evaluation: Evaluation, new: Sequence[NewClient]) -> dict[str, Any]:
    from tasks import figures

    told = ["client", "samples", "accuracy_global", "accuracy"]
    if run.method.has_gate:
        told += [f"{what}_{m}" for what in figures.POOL for m in range(run.method.experts)]
    served = new_client_rows(new, run.data)
    return {
        "evaluate": evaluation_figures(run.settings, evaluation),
        "cold_start": summary(new),
        "clients": [{name: row[name] for name in told} for row in evaluation.clients],
        "new_clients": [
            {name: value for name, value in row.items() if not name.startswith("correlation_")}
            for row in served
        ],
    }


def _machine(run: Run) -> dict[str, Any]:
    cpu = Path("/proc/cpuinfo")
    _, dtype, *kinds = run.computed
    names = re.findall(r"model name\s*: (.*)", cpu.read_text()) if cpu.exists() else []
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "gpu": None if kinds == ["cpu"] else ", ".join(kinds),
        "cores": os.cpu_count(),
        "workers": run.engine.workers,
        "torch": torch.__version__,
        "dtype": dtype,
    }
