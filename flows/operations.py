"""The flows a team runs on the work pool: one training, and the one of every night.

Their parameters are forms in Prefect's UI, made from the settings models: an empty field is what
params.yaml says, a filled one wins over it, a value out of range is refused before a run starts.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from pydantic import BaseModel, ConfigDict, Field, create_model

from fedcoe.config import (
    ColdStartSettings,
    EvaluateSettings,
    FaultSettings,
    ModelSettings,
    PartitionSettings,
    PrivacySettings,
    RuntimeSettings,
    TrainSettings,
    load_settings,
)
from fedcoe.methods.settings import MethodSettings, method_class, method_names
from flows.federated_training import federated_training
from flows.pipeline import check_dataset, check_method, partition_data
from flows.release import release as release_candidate
from tasks.data_version import fetch_data
from tasks.locks import reading_data
from tasks.registry import use_default_stores
from tasks.report import build_report
from tasks.tracking import version_of
from tasks.workspace import workspace


def _optional(section: type[BaseModel]) -> Any:
    """The section with the same descriptions and ranges, every field empty."""
    fields: dict[str, Any] = {
        name: (field.rebuild_annotation() | None, Field(None, description=field.description))
        for name, field in section.model_fields.items()
        if not (name == "name" and issubclass(section, MethodSettings))
    }
    name = section.__name__.removesuffix("Settings")
    return create_model(name, __config__=ConfigDict(extra="forbid"), **fields)


if TYPE_CHECKING:
    Partition: TypeAlias = BaseModel
    Model: TypeAlias = BaseModel
    Train: TypeAlias = BaseModel
    Evaluate: TypeAlias = BaseModel
    ColdStart: TypeAlias = BaseModel
    Runtime: TypeAlias = BaseModel
    FedCoE: TypeAlias = BaseModel
    Faults: TypeAlias = BaseModel
    Privacy: TypeAlias = BaseModel
else:
    Partition = _optional(PartitionSettings)
    Model = _optional(ModelSettings)
    Train = _optional(TrainSettings)
    Evaluate = _optional(EvaluateSettings)
    ColdStart = _optional(ColdStartSettings)
    Runtime = _optional(RuntimeSettings)
    FedCoE = _optional(method_class("fedcoe").Settings)
    Faults = _optional(FaultSettings)
    Privacy = _optional(PrivacySettings)

Method = Annotated[str | None, Field(json_schema_extra={"enum": [*method_names(), None]})]


def _name() -> str:
    return f"train · {flow_run.parameters.get('method') or 'params.yaml'}"


@flow(name="train", flow_run_name=_name)
def train(
    root: str = ".",
    method: Method = None,
    fedcoe: FedCoE | None = None,
    train: Train | None = None,
    partition: Partition | None = None,
    model: Model | None = None,
    evaluate: Evaluate | None = None,
    cold_start: ColdStart | None = None,
    runtime: Runtime | None = None,
    privacy: Privacy | None = None,
    faults: Faults | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, float]:
    """Train as params.yaml says, but for what is filled in here, in a folder of its own.

    Args:
        root: folder of params.yaml and data/.
        method: what to train; empty: what params.yaml names.
        fedcoe: experts, gate and the like, where the method is fedcoe.
        train: rounds, learning rate and the like.
        partition: how the data is dealt to clients.
        model: architecture of the experts.
        evaluate: how often to evaluate.
        cold_start: how new clients are served.
        runtime: workers and precision.
        privacy: differential privacy; epsilon 0 is none.
        faults: simulated faults and attacks of clients.
        overrides: any setting as section.key=value, e.g. method.mu=0.1 of another method; see
            docs/settings.md. They win over the fields above.

    Returns:
        The headline figures: accuracies in [0, 1] by name.
    """
    sections: dict[str, BaseModel | None] = {
        "method": fedcoe,
        "train": train,
        "partition": partition,
        "model": model,
        "evaluate": evaluate,
        "cold_start": cold_start,
        "runtime": runtime,
        "privacy": privacy,
        "faults": faults,
    }
    filled = [
        f"{name}.{key}={json.dumps(value)}"
        for name, section in sections.items()
        if section is not None
        for key, value in section.model_dump(mode="json", exclude_none=True).items()
    ]
    named = [f"method.name={method}"] if method else []
    return _train(Path(root), [*named, *filled, *overrides], release=False)


@flow(name="nightly", flow_run_name="nightly")
def nightly(
    root: str = ".", overrides: Sequence[str] = (), fetch: bool = True, release: bool = True
) -> dict[str, float]:
    """Fetch the data that data.dvc names, train, and release what was trained.

    Args:
        root: folder of params.yaml and data/.
        overrides: settings that win over params.yaml, as section.key=value.
        fetch: bring the data here with DVC first.
        release: put the new version beside the champion, and promote it if it is better.

    Returns:
        The headline figures: accuracies in [0, 1] by name.
    """
    if fetch:
        fetch_data(Path(root).resolve())
    return _train(Path(root), overrides, release)


def _train(root: Path, overrides: Sequence[str], release: bool) -> dict[str, float]:
    with reading_data(root):
        notes = check_dataset(root, overrides)
    for note in (*notes, *check_method(root, overrides)):
        get_run_logger().warning(note)
    use_default_stores(root)
    settings = load_settings(root / "params.yaml", overrides)
    with workspace(root, settings) as folder:
        deal(folder)
        tags = {"flow_run": str(flow_run.id)}
        figures: Mapping[str, float] = federated_training(str(folder), tags=tags)
        report(folder)
        if release:
            version = version_of(tags)
            if version is None:
                get_run_logger().warning(
                    "what was trained is not registered yet, so nothing is released; "
                    "`fedcoe sync` sends it, `fedcoe release` judges it"
                )
            else:
                release_candidate(str(folder), version)
    return dict(figures)


@task(name="partition", cache_policy=NO_CACHE)
def deal(folder: Path) -> list[str]:
    """Deal the data to clients."""
    return partition_data(folder)


@task(name="report", cache_policy=NO_CACHE)
def report(folder: Path) -> Path:
    """Draw the page that says what the training did."""
    return build_report(folder)
