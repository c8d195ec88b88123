"""What benchmarks share: a federation without pipeline or tracking, and how results are kept."""

import json
import os
import platform
import resource
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedcoe.config import Settings, validate_settings
from fedcoe.data.dataset import load_dataset
from fedcoe.data.partition import Partition, make_partition, save_partition
from fedcoe.engine.clients import ClientData
from fedcoe.engine.devices import hardware
from fedcoe.engine.pool import Engine, Site
from fedcoe.engine.trainer import native_bf16
from fedcoe.methods.base import Federation, Method
from fedcoe.methods.settings import method_class

RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Ground:
    """A federation ready to run rounds on."""

    settings: Settings
    data: ClientData
    method: Method
    engine: Engine


@contextmanager
def ground(
    data: Path, values: Mapping[str, Any], partition: Partition | None = None
) -> Iterator[Ground]:
    """Open a dataset, deal it out in a temporary folder, start the workers."""
    settings = validate_settings(values, "benchmark")
    dataset = load_dataset(data)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if partition is None:
            partition = make_partition(
                settings.partition, dataset.y_train, len(dataset.y_test), len(dataset.info.classes)
            )
        save_partition(
            partition,
            settings.partition,
            dataset.y_train,
            dataset.info.classes,
            folder / "partitions",
        )
        clients = ClientData(dataset, partition)
        method = method_class(settings.method.name)(Federation.of(settings, clients))
        vectorized, devices = hardware(settings.runtime)
        site = Site(
            data,
            folder / "partitions",
            folder / "personal",
            settings.model.name,
            settings.runtime.precision,
            vectorized=vectorized,
            devices=devices,
            build=method.build,
        )
        with Engine(site, settings.runtime.workers) as engine:
            yield Ground(settings, clients, method, engine)


def iid(dataset_size: int, test_size: int, clients: int, seed: int = 0) -> Partition:
    """Equal clients, all samples for training: pfl-research's CIFAR-10 setup."""
    owner = np.empty(dataset_size, np.int32)
    order = np.random.default_rng(seed).permutation(dataset_size)
    owner[order] = np.arange(dataset_size) // (dataset_size // clients)
    return Partition(
        client=owner,
        split=np.zeros(dataset_size, np.int8),
        group=np.zeros(clients, np.int8),
        test_group=np.zeros(test_size, np.int8),
        seen=clients,
        new=0,
        skew="none",
        names=tuple(f"client-{k:04d}" for k in range(clients)),
    )


def machine() -> dict[str, Any]:
    """Hardware and versions a figure belongs to."""
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "native_bf16": native_bf16(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
    }


def keep(name: str, figures: Mapping[str, Any]) -> None:
    """Write benchmarks/results/<name>.json with the machine it was measured on."""
    RESULTS.mkdir(exist_ok=True)
    content = {"machine": machine()} | dict(figures)
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def resident_gib() -> float:
    """Peak resident memory of this process and its ended children, in GiB."""
    own, children = (
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return max(own, children) / 2**20
