"""A small federation that every test may use: 8x8 images, 4 classes, 6 seen and 2 new clients."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcoe.cold_start import serve_clients, summary
from fedcoe.config import PartitionSettings, Settings, validate_settings
from fedcoe.data.dataset import Dataset, RawDataset, load_dataset, write_dataset
from fedcoe.data.partition import Partition, load_partition, make_partition, save_partition
from fedcoe.engine.clients import ClientData
from fedcoe.engine.pool import ClientSide, Engine, Site
from fedcoe.engine.trainer import Build
from fedcoe.evaluate import Evaluation, evaluate, score_clients, score_global
from fedcoe.methods.base import Federation, Method
from fedcoe.methods.settings import method_class
from fedcoe.models import build_expert
from fedcoe.rounds import (
    evaluation_due,
    finetune,
    gate_clients,
    train_round,
    update_gate,
)
from fedcoe.state import ServerState

PARTITION = {"clients": 8, "new_clients": 0.25, "alpha": 0.5, "min_samples": 10}
BASE: dict[str, dict[str, Any]] = {
    "partition": PARTITION,
    "model": {"name": "gn_cnn"},
    "method": {"name": "fedcoe", "experts": 2, "gate_features": 8},
    "train": {"rounds": 4, "batch_size": 16, "lr": 0.05, "lr_schedule": "constant"},
    "evaluate": {"every": 2, "batch_size": 64},
    "cold_start": {"em_steps": 5, "few_shot_epochs": 1},
    "runtime": {"workers": 1, "precision": "fp32"},
}


@dataclass(frozen=True)
class World:
    """A dataset and its partition, on disk and opened."""

    folder: Path
    dataset: Dataset
    partition: Partition

    @property
    def data(self) -> ClientData:
        return ClientData(self.dataset, self.partition)


def raw_dataset(train: int = 320, test: int = 48, classes: int = 4) -> RawDataset:
    """Noisy copies of one random 8x8 pattern a class."""
    rng = np.random.default_rng(5)
    patterns = rng.integers(0, 256, (classes, 8, 8, 1))

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.permutation(np.arange(count) % classes)
        noise = rng.integers(-60, 61, (count, 8, 8, 1))
        return np.clip(patterns[labels] + noise, 0, 255).astype(np.uint8), labels

    x_train, y_train = draw(train)
    x_test, y_test = draw(test)
    names = tuple("abcdefgh"[:classes])
    return RawDataset(x_train, y_train, x_test, y_test, names, "synthetic", "CC0")


def build_world(folder: Path, raw: RawDataset, partition: Partition | None = None) -> World:
    write_dataset(folder / "data", "synthetic", raw)
    settings = PartitionSettings(**PARTITION)
    if partition is None:
        partition = make_partition(settings, raw.y_train, len(raw.y_test), len(raw.classes))
    save_partition(partition, settings, raw.y_train, raw.classes, folder / "partitions")
    return World(folder, load_dataset(folder / "data"), load_partition(folder / "partitions"))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"), raw_dataset())


@pytest.fixture(scope="session")
def make_world(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., World]:
    """make_world(change, partition): the world with its RawDataset changed."""

    def make(change: Callable[[RawDataset], RawDataset], partition: Partition) -> World:
        return build_world(tmp_path_factory.mktemp("other"), change(raw_dataset()), partition)

    return make


def settings_of(sections: Mapping[str, Mapping[str, Any]]) -> Settings:
    merged = {
        name: BASE.get(name, {}) | dict(sections.get(name, {})) for name in {**BASE, **sections}
    }
    return validate_settings(merged, "test")


@pytest.fixture(scope="session")
def make_federation(world: World) -> Callable[..., Federation]:
    """make_federation(method={...}, train={...}, ...): settings over those of BASE."""

    def make(**sections: Mapping[str, Any]) -> Federation:
        return Federation.of(settings_of(sections), world.data)

    return make


@pytest.fixture(scope="session")
def federation(make_federation: Callable[..., Federation]) -> Federation:
    return make_federation()


@pytest.fixture(scope="session")
def make_method(make_federation: Callable[..., Federation]) -> Callable[..., Method]:
    """make_method(train={...}, **method): a method with these settings."""

    def make(
        train: Mapping[str, Any] | None = None,
        evaluate: Mapping[str, Any] | None = None,
        **method: Any,
    ) -> Method:
        found = make_federation(train=train or {}, evaluate=evaluate or {}, method=method)
        made: Method = method_class(found.settings.method.name)(found)
        return made

    return make


@pytest.fixture
def make_engine(world: World, tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    """make_engine(workers=1, world=...): an engine with personal experts of its own."""
    with ExitStack() as stack:
        made: list[Engine] = []

        def make(workers: int = 1, world: World = world, build: Build = build_expert) -> Engine:
            personal = tmp_path / f"personal-{len(made)}"
            folder = world.folder
            site = Site(folder / "data", folder / "partitions", personal, "gn_cnn", build=build)
            made.append(stack.enter_context(Engine(site, workers)))
            return made[-1]

        yield make


@pytest.fixture
def engine(make_engine: Callable[..., Engine]) -> Engine:
    return make_engine()


@pytest.fixture
def side(engine: Engine) -> ClientSide:
    """What the engine's one worker sees."""
    found: ClientSide = engine.run(lambda side: side)
    return found


@pytest.fixture(scope="session")
def train() -> Callable[..., ServerState]:
    """train(engine, method, rounds): the state after some rounds with their gate updates."""

    def run(
        engine: Engine, method: Method, rounds: int, state: ServerState | None = None
    ) -> ServerState:
        state = state or method.init()
        for _ in range(rounds):
            before = state
            state, _ = train_round(engine, method, state)
            if members := gate_clients(method, state.round):
                state = update_gate(engine, method, state, members, before)
            if evaluation_due(method, state):
                state, _ = finetune(engine, method, state)
        return state

    return run


@dataclass(frozen=True)
class Outcome:
    state: ServerState
    evaluation: Evaluation
    cold_start: dict[str, dict[str, float]]


@pytest.fixture
def on_engine(world, tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    """on_engine(method, vectorized=False, device="cpu"): one process, the real model's build."""
    with ExitStack() as stack:
        made: list[Engine] = []

        def make(method: Method, vectorized: bool = False, device: str = "cpu") -> Engine:
            site = Site(
                world.folder / "data",
                world.folder / "partitions",
                tmp_path / f"own-{len(made)}",
                method.federation.settings.model.name,
                vectorized=vectorized,
                devices=(device,),
                build=method.build,
            )
            made.append(stack.enter_context(Engine(site, 1)))
            return made[-1]

        yield make


@pytest.fixture
def one_round(on_engine, train) -> Callable[..., ServerState]:
    """one_round(method, vectorized=False): the state after it, the gate updated."""

    def run(method: Method, vectorized: bool = False) -> ServerState:
        return train(on_engine(method, vectorized), method, 1)

    return run


@pytest.fixture
def two_rounds(world, train, on_engine) -> Callable[..., Outcome]:
    """two_rounds(method, vectorized=False, device="cpu"): train, evaluate and serve new clients."""

    def run(method: Method, vectorized: bool = False, device: str = "cpu") -> Outcome:
        engine = on_engine(method, vectorized, device)
        state = train(engine, method, 2)
        clients = engine.run(score_clients, method, state, range(6))
        overall = engine.run(score_global, method, state, np.arange(48))
        labels = np.asarray(world.dataset.y_test)
        state, evaluation = evaluate(method, state, clients, overall, labels)
        served = engine.run(serve_clients, method, state, [6, 7])
        return Outcome(state, evaluation, summary(served))

    return run
