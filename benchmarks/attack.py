"""Fashion-MNIST with a fifth of the clients attacking: each defence beside the undefended run.

The clients and settings of `results/fashion-mnist`: 20 clients of which 4 never train, Dirichlet
0.1, 6 rounds. Of the 16 others 3 attack in every round: they send -1 or 10 times their updates.
FedAvg as its authors left it (row `plain` there), FedCoE with all its switches (row `all`).

    fedcoe fetch fashion-mnist
    python benchmarks/attack.py [--seeds 0 1 2] [--methods fedavg fedcoe] [--attacks ...]

One JSON file a training in `results/attack/cells/`, `table.md` from those that are there. A
training whose file has the same settings and data is not done again.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedcoe.config import load_settings
from fedcoe.data.dataset import load_dataset
from fedcoe.state import write_atomic
from flows.compare import Cell, row_settings
from flows.federated_training import federated_training
from flows.pipeline import partition_once

ROOT = Path(__file__).parent.parent
FOLDER = Path("results") / "attack"
COMMON = (
    "data.name=fashion-mnist",
    "train.rounds=6",
    "evaluate.every=3",
    "cold_start.few_shot_epochs=0",
)
ROWS = {"fedavg": "plain", "fedcoe": "all"}
STATISTICS = "sign_flip, statistics too"
ATTACKS: dict[str, tuple[str, ...]] = {
    "none": (),
    "sign_flip": ("faults.attack=sign_flip",),
    "scale": ("faults.attack=scale", "faults.attack_scale=10.0"),
    STATISTICS: ("faults.attack=sign_flip", "faults.attack_statistics=true"),
}
DEFENCES = ("none", "norm_clip", "trimmed_mean", "median")
MEASURES = {
    "global": ("evaluate", "global", "accuracy"),
    "cold start, none": ("cold_start", "none", "accuracy"),
    "personalized": ("evaluate", "personalized", "accuracy"),
    "worst tenth": ("evaluate", "personalized", "worst10"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS), choices=list(ATTACKS))
    parser.add_argument("--defences", nargs="+", default=list(DEFENCES), choices=list(DEFENCES))
    args = parser.parse_args()
    for seed in args.seeds:
        for attack in args.attacks:
            for method in args.methods:
                if attack == STATISTICS and method != "fedcoe":
                    continue  # FedAvg's clients send none
                for defence in args.defences:
                    train(method, attack, defence, seed)
                    write_atomic(ROOT / FOLDER / "table.md", table(cells()).encode())


def train(method: str, attack: str, defence: str, seed: int) -> None:
    """Make one cell, unless its file is there."""
    row = ROWS[method]
    overrides = (*COMMON, f"partition.seed={seed}", f"train.seed={seed}", *ATTACKS[attack])
    settings = load_settings(ROOT / "params.yaml", [*overrides, f"method.name={method}"])
    settings = row_settings(settings, method, row)
    chosen = settings.method.model_copy(update={"robust": defence})
    settings = settings.model_copy(update={"method": chosen})
    data_hash = load_dataset(ROOT / "data").info.hash
    key = Cell(method, row, seed, settings, overrides, "").key(data_hash)
    words = "-".join([method, *attack.replace(",", "").split(), defence, f"seed{seed}"])
    file = FOLDER / "cells" / f"{words}.json"
    if (ROOT / file).exists() and json.loads((ROOT / file).read_text())["key"] == key:
        return
    notes = {"method": method, "row": row, "seed": seed, "key": key}
    notes |= {"attack": attack, "defence": defence, "command": "python benchmarks/attack.py"}
    partitions, _ = partition_once(ROOT, overrides)
    mapping = settings.method.model_dump(mode="json")
    federated_training(str(ROOT), overrides, mapping, str(file), partitions, notes)


def cells() -> list[dict[str, Any]]:
    return [json.loads(p.read_text()) for p in sorted((ROOT / FOLDER / "cells").glob("*.json"))]


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: one line a method, attack and defence; mean ± standard deviation over seeds, %."""
    lines = ["| method | attack | defence | seeds | " + " | ".join(MEASURES) + " |"]
    lines.append("|---" * (4 + len(MEASURES)) + "|")
    for method in ROWS:
        for attack in ATTACKS:
            for defence in DEFENCES:
                own = [c for c in found if place(c) == (method, attack, defence)]
                if own:
                    shown = [spread([value(c, path) for c in own]) for path in MEASURES.values()]
                    words = [method, attack, defence, str(len(own)), *shown]
                    lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines) + "\n"


def place(cell: dict[str, Any]) -> tuple[str, str, str]:
    return cell["method"], cell["attack"], cell["defence"]


def value(cell: dict[str, Any], path: Sequence[str]) -> float:
    found: Any = cell
    for name in path:
        found = found[name]
    return 100 * float(found)


def spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
