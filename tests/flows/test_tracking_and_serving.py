"""What MLflow holds after a run, and what a fresh process gets when it loads a registered model."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def the_run(stores: Any) -> Any:
    [run] = stores.search_runs([stores.get_experiment_by_name("fedcoe").experiment_id])
    return run


def test_the_run_names_data_partition_commit_and_settings(project: Path, stores: Any) -> None:
    run = the_run(stores)
    data = json.loads((project / "data/dataset.json").read_text())
    manifest = json.loads((project / "partitions/manifest.json").read_text())
    tags = run.data.tags
    assert tags["data_hash"] == data["hash"]
    assert tags["partition_fingerprint"] == manifest["fingerprint"]
    assert tags["git_commit"] == "unknown"  # the project is in no git repository
    assert (tags["method"], tags["role"]) == ("fedcoe", "training")
    assert run.data.params["train.lr"] == "0.05"
    assert run.data.params["method.experts"] == "2"
    assert run.info.status == "FINISHED"


def test_each_evaluation_leaves_its_tables_with_correlations_and_loads(
    project: Path, stores: Any, tmp_path: Path
) -> None:
    run = the_run(stores).info.run_id
    rounds = [Path(file.path).name for file in stores.list_artifacts(run, "evaluations")]
    assert rounds == ["round-000002", "round-000003"]
    folder = Path(stores.download_artifacts(run, "evaluations/round-000003", str(tmp_path)))
    for name in ("clients.csv", "experts.csv"):
        assert (folder / name).read_bytes() == (project / "plots" / name).read_bytes()


def test_runs_are_found_by_method_data_and_skew_and_name_their_data(
    project: Path, stores: Any
) -> None:
    run = the_run(stores)
    asked = "tags.method = 'fedcoe' and tags.dataset = 'digits' and tags.alpha = '0.3'"
    experiment = [stores.get_experiment_by_name("fedcoe").experiment_id]
    assert [found.info.run_id for found in stores.search_runs(experiment, asked)] == [
        run.info.run_id
    ]
    assert not stores.search_runs(experiment, asked.replace("0.3", "0.1"))
    assert (run.data.tags["scheme"], run.data.tags["seed"]) == ("dirichlet", "0")
    [given] = run.inputs.dataset_inputs
    data = json.loads((project / "data/dataset.json").read_text())
    assert (given.dataset.name, given.dataset.digest) == ("digits", data["hash"][:16])
    profile = json.loads(given.dataset.profile)
    assert (profile["train"], profile["clients"]) == (data["train"], 6)


def test_the_version_of_the_data_is_what_dvc_calls_it(tmp_path: Path) -> None:
    from tasks.tracking import data_version

    assert data_version(tmp_path) == "unknown"
    for broken in ("outs: []", "outs: {", "- 1"):
        (tmp_path / "data.dvc").write_text(broken)
        assert data_version(tmp_path) == "unknown"
    (tmp_path / "data.dvc").write_text("outs:\n- md5: 0d50.dir\n  path: data\n")
    assert data_version(tmp_path) == "0d50.dir"


def test_the_machine_is_watched_until_it_is_stopped() -> None:
    import threading

    from tasks.machine import Machine

    told: list[dict[str, float]] = []
    often = threading.Event()

    def tell(figures: dict[str, float]) -> None:
        told.append(figures)
        if len(told) == 3:
            often.set()

    machine = Machine(0.01, tell)
    assert often.wait(60)
    machine.stop()
    assert not [thread for thread in threading.enumerate() if thread.name == "machine"]
    assert told[-1]["system/system_memory_usage_percentage"] > 0
    assert "system/cpu_utilization_percentage" in told[0]


def test_the_git_commit_says_whether_files_differ_from_it(tmp_path: Path) -> None:
    from tasks.tracking import git_commit

    def git(*args: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", *identity, *args], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "first")
    assert git_commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("two")
    assert git_commit(tmp_path) == git("rev-parse", "HEAD") + "+changes"


def test_metrics_have_one_value_a_round_and_evaluations_their_rounds(
    project: Path, stores: Any
) -> None:
    run = the_run(stores)

    def history(name: str) -> dict[int, float]:
        return {m.step: m.value for m in stores.get_metric_history(run.info.run_id, name)}

    assert list(history("train_loss")) == [1, 2, 3]
    assert sorted(history("global_accuracy")) == [2, 3]
    scored = json.loads((project / "metrics/evaluate.json").read_text())
    assert round(history("global_accuracy")[3], 6) == scored["global"]["accuracy"]
    images = history("images")
    assert images[1] == images[2] == images[3] > 0


def test_the_run_keeps_the_figures(stores: Any) -> None:
    run = the_run(stores)
    figures = {f.path for f in stores.list_artifacts(run.info.run_id, "figures")}
    names = ("learning_curves", "correlation", "expert_client_accuracy", "clients_by_classes")
    assert figures == {f"figures/{name}.png" for name in names}


def test_mixture_gate_and_experts_are_registered_as_candidates(project: Path, stores: Any) -> None:
    names = {model.name for model in stores.search_registered_models()}
    assert names == {"fedcoe", "fedcoe-gate", "fedcoe-expert-0", "fedcoe-expert-1"}
    scored = json.loads((project / "metrics/evaluate.json").read_text())
    for name in names:
        version = stores.get_model_version_by_alias(name, "candidate")
        assert version.tags["accuracy_global"] == f"{scored['global']['accuracy']:.4f}"
        assert version.tags["dataset"] == "digits"
        assert {"accuracy", "load", "clients"} <= set(version.tags) or "expert" not in name
        assert "champion" not in version.aliases
        # With the project's runs, wherever the command was given.
        logged = stores.get_logged_model(version.source.removeprefix("models:/"))
        assert logged.experiment_id == the_run(stores).info.experiment_id
        assert logged.artifact_location.startswith(f"file://{project}/.fedcoe/artifacts")


def test_a_fresh_process_predicts_with_the_accuracy_that_training_measured(
    project: Path, stores: Any
) -> None:
    code = """
