"""`fedcoe tune`: many processes, one study; killed and started again; validation figures only."""

import csv
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.trial import TrialState

from fedcoe.config import load_settings
from fedcoe.data.dataset import load_dataset
from fedcoe.data.partition import TEST, VALIDATION, load_partition
from fedcoe.engine.clients import ClientData
from fedcoe.errors import FedCoEError
from fedcoe.methods.settings import method_names
from tasks.study import ATTEMPTS, Plan, Study, alive
from tasks.trial import TrialProcess, run_trial, validation_curve

TUNE = """\
tune:
  trials: 5
  startup_trials: 2
  warmup_rounds: 1
  space:
    train.lr: {low: 0.001, high: 0.5, log: true}
    method.server_momentum: {choices: [0.0, 0.7]}
    method.experts: {low: 1, high: 3}
"""


@pytest.fixture
def tunable(new_project: Callable[..., Path]) -> Path:
    """A project that evaluates each round, with a search in params.yaml."""
    root = new_project(evaluate={"every": 1})
    with (root / "params.yaml").open("a") as file:
        file.write(TUNE)
    return root


def plan_of(root: Path, *overrides: str, method: str | None = None) -> Plan:
    from flows.tune import plan_search

    return plan_search(root, overrides, method)[0]


@pytest.fixture
def open_study() -> Iterator[Callable[[Plan], Study]]:
    opened: list[Study] = []

    def make(plan: Plan) -> Study:
        opened.append(Study(plan))
        return opened[-1]

    yield make
    for study in opened:
        study.close()


@pytest.fixture
def run_tune(prefect_api: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """The flow in this process, with the project's own MLflow."""
    from flows.tune import tune

    def run(root: Path, *overrides: str, **options: Any) -> dict[str, Any]:
        store = options.pop("store", f"sqlite:///{root}/.fedcoe/mlflow.db")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
        return dict(tune(str(root), overrides, **options))

    return run


def trials_of(root: Path) -> list[dict[str, str]]:
    [table] = (root / "results/tune").glob("*/trials.csv")
    return list(csv.DictReader(io.StringIO(table.read_text())))


def without_numbers(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k != "trial"} for row in rows]


# ------------------------------------------------------------------ the study


def test_two_processes_never_start_more_trials_than_are_asked_for(
    tunable: Path, open_study: Callable[[Plan], Study]
) -> None:
    plan = plan_of(tunable, "tune.trials=3")
    one, two = open_study(plan), open_study(plan)
    first, second, third = one.claim(), two.claim(), one.claim()
    assert first and second and third
    assert len({trial.params["train.lr"] for trial in (first, second, third)}) == 3

    got: list[Any] = []
    waiting = threading.Thread(target=lambda: got.append(two.claim()))
    waiting.start()
    one.optuna.tell(first, 1.0)
    one.optuna.tell(third, state=TrialState.PRUNED)
    waiting.join(0.5)
    assert waiting.is_alive()  # the last one may yet fail
    one.optuna.tell(second.number, state=TrialState.FAIL)
    waiting.join(10)
    assert got[0] is not None
    two.optuna.tell(got[0], 2.0)
    assert one.claim() is None and two.claim() is None
    assert one.progress().finished == 3


def test_a_trial_whose_process_is_gone_is_tried_again_but_not_for_ever(
    tunable: Path, open_study: Callable[[Plan], Study]
) -> None:
    plan = plan_of(tunable, "tune.trials=1")
    params = []
    for _ in range(ATTEMPTS):
        study = open_study(plan)
        trial = study.claim()
        assert trial is not None
        params.append(trial.params)
        study.close()
    assert params == [params[0]] * ATTEMPTS
    last = open_study(plan)
    assert last.claim() is None
    assert last.progress().failed == 1
    assert [t.number for t in last.ended()] == [ATTEMPTS - 1]
    assert len(list((plan.folder / "workers").iterdir())) == 1


def test_a_trial_is_not_taken_from_a_process_that_lives(
    tunable: Path, open_study: Callable[[Plan], Study]
) -> None:
    plan = plan_of(tunable, "tune.trials=2")
    one, two = open_study(plan), open_study(plan)
    one.claim()
    two.claim()
    assert [t.state for t in two.trials()] == [TrialState.RUNNING] * 2
    assert one.scratch.exists()


def test_a_journal_cut_off_in_a_line_is_read_up_to_that_line(
    tunable: Path, open_study: Callable[[Plan], Study]
) -> None:
    plan = plan_of(tunable)
    study = open_study(plan)
    trial = study.claim()
    study.optuna.tell(trial, 0.5)
    study.close()
    with (plan.folder / "journal.log").open("a") as journal:
        journal.write('{"op_code": 4, "trial')
    again = open_study(plan)
    assert [t.value for t in again.ended()] == [0.5]
    assert again.claim() is not None
    again.close()
    assert len(open_study(plan).trials()) == 2


