"""Faulty clients in a whole run: what is counted and said, and a stop that loses nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Python that makes every client diverge in round 3, and the run stop.
DIVERGE_IN_ROUND_3 = """
from fedcoe.engine.trainer import Trainer
fit = Trainer._fit
def diverging(self, fit_, work, images, labels):
    result = fit(self, fit_, work, images, labels)
    if work.round == 3: result.vector[:] = float("nan")
    return result
Trainer._fit = diverging
"""


@pytest.mark.slow
def test_a_run_stopped_below_the_quorum_goes_on_from_the_round_before(
    project: Path,
    new_project: Callable[..., Path],
    fedcoe_command: Callable[..., Any],
    contents: Callable[..., dict[str, bytes]],
    prefect_api: str,
) -> None:
    root = new_project()
    stopped = fedcoe_command(root, "train", code=DIVERGE_IN_ROUND_3, PREFECT_API_URL=prefect_api)
    assert stopped.returncode == 2, stopped.stderr
    last = stopped.stderr.strip().splitlines()[-1]
    assert "round 3: only 0 of 4 updates are valid (4 not finite, 4 personal not finite)" in last
    assert "Traceback" not in stopped.stderr + stopped.stdout
    [scratch] = (root / ".fedcoe/runs").iterdir()
    kept = sorted(file.name[:12] for file in scratch.glob("round-*.safetensors"))
    assert kept == ["round-000001", "round-000002"]
    assert not (root / "models").exists()
    done = fedcoe_command(root, "train", PREFECT_API_URL=prefect_api)
    assert done.returncode == 0, done.stderr
    ours, theirs = (contents(folder, ("models",)) for folder in (root, project))
    assert ours == theirs


@pytest.mark.slow
def test_what_is_left_out_is_in_the_log_the_metrics_and_the_tracked_run_by_reason(
    new_project: Callable[..., Path], fedcoe_command: Callable[..., Any], prefect_api: str
) -> None:
    from mlflow import MlflowClient

    root = new_project()
    faults = ("-S", "faults.timeout=0.3", "-S", "faults.duplicate=0.4", "-S", "train.quorum=0.0")
    done = fedcoe_command(
        root, "train", *faults, PREFECT_API_URL=prefect_api, PREFECT_LOGGING_LEVEL="INFO"
    )
    assert done.returncode == 0, done.stderr
    dropped = json.loads((root / "metrics/train.json").read_text())["dropped"]
    assert set(dropped) == {"duplicate", "late"}
    said = done.stdout + done.stderr
    assert "left out" in said
    assert "asked for 4 updates" in said
    assert "left out gate messages: " in said
    client = MlflowClient(f"sqlite:///{root}/.fedcoe/mlflow.db")
    [run] = client.search_runs([e.experiment_id for e in client.search_experiments()])
    for reason, count in dropped.items():
        logged = client.get_metric_history(run.info.run_id, f"dropped.{reason}")
        assert sum(metric.value for metric in logged) == count
