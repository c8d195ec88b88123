"""Comparisons end to end: what a row trains, which cells are trained, what a kill costs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedcoe.config import load_settings, validate_settings
from fedcoe.errors import FedCoEError
from fedcoe.methods.settings import method_class, method_names
from flows.compare import Cell, ablation_cells, ablation_sets, comparison_cells, row_settings
from tasks.outbox import outboxes

REPOSITORY = Path(__file__).parents[2]


def test_cells_that_differ_in_prediction_share_a_training_unless_it_is_private() -> None:
    for epsilon, trainings in ((0.0, 1), (8.0, 2)):
        settings = [
            validate_settings(
                {"method": {"reweighting": on}, "privacy": {"epsilon": epsilon}}, "test"
            )
            for on in (False, True)
        ]
        cells = [Cell("fedcoe", "all", 0, found, (), "") for found in settings]
        assert len({cell.training for cell in cells}) == trainings


SWITCHES = ("balanced_softmax", "server_momentum", "reweighting", "coordination_head")


def switches(method: str, row: str, **values: Any) -> tuple[Any, ...]:
    settings = validate_settings({"method": {"name": "fedcoe"}} | values, "test")
    found = row_settings(settings, method, row).method
    return tuple(getattr(found, name) for name in SWITCHES)


@pytest.mark.parametrize(
    ("method", "plain", "every"),
    [
        ("fedcoe", (False, 0.0, False, False), (True, 0.7, True, True)),
        ("fedavg", (False, 0.0, False, False), (True, 0.7, True, True)),
        ("fedavgm", (False, 0.9, False, False), (True, 0.9, True, True)),
        ("fedadam", (False, 0.9, False, False), (True, 0.9, True, True)),
        ("fedrod", (True, 0.0, False, False), (True, 0.7, True, True)),
    ],
)
def test_rows_turn_switches_off_and_on_but_those_that_are_the_method(
    method: str, plain: tuple[Any, ...], every: tuple[Any, ...]
) -> None:
    assert switches(method, "plain") == plain
    assert switches(method, "all") == every


@pytest.mark.parametrize("method", method_names())
def test_every_method_takes_every_row(method: str) -> None:
    assert switches(method, "all")[0] is True
    default = method_class(method).Settings(name=method)
    assert method == "fedcoe" or switches(method, "plain") == tuple(
        getattr(default, name) for name in SWITCHES
    )


def test_a_method_keeps_its_other_settings_from_params_and_no_one_elses() -> None:
    settings = validate_settings({"method": {"name": "fedcoe", "experts": 2}}, "test")
    assert row_settings(settings, "fedcoe", "plain").method.model_dump()["experts"] == 2
    assert row_settings(settings, "ifca", "plain").method == method_class("ifca").Settings(
        name="ifca"
    )


def test_patches_and_balanced_head_of_params_are_for_every_methods_row_all() -> None:
    chosen = {"patch_filters": 5, "balanced_head": True}
    settings = validate_settings({"method": {"name": "fedcoe"} | chosen}, "test")
    for method in ("fedcoe", "fedavg", "ditto"):
        every, plain = (row_settings(settings, method, row).method for row in ("all", "plain"))
        assert (every.patch_filters, every.balanced_head) == (5, True)
        assert (plain.patch_filters, plain.balanced_head) == (0, False)


@pytest.mark.parametrize(
    ("method", "blends"),
    [
        ("ditto", True),
        ("fedrod", True),
        ("fedavg_ft", True),
        ("fedcoe", False),
        ("fedavg", False),
        ("local", False),
    ],
)
def test_row_all_weighs_own_models_where_the_method_would_use_them_alone(
    method: str, blends: bool
) -> None:
    settings = validate_settings({"method": {"name": "fedcoe"}}, "test")
    every, plain = (row_settings(settings, method, row).method for row in ("all", "plain"))
    assert (every.blend, plain.blend) == (blends, False)
    asked = validate_settings({"method": {"name": method, "blend": True}}, "test")
    assert not row_settings(asked, method, "plain").method.blend


def test_reweighting_trains_nothing_of_its_own(tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    cells = comparison_cells(tmp_path, [], ["fedavg"], ["plain", "reweighting"], [3])
    assert [(cell.row, cell.seed) for cell in cells] == [("plain", 3)]
    assert cells[0].settings.partition.seed == cells[0].settings.train.seed == 3
    with pytest.raises(FedCoEError, match="no row 'best'"):
        comparison_cells(tmp_path, [], ["fedavg"], ["best"], [0])
    with pytest.raises(FedCoEError, match="no method 'nosuch'"):
        comparison_cells(tmp_path, [], ["nosuch"], ["all"], [0])


def test_a_key_names_what_decides_the_result_and_nothing_else(tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)

    def key(*overrides: str, data: str = "d", row: str = "all") -> str:
        [cell] = comparison_cells(tmp_path, overrides, ["fedavg"], [row], [0])
        return cell.key(data)

    assert key() == key("runtime.workers=2") == key("tune.trials=3") == key("data.name=other")
    others = [key("train.lr=0.05"), key("runtime.precision=fp32"), key(data="e"), key(row="plain")]
    assert len({key(), *others}) == 5


@pytest.mark.parametrize("name", sorted(ablation_sets(REPOSITORY)))
def test_every_ablation_of_the_repository_is_possible_and_changes_something(name: str) -> None:
    cells = ablation_cells(REPOSITORY, [], name, [0])
    default, *changed = cells
    assert default.row == "default" and changed
    assert default.settings == row_settings(
        load_settings(REPOSITORY / "params.yaml", ["train.seed=0", "partition.seed=0"]),
        "fedcoe",
        "all",
    )
    assert len({cell.row for cell in cells}) == len(cells)
    # A sweep names its default once more, params.yaml has no patches and no balanced head: not
    # trained twice.
    same = [cell.row for cell in changed if cell.key("") == default.key("")]
    assert set(same) <= {"m-4", "k-1", "equal-capacity", "no-patch-features", "no-balanced-head"}


def test_all_ablations_are_the_union_of_the_sets() -> None:
    sets = ablation_sets(REPOSITORY)
    union = sets.pop("all")
    assert union == [item for items in sets.values() for item in items]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 3", "must map set names"),
        ("a: [{label: x}]", "must map set names"),
        ("a: [{label: x, overrides: {}}, {label: x, overrides: {}}]", "labels must differ"),
        ("a: [{label: default, overrides: {}}]", "none may be `default`"),
        ("a: [", "not readable"),
    ],
)
def test_mistakes_in_ablations_are_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "ablations.yaml").write_text(text)
    with pytest.raises(FedCoEError, match=rf"ablations.yaml: .*{words}"):
        ablation_sets(tmp_path)


def test_an_unknown_setting_in_an_ablation_is_an_error(tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    (tmp_path / "ablations.yaml").write_text("a: [{label: x, overrides: {method.magic: 1}}]")
    with pytest.raises(FedCoEError, match=r"method.*magic.*unknown key"):
        ablation_cells(tmp_path, [], "a", [0])


def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is trained from now on."""
    import flows.compare

    train, names = flows.compare.federated_training, []

    def note(*args: Any, **options: Any) -> Any:
        names.append(Path(args[3]).stem)
        return train(*args, **options)

    monkeypatch.setattr(flows.compare, "federated_training", note)
    return names


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_a_comparison_trains_once_tracks_its_rows_and_is_drawn_again_from_its_cells(
    new_project: Callable[..., Path], prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    from flows.compare import ablate, compare_methods, render

    root = new_project(train={"rounds": 1})
    uri = f"sqlite:///{root}/.fedcoe/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    names = trained(monkeypatch)
    options = {"methods": ["fedcoe", "local"], "seeds": [1], "name": "tiny"}
    table = compare_methods(str(root), **options)
    every = {f"{m}-{r}-seed1" for m in ("fedcoe", "local") for r in ("plain", "all")}
    assert set(names) == every and len(names) == 4
    folder = root / "results" / "tiny"
    before = files(folder)
    assert len(table.splitlines()) == 2 + 6

    assert compare_methods(str(root), **options) == table
    assert len(names) == 4 and files(folder) == before

    older, said = folder / "cells/local-all-seed1.json", []
    older.write_text(json.dumps(json.loads(older.read_text()) | {"code": "of before"}))
    logger = SimpleNamespace(warning=lambda text, *values: said.append(text % values))
    monkeypatch.setattr("flows.compare.get_run_logger", lambda: logger)
    compare_methods(str(root), **options)
    assert len(names) == 4
    [sentence] = said
    assert sentence.startswith(
        "results/tiny/cells/local-all-seed1.json is kept, but is of other code"
    )
    older.write_bytes(before["cells/local-all-seed1.json"])

    cell = json.loads(before["cells/fedcoe-plain-seed1.json"])
    assert cell["command"] == "fedcoe compare --methods fedcoe --rows plain --seeds 1"
    assert cell["settings"]["method"]["server_momentum"] == 0.0
    assert cell["timing"]["train_seconds"] > 0 and cell["timing"]["torch"]
    assert cell["timing"]["dtype"] == "float32"  # as params.yaml says
    assert cell["reweighted"]["evaluate"]["global"] == cell["evaluate"]["global"]
    assert cell["reweighted"]["clients"] != cell["clients"]
    assert "few_shot" in cell["cold_start"] and "few_shot" not in cell["reweighted"]["cold_start"]
    assert "reweighted" not in json.loads(before["cells/fedcoe-all-seed1.json"])

    client = json.loads(before["cells/fedcoe-all-seed1.json"])["clients"][0]
    assert client["gate_0"] + client["gate_1"] == pytest.approx(1.0, abs=1e-4) != client["gate_0"]
    assert "pool.png" in before and "gate_0" not in before["cells/local-all-seed1.json"].decode()

    for path in folder.iterdir():
        if path.is_file():
            path.unlink()
    assert render(root, "tiny") == table and files(folder) == before

    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("fedcoe").experiment_id])
    [parent] = [r for r in runs if r.data.tags["role"] == "comparison"]
    artifacts = {f.path for f in client.list_artifacts(parent.info.run_id)}
    assert {"table.md", "index.html", "differences.csv"} <= artifacts
    assert {r.info.status for r in runs} == {"FINISHED"}
    [left] = outboxes(root)  # a comparison can be taken up again
    assert left.first()["tags"]["role"] == "comparison" and not left.waiting(uri)
    cells = [r for r in runs if r.data.tags["role"] == "cell"]
    assert {(t["method"], t["row"], t["seed"]) for t in (r.data.tags for r in cells)} == {
        (m, r, "1") for m in ("fedcoe", "local") for r in ("plain", "reweighting", "all")
    }
    assert {r.data.tags["mlflow.parentRunId"] for r in cells} == {parent.info.run_id}
    assert {r.data.tags["comparison"] for r in cells} == {"tiny"}
    assert all("final.personalized" in r.data.metrics for r in cells)

    # The default of an ablation is the comparison's own cell, so one training is left.
    (root / "ablations.yaml").write_text(
        "heads: [{label: no head, overrides: {method.coordination_head: false}}]"
    )
    said = ablate("heads", str(root), (), [1])
    assert names[4:] == ["fedcoe-no-head-seed1"]
    assert "no-head" in said and "+0.00" not in said.splitlines()[0]
    own = json.loads((root / "results/ablation-heads/cells/fedcoe-default-seed1.json").read_text())
    assert own["clients"] == json.loads(before["cells/fedcoe-all-seed1.json"])["clients"]

    with pytest.raises(FedCoEError, match=r"not on one footing: train.lr = 0.05 and 0.1"):
        compare_methods(str(root), ["train.lr=0.1"], ["fedcoe"], [0], "tiny")
    kept = files(root / "results")
    for only in (True, False):
        with pytest.raises(FedCoEError, match=r"tiny/cells: fedcoe-plain-seed1, .* \(4 in all\)"):
            compare_methods(str(root), ["train.lr=0.1"], **options, cell_only=only)
    assert len(names) == 5 and files(root / "results") == kept