def test_figures_of_other_settings_data_or_space_are_another_study(tunable: Path) -> None:
    name = plan_of(tunable).name
    same = ["tune.trials=9", "runtime.workers=2", "cold_start.em_steps=3"]
    other = ["train.seed=1", "partition.seed=1", "tune.seed=1", "tune.objective=global_accuracy",
             "tune.space={train.lr: {low: 0.1, high: 0.2}}", "tune.rounds=2",
             "runtime.precision=bf16"]  # fmt: skip
    assert {plan_of(tunable, change).name for change in same} == {name}
    assert len({name} | {plan_of(tunable, change).name for change in other}) == len(other) + 1
    info = tunable / "data/dataset.json"
    digest = load_dataset(tunable / "data").info.hash
    info.write_text(info.read_text().replace(digest, digest[::-1]))
    assert plan_of(tunable).name != name


def test_neither_stages_nor_runs_depend_on_the_search(tunable: Path) -> None:
    from ruamel.yaml import YAML

    from tasks.run import run_key

    stages = YAML(typ="safe").load(Path(__file__).parents[2] / "dvc.yaml")["stages"]
    for name, stage in stages.items():
        assert "params.yaml" not in stage["deps"], name
        assert "tune" not in stage.get("params", []), name
    data = ClientData(load_dataset(tunable / "data"), load_partition(tunable / "partitions"))
    one, two = (
        load_settings(tunable / "params.yaml", change) for change in ([], ["tune.trials=9"])
    )
    assert one != two
    assert run_key(one, data) == run_key(two, data)


def test_keys_and_objectives_that_a_method_lacks_are_said(tunable: Path) -> None:
    from flows.tune import plan_search

    plan, notes = plan_search(tunable, (), "fedavg")
    assert "method.experts" not in plan.space
    assert any("method.experts is left out" in note for note in notes)
    plan, notes = plan_search(tunable, (), "local")
    assert plan.objective == "personalized_nll"
    assert any("no global model" in note for note in notes)


# ------------------------------------------------------------------- one trial


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`stubbed(figures)`: no training; figures(lr) are the objective by round, NaN included."""

    def stub(figures: Callable[[float], list[float]]) -> None:
        def curve(run: Any) -> Iterator[tuple[int, dict[str, float]]]:
            for i, value in enumerate(figures(run.settings.train.lr)):
                yield i + 1, {"global_nll": value}

        monkeypatch.setattr("tasks.trial.validation_curve", curve)

    return stub


def finish(study: Study) -> list[TrialState]:
    (study.scratch / "data").symlink_to((study.plan.root / "data").resolve())
    states = []
    while (trial := study.claim()) is not None:
        states.append(run_trial(study, trial))
    return states


def test_a_trial_worse_than_the_median_is_stopped_after_the_warmup(
    tunable: Path, open_study: Callable[[Plan], Study], stubbed: Callable[..., None]
) -> None:
    seen = []

    def figures(lr: float) -> list[float]:
        seen.append(lr)
        return [float(len(seen))] * 3

    stubbed(figures)
    study = open_study(plan_of(tunable, "tune.trials=4", "tune.warmup_rounds=2"))
    states = finish(study)
    assert [s.name for s in states] == ["COMPLETE", "COMPLETE", "PRUNED", "PRUNED"]
    assert [t.last_step for t in study.trials()] == [3, 3, 2, 2]
    best = study.progress().best
    assert best is not None and best.number == 0

    seen.clear()
    study = open_study(plan_of(tunable, "tune.trials=4", "tune.pruner=none"))
    assert {s.name for s in finish(study)} == {"COMPLETE"}


def test_figures_that_are_not_finite_fail_their_trial_and_no_other(
    tunable: Path, open_study: Callable[[Plan], Study], stubbed: Callable[..., None]
) -> None:
    calls = []

    def figures(lr: float) -> list[float]:
        calls.append(lr)
        return [1.0, float("nan")] if len(calls) == 1 else [1.0, 1.0]

    stubbed(figures)
    study = open_study(plan_of(tunable, "tune.trials=2"))
    assert [s.name for s in finish(study)] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert study.trials()[0].user_attrs["error"] == "round 2: global_nll is nan"


def test_when_every_trial_fails_the_search_ends(
    tunable: Path, open_study: Callable[[Plan], Study], stubbed: Callable[..., None]
) -> None:
    from tasks.tuning import write_search

    stubbed(lambda lr: [float("inf")])
    study = open_study(plan_of(tunable, "tune.trials=3"))
    assert [s.name for s in finish(study)] == ["FAIL"] * 3
    with pytest.raises(FedCoEError, match=r"all 3 trials failed.*tune\.space.*global_nll is inf"):
        write_search.fn(study)
    assert len(trials_of(tunable)) == 3


# ------------------------------------------------- validation figures, and only these


def curve_of(root: Path, *overrides: str) -> list[tuple[int, dict[str, float]]]:
    from tasks.run import open_run

    settings = load_settings(root / "params.yaml", overrides)
    with open_run(settings, root, root / "partitions") as run:
        return list(validation_curve(run))


def spoil(root: Path, split: int) -> None:
    """Replace one split's images and labels by garbage; with TEST all that no trial may read."""
    partition, rng = load_partition(root / "partitions"), np.random.default_rng(1)
    rows = np.concatenate([partition.indices(k, split) for k in range(partition.seen)])
    spoilt = {"train": rows}
    if split == TEST:
        new = np.flatnonzero(partition.client >= partition.seen)
        spoilt = {"train": np.concatenate([rows, new]), "test": np.arange(359)}
    for part, index in spoilt.items():
        images, labels = (np.load(root / f"data/{array}_{part}.npy") for array in "xy")
        images[index] = rng.integers(0, 256, images[index].shape)
        labels[index] = rng.integers(0, 10, len(index))
        np.save(root / f"data/x_{part}.npy", images)
        np.save(root / f"data/y_{part}.npy", labels)


