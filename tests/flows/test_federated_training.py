"""The training flow in process: its files, its tasks in Prefect, its failures, its determinism."""

import csv
import json
import logging
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedcoe.errors import FedCoEError

Training = Callable[..., dict[str, float]]
NewProject = Callable[..., Path]


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [n for item in value.values() for n in numbers(item)]
    return [value] if isinstance(value, float) else []


def test_metrics_have_the_documented_keys_and_ranges(project: Path) -> None:
    train, scored, cold = (
        json.loads((project / f"metrics/{name}.json").read_text())
        for name in ("train", "evaluate", "cold_start")
    )
    assert set(train) == {"rounds", "best_round", "images_trained", "bytes_up", "bytes_down"}
    assert train["rounds"] == 3 and train["best_round"] in (2, 3)
    assert all(type(value) is int and value > 0 for value in train.values())
    assert (scored["method"], scored["seed"]) == ("fedcoe", 0)
    assert set(scored["global"]) == {"accuracy", "nll", "ece"}
    assert {"accuracy", "mean", "std", "worst10", "nll"} <= set(scored["personalized"])
    assert set(cold) == {"none", "unlabelled", "labels", "few_shot"}
    for figures in (scored["global"], scored["personalized"], *cold.values()):
        assert 0.0 <= figures["accuracy"] <= 1.0
    assert all(round(n, 6) == n for n in numbers(scored))


def test_training_learns_something(project: Path) -> None:
    scored = json.loads((project / "metrics/evaluate.json").read_text())
    assert scored["global"]["accuracy"] > 0.3
    assert scored["personalized"]["accuracy"] > scored["personalized"]["worst10"] > 0.1


def test_models_folder_has_the_documented_files(project: Path) -> None:
    files = {str(f.relative_to(project / "models")) for f in (project / "models").rglob("*.*")}
    assert files == {
        "state.json",
        "gate.safetensors",
        *(f"experts/expert-{m}.safetensors" for m in range(2)),
        *(f"personal/{k}.safetensors" for k in range(4)),
    }


def test_curves_have_one_row_an_evaluation_and_grow(project: Path) -> None:
    curves = rows(project / "plots/curves.csv")
    assert [int(row["round"]) for row in curves] == [2, 3]
    assert {"global_accuracy", "personalized_accuracy", "cold_unlabelled", "train_loss"} <= set(
        curves[0]
    )
    assert int(curves[1]["bytes"]) > int(curves[0]["bytes"]) > 0
    # Every seen client trains one expert and its personal one on all its training samples.
    samples = sum(int(row["samples"]) for row in rows(project / "plots/clients.csv"))
    assert [int(row["images"]) for row in curves] == [2 * 2 * samples, 3 * 2 * samples]


def test_tables_name_seen_and_new_clients_apart(project: Path) -> None:
    seen, new = (rows(project / f"plots/{name}.csv") for name in ("clients", "new_clients"))
    assert [row["client"] for row in seen] == [f"client-{k:03d}" for k in range(4)]
    assert [row["client"] for row in new] == ["client-004", "client-005"]
    for row in (*seen, *new):
        total = sum(float(row[f"correlation_{m}"]) for m in range(2))
        assert total == pytest.approx(1.0, abs=1e-5)
    experts = rows(project / "plots/experts.csv")
    assert [row["expert"] for row in experts] == ["0", "1"]
    assert sum(float(row["load"]) for row in experts) == pytest.approx(1.0)
    assert sum(int(row["clients"]) for row in experts) == len(seen)


def test_evaluating_the_exported_models_repeats_the_figures_of_training(project: Path) -> None:
    scored = json.loads((project / "metrics/evaluate.json").read_text())
    cold = json.loads((project / "metrics/cold_start.json").read_text())
    last = {name: float(value) for name, value in rows(project / "plots/curves.csv")[-1].items()}
    assert last["global_accuracy"] == scored["global"]["accuracy"]
    assert last["global_nll"] == scored["global"]["nll"]
    assert last["personalized_accuracy"] == scored["personalized"]["accuracy"]
    for name, value in scored["validation"].items():
        assert last[f"validation_{name}"] == value
    for mode, figures in cold.items():
        assert last[f"cold_{mode}"] == figures["accuracy"]


