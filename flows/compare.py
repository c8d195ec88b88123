"""The flows: methods x rows x seeds on the same footing, and ablations of FedCoE.

A cell is one training, kept as one file; which settings a row stands for is said here. Tables and
figures are functions of the cells (`tasks/comparison.py`).
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact

from fedcoe.config import Settings, fingerprint_of, load_settings, read_yaml, validate_settings
from fedcoe.data.dataset import load_dataset
from fedcoe.errors import FedCoEError
from fedcoe.methods.settings import SWITCHES, method_class, method_names
from flows.federated_training import Again, federated_training
from flows.pipeline import check_dataset, partition_once
from tasks.comparison import (
    OF_PARAMS,
    Comparison,
    cell_name,
    check_footing,
    load_cells,
    measures,
    metrics,
    read_cells,
    write_comparison,
)
from tasks.files import write_json
from tasks.locks import reading_data
from tasks.report import build_comparison_page
from tasks.run import code_hash
from tasks.tracking import Tracking, log_row, log_tables, start_study

ROWS = ("plain", "all")
"""What is trained. A third row, `reweighting`, is `plain` predicted a second time."""
ABLATIONS = "ablations.yaml"


@dataclass(frozen=True)
class Cell:
    """One training: what it is called and all that decides it."""

    method: str
    row: str
    seed: int
    settings: Settings
    overrides: tuple[str, ...]
    """Those of the whole comparison, of the row and of the seed."""
    command: str
    order: int | None = None
    """Place in an ablation's table."""

    def key(self, data_hash: str) -> str:
        """16 hex digits: equal keys, equal training."""
        named = self.settings.model_dump(
            mode="json", exclude={"data": True, "runtime": {"workers"}}
        )
        return fingerprint_of([named, data_hash])

    @property
    def training(self) -> str:
        """Equal for cells that differ only in how the trained experts predict.

        With privacy each has a training of its own: a gate update made again is told again.
        """
        only = method_class(self.method).predicts_only(self.settings.method)
        if self.settings.privacy.epsilon:
            only = frozenset()
        decides = {"method": set(only), "runtime": {"workers"}}
        return fingerprint_of(self.settings.model_dump(mode="json", exclude=decides))

    def file(self, name: str) -> str:
        """Its file in a comparison, under the root."""
        return f"results/{name}/cells/{cell_name(self.method, self.row, self.seed)}.json"

    def notes(self, data_hash: str) -> dict[str, Any]:
        """What the file says beside figures and settings."""
        said = {"method": self.method, "row": self.row, "seed": self.seed}
        said |= {"key": self.key(data_hash), "command": self.command}
        return said | ({} if self.order is None else {"order": self.order})

    def tags(self, name: str, parent: Tracking) -> dict[str, str]:
        """Of its MLflow run under the comparison's."""
        tags = {"comparison": name, "row": self.row, "seed": str(self.seed)}
        return tags | {"mlflow.parentRunId": parent.run_id} if parent.run_id else {}


def row_settings(settings: Settings, method: str, row: str) -> Settings:
    """The settings of a method in a row.

    `plain` is the method as its authors left it: its own defaults, FedCoE without the switches.
    `all` has every switch on, patch filters and balanced head as in params.yaml, and weighs what
    seen clients predict with their own models alone. A method that params.yaml names keeps its
    other settings from there.

    Raises:
        FedCoEError: no such method or row, or settings that exclude each other.
    """
    if method not in method_names():
        raise FedCoEError(f"no method {method!r}; there are: {', '.join(method_names())}")
    if row not in ROWS:
        raise FedCoEError(f"no row {row!r}; there are: {', '.join(ROWS)} (reweighting with plain)")
    kind = method_class(method)
    own = kind.Settings(name=method)
    switches = {name: getattr(own, name) for name in SWITCHES if hasattr(own, name)}
    if row == "all":
        momentum = switches["server_momentum"]
        momentum = max(momentum, 0.7) if kind.heavy_ball else momentum
        switches = dict.fromkeys(switches, True) | {"server_momentum": momentum}
        switches |= {name: getattr(settings.method, name) for name in OF_PARAMS}
    elif method == "fedcoe":
        switches = dict.fromkeys(switches, False) | {"server_momentum": 0.0, "patch_filters": 0}
    switches["blend"] = row == "all" and kind.own_model_alone and kind.has_global
    named = settings.method.name == method
    kept = settings.method.model_dump(mode="json") if named else {"name": method}
    found = validate_settings({"method": kept | switches}, f"{method}, row {row}").method
    return settings.model_copy(update={"method": found})


def comparison_cells(
    root: Path,
    overrides: Sequence[str],
    methods: Sequence[str],
    rows: Sequence[str],
    seeds: Sequence[int],
) -> list[Cell]:
    """Every training of a comparison, checked before the first one starts."""
    trained = list(dict.fromkeys("plain" if row == "reweighting" else row for row in rows))
    cells = []
    for seed in seeds:
        own = (*overrides, f"partition.seed={seed}", f"train.seed={seed}")
        settings = load_settings(root / "params.yaml", own)
        for method in methods:
            for row in trained:
                words = ["compare", "--methods", method, "--rows", row, "--seeds", str(seed)]
                found = row_settings(settings, method, row)
                cells.append(Cell(method, row, seed, found, own, _command(words, overrides)))
    return cells


