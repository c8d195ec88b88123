"""Imports go one way: cli -> flows -> tasks -> fedcoe; the library stays free of the tools."""

import ast
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from fedcoe.config import Settings
from flows.settings_page import settings_page

ROOT = Path(__file__).parent.parent
TOOLS = {"prefect", "mlflow", "dvc", "optuna", "typer", "rich", "click"}
FILES = {layer: sorted((ROOT / layer).rglob("*.py")) for layer in ("fedcoe", "tasks", "flows")}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").split(".")[0]


def names(paths):
    return [str(p.relative_to(ROOT)) for p in paths]


@pytest.mark.parametrize(
    ("layer", "forbidden"),
    [("fedcoe", TOOLS | {"tasks", "flows"}), ("tasks", {"flows", "typer"})],
)
def test_layers_import_only_what_is_below_them(layer, forbidden):
    assert FILES[layer]
    bad = {
        str(path.relative_to(ROOT)): found
        for path in FILES[layer]
        if (found := forbidden & set(imported(path)))
    }
    assert not bad


def test_no_layer_imports_relatively_so_that_the_rule_above_sees_every_import():
    relative = [
        path
        for paths in FILES.values()
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not names(relative)


def reached(entry):
    """The project's files that one imports (`from ... import`), and those that they import."""
    seen, ahead = set(), [ROOT / entry]
    while ahead:
        path = ahead.pop()
        if path in seen or not path.exists():
            continue
        seen.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                for name in (node.module, *(f"{node.module}.{a.name}" for a in node.names)):
                    module = ROOT.joinpath(*name.split("."))
                    ahead += [module.with_suffix(".py"), module / "__init__.py"]
    return seen


@pytest.mark.parametrize(
    ("stage", "entry"),
    [
        ("partition", "flows/pipeline.py"),
        ("train", "flows/federated_training.py"),
        ("evaluate", "flows/pipeline.py"),
        ("cold_start", "flows/pipeline.py"),
        ("report", "tasks/report.py"),
    ],
)
def test_a_stage_is_run_again_when_a_file_that_it_imports_changes(stage, entry):
    watched = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"][stage]["deps"]
    files = names(reached(entry))
    assert len(files) > 20
    assert not [f for f in files if not any(f == w or f.startswith(f"{w}/") for w in watched)]


@pytest.mark.parametrize(
    ("file", "stage"),
    [("dvc.yaml", "train"), ("dvc.yaml", "baseline"), ("results/dvc.yaml", "compare")],
)
def test_what_trains_is_run_again_when_any_setting_of_a_training_changes(file, stage):
    listed = YAML(typ="safe").load(ROOT / file)["stages"][stage]["params"]
    sections = {name.partition(".")[0] for name in listed}
    # `data` names what lies in data/, which is watched itself; a search is no training.
    assert sections == set(Settings.model_fields) - {"data", "tune"}
    assert sections <= set(YAML(typ="safe").load(ROOT / "params.yaml"))


def test_the_page_of_settings_is_as_it_is_made_and_gives_each_a_meaning():
    page = settings_page()
    assert (ROOT / "docs/settings.md").read_text() == page
    assert "|  |\n" not in page


def test_the_library_prints_nothing():
    loud = [
        path
        for path in FILES["fedcoe"]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and (
            (isinstance(node.func, ast.Name) and node.func.id == "print")
            or ast.unparse(node.func).startswith(("sys.stdout", "sys.stderr"))
        )
    ]
    assert not names(loud)


def test_nothing_that_is_loaded_can_execute_code():
    # CIFAR comes pickled; its reader subclasses Unpickler and refuses every class but arrays.
    readers = {"fedcoe/data/sources/cifar.py"}
    calls = ("pickle.load", "torch.load", "allow_pickle=True", "eval(", "exec(")
    bad = [
        path
        for paths in FILES.values()
        for path in paths
        if any(call in path.read_text() for call in calls)
        or (
            ({"pickle", "joblib", "cloudpickle", "dill"} & set(imported(path)))
            and str(path.relative_to(ROOT)) not in readers
        )
    ]
    assert not names(bad)


def test_there_is_no_drawer_for_everything():
    drawers = [
        path
        for paths in FILES.values()
        for path in paths
        if path.stem in {"utils", "util", "helpers", "common", "misc"}
    ]
    assert not names(drawers)


def test_every_module_of_the_library_says_why_it_exists():
    silent = [
        path
        for path in FILES["fedcoe"]
        if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not names(silent)