@pytest.mark.slow
def test_reweighting_a_plain_training_gives_what_training_with_it_gives(
    new_project: Callable[..., Path], run_training: Callable[..., Any]
) -> None:
    root = new_project(train={"rounds": 2})
    off = {"name": "fedcoe", "experts": 2, "reweighting": False}
    run_training(root, (), off, "off.json", "partitions", {"row": "plain"}, tracked=False)
    run_training(root, (), off | {"reweighting": True}, "on.json", "partitions", tracked=False)
    again, own = (json.loads((root / name).read_text()) for name in ("off.json", "on.json"))
    for part in ("clients", "evaluate"):
        assert again["reweighted"][part] == own[part] and again[part] != own[part]
    modes = ("none", "unlabelled", "labels")
    assert all(again["reweighted"]["cold_start"][m] == own["cold_start"][m] for m in modes)


PREDICTED = """\
heads:
  - {label: no head, overrides: {method.coordination_head: false}}
  - {label: patches, overrides: {method.patch_filters: 5, method.balanced_head: true}}
  - {label: uniform, overrides: {method.gate: uniform, method.coordination_head: false}}
  - {label: other experts, overrides: {method.balanced_softmax: false}}
"""


@pytest.mark.slow
def test_an_ablation_trains_once_what_differs_in_predictions_only_and_gives_the_same_figures(
    new_project: Callable[..., Path], prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    from flows.compare import ablate

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    found = []
    for alone in (False, True):
        root = new_project(train={"rounds": 3}, evaluate={"every": 2})
        if not alone:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/.fedcoe/mlflow.db")
        (root / "ablations.yaml").write_text(PREDICTED)
        with monkeypatch.context() as patch:
            names = trained(patch)
            if alone:
                patch.setattr("flows.compare.Cell.training", property(lambda self: self.row))
                patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
            ablate("heads", str(root), (), [0])
        assert len(names) == (5 if alone else 2)
        folder = root / "results/ablation-heads/cells"
        found.append({path.stem: json.loads(path.read_text()) for path in folder.iterdir()})
    at_once, alone_ = found
    assert at_once.keys() == alone_.keys() and len(at_once) == 5
    for name, cell in at_once.items():
        other = alone_[name]
        again = name.split("-seed")[0] in ("fedcoe-no-head", "fedcoe-patches", "fedcoe-uniform")
        assert len(cell["curves"]) == (1 if again else 2) and len(other["curves"]) == 2
        ((*_, last), (*_, own)) = (c.pop("curves") for c in (cell, other))
        assert last == own
        for timed in (cell, other):
            timed.pop("timing"), timed["train"].pop("best_round")
        assert cell == other
    assert len({cell["evaluate"]["global"]["nll"] for cell in at_once.values()}) == 5

    client = MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("fedcoe").experiment_id])
    rows = [r.data.tags["row"] for r in runs if r.data.tags["role"] == "cell"]
    assert sorted(rows) == ["default", "no-head", "other-experts", "patches", "uniform"]


