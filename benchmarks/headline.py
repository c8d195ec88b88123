"""results/headline.md: FedCoE beside its rivals on the four setups, and every target with its gap.

    python benchmarks/headline.py

A function of the cells in `results/<profile>/`; trains nothing. Make the cells with
`fedcoe compare --profile <profile>`. A figure that no cell gives is `-`, a target without one is
neither met nor missed.
"""

import math
from pathlib import Path
from typing import Any

import pandas as pd

from fedcoe.durable import write_atomic
from tasks.comparison import Comparison, load_cells, markdown, results, shown, summary

RESULTS = Path(__file__).parents[1] / "results"
SETUPS = {
    "cifar10-dir01": "CIFAR-10 (JPEG), Dirichlet(0.1)",
    "cifar10-dir05": "CIFAR-10 (JPEG), Dirichlet(0.5)",
    "fashion-dir01": "Fashion-MNIST, Dirichlet(0.1)",
    "cifar10-rot4": "CIFAR-10 (JPEG), Dirichlet(0.5), four rotation groups",
}
MEASURES = {
    "global": "global",
    "personalized": "personalized",
    "none": "cold start, none",
    "unlabelled": "cold start, unlabelled",
    "labels": "cold start, labels",
}
OURS = ("fedcoe", "all")
ONE_EXPERT = ("fedavg", "all")
"""FedAvg with every switch is FedCoE with one expert and no personal one."""
LIMIT = "centralized"
AT_LEAST = {
    ("cifar10-dir01", "global"): 72.0,
    ("cifar10-dir01", "personalized"): 94.5,
    ("cifar10-dir01", "labels"): 92.0,
    ("cifar10-dir01", "unlabelled"): 90.0,
    ("cifar10-dir05", "global"): 76.0,
    ("cifar10-dir05", "labels"): 83.0,
    ("fashion-dir01", "personalized"): 98.2,
}
BELOW_LIMIT = {
    "cifar10-dir01": 3.0,
    "fashion-dir01": 3.0,
    "cifar10-dir05": 1.5,
    "cifar10-rot4": 1.5,
}
"""Points that global accuracy may stay below Centralized."""
PAPER = {"global": 8.82, "personalized": 29.19}
"""The paper's margins over its baseline; 12.54 over the best baseline in cold start."""
PAPER_COLD = 12.54


CURVES = {
    "global": "global_accuracy",
    "personalized": "personalized_accuracy",
    "none": "cold_none",
    "unlabelled": "cold_unlabelled",
    "labels": "cold_labels",
}
SAME_IMAGES = 1.05
"""Times the images of plain FedAvg: FedCoE's fine-tuned personal experts take 3 % more."""


class Figures:
    """Means over seeds by method, row and measure; NaN where there is no cell."""

    def __init__(self, table: pd.DataFrame) -> None:
        self.rows = {(r["method"], r["row"]): r for r in table.to_dict("records")}

    def mean(self, row: tuple[str, str], measure: str) -> float:
        return float(self.rows[row][MEASURES[measure]]) if row in self.rows else math.nan

    def best(self, measure: str, rows: tuple[str, ...]) -> tuple[float, str]:
        """Highest mean of a federated rival in these rows, and whose it is."""
        found = [
            (self.mean(key, measure), " + ".join(key))
            for key in self.rows
            if key[0] not in (OURS[0], LIMIT) and key[1] in rows
        ]
        found = [pair for pair in found if not math.isnan(pair[0])]
        return max(found, default=(math.nan, "-"))


