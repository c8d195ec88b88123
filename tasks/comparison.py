"""From the cells of a comparison (one JSON file a training) to its tables and figures.

All of it is a function of the cells alone: no training, no clock, no path of the machine. So a
comparison can be drawn again years later, and a table can never say what no cell says.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fedcoe.durable import write_atomic
from fedcoe.errors import FedCoEError
from fedcoe.methods.settings import MethodSettings
from tasks import figures
from tasks.files import write_csv

Values = dict[str, Any]

ACCURACIES = {
    "global": ("evaluate", "global", "accuracy"),
    "personalized": ("evaluate", "personalized", "accuracy"),
    "mean of clients": ("evaluate", "personalized", "mean"),
    "worst tenth": ("evaluate", "personalized", "worst10"),
    "cold start, none": ("cold_start", "none", "accuracy"),
    "cold start, unlabelled": ("cold_start", "unlabelled", "accuracy"),
    "cold start, labels": ("cold_start", "labels", "accuracy"),
    "few-shot": ("cold_start", "few_shot", "accuracy"),
}
"""Where a cell has them, as shares; tables have them in %."""
NEEDS_GLOBAL = {"global", *(name for name in ACCURACIES if name.startswith("cold start"))}
WINS = "win rate"
COSTS = {"MB a round": 2, "images": 0, "seconds": 1}
"""What a training cost, with the digits to show."""
COMPARED = (*ACCURACIES, WINS)
OF_PARAMS = ("patch_filters", "balanced_head")
"""Switches that row `all` has as params.yaml has them, so that they differ between comparisons."""
ONLY_IN_CSV = {"few-shot"}  # it trains, so it must not stand beside what does not


@dataclass(frozen=True)
class Comparison:
    """The cells of one folder under `results/`."""

    name: str
    cells: list[Values]
    reference: tuple[str, str] = ("fedcoe", "all")
    """Method and row that differences are taken to."""

    @property
    def is_ablation(self) -> bool:
        return self.reference[1] == "default"


def load_cells(folder: Path) -> list[Values]:
    """The cells of a comparison that may be compared.

    Raises:
        FedCoEError: there is none, one is damaged, or they are not on one footing.
    """
    cells = read_cells(folder)
    if not cells:
        raise FedCoEError(
            f"{folder}: no cells here; `fedcoe compare` or `fedcoe ablate` makes them"
        )
    check_footing(cells, folder)
    return cells


def read_cells(folder: Path) -> list[Values]:
    """Read `folder/cells/*.json`, in the order of tables: FedCoE, the others by name, Local."""
    cells = []
    for path in sorted((folder / "cells").glob("*.json")):
        try:
            cell = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FedCoEError(f"{path}: damaged ({error}); delete it and compare again") from None
        if "row" in cell:  # cells from before there were rows are left alone
            cells.append(cell)
    return sorted(cells, key=_place)


def _place(cell: Values) -> tuple[Any, ...]:
    method, row = cell["method"], cell["row"]
    order = cell.get("order", 0 if row == "plain" else 1)
    return method != "fedcoe", method == "local", method, order, row, cell["seed"]


def check_footing(cells: Sequence[Values], folder: Path) -> None:
    """Refuse to compare cells whose data, partition or common settings differ.

    Raises:
        FedCoEError: names the cells and what differs.
    """
    first: dict[tuple[str, Any], tuple[str, Any]] = {}
    for cell in cells:
        found = {("data", ""): cell["data_hash"]}
        if "partition_fingerprint" in cell:  # not yet known of a cell to come
            found[("partition", cell["seed"])] = cell["partition_fingerprint"]
        if "order" not in cell:  # an ablation may change what it likes
            found |= {(key, ""): value for key, value in _footing(cell["settings"]).items()}
        if cell["row"] == "all":
            method = cell["settings"].get("method", {})
            for switch in OF_PARAMS:  # left out of settings when off
                off = MethodSettings.model_fields[switch].default
                found[(f"method.{switch}", "all")] = method.get(switch, off)
            found[("method.blend", cell["method"])] = method.get("blend", False)
        name = cell_name(cell["method"], cell["row"], cell["seed"])
        for what, value in found.items():
            before, known = first.setdefault(what, (name, value))
            if known != value:
                raise FedCoEError(
                    f"{folder}: {before} and {name} are not on one footing: {what[0]} = {known} "
                    f"and {value}; delete the stale cells or give another --name"
                )


def _footing(settings: Mapping[str, Any]) -> Values:
    """What all methods must share, whatever the seed."""
    sections = ("partition", "model", "train", "evaluate", "cold_start")
    shared = {
        f"{section}.{key}": value
        for section in sections
        for key, value in settings[section].items()
        if key != "seed"
    }
    # Not there where they are off.
    longest = settings["train"].get("max_update_norm", 0.0)
    absent = {name: settings.get(name) for name in ("faults", "privacy")}
    return shared | absent | {"train.max_update_norm": longest}


def cell_name(method: str, row: str, seed: int) -> str:
    """File name of a cell, without its ending."""
    return f"{method}-{row}-seed{seed}"


def results(comparison: Comparison) -> pd.DataFrame:
    """One line a method, row and seed: accuracies and win rate in %, costs.

    A cell that was also predicted with reweighting gives two lines: its costs are those of the
    one training. NaN where a figure has no meaning: `global` of a method without a global model,
    the win rate without Local on the same seed.
    """
    local = {
        cell["seed"]: _by_client(cell)
        for cell in comparison.cells
        if (cell["method"], cell["row"]) == ("local", "plain")
    }
    lines = []
    for cell in comparison.cells:
        rows = [(cell["row"], cell)]
        if cell["row"] == "plain":
            rows.append(("reweighting", cell.get("reweighted") or cell))
        for row, scored in rows:
            line = {"method": cell["method"], "row": row, "seed": cell["seed"]}
            found = measures(cell, scored)
            rival = local.get(cell["seed"])
            found[WINS] = win_rate(_by_client(scored), rival) if rival else math.nan
            lines.append(line | {k: v if k in COSTS else 100 * v for k, v in found.items()})
    return pd.DataFrame(lines)


def measures(cell: Values, scored: Values) -> dict[str, float]:
    """Accuracies, as shares, of `scored` (a cell, or its part with reweighting), and costs."""
    found = {
        name: math.nan if name in NEEDS_GLOBAL and not cell["has_global"] else _at(scored, path)
        for name, path in ACCURACIES.items()
    }
    train = cell["train"]
    moved = train["bytes_up"] + train["bytes_down"]
    return found | {
        "MB a round": moved / train["rounds"] / 1e6,
        "images": float(train["images_trained"]),
        "seconds": float(cell["timing"]["train_seconds"]),
    }


def metrics(found: Mapping[str, float]) -> dict[str, float]:
    """What is known of `measures`, under names MLflow takes."""
    known = {name: value for name, value in found.items() if not math.isnan(value)}
    return {re.sub(r"\W+", "_", name): value for name, value in known.items()}


def _at(values: Any, path: Sequence[str]) -> float:
    for name in path:
        values = values.get(name) if isinstance(values, dict) else None
    return float(values) if isinstance(values, int | float) else math.nan


def _by_client(scored: Values) -> dict[str, float]:
    return {client["client"]: client["accuracy"] for client in scored["clients"]}


def win_rate(own: Mapping[str, float], rival: Mapping[str, float]) -> float:
    """Share of clients whose accuracy beats the rival's on the same client; ties count half."""
    gaps = np.sign([own[name] - rival[name] for name in own])
    return float((1 + gaps).mean() / 2)