import json, sys, mlflow.pyfunc, numpy as np
model = mlflow.pyfunc.load_model("models:/fedcoe@candidate")
x, y = (np.load(f"data/{n}_test.npy") for n in "xy")
counts = np.bincount(y[:50], minlength=10).tolist()
p = {"none": model.predict(x),
     "unlabelled": model.predict(x[:50], params={"mode": "unlabelled"}),
     "labels": model.predict(x[:50], params={"mode": "labels", "label_counts": counts})}
try:
    model.predict(np.zeros((2, 9, 9, 1), np.uint8)); said = "nothing"
except Exception as error:
    said = f"{type(error).__name__}: {error}"
expert = mlflow.pyfunc.load_model("models:/fedcoe-expert-1@candidate").predict(x)
gate = mlflow.pyfunc.load_model("models:/fedcoe-gate@candidate").predict(x)
print(json.dumps({"accuracy": round(float((p["none"].argmax(1) == y).mean()), 6),
    "nll": round(float(-np.log(p["none"][np.arange(len(y)), y]).mean()), 6),
    "sums": [float(abs(v.sum(1) - 1).max()) for v in (*p.values(), expert, gate)],
    "shapes": [v.shape for v in (*p.values(), expert, gate)],
    "expert": round(float((expert.argmax(1) == y).mean()), 6),
    "moved": [float(abs(p[m] - p["none"][:50]).max()) for m in ("unlabelled", "labels")],
    "said": said}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project, capture_output=True, text=True, timeout=400,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    scored = json.loads((project / "metrics/evaluate.json").read_text())
    assert found["accuracy"] == scored["global"]["accuracy"]
    assert found["nll"] == pytest.approx(scored["global"]["nll"], abs=2e-6)
    row = (project / "plots/experts.csv").read_text().splitlines()[2].split(",")
    assert found["expert"] == float(row[3])
    assert max(found["sums"]) < 1e-6
    assert found["shapes"] == [[359, 10], [50, 10], [50, 10], [359, 10], [359, 2]]
    assert min(found["moved"]) > 1e-4
    assert "9" in found["said"] and "8" in found["said"] and "shape" in found["said"].lower()


def test_the_exported_bundle_refuses_another_shape_and_bad_counts(project: Path) -> None:
    from fedcoe.bundle import load_bundle
    from fedcoe.errors import FedCoEError

    bundle = load_bundle(project / "models")
    with pytest.raises(FedCoEError, match=r"uint8 \[2, 9, 9, 1\].*\[n, 8, 8, 1\]"):
        bundle.predict(np.zeros((2, 9, 9, 1), np.uint8))
    with pytest.raises(FedCoEError, match="10 numbers"):
        bundle.predict(np.zeros((2, 8, 8, 1), np.uint8), "labels", np.ones(3, np.int64))


def test_registered_experts_are_listed_newest_first(
    stores: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.registry import registered_experts

    rows = registered_experts()
    assert [row["name"] for row in rows] == [
        "fedcoe", "fedcoe-expert-0", "fedcoe-expert-1", "fedcoe-gate",
    ]  # fmt: skip
    assert all(row["aliases"] == "candidate" and row["version"] == "1" for row in rows)


def test_flat_joins_keys_by_dots() -> None:
    from tasks.tracking import flat

    assert flat({"a": {"b": 1, "c": [2, 3]}, "d": "e"}) == {
        "a.b": 1, "a.c.0": 2, "a.c.1": 3, "d": "e",
    }  # fmt: skip


def test_retry_condition_lets_mistakes_be() -> None:
    from fedcoe.errors import FedCoEError
    from tasks.retry import may_pass

    class State:
        def __init__(self, error: Exception | None) -> None:
            self.error = error

        def result(self) -> None:
            if self.error:
                raise self.error

    assert may_pass(None, None, State(RuntimeError()))
    assert not may_pass(None, None, State(FedCoEError()))
    assert not may_pass(None, None, State(None))


@pytest.fixture
def untracked(new_project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with an empty MLflow database, which is the one in force."""
    root = new_project()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/.fedcoe/mlflow.db")
    return root


def test_a_run_that_another_flow_run_goes_on_with_is_found_by_that_one(untracked: Path) -> None:
    from mlflow import MlflowClient

    from tasks import tracking

    root = untracked
    for name in ("first", "second"):
        run = tracking._open(root, root / "memo", "run", {"flow_run": name, "role": "training"}, {})
        run.send_all()
    client = MlflowClient()
    [found] = client.search_runs([client.get_experiment_by_name("fedcoe").experiment_id])
    assert (found.data.tags["flow_run"], found.data.tags["role"]) == ("second", "training")


@pytest.mark.parametrize("step", ["log_batch", "set_terminated"])
def test_a_trial_whose_logging_broke_off_is_logged_by_a_later_call(
    step: str, untracked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    from tasks import tracking

    root = untracked
    study = tracking.start_study(root, root / "memo", "search", {}, {"role": "study"})
    trial = {"number": 0, "state": "complete", "value": 0.5, "params": {"train.lr": 0.1}}
    trial |= {"curve": [{"round": 1, "global_nll": 0.7}], "error": ""}
    with monkeypatch.context() as broken:

        def slow(*_: Any, **__: Any) -> None:
            raise TimeoutError("too slow")

        broken.setattr(MlflowClient, step, slow)
        tracking.log_trials(study, root, [trial])
    monkeypatch.setattr(tracking.patience(study.store), "until", 0.0)
    for _ in range(2):
        tracking.log_trials(study, root, [trial])
    client = MlflowClient()
    experiment = client.get_experiment_by_name("fedcoe").experiment_id
    [child] = client.search_runs([experiment], "tags.role = 'trial'")
    assert (child.info.status, child.data.metrics["objective"]) == ("FINISHED", 0.5)
    for name in ("objective", "validation_global_nll"):
        assert len(client.get_metric_history(child.info.run_id, name)) == 1
