"""Imports go one way: cli -> flows -> tasks -> fedcoe; the library stays free of the tools."""

import ast
from pathlib import Path

import pytest

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
