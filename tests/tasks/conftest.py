"""A small but realistic finished run, written to disk as the pipeline leaves it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedcoe.config import PartitionSettings, validate_settings
from fedcoe.data.partition import make_partition, save_partition

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RunWriter = Callable[..., Path]


def clients_table(
    clients: int = 16, experts: int = 4, names: Sequence[str] = (), seed: int = 0
) -> pd.DataFrame:
    """plots/clients.csv of clients that each lean to one expert."""
    rng = np.random.default_rng(seed)
    home = np.arange(clients) % experts
    correlation = rng.dirichlet(np.full(experts, 0.4), clients)
    correlation[np.arange(clients), home] += 1.5
    correlation /= correlation.sum(axis=1, keepdims=True)
    accuracy = np.clip(0.3 + 0.55 * correlation + rng.normal(0, 0.04, correlation.shape), 0, 1)
    pooled = np.clip(accuracy.max(axis=1) + rng.normal(0.04, 0.03, clients), 0, 1)
    return pd.DataFrame(
        {
            "client": [*names, *(f"client-{k:03d}" for k in range(len(names), clients))][:clients],
            "kind": "seen",
            "samples": rng.integers(20, 400, clients),
            "test_samples": 50,
            "feature_group": "",
            "accuracy_global": pooled,
            "accuracy": np.clip(pooled + rng.normal(0.08, 0.04, clients), 0, 1),
        }
        | {f"correlation_{m}": correlation[:, m] for m in range(experts)}
        | {f"expert_accuracy_{m}": accuracy[:, m] for m in range(experts)}
    )


def curves_table(rounds: int = 30, lift: float = 0.0) -> pd.DataFrame:
    """plots/curves.csv: losses every round, accuracies every fifth."""
    every = np.arange(1, rounds + 1)
    rise = 1 - np.exp(-every / 9)
    table = pd.DataFrame(
        {
            "round": every,
            "global_accuracy": (0.68 + lift) * rise,
            "personalized_accuracy": 0.5 + (0.42 + lift / 2) * rise,
            "cold_none": (0.66 + lift) * rise,
            "cold_unlabelled": 0.2 + (0.62 + lift) * rise,
            "cold_labels": 0.4 + (0.48 + lift) * rise,
            "train_loss": 2.3 * np.exp(-every / 12),
        }
    )
    unevaluated = (every % 5 != 0) & (every != rounds)
    table.loc[unevaluated, table.columns[1:6]] = np.nan
    return table


def _evaluated(method: str, accuracy: float) -> dict[str, Any]:
    own = {"accuracy": accuracy + 0.2, "mean": accuracy + 0.18, "std": 0.06}
    return {
        "method": method,
        "seed": 0,
        "global": {"accuracy": accuracy, "nll": 0.91, "ece": 0.034},
        "personalized": own | {"worst10": accuracy + 0.02, "nll": 0.42},
    }


def _cold(base: float) -> dict[str, Any]:
    modes = {"none": base, "unlabelled": base + 0.11, "labels": base + 0.16, "few_shot": base + 0.2}
    return {
        mode: {"accuracy": a, "mean": a - 0.01, "worst10": a - 0.2, "nll": 1.2 - a}
        for mode, a in modes.items()
    }


def write_run(
    root: Path,
    *,
    clients: int = 10,
    experts: int = 4,
    baseline: bool = True,
    names: Sequence[str] = (),
    classes: Sequence[str] = CLASSES,
) -> Path:
    """Write every input of the report under `root`; a fifth of the clients are new."""
    rng = np.random.default_rng(1)
    for folder in ("data", "metrics", "plots"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    new = max(1, clients // 5)
    seen = clients - new
    everyone = [*names, *(f"client-{k:03d}" for k in range(len(names), clients))]

    def write(path: str, values: Any) -> None:
        (root / path).write_text(json.dumps(values))

    trained = validate_settings({"partition": {"clients": clients}}, "test")
    (root / "models").mkdir(exist_ok=True)
    write("models/state.json", {"settings": trained.model_dump(mode="json", exclude={"runtime"})})
    about = {"name": "mnist5k", "train": 4000, "test": 1000, "shape": [28, 28, 1]}
    write("data/dataset.json", about | {"classes": list(classes), "hash": "9d" * 32})
    # The real partitioner writes the manifest, so that a change of its form is noticed here.
    settings = PartitionSettings(clients=clients, new_clients=new / clients, alpha=0.3)
    labels = rng.permutation(np.arange(200 * clients) % len(classes))
    partition = replace(
        make_partition(settings, labels, 1000, len(classes)),
        names=tuple(everyone),
        warnings=("dirichlet: 3 redraws until every client had 10 samples",),
    )
    save_partition(partition, settings, labels, classes, root / "partitions")
    train = {"rounds": 30, "best_round": 25, "images_trained": 86_400}
    write("metrics/train.json", train | {"bytes_up": 412_300_000, "bytes_down": 389_100_000})
    print_ = {"footing": "the same"}
    ours = _evaluated("fedcoe" if experts > 1 else "fedavg", 0.712)
    write("metrics/evaluate.json", ours | print_)
    write("metrics/cold_start.json", _cold(0.69))
    curves_table(lift=0.05).to_csv(root / "plots/curves.csv", index=False)
    if baseline:
        plain = train | {"bytes_up": 180_000_000, "bytes_down": 180_000_000}
        averaged = {"train": plain, "evaluate": _evaluated("fedavg", 0.664)} | print_
        write("metrics/baseline.json", {"baseline": averaged | {"cold_start": _cold(0.66)}})
        curves_table().to_csv(root / "plots/baseline_curves.csv", index=False)
    clients_table(seen, experts, everyone[:seen]).to_csv(root / "plots/clients.csv", index=False)
    joined = clients_table(new, experts, everyone[seen:], seed=2)
    kept = joined[["client", "samples", "test_samples", "feature_group"]].assign(
        none=joined["accuracy_global"],
        unlabelled=joined["accuracy_global"] + 0.02,
        labels=joined["accuracy"],
        few_shot=np.nan,
    )
    correlations = joined.filter(like="correlation_")
    kept.join(correlations).to_csv(root / "plots/new_clients.csv", index=False)
    by_class = rng.uniform(0.1, 0.95, (experts, len(classes)))
    table = pd.DataFrame(
        {
            "expert": range(experts),
            "load": rng.dirichlet(np.full(experts, 20)),
            "clients": np.bincount(np.arange(seen) % experts, minlength=experts),
            "accuracy": by_class.mean(axis=1),
        }
        | {f"accuracy_class_{name}": by_class[:, c] for c, name in enumerate(classes)}
    )
    table.to_csv(root / "plots/experts.csv", index=False)
    return root


@pytest.fixture
def make_run(tmp_path: Path) -> RunWriter:
    """`make_run(**options)` writes a run (see `write_run`) and returns its folder."""
    return lambda **options: write_run(tmp_path / "run", **options)