@pytest.mark.parametrize("method", method_names())
def test_no_trial_reads_test_images_or_labels(
    method: str, new_project: Callable[..., Path], tmp_path: Path
) -> None:
    root = new_project()
    # One evaluation is enough, but for the method that trains on what one has found.
    every = 1 if method == "fedcoe" else 2
    changes = [f"method.name={method}", "train.rounds=2", f"evaluate.every={every}"]
    clean = curve_of(root, *changes)
    assert [round_ for round_, _ in clean] == [1, 2][-2 // every :]
    spoil(root, TEST)
    assert curve_of(root, *changes) == clean
    spoil(root, VALIDATION)
    assert curve_of(root, *changes) != clean


def test_a_trial_sees_the_validation_figures_that_training_reports(
    project: Path, new_project: Callable[..., Path]
) -> None:
    rows = list(csv.DictReader(io.StringIO((project / "plots/curves.csv").read_text())))
    found = curve_of(new_project())
    assert [round_ for round_, _ in found] == [int(row["round"]) for row in rows] == [2, 3]
    for (_, figures), row in zip(found, rows, strict=True):
        for name, value in figures.items():
            assert value == pytest.approx(float(row[f"validation_{name}"]), abs=2e-6), name


# ----------------------------------------------------------------- processes


@pytest.mark.slow
def test_a_trial_goes_on_when_its_process_is_killed(
    tunable: Path, open_study: Callable[[Plan], Study]
) -> None:
    plan = plan_of(tunable, "tune.trials=1", "train.rounds=8")
    study, process = open_study(plan), TrialProcess(plan, 1)
    got: list[Any] = []
    waiting = threading.Thread(target=lambda: got.append(process.next_trial()))
    waiting.start()
    wait_until(lambda: any(t.intermediate_values for t in study.trials()))
    os.kill(process._pid, signal.SIGKILL)
    waiting.join(60)
    process.stop()
    assert got == ["COMPLETE"]
    first, second = study.trials()
    assert first.state == TrialState.FAIL and first.params == second.params
    assert study.progress().failed == 0


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_search_killed_half_way_ends_with_the_trials_of_one_never_killed(
    tunable: Path,
    tmp_path: Path,
    run_tune: Callable[..., dict[str, Any]],
    open_study: Callable[[Plan], Study],
    prefect_api: str,
) -> None:
    seeded = "tune.seed=1"  # prunes two of the five trials
    other = tmp_path / "other"
    shutil.copytree(tunable, other)
    best = run_tune(tunable, seeded)
    assert best["finished"] == 5 and best["pruned"] >= 1
    again = run_tune(tunable, seeded)
    assert again == best

    plan = plan_of(other, seeded)
    study = open_study(plan)
    code = "from flows.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "tune", "-S", seeded],
        cwd=other,
        env=os.environ | {"PREFECT_API_URL": prefect_api, "MLFLOW_TRACKING_URI": "sqlite:///x.db"},
    ) as command:
        wait_until(lambda: study.progress().finished >= 2)
        wait_until(lambda: study.trials()[-1].state == TrialState.RUNNING)
        command.kill()
    kept = [(t.params, t.value) for t in study.ended()]
    assert 2 <= len(kept) < 5
    # Its trial process notices and ends by itself.
    others = {folder.name for folder in (plan.folder / "workers").iterdir()} - {study.worker}
    wait_until(lambda: not any(alive(plan, worker) for worker in others))
    resumed = run_tune(other, seeded)
    assert [(t.params, t.value) for t in study.ended()][: len(kept)] == kept
    assert without_numbers(trials_of(other)) == without_numbers(trials_of(tunable))
    assert resumed["params"] == best["params"] and resumed["overlay"] == best["overlay"]


