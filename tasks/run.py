"""What all tasks of one training run share: where things are, the method, the engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedcoe import __version__
from fedcoe.config import Settings, fingerprint_of
from fedcoe.data.dataset import load_dataset
from fedcoe.data.partition import load_partition
from fedcoe.engine.clients import ClientData
from fedcoe.engine.pool import Engine, Site, hardware
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

    @property
    def scratch(self) -> Path:
        """Checkpoints and personal experts of the run while it trains."""
        return self.root / ".fedcoe" / "runs" / f"{self.settings.method.name}-{self.key}"

    @property
    def personal(self) -> PersonalStore:
        return PersonalStore(self.scratch / "personal")


def run_key(settings: Settings, data: ClientData) -> str:
    """16 hex digits of everything the result depends on."""
    named = settings.model_copy(
        update={"runtime": settings.runtime.model_copy(update={"workers": 0})}
    )
    values = {
        "settings": named.fingerprint(),
        "data": data.dataset.info.hash,
        "partition": data.partition.fingerprint,
        "version": __version__,
    }
    return fingerprint_of(values)


@contextmanager
def open_run(settings: Settings, root: Path, partitions: Path) -> Iterator[Run]:
    """Open data and partitions and start the workers; they end with the context.

    Raises:
        FedCoEError: data or partitions are missing; says what to run.
    """
    data = ClientData(load_dataset(root / "data"), load_partition(partitions))
    method: Method = method_class(settings.method.name)(Federation.of(settings, data))
    key = run_key(settings, data)
    personal = root / ".fedcoe" / "runs" / f"{settings.method.name}-{key}" / "personal"
    vectorized, devices = hardware(settings.runtime.engine)
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
        yield Run(root, settings, data, method, engine, key)
