"""A run with privacy through the flow: its figures, its card, a resume, and what it registers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedcoe.errors import FedCoEError
from tasks.stop import Stopped

PRIVATE = ["privacy.epsilon=8", "privacy.delta=0.05", "privacy.clip=0.5"]


@pytest.mark.slow
def test_a_private_run_says_what_it_spent_and_an_interrupted_one_spends_the_same(
    new_project: Callable[..., Path],
    run_training: Callable[..., Any],
    contents: Callable[..., dict[str, bytes]],
) -> None:
    import mlflow

    root = new_project()
    run_training(root, PRIVATE)
    told = json.loads((root / "metrics/train.json").read_text())
    assert (told["epsilon"], told["delta"]) == (8.0, 0.05)
    [header, first, last] = (root / "plots/curves.csv").read_text().splitlines()
    column = header.split(",").index("epsilon")
    assert 0 < float(first.split(",")[column]) < 8.0 == float(last.split(",")[column])
    client = mlflow.MlflowClient(f"sqlite:///{root}/.fedcoe/mlflow.db")
    [run] = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.data.metrics["epsilon"] == pytest.approx(8.0) and run.data.metrics["delta"] == 0.05
    [version] = client.search_model_versions("name='fedcoe'")
    assert "epsilon 8, delta 0.05" in version.description
    assert "proves no privacy" not in version.description
    registered = json.loads((root / "models/state.json").read_text())
    assert not any(map(sum, registered["label_counts"])) and not any(registered["share"])

    again = new_project()
    for finished in (1, 2):

        def stop(round_: int, rounds: int, finished: int = finished) -> None:
            if round_ == finished:
                raise Stopped("stopped")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("flows.federated_training.stop_if_asked", stop)
            with pytest.raises(Stopped):
                run_training(again, PRIVATE, tracked=False)
    run_training(again, PRIVATE, tracked=False)
    ours, theirs = contents(again), contents(root)
    assert [name for name in theirs if ours.get(name) != theirs[name]] == []


@pytest.mark.slow
def test_a_method_that_cannot_be_private_is_refused_before_it_trains(
    new_project: Callable[..., Path], run_training: Callable[..., Any]
) -> None:
    root = new_project()
    with pytest.raises(FedCoEError, match=r"privacy\.epsilon: method scaffold sends what"):
        run_training(root, [*PRIVATE, "method.name=scaffold"], tracked=False)
    assert not (root / "metrics").exists()