def test_checkpoints_are_gone_after_success(project: Path) -> None:
    assert not list((project / ".fedcoe/runs").glob("*/round-*"))


def test_nothing_that_dvc_hashes_names_this_machine_or_a_run(project: Path, stores: Any) -> None:
    experiment = stores.get_experiment_by_name("fedcoe")
    [run] = stores.search_runs([experiment.experiment_id])
    for folder in ("models", "metrics", "plots", "partitions", "reports"):
        for file in (project / folder).rglob("*.*"):
            content = file.read_bytes()
            assert str(project).encode() not in content, file
            assert run.info.run_id.encode() not in content, file


def test_two_workers_and_another_folder_give_the_same_bytes(
    project: Path,
    new_project: NewProject,
    run_training: Training,
    contents: Callable[..., dict[str, bytes]],
) -> None:
    from flows.pipeline import evaluate_cold_start, evaluate_models

    other = new_project(runtime={"workers": 2})
    run_training(other, tracked=False)
    trained = contents(other)
    evaluate_models(other)
    evaluate_cold_start(other)
    assert trained == contents(other)
    ours = contents(project)
    assert ours.keys() == trained.keys()
    assert [name for name in ours if ours[name] != trained[name]] == []


def test_a_stage_serves_as_params_yaml_says_now(project: Path, tmp_path: Path) -> None:
    from flows.pipeline import evaluate_cold_start

    root = Path(shutil.copytree(project, tmp_path / "project"))
    before = json.loads((root / "metrics/cold_start.json").read_text())
    text = (root / "params.yaml").read_text()
    assert "few_shot" in before and "few_shot_epochs: 1" in text
    (root / "params.yaml").write_text(text.replace("few_shot_epochs: 1", "few_shot_epochs: 0"))
    evaluate_cold_start(root)
    after = json.loads((root / "metrics/cold_start.json").read_text())
    assert after == {mode: of for mode, of in before.items() if mode != "few_shot"}


def test_another_seed_gives_other_models(
    project: Path, new_project: NewProject, run_training: Training
) -> None:
    other = new_project(train={"seed": 1, "rounds": 1})
    run_training(other, tracked=False)
    name = "models/experts/expert-0.safetensors"
    assert (other / name).read_bytes() != (project / name).read_bytes()


def test_a_method_given_by_name_writes_only_its_figures(
    new_project: NewProject, run_training: Training
) -> None:
    root = new_project(train={"rounds": 1})
    run_training(root, tracked=False, method="fedavg", figures="metrics/baseline.json")
    figures = json.loads((root / "metrics/baseline.json").read_text())
    assert figures["evaluate"]["method"] == "fedavg"
    assert {"train", "evaluate", "cold_start"} <= set(figures)
    assert not (root / "models").exists()


def api(query: Callable[[Any], Any]) -> Any:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return query(client)


def last_flow_run() -> Any:
    from prefect.client.schemas.sorting import FlowRunSort

    return api(lambda c: c.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1))[0]


