"""What all tasks of one training run share: where things are, the method, the engine."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fedcoe
from fedcoe import __version__
from fedcoe.config import Settings, fingerprint_of
from fedcoe.data.dataset import load_dataset
from fedcoe.data.partition import load_partition
from fedcoe.engine.clients import ClientData
from fedcoe.engine.devices import hardware
from fedcoe.engine.pool import Engine, Site
from fedcoe.engine.trainer import computes_in
from fedcoe.methods.base import Federation, Method
from fedcoe.methods.settings import method_class
from fedcoe.state import PersonalStore


@dataclass(frozen=True)
class Run:
    """A training run in progress. Paths are under `root`, the folder of params.yaml."""

    root: Path
    settings: Settings
    data: ClientData
    method: Method
    engine: Engine
    key: str
    """Names the run: equal keys mean equal results, byte for byte, on one machine."""
    code: str
    """Hash of the library's source when the run was opened. No part of the key, which names
    results, but a checkpoint of other code is not continued."""

    @property
    def scratch(self) -> Path:
        """Checkpoints and personal experts of the run while it trains."""
        return self.root / ".fedcoe" / "runs" / f"{self.settings.method.name}-{self.key}"

    @property
    def personal(self) -> PersonalStore:
        return PersonalStore(self.scratch / "personal")

    @property
    def origin(self) -> dict[str, Any]:
        """What a checkpoint of this run says it was made from."""
        named = _named(self.settings).model_dump(mode="json")
        prints = _fingerprints(self.data)
        return {"settings": named, **prints, "code": self.code, "computed": self.computed}

    @property
    def computed(self) -> list[str]:
        """What `auto` in `runtime` came to, the engine, what it computes in and on what, and the
        libraries that compute."""
        site = self.engine.site
        names = (d if d == "cpu" else torch.cuda.get_device_name(d) for d in site.devices)
        dtype = str(computes_in(site.precision, site.devices[0])).removeprefix("torch.")
        engine = "vectorized" if site.vectorized else "sequential"
        libraries = [f"torch {torch.__version__}", f"numpy {np.__version__}"]
        return [engine, dtype, *sorted(set(names)), *libraries]


def run_key(settings: Settings, data: ClientData) -> str:
    """16 hex digits of everything the result depends on."""
    return fingerprint_of({"settings": _named(settings).fingerprint(), **_fingerprints(data)})


def _named(settings: Settings) -> Settings:
    """Without what decides nothing: workers do where one trains many models at once."""
    if settings.runtime.engine == "vectorized":
        return settings
    runtime = settings.runtime.model_copy(update={"workers": 0})
    return settings.model_copy(update={"runtime": runtime})


def _fingerprints(data: ClientData) -> dict[str, str]:
    return {
        "data": data.dataset.info.hash,
        "partition": data.partition.fingerprint,
        "version": __version__,
    }


def code_hash() -> str:
    """sha256 over the names and bytes of the library's source files."""
    folder = Path(fedcoe.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


@contextmanager
def open_run(settings: Settings, root: Path, partitions: Path) -> Iterator[Run]:
    """Open data and partitions and start the workers; they end with the context.

    Raises:
        FedCoEError: data or partitions are missing; says what to run.
    """
    data = ClientData(load_dataset(root / "data"), load_partition(partitions))
    method: Method = method_class(settings.method.name)(Federation.of(settings, data))
    key, code = run_key(settings, data), code_hash()
    personal = root / ".fedcoe" / "runs" / f"{settings.method.name}-{key}" / "personal"
    vectorized, devices = hardware(settings.runtime)
    site = Site(
        root / "data",
        partitions,
        personal,
        settings.model.name,
        settings.runtime.precision,
        vectorized=vectorized,
        devices=devices,
        build=method.build,
    )
    with Engine(site, settings.runtime.workers) as engine:
        yield Run(root, settings, data, method, engine, key, code)