@pytest.mark.slow
def test_two_searches_and_two_workers_share_one_study_and_one_mlflow_run(
    tunable: Path, run_tune: Callable[..., dict[str, Any]], prefect_api: str
) -> None:
    from mlflow import MlflowClient

    store = f"sqlite:///{tunable}/.fedcoe/mlflow.db"
    code = "from flows.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "tune", "-S", "tune.trials=7"],
        cwd=tunable,
        env=os.environ | {"PREFECT_API_URL": prefect_api, "MLFLOW_TRACKING_URI": store},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as command:
        best = run_tune(tunable, "tune.trials=7", workers=2)
        printed, said = command.communicate(timeout=300)
    assert command.returncode == 0, said
    assert said == ""
    assert best["dvc"] in printed
    rows = trials_of(tunable)
    assert len(rows) == 7 == best["finished"] + best["failed"]

    client = MlflowClient(store)
    [experiment] = [e for e in client.search_experiments() if e.name == "fedcoe"]
    runs = client.search_runs([experiment.experiment_id])
    [parent] = [run for run in runs if run.data.tags["role"] == "study"]
    trials = [run for run in runs if run.data.tags["role"] == "trial"]
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == {parent.info.run_id}
    assert sorted(int(run.data.tags["trial"]) for run in trials) == sorted(
        int(row["trial"]) for row in rows
    )
    by_trial = {run.data.tags["trial"]: run for run in trials}
    for row in rows:
        run = by_trial[row["trial"]]
        assert run.data.tags["state"] == row["state"]
        assert run.data.params["method.experts"] == row["method.experts"]
        steps = client.get_metric_history(run.info.run_id, "validation_global_nll")
        assert [m.step for m in steps] == list(range(1, int(row["round"]) + 1))
    names = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert names == {"best.yaml", "trials.csv", "history.png", "slices.png"}


@pytest.mark.slow
def test_searches_of_one_study_that_end_together_all_leave_its_files_in_mlflow(
    tunable: Path,
    run_tune: Callable[..., dict[str, Any]],
    open_study: Callable[[Plan], Study],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from mlflow import MlflowClient

    from flows.tune import _described, _end
    from tasks.tracking import Tracking, start_study

    said: list[str] = []
    monkeypatch.setattr(Tracking, "_warn", lambda _, text, *values: said.append(text % values))
    best = run_tune(tunable, "tune.trials=1", "train.rounds=1")
    plan = plan_of(tunable, "tune.trials=1", "train.rounds=1")

    def opened(_: int) -> tuple[Study, Tracking]:
        memo = plan.folder / "mlflow-run"
        return open_study(plan), start_study(plan.root, memo, plan.name, *_described(plan))

    searches = [opened(i) for i in range(4)]
    with ThreadPoolExecutor(len(searches)) as pool:
        ends = list(pool.map(lambda search: _end(*search), searches))
    assert ends == [best] * len(searches)
    assert said == []
    tracking = searches[0][1]
    assert tracking.run_id is not None
    client = MlflowClient(tracking.store)
    names = {file.path for file in client.list_artifacts(tracking.run_id)}
    assert names == {"best.yaml", "trials.csv", "history.png", "slices.png"}
    assert client.get_run(tracking.run_id).info.status == "FINISHED"


@pytest.mark.slow
def test_the_best_settings_come_as_a_dvc_command_and_mlflow_may_be_down(
    tunable: Path, run_tune: Callable[..., dict[str, Any]]
) -> None:
    import shlex

    from dvc.utils.hydra import apply_overrides

    best = run_tune(
        tunable,
        "tune.trials=2",
        "tune.space={train.lr: {low: 0.01, high: 0.1}, method.mu: {choices: [0.02]}}",
        method="fedprox",
        store="sqlite:////nowhere/at/all.db",
    )
    head = (Path(best["folder"]) / "best.yaml").read_text()
    assert best["dvc"] in head and best["train"] in head
    words = shlex.split(best["dvc"])
    assert words[:3] == ["dvc", "exp", "run"] and "+method.mu=0.02" in words
    apply_overrides(tunable / "params.yaml", [word for word in words[3:] if word != "-S"])
    told = [word for word in shlex.split(best["train"])[2:] if word != "-S"]
    assert load_settings(tunable / "params.yaml").method.name == "fedprox"
    assert load_settings(tunable / "params.yaml").method.mu == 0.02
    assert load_settings(tunable / "params.yaml").train.lr == best["params"]["train.lr"]
    assert load_settings(tunable / "params.yaml", told) == load_settings(tunable / "params.yaml")
