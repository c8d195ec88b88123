"""Rounds that trainings of a comparison have in common are trained once, with equal figures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcoe.state import load_state

SETTINGS = (
    "method.branch_after=3", "method.personal_epochs=1", "train.cohort=0.75", "faults.dropout=0.2",
    "train.quorum=0.1",
)  # fmt: skip
NewProject = Callable[..., Path]


def rounds_trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rounds that are trained from now on."""
    import flows.federated_training as module

    plan, found = module.plan_round, []

    def noted(method: Any, state: Any, engine: Any) -> Any:
        found.append(state.round + 1)
        return plan(method, state, engine)

    monkeypatch.setattr(module, "plan_round", noted)
    return found


def cells(root: Path) -> dict[str, dict[str, Any]]:
    return {p.stem: json.loads(p.read_text()) for p in root.glob("results/*/cells/*.json")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("methods", "similarity", "branch", "shared_until"),
    [
        (("fedavg", "fedcoe"), "labels", 3, 2),
        (("fedcoe", "fedavg_ft"), "features", 4, 4),
    ],
)
def test_what_cells_share_is_trained_once_and_their_figures_are_those_of_trainings_apart(
    new_project: NewProject,
    prefect_api: str,
    monkeypatch: pytest.MonkeyPatch,
    methods: tuple[str, ...],
    similarity: str,
    branch: int,
    shared_until: int,
) -> None:
    from flows.compare import compare_methods

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    found = []
    for shared in (True, False):
        root = new_project(train={"rounds": 5}, method={"experts": 3, "gate_every": 1})
        with monkeypatch.context() as patch:
            trained = rounds_trained(patch)
            if not shared:
                patch.setattr("flows.federated_training.next_of_trunk", lambda *_: None)
            own = f"method.similarity={similarity}", f"method.branch_after={branch}"
            settings = (*SETTINGS, *own)
            compare_methods(str(root), settings, methods, [0], "both", ["all"], True)
        found.append((trained, cells(root)))
    (once, here), (apart, there) = found
    assert apart == [*range(1, 6), *range(1, 6)]
    # FedAvg keeps rounds 2 and 4, the pool 2 and its branch.
    assert once == [*range(1, 6), *range(shared_until + 1, 6)]
    assert here.keys() == there.keys() and len(here) == 2
    for name, cell in here.items():
        for each in (cell, there[name]):
            assert each["timing"].pop("train_seconds") > 0
        assert [row["round"] for row in cell["curves"]] == [2, 4, 5]
        assert cell == there[name]


@pytest.mark.slow
def test_a_comparison_at_a_terminal_shows_rounds_that_it_does_not_train(
    new_project: NewProject, fedcoe_command: Callable[..., Any], prefect_api: str
) -> None:
    root = new_project(train={"rounds": 3})
    words = [word for setting in SETTINGS for word in ("-S", setting)]
    found = fedcoe_command(
        root, "compare", "--methods", "fedcoe,fedavg", "--rows", "all", "--seeds", "0", *words,
        PREFECT_API_URL=prefect_api, MLFLOW_TRACKING_URI="http://127.0.0.1:9",
        MLFLOW_HTTP_REQUEST_MAX_RETRIES="0", FORCE_COLOR="1",
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert "3/3" in found.stderr
    assert "| fedavg | all | 1 |" in found.stdout
    # The branch comes after the last round, so only the evaluation in round 2 is kept.
    assert [p.stem for p in root.glob(".fedcoe/trunks/*/*/*")] == ["000002"]


@pytest.mark.slow
def test_a_damaged_trunk_is_trained_again_and_one_of_other_code_goes(
    new_project: NewProject, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.compare import compare_methods

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    root = new_project(train={"rounds": 4})
    (root / ".fedcoe/trunks/0123456789abcdef").mkdir(parents=True)
    options: Any = {"overrides": SETTINGS, "seeds": [0], "rows": ["all"], "cell_only": True}
    compare_methods(str(root), methods=["fedavg"], name="first", **options)
    [file] = root.glob(".fedcoe/trunks/*/*/*.safetensors")
    assert file.stem == "000002" and not (root / ".fedcoe/trunks/0123456789abcdef").exists()
    state, notes = load_state(file)
    file.write_bytes(file.read_bytes()[:-9])
    trained = rounds_trained(monkeypatch)
    compare_methods(str(root), methods=["fedcoe"], name="second", **options)
    assert trained == [1, 2, 3, 4]
    assert len(cells(root)) == 2
    again, made = load_state(file)
    assert made["seconds"] > 0 and len(made["records"]) == 2
    for mine, theirs in zip(made["records"], notes["records"], strict=True):
        # Of the pool's own there are drift and load of an expert that nobody trained.
        assert mine["drift"] == [*theirs["drift"], 0.0]
        assert mine | {"drift": 0, "load_entropy": 0} == theirs | {"drift": 0, "load_entropy": 0}
    for name in ("experts", "momentum", "dispatched"):
        assert np.array_equal(getattr(again, name), getattr(state, name))


@pytest.mark.slow
def test_trainings_outside_comparisons_neither_keep_nor_use_a_trunk(
    new_project: NewProject, run_training: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = new_project(train={"rounds": 3})
    run_training(root, SETTINGS, "fedavg", "cell.json", "partitions", {"row": "all"}, tracked=False)
    [file] = root.glob(".fedcoe/trunks/*/*/*.safetensors")
    trained = rounds_trained(monkeypatch)
    run_training(root, SETTINGS, "fedavg", "figures.json", tracked=False)
    assert trained == [1, 2, 3] and list(root.glob(".fedcoe/trunks/*/*/*")) == [file]