def summary(lines: pd.DataFrame) -> pd.DataFrame:
    """Over seeds: mean and standard deviation (n - 1) of every measure, and the number of seeds."""
    groups = lines.groupby(["method", "row"], sort=False)
    table = pd.DataFrame({"seeds": groups["seed"].nunique()})
    for name in (*COMPARED, *COSTS):
        table[name] = groups[name].mean()
        table[f"{name} std"] = groups[name].std(ddof=1)
    return table.reset_index()


def paired_interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean of paired differences and its 95 % confidence interval (Student's t).

    Returns:
        (mean, low, high); low and high are NaN with fewer than two pairs.
    """
    d = np.asarray(differences, dtype=np.float64)
    if not len(d):
        return math.nan, math.nan, math.nan
    half = math.nan
    if len(d) > 1:
        from scipy import stats  # a quarter of a second that a training can do without

        half = float(stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / np.sqrt(len(d)))
    return float(d.mean()), float(d.mean()) - half, float(d.mean()) + half


def differences(lines: pd.DataFrame, reference: tuple[str, str]) -> pd.DataFrame:
    """Every other row minus the reference, paired by seed, in points; empty without reference.

    Columns method, row, measure, pairs, difference, low, high.
    """
    by_row = dict(list(lines.set_index("seed").groupby(["method", "row"], sort=False)))
    if reference not in by_row:
        return pd.DataFrame(columns=["method", "row", "measure", "pairs", "difference"])
    found = []
    for (method, row), own in by_row.items():
        if (method, row) == reference:
            continue
        for measure in COMPARED:
            gaps = (own[measure] - by_row[reference][measure]).dropna()
            mean, low, high = paired_interval(list(gaps))
            found.append(
                {"method": method, "row": row, "measure": measure, "pairs": len(gaps)}
                | {"difference": mean, "low": low, "high": high}
            )
    return pd.DataFrame(found)


def shown(mean: float, spread: float = math.nan, digits: int = 2) -> str:
    """`mean ± spread`; the mean alone without a spread, `-` without a mean."""
    if math.isnan(mean):
        return "-"
    text = f"{mean:,.{digits}f}"
    return text if math.isnan(spread) else f"{text} ± {spread:,.{digits}f}"


def shown_difference(mean: float, low: float, high: float) -> str:
    """`mean [low, high]`, bold if the interval excludes 0; `-` for what is not known."""
    if math.isnan(mean):
        return "-"
    if math.isnan(low):
        return f"{mean:+.2f} [-]"
    text = f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def table_rows(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table a person reads."""
    kept = [name for name in COMPARED if name not in ONLY_IN_CSV]
    lines = []
    for row in table.to_dict("records"):
        line = [row["method"], row["row"], str(row["seeds"])]
        line += [shown(row[name], row[f"{name} std"]) for name in kept]
        line += [shown(row[name], digits=digits) for name, digits in COSTS.items()]
        lines.append(line)
    return ["method", "row", "seeds", *kept, *COSTS], lines


def difference_rows(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the paired differences: one line a row, one column a measure."""
    kept = [name for name in COMPARED if name not in ONLY_IN_CSV]
    lines = []
    for (method, row), own in table.groupby(["method", "row"], sort=False):
        by_name = own.set_index("measure")[["difference", "low", "high"]]
        lines.append([method, row, *(shown_difference(*by_name.loc[name]) for name in kept)])
    return ["method", "row", *kept], lines


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def curves(comparison: Comparison) -> dict[tuple[str, str], pd.DataFrame]:
    """(method, row) to mean curves over seeds: one line an evaluated round."""
    frames: dict[tuple[str, str], list[pd.DataFrame]] = {}
    for cell in comparison.cells:
        frame = pd.DataFrame(cell["curves"])
        if not cell["has_global"]:
            frame["global_accuracy"] = math.nan
        frames.setdefault((cell["method"], cell["row"]), []).append(frame)
    kept = ["bytes", "images", "global_accuracy", "personalized_accuracy", "cold_unlabelled"]
    return {
        key: pd.concat(found)
        .reindex(columns=["round", *kept])
        .groupby("round")
        .mean()
        .reset_index()
        for key, found in frames.items()
    }


def comparison_figures(comparison: Comparison, lines: pd.DataFrame) -> dict[str, Figure]:
    """Curves over rounds and over bytes, the reference's pool on its first seed, and the paired
    differences; by file name."""
    mean = curves(comparison)
    drawn = {
        f"curves-{axis}": figures.comparison_curves(mean, comparison.reference, axis=axis)
        for axis in ("rounds", "bytes")
    }
    own = (c for c in comparison.cells if (c["method"], c["row"]) == comparison.reference)
    clients = next((c["clients"] for c in own if "gate_1" in c["clients"][0]), None)
    if clients:  # cells from before this was told have none
        drawn["pool"] = figures.pool_heatmaps(pd.DataFrame(clients))
    gaps = differences(lines, comparison.reference)
    if len(gaps):
        drawn["differences"] = figures.comparison_differences(
            gaps, ("global", "personalized", "cold start, unlabelled"), comparison.reference
        )
    return drawn


def write_comparison(folder: Path, comparison: Comparison) -> str:
    """Write tables and figures into `folder`.

    Returns:
        The table, in Markdown.
    """
    lines = results(comparison)
    table, gaps = summary(lines), differences(lines, comparison.reference)
    text = markdown(*table_rows(table))
    write_csv(folder / "table.csv", _blank(table))
    write_csv(folder / "differences.csv", _blank(gaps))
    write_atomic(folder / "table.md", text.encode())
    said = markdown(*difference_rows(gaps)) if len(gaps) else "No row to compare with.\n"
    method, row = comparison.reference
    said = f"Minus {method}, {row}; points, 95 % interval, paired by seed.\n\n{said}"
    write_atomic(folder / "differences.md", said.encode())
    for name, figure in comparison_figures(comparison, lines).items():
        write_atomic(folder / f"{name}.png", figures.to_png(figure))
    return text


def _blank(table: pd.DataFrame) -> list[Values]:
    """Rows for a CSV file; nothing stands where a figure has no meaning."""
    return [
        {k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
        for row in table.to_dict("records")
    ]