def ablation_sets(root: Path) -> dict[str, list[tuple[str, Mapping[str, Any]]]]:
    """Sets of `ablations.yaml` by name, each of (label, overrides); `all` is their union.

    Raises:
        FedCoEError: no such file, or not of this form.
    """
    path = root / ABLATIONS
    values = read_yaml(path, "the repository has one to copy")
    try:
        sets: dict[str, list[tuple[str, Mapping[str, Any]]]] = {
            str(name): [(str(item["label"]), dict(item["overrides"])) for item in items]
            for name, items in values.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise FedCoEError(f"{path}: must map set names to lists of label, overrides") from None
    union = {label: overrides for items in sets.values() for label, overrides in items}
    labels = [label for items in sets.values() for label, _ in items]
    if len(union) < len(labels) or {"default", "plain"} & set(labels):
        raise FedCoEError(f"{path}: labels must differ, and none may be `default` or `plain`")
    return {**sets, "all": list(union.items())}


def ablation_cells(
    root: Path, overrides: Sequence[str], name: str, seeds: Sequence[int]
) -> list[Cell]:
    """Every training of an ablation: FedCoE with all switches, and each change of it."""
    sets = ablation_sets(root)
    if name not in sets:
        raise FedCoEError(f"no ablation {name!r}; there are: {', '.join(sets)}")
    cells = []
    for seed in seeds:
        for order, (label, changes) in enumerate([("default", {}), *sets[name]]):
            changed = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
            own = [*overrides, *changed, f"partition.seed={seed}", f"train.seed={seed}"]
            base = load_settings(root / "params.yaml", [*overrides, "method.name=fedcoe"])
            switched = row_settings(base, "fedcoe", "all").method
            switches = [f"method.{key}={json.dumps(getattr(switched, key))}" for key in SWITCHES]
            every = [*overrides, "method.name=fedcoe", *switches, *own]
            settings = load_settings(root / "params.yaml", every)
            command = _command(["ablate", name, "--seeds", str(seed)], overrides)
            row = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
            cells.append(Cell("fedcoe", row, seed, settings, tuple(own), command, order))
    return cells


def _command(words: Sequence[str], overrides: Sequence[str]) -> str:
    given = [part for override in overrides for part in ("-S", override)]
    return shlex.join(["fedcoe", *words, *given])


@flow(name="compare", validate_parameters=False)
def compare_methods(
    root: str = ".",
    overrides: Sequence[str] = (),
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    name: str | None = None,
    rows: Sequence[str] = ROWS,
    cell_only: bool = False,
) -> str:
    """Train every method in every row with every seed and write `results/<name>/`.

    A seed decides partition, cohorts, initial weights and batch order, the same for all methods.
    A cell is one file; cells whose file says the same settings and data are not trained again.

    Args:
        root: folder of params.yaml and data/.
        overrides: settings of every training that win over params.yaml, as section.key=value.
        methods: what to train; empty: all methods.
        seeds: of partition and training.
        name: folder under results/; empty: the dataset's name.
        rows: `plain` (with it: reweighting) and `all` switches on.
        cell_only: leave tables and figures to `fedcoe compare --render`.

    Returns:
        The table of all cells in the folder, in Markdown.
    """
    folder = Path(root)
    check_dataset(folder, overrides)
    cells = comparison_cells(folder, overrides, methods or method_names(), rows, seeds)
    return _run(folder, name or load_dataset(folder / "data").info.name, cells, cell_only)


@flow(name="ablate", validate_parameters=False)
def ablate(
    ablation: str, root: str = ".", overrides: Sequence[str] = (), seeds: Sequence[int] = (0, 1, 2)
) -> str:
    """Train FedCoE with each change of a set of ablations.yaml: `results/ablation-<set>/`.

    Returns:
        The table of differences to the default, in Markdown.
    """
    folder = Path(root)
    check_dataset(folder, overrides)
    cells = ablation_cells(folder, overrides, ablation, seeds)
    return _run(folder, f"ablation-{ablation}", cells, False)


def render(root: Path, name: str) -> str:
    """Tables, figures and page of `results/<name>/` from its cells.

    Returns:
        The table, in Markdown.
    """
    folder = root / "results" / name
    cells = load_cells(folder)
    ablation = all("order" in cell for cell in cells)
    reference = ("fedcoe", "default" if ablation else "all")
    if not any((cell["method"], cell["row"]) == reference for cell in cells):
        reference = (cells[0]["method"], cells[0]["row"])  # the first of the table
    comparison = Comparison(name, cells, reference)
    table = write_comparison(folder, comparison)
    build_comparison_page(folder, comparison)
    return table


def _run(root: Path, name: str, cells: Sequence[Cell], cell_only: bool) -> str:
    with reading_data(root):
        return _compare(root, name, cells, cell_only)


def _compare(root: Path, name: str, cells: Sequence[Cell], cell_only: bool) -> str:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise FedCoEError(f"--name {name!r}: begin with a letter; letters, digits, _ . - only")
    data_hash = load_dataset(root / "data").info.hash
    results = root / "results" / name
    if not cell_only:
        _check_others(results, cells, data_hash)
    _check_own(root, name, cells, data_hash)
    tags = {"role": "comparison", "comparison": name}
    memo = root / ".fedcoe" / "comparisons" / name
    memo.parent.mkdir(parents=True, exist_ok=True)
    parent = start_study(root, memo, f"comparison · {name}", {}, tags)
    try:
        groups: dict[str, list[Cell]] = {}
        for cell in cells:
            groups.setdefault(cell.training, []).append(cell)
        for group in groups.values():
            _make(root, name, group, data_hash, parent)
        if cell_only:
            return ""
        table = render(root, name)
    except BaseException:
        parent.finish("FAILED")
        raise
    log_tables(parent, results)
    parent.finish("FINISHED")
    text = (results / "differences.md").read_text() if cells[0].order is not None else table
    create_markdown_artifact(key=re.sub(r"[^a-z0-9]+", "-", name.lower()), markdown=text)
    return text


def _check_others(results: Path, cells: Sequence[Cell], data_hash: str) -> None:
    """Before hours of training: the cells that stay must be comparable with those to come."""
    planned = [
        {"method": cell.method, "row": cell.row, "seed": cell.seed, "data_hash": data_hash}
        | {"settings": cell.settings.model_dump(mode="json")}
        | ({} if cell.order is None else {"order": cell.order})
        for cell in cells
    ]
    coming = {(cell.method, cell.row, cell.seed) for cell in cells}
    kept = [c for c in read_cells(results) if (c["method"], c["row"], c["seed"]) not in coming]
    check_footing([*kept, *planned], results)


def _check_own(root: Path, name: str, cells: Sequence[Cell], data_hash: str) -> None:
    """A file of other settings or data may be all that is left of a day: none is written over."""
    found = [(Path(cell.file(name)), cell.key(data_hash)) for cell in cells]
    lost = [file.stem for file, key in found if _read(root / file).get("key", key) != key]
    if lost:
        named = ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else "")
        raise FedCoEError(
            f"results/{name}/cells: {named} ({len(lost)} in all) of other settings or data would "
            "be written over; compare under another --name, or move or delete them"
        )