def test_prefect_shows_tasks_by_readable_names_and_artifacts(
    new_project: NewProject, run_training: Training
) -> None:
    from prefect.client.schemas.filters import (
        ArtifactFilter,
        ArtifactFilterFlowRunId,
        FlowRunFilter,
        FlowRunFilterId,
    )

    root = new_project(runtime={"workers": 2}, train={"rounds": 1})
    run_training(root, tracked=False)
    run = last_flow_run()
    assert run.state.is_completed()
    mine = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
    expected = {
        *(f"round 1 · local train · shard {i}/2" for i in (1, 2)),
        "round 1 · expert aggregate",
        *(f"round 1 · gate statistics · shard {i}/2" for i in (1, 2)),
        "round 1 · gate update",
        *(f"round 1 · score · shard {i}/2" for i in (1, 2)),
        "round 1 · evaluate",
        *(f"round 1 · cold-start evaluate · shard {i}/2" for i in (1, 2)),
        "round 1 · checkpoint",
    }
    names: set[str] = set()
    for _ in range(100):  # events reach the server a little later
        names = {t.name for t in api(lambda c: c.read_task_runs(flow_run_filter=mine))}
        if expected <= names:
            break
        time.sleep(0.1)
    assert expected - names == set()
    made = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
    artifacts = {a.key: a for a in api(lambda c: c.read_artifacts(artifact_filter=made))}
    assert set(artifacts) == {"fedcoe-summary", "fedcoe-figures"}
    assert artifacts["fedcoe-summary"].type == "markdown"
    assert "digits" in artifacts["fedcoe-summary"].data
    figures = {row["figure"] for row in json.loads(artifacts["fedcoe-figures"].data)}
    assert {"global", "personalized", "cold start, unlabelled images"} <= figures


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception, times: int) -> list[int]:
    """Make local training raise at its first calls; returns a list that grows with the calls."""
    from fedcoe.methods.base import Method

    calls: list[int] = []
    train = Method.local_train

    def local_train(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return train(self, *args)

    monkeypatch.setattr(Method, "local_train", local_train)
    return calls


def test_a_passing_failure_is_retried_once_and_the_run_completes(
    new_project: NewProject, run_training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = failing(monkeypatch, RuntimeError("a passing failure"), 1)
    run_training(new_project(train={"rounds": 1}), tracked=False)
    assert len(calls) == 2
    assert last_flow_run().state.is_completed()


def test_a_lasting_failure_is_retried_only_once(
    new_project: NewProject, run_training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = failing(monkeypatch, RuntimeError("lasting"), 9)
    with pytest.raises(RuntimeError, match="lasting"):
        run_training(new_project(train={"rounds": 1}), tracked=False)
    assert len(calls) == 2


def test_a_mistake_is_not_retried_and_ends_the_runs_as_failed(
    new_project: NewProject, run_training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    root = new_project(train={"rounds": 1})
    calls = failing(monkeypatch, FedCoEError("nothing but a mistake"), 9)
    with pytest.raises(FedCoEError, match="nothing but a mistake"):
        run_training(root)
    assert len(calls) == 1
    state = last_flow_run().state
    assert state.is_failed()
    assert "nothing but a mistake" in state.message and "\n" not in state.message
    client = MlflowClient(f"sqlite:///{root}/.fedcoe/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("fedcoe").experiment_id])
    assert run.info.status == "FAILED"
    # The next run of the same settings goes on in the same MLflow run.
    monkeypatch.undo()
    run_training(root)
    [again] = client.search_runs([client.get_experiment_by_name("fedcoe").experiment_id])
    assert (again.info.run_id, again.info.status) == (run.info.run_id, "FINISHED")


def test_an_unreachable_tracking_store_is_said_once_and_training_goes_on(
    new_project: NewProject,
    prefect_api: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    free_port: Callable[[], int],
) -> None:
    from flows.federated_training import federated_training

    # A store of its own: a process meets an outage once.
    store = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    root = new_project(train={"rounds": 2})
    with caplog.at_level(logging.WARNING):
        federated_training(str(root))
    assert (root / "models/state.json").exists() and (root / "metrics/train.json").exists()
    told = [r.getMessage() for r in caplog.records if r.getMessage().startswith("MLflow:")]
    outage, waiting = told
    assert outage.startswith(f"MLflow: {store} does not answer") and "\n" not in outage
    assert re.match(r"MLflow: \d+ records wait in .fedcoe/outbox", waiting)