def targets(setup: str, f: Figures) -> list[tuple[str, float, float]]:
    """(what, needed, found) in points of accuracy."""
    ours = {name: f.mean(OURS, name) for name in MEASURES}
    every = ("plain", "reweighting", "all")
    rows = [
        (f"{name} accuracy", need, ours[name])
        for (where, name), need in AT_LEAST.items()
        if where == setup
    ]
    for name in MEASURES:
        value, who = f.best(name, every)
        rows.append((f"{name}: over the best rival in any row ({who})", 0.0, ours[name] - value))
    limit = ours["global"] - f.mean((LIMIT, "plain"), "global")
    rows.append(("global over Centralized", -BELOW_LIMIT[setup], limit))
    for name in ("personalized", "unlabelled", "labels"):
        over = ours[name] - f.mean((LIMIT, "reweighting"), name)
        rows.append((f"{name} over Centralized + reweighting", 0.0, over))
    for name, need in PAPER.items():
        over = ours[name] - f.mean(("fedavg", "plain"), name)
        rows.append((f"{name} over plain FedAvg", need, over))
    for name in ("none", "unlabelled", "labels"):
        value, who = f.best(name, ("plain",))
        what = f"cold start {name}, over the best plain baseline ({who})"
        rows.append((what, PAPER_COLD, ours[name] - value))
    pool = 5.0 if setup == "cifar10-rot4" else 2.0
    for name in ("global", "none", "unlabelled", "labels") if pool == 5.0 else ("global",):
        over = ours[name] - f.mean(ONE_EXPERT, name)
        rows.append((f"{name}: the pool over one expert (fedavg + all)", pool, over))
    return rows


def verdict(need: float, found: float) -> str:
    if math.isnan(found):
        return "not measured"
    return "met" if found >= need else f"missed by {need - found:.2f}"


def table(rows: Any) -> list[list[str]]:
    return [
        [
            r["method"],
            r["row"],
            str(r["seeds"]),
            *(shown(r[name], r[f"{name} std"]) for name in MEASURES.values()),
            shown(r["images"] / 1e6),
            shown(r["MB a round"], digits=0),
        ]
        for r in rows
    ]


def equal_images(cells: list[dict[str, Any]]) -> list[list[str]]:
    """Every row where its training had seen as many images as plain FedAvg in all its rounds: its
    last evaluation until then, means over seeds."""
    budget = {
        cell["seed"]: SAME_IMAGES * cell["train"]["images_trained"]
        for cell in cells
        if (cell["method"], cell["row"]) == ("fedavg", "plain")
    }
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for cell in cells:
        within = [c for c in cell["curves"] if c["images"] <= budget.get(cell["seed"], 0)]
        if within:
            last = within[-1]
            if not cell["has_global"]:
                last = {name: last[name] for name in ("round", CURVES["personalized"])}
            found.setdefault((cell["method"], cell["row"]), []).append(last)
    lines = []
    for (method, row), rows in found.items():
        mean = pd.DataFrame(rows).mean()
        seen = [shown(100 * mean.get(CURVES[name], math.nan)) for name in MEASURES]
        lines.append([method, row, shown(mean["round"], digits=0), *seen])
    return lines


def main() -> None:
    said = [
        "# The headline\n\nMade by `make results` from the cells beside it; accuracy in %, mean ± "
        "standard deviation over seeds, margins in points.\n`none`, `unlabelled`, `labels`: new "
        "clients. FedCoE is its row `all`. A rival's row `all` has the same switches;\n`fedavg`, "
        "`all` is FedCoE with one expert and no personal one.\n"
    ]
    head = ["method", "row", "seeds", *MEASURES, "million images", "MB a round"]
    for setup, title in SETUPS.items():
        folder = RESULTS / setup
        if not (folder / "cells").is_dir():
            said.append(f"\n## {title}\n\nNo cells yet.\n")
            continue
        cells = load_cells(folder)
        means = summary(results(Comparison(setup, cells, OURS)))
        rivals = sorted(set(means["method"]) - {OURS[0], LIMIT})
        said.append(f"\n## {title}\n\nRivals measured so far: {', '.join(rivals) or 'none'}.\n\n")
        said.append(markdown(head, table(means.to_dict("records"))))
        lines = [
            [
                what,
                f"{need:+.2f}" if need <= 0 else f"{need:.2f}",
                shown(found),
                verdict(need, found),
            ]
            for what, need, found in targets(setup, Figures(means))
        ]
        said.append(f"\n{markdown(['target', 'at least', 'found', ''], lines)}")
        if same := equal_images(cells):
            said.append(
                "\nAt equal images trained (plain FedAvg's). A row cut short has not lowered its "
                "learning rate to the\nend; `reweighting` is predicted at the end only.\n\n"
            )
            said.append(markdown(["method", "row", "round", *MEASURES], same))
    write_atomic(RESULTS / "headline.md", "".join(said).encode())


if __name__ == "__main__":
    main()