def _make(root: Path, name: str, cells: Sequence[Cell], data_hash: str, parent: Tracking) -> None:
    """Make cells of one training, unless their files, or those of another comparison, hold what
    would come out."""
    missing = []
    for cell in cells:
        file, notes = root / cell.file(name), cell.notes(data_hash)
        here = _read(file)
        if here.get("key") == notes["key"]:
            if here.get("code", code_hash()) != code_hash():
                get_run_logger().warning(
                    "%s is kept, but is of other code (commit %s); delete it to train it again",
                    cell.file(name),
                    here["commit"],
                )
            if here.get("order") != cell.order:  # ablations.yaml lists it elsewhere now
                write_json(file, here | notes)
        elif made := _elsewhere(root / "results", notes["key"]):
            write_json(file, {k: v for k, v in made.items() if k != "order"} | notes)
            rows = [cell.row, "reweighting"] if cell.row == "plain" else [cell.row]
            _log(root, name, cell, parent, *rows)
        else:
            missing.append(cell)
    if not missing:
        return
    first, *others = missing
    again = [
        Again(cell.settings.method.model_dump(mode="json"), cell.file(name), cell.notes(data_hash))
        for cell in others
    ]
    federated_training(
        str(root),
        first.overrides,
        first.settings.method.model_dump(mode="json"),
        first.file(name),
        partition_once(root, first.overrides)[0],
        first.notes(data_hash),
        first.tags(name, parent),
        again=again,
    )
    for cell in others:
        _log(root, name, cell, parent, cell.row)
    if first.row == "plain":
        _log(root, name, first, parent, "reweighting")


def _log(root: Path, name: str, cell: Cell, parent: Tracking, *rows: str) -> None:
    """MLflow runs for rows of figures that took no training of their own."""
    if not (tags := cell.tags(name, parent)):
        return
    made = _read(root / cell.file(name))
    for row in rows:
        again = made.get("reweighted") if row == "reweighting" else None
        found = metrics(measures(made, again or made))
        log_row(parent, root, tags | {"row": row}, made, found)


def _elsewhere(results: Path, key: str) -> dict[str, Any]:
    cells = (_read(path) for path in sorted(results.glob("*/cells/*.json")))
    return next((cell for cell in cells if cell.get("key") == key), {})


def _read(path: Path) -> dict[str, Any]:
    """A cell; empty if there is none that can be used."""
    try:
        cell = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cell if isinstance(cell, dict) and "row" in cell else {}
