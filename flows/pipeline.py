"""The stages of dvc.yaml but training, which is a Prefect flow. They read and write files."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedcoe.bundle import load_bundle
from fedcoe.cold_start import serve_clients
from fedcoe.config import load_settings
from fedcoe.data.dataset import load_dataset
from fedcoe.data.partition import load_partition, make_partition, save_partition
from fedcoe.data.sources import sources
from fedcoe.engine.clients import ClientData
from fedcoe.engine.devices import hardware
from fedcoe.engine.pool import Engine, Site
from fedcoe.errors import FedCoEError
from fedcoe.evaluate import evaluate, join_scores, score_clients, score_global
from fedcoe.methods.base import Method
from fedcoe.methods.settings import SWITCHES
from fedcoe.state import ServerState
from tasks.files import footing, write_cold_start, write_csv, write_evaluation, write_json
from tasks.run import code_hash


def check_method(root: Path, given: Sequence[str], profile: Sequence[str] = ()) -> list[str]:
    """What somebody should know who gives settings of a method on the command line.

    Args:
        given: the command's overrides.
        profile: those of its profile.

    Raises:
        FedCoEError: one is of another method, so it would change nothing.
    """
    method = load_settings(root / "params.yaml", [*profile, *given]).method
    keys = [g.partition("=")[0].strip() for g in given]
    named = [key.removeprefix("method.") for key in keys if key.startswith("method.")]
    for name in named:
        if name not in type(method).model_fields:
            raise FedCoEError(
                f"-S method.{name}: {method.name} has no such setting; "
                "say -S method.name=... for the method that has it"
            )
    if "name" not in named:
        return []
    own = type(method)(name=method.name)
    kept = [
        f"{name}={getattr(method, name)}"
        for name in SWITCHES
        if name not in named and getattr(method, name) != getattr(own, name)
    ]
    if not kept:
        return []
    return [
        f"{method.name} takes {', '.join(kept)} from params.yaml, where its own defaults are others"
    ]


def check_dataset(root: Path, overrides: Sequence[str]) -> list[str]:
    """Refuse overrides that name another dataset than data/ holds: it would be trained on.

    Returns:
        A note where params.yaml names another one: what lies there is trained on.

    Raises:
        FedCoEError: overrides do.
    """
    if not (root / "data").is_dir():
        return []
    asked = load_settings(root / "params.yaml", overrides).data.name
    found = load_dataset(root / "data").info.name
    if asked == found:
        return []
    if any(given.startswith("data.name=") for given in overrides):
        raise FedCoEError(
            f"data/ holds {found}, not {asked}; run `fedcoe fetch {asked}`, or say "
            f"`data.name={found}` to train on what is there"
        )
    if found not in sources():
        return []  # data of one's own, put there on purpose
    return [f"data/ holds {found}, which is trained on; params.yaml names {asked}"]


def partition_data(
    root: Path, overrides: Sequence[str] = (), folder: str = "partitions"
) -> list[str]:
    """Stage `partition`: deal the training data to clients. Returns warnings."""
    settings = load_settings(root / "params.yaml", overrides).partition
    dataset = load_dataset(root / "data")
    partition = make_partition(
        settings,
        dataset.y_train,
        len(dataset.y_test),
        len(dataset.info.classes),
        dataset.client_train,
        dataset.info.clients,
    )
    save_partition(partition, settings, dataset.y_train, dataset.info.classes, root / folder)
    return list(partition.warnings)


def partition_once(root: Path, overrides: Sequence[str]) -> tuple[str, list[str]]:
    """Deal the data in a folder named by what decides it, code included, unless that was done.

    Whole or not at all: others may be dealing the same.

    Returns:
        The folder, under the root, and warnings if it was made now.
    """
    part = load_settings(root / "params.yaml", overrides).fingerprint("partition")
    name = (
        f".fedcoe/partitions/{part}-{load_dataset(root / 'data').info.hash[:8]}-{code_hash()[:8]}"
    )
    if (root / name).exists():
        return name, []
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=(root / name).parent) as scratch:
        made = Path(scratch).resolve() / "partitions"
        warnings = partition_data(root, overrides, str(made))
        with suppress(OSError):  # whoever came first has dealt the same
            made.rename(root / name)
    return name, warnings


BASELINE = ".fedcoe/baseline.json"
"""Where stage `baseline` has all its figures written, under the root."""


def baseline_method(root: Path) -> dict[str, Any]:
    """What stage `baseline` trains: FedAvg with the switches that params.yaml has for its method,
    so that the report's differences are not theirs."""
    method = load_settings(root / "params.yaml").method
    switches = {name: getattr(method, name) for name in (*SWITCHES, "ridge")}
    return {"name": "fedavg", **switches}


def write_baseline(root: Path) -> None:
    """Stage `baseline`, after training: metrics/baseline.json and plots/baseline_curves.csv."""
    figures = json.loads((root / BASELINE).read_text())
    kept = {name: figures[name] for name in ("train", "evaluate", "cold_start")}
    prints = (figures[name] for name in ("settings", "data_hash", "partition_fingerprint"))
    kept["footing"] = footing(*prints)
    # Under a name of its own: `dvc exp show` has no room for that of the file.
    write_json(root / "metrics" / "baseline.json", {"baseline": kept})
    write_csv(root / "plots" / "baseline_curves.csv", figures["curves"])


@contextmanager
def open_models(root: Path) -> Iterator[tuple[Method, ServerState, ClientData, Engine]]:
    """The models on disk, evaluated and served as params.yaml says, their data, and workers."""
    settings = load_settings(root / "params.yaml")
    bundle = load_bundle(root / "models")
    trained = bundle.method.federation
    asked = {name: getattr(settings, name) for name in ("evaluate", "cold_start")}
    told = replace(trained, settings=trained.settings.model_copy(update=asked))
    method: Method = type(bundle.method)(told)
    data = ClientData(load_dataset(root / "data"), load_partition(root / "partitions"))
    vectorized, devices = hardware(settings.runtime)
    site = Site(
        root / "data",
        root / "partitions",
        root / "models" / "personal",
        trained.settings.model.name,
        settings.runtime.precision,
        exported=True,
        vectorized=vectorized,
        devices=devices,
        build=method.build,
    )
    with Engine(site, settings.runtime.workers) as engine:
        yield method, bundle.state, data, engine


def evaluate_models(root: Path) -> None:
    """Stage `evaluate`: score models/ on all seen clients and the official test set.

    Scores the files a person would deploy, not what training had in memory.
    """
    with open_models(root) as (method, state, data, engine):
        counts = [int(n) for n in method.federation.train_counts]
        shards = engine.shards(range(len(counts)), counts)
        labels = np.asarray(data.dataset.y_test)
        rows = np.array_split(np.arange(len(labels)), min(engine.workers, len(labels)))
        scored = engine.map(score_clients, method, state, over=shards)
        overall = join_scores(engine.map(score_global, method, state, over=rows))
        clients = [client for shard in scored for client in shard]
        _, evaluation = evaluate(method, state, clients, overall, labels)
    write_evaluation(root, method, data, evaluation)


def evaluate_cold_start(root: Path) -> None:
    """Stage `cold_start`: serve the new clients from models/."""
    with open_models(root) as (method, state, data, engine):
        partition = data.partition
        new = range(partition.seen, partition.clients)
        samples = np.bincount(partition.client, minlength=partition.clients)
        shards = engine.shards(new, [int(samples[k]) for k in new])
        served = engine.map(serve_clients, method, state, over=shards)
    write_cold_start(root, data, [client for shard in served for client in shard])