@pytest.mark.slow
def test_a_killed_comparison_loses_no_finished_cell(
    new_project: Callable[..., Path], prefect_api: str
) -> None:
    root = new_project(train={"rounds": 2})
    words = ["compare", "--methods", "fedavg,local", "--seeds", "0", "--name", "tiny"]
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    command = [sys.executable, "-c", "from flows.cli import main; main()", *words]
    cells = root / "results/tiny/cells"
    process = subprocess.Popen(
        command, cwd=root, env=environment | {"PREFECT_API_URL": prefect_api},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 400
        while len(list(cells.glob("*.json"))) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = {path.name: path.read_bytes() for path in cells.glob("*.json")}
    assert 2 <= len(kept) < 4 and not (root / "results/tiny/table.csv").exists()
    done = subprocess.run(
        command, cwd=root, env=environment | {"PREFECT_API_URL": prefect_api},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    after = {path.name: path.read_bytes() for path in cells.glob("*.json")}
    assert len(after) == 4
    assert {name: after[name] for name in kept} == kept
    assert "| local | plain |" in done.stdout


def test_an_unreachable_tracking_server_stops_no_comparison(
    new_project: Callable[..., Path], prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.compare import compare_methods

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    root = new_project(train={"rounds": 1})
    options = {"methods": ["fedavg_ft"], "seeds": [0, 1], "name": "alone", "rows": ["all"]}
    assert "| fedavg_ft | all | 2 |" in compare_methods(str(root), **options)
    assert len(files(root / "results/alone/cells")) == 2


@pytest.mark.parametrize("name", ["../outside", "a b"])
def test_a_name_stays_inside_results(
    new_project: Callable[..., Path], prefect_api: str, name: str
) -> None:
    from flows.compare import compare_methods

    root = new_project()
    with pytest.raises(FedCoEError, match="--name"):
        compare_methods(str(root), methods=["local"], seeds=[0], name=name)
