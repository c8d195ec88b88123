"""Picking: what `fedcoe experts` and the registry's pages say of every version."""

import csv
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedcoe.errors import FedCoEError

Command = Callable[..., subprocess.CompletedProcess[str]]


def test_every_version_has_a_card_as_description_and_artifact(stores: Any, tmp_path: Path) -> None:
    from mlflow.artifacts import download_artifacts

    for model in stores.search_registered_models():
        version = stores.get_model_version_by_alias(model.name, "candidate")
        assert version.description.startswith(f"# {model.name}\n\n## Intended use")
        assert f"`{version.run_id}`" in version.description
        uri = f"models:/{model.name}/{version.version}"
        folder = Path(download_artifacts(uri, dst_path=str(tmp_path / model.name)))
        assert (folder / "artifacts/model_card.md").read_text() == version.description


def test_experts_tags_agree_with_the_evaluation(project: Path, stores: Any) -> None:
    rows = list(csv.DictReader((project / "plots/experts.csv").open()))
    clients = list(csv.DictReader((project / "plots/clients.csv").open()))
    size = (project / "models/experts/expert-0.safetensors").stat().st_size
    for row in rows:
        tags = stores.get_model_version_by_alias(f"fedcoe-expert-{row['expert']}", "candidate").tags
        for name, value in json.loads(tags["accuracy_by_class"]).items():
            assert value == pytest.approx(float(row[f"accuracy_class_{name}"]), abs=1e-4)
        best = {
            c["client"]
            for c in clients
            if float(c[f"expert_accuracy_{row['expert']}"])
            == max(float(v) for k, v in c.items() if k.startswith("expert_accuracy_"))
        }
        assert {part.split(" ")[0] for part in tags["serves_best"].split(", ") if part} == best
        assert float(tags["drift"]) > 0
        assert int(tags["bytes"]) == pytest.approx(size, rel=0.05)
        assert tags["git_commit"] == "unknown" and tags["data_hash"]


def test_the_command_lists_them_and_shows_a_card(project: Path, fedcoe_here: Command) -> None:
    listed = fedcoe_here(project, "experts", COLUMNS="80")
    assert listed.returncode == 0
    [mixture] = [line for line in listed.stdout.splitlines() if line.startswith("fedcoe  ")]
    figures = json.loads((project / "metrics/evaluate.json").read_text())
    for part in ("global", "personalized"):
        assert f" {100 * figures[part]['accuracy']:.1f} " in mixture
    assert all(word in listed.stdout for word in ("fedcoe-expert-1", "serves best", "drift"))
    shown = fedcoe_here(project, "experts", "fedcoe-expert-1")
    assert shown.stdout.startswith("# fedcoe-expert-1")
    assert "## Limits" in shown.stdout and "| class | accuracy alone |" in shown.stdout


@pytest.mark.parametrize("columns", ["60", "80"])
def test_names_and_figures_of_the_list_are_whole_at_any_width(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, columns: str
) -> None:
    from typer.testing import CliRunner

    from flows.cli import app

    row = {
        "version": "12",
        "mixture": "12",
        "aliases": "candidate, champion",
        "accuracy_global": "0.7444",
    }
    mixture = row | {"accuracy_personalized": "0.9", "accuracy_cold_none": "0.7"}
    mixture |= {"name": "fedcoe", "accuracy_cold_unlabelled": "1.0", "dataset": "mnist5k"}
    expert = row | {"name": "fedcoe-expert-1", "accuracy": "0.5", "load": "0.25", "clients": "10"}
    expert |= {"drift": "0.012", "serves_best": "client-013 (0.97), client-003 (0.95)"}
    monkeypatch.setattr("tasks.registry.registered_experts", lambda: [mixture, expert])
    monkeypatch.setenv("COLUMNS", columns)
    lines = CliRunner().invoke(app, ["experts", "--root", str(tmp_path)]).stdout.splitlines()
    assert [line.split() for line in lines if "  " in line.strip()] == [
        ["name", "version", "alias", "global", "personalized", "none", "unlabelled", "data"],
        ["fedcoe", "12", "candidate", "74.4", "90.0", "70.0", "100.0", "mnist5k"],
        ["name", "version", "alias", "alone", "load", "clients", "drift", "serves", "best"],
        ["fedcoe-expert-1", "12", "candidate", "50.0", "25.0", "10", "0.012", "client-013"],
    ]
    assert [line.strip() for line in lines].count("champion") == 2


def test_a_card_that_is_not_there_is_a_users_mistake(stores: Any) -> None:
    from tasks.registry import registered_card

    assert registered_card("fedcoe", "1") == registered_card("fedcoe")
    with pytest.raises(FedCoEError, match="no model 'fedcoe-expert-9'"):
        registered_card("fedcoe-expert-9")
    with pytest.raises(FedCoEError, match="version 7 has no card; versions with one: 1"):
        registered_card("fedcoe", "7")
