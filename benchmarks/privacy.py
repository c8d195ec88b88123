"""Fashion-MNIST under client-level differential privacy: FedAvg and FedCoE at several epsilons.

1,000 clients train in all of 8 rounds (another 250 never do), 5 to some hundred images each,
Dirichlet 0.3. Both methods with balanced softmax, server momentum 0.7 and reweighting; FedCoE with
2 experts, a gate and head on 16 features an expert, and no personal experts, which cost no budget.
`off` is without privacy; `clip` bounds and weighs as private runs do, with next to no noise.

    fedcoe fetch fashion-mnist
    python benchmarks/privacy.py [--seeds 0] [--epsilons off 8 2 clip] [--methods fedavg fedcoe]

One JSON file a training in `results/privacy/cells/`, `table.md` from those that are there. What is
there with the same settings and data is not trained again.
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
from flows.compare import Cell
from flows.federated_training import federated_training
from flows.pipeline import partition_once

ROOT = Path(__file__).parent.parent
FOLDER = Path("results") / "privacy"
COMMON = (
    "data.name=fashion-mnist",
    "partition.clients=1250",
    "partition.new_clients=0.2",
    "partition.alpha=0.3",
    "partition.min_samples=5",
    "model.name=gn_cnn",
    "train.rounds=8",
    "train.batch_size=10",
    "train.lr=0.05",
    "evaluate.every=8",
    "cold_start.few_shot_epochs=0",
    "method.balanced_softmax=true",
    "method.server_momentum=0.7",
    "method.reweighting=true",
)
METHODS: dict[str, tuple[str, ...]] = {
    "fedavg": ("method.name=fedavg", "method.coordination_head=false"),
    "fedcoe": ("method.experts=2", "method.gate_features=16", "method.personal_expert=false"),
}
DELTA, CLIP = 5e-4, 0.5
EPSILONS = {"off": 0.0, "clip": 1e6, "8": 8.0, "2": 2.0}
MEASURES = {
    "global": ("evaluate", "global", "accuracy"),
    "personalized": ("evaluate", "personalized", "accuracy"),
    "worst tenth": ("evaluate", "personalized", "worst10"),
    "cold start, none": ("cold_start", "none", "accuracy"),
    "cold start, labels": ("cold_start", "labels", "accuracy"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--epsilons", nargs="+", default=list(EPSILONS), choices=list(EPSILONS))
    args = parser.parse_args()
    for seed in args.seeds:
        for epsilon in args.epsilons:
            for method in args.methods:
                train(method, epsilon, seed)
                write_atomic(ROOT / FOLDER / "table.md", table(cells()).encode())


def train(method: str, epsilon: str, seed: int) -> None:
    """Make one cell, unless its file is there."""
    privacy = (f"privacy.epsilon={EPSILONS[epsilon]}", f"privacy.delta={DELTA}")
    privacy = (*privacy, f"privacy.clip={CLIP}") if EPSILONS[epsilon] else ()
    overrides = (*COMMON, *METHODS[method], *privacy)
    overrides = (*overrides, f"partition.seed={seed}", f"train.seed={seed}")
    settings = load_settings(ROOT / "params.yaml", overrides)
    key = Cell(method, epsilon, seed, settings, overrides, "").key(
        load_dataset(ROOT / "data").info.hash
    )
    file = FOLDER / "cells" / f"{method}-{epsilon}-seed{seed}.json"
    if (ROOT / file).exists() and json.loads((ROOT / file).read_text())["key"] == key:
        return
    notes = {"method": method, "row": epsilon, "seed": seed, "key": key}
    notes |= {"command": "python benchmarks/privacy.py"}
    partitions, _ = partition_once(ROOT, overrides)
    federated_training(str(ROOT), overrides, None, str(file), partitions, notes)


def cells() -> list[dict[str, Any]]:
    return [json.loads(p.read_text()) for p in sorted((ROOT / FOLDER / "cells").glob("*.json"))]


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: one line a method and epsilon; mean ± standard deviation over seeds, %."""
    lines = ["| method | epsilon | delta | seeds | " + " | ".join(MEASURES) + " |"]
    lines.append("|---" * (4 + len(MEASURES)) + "|")
    for method in METHODS:
        for epsilon in EPSILONS:
            own = [c for c in found if (c["method"], c["row"]) == (method, epsilon)]
            if not own:
                continue
            spent = own[0]["train"].get("epsilon")
            name = {"off": "off", "clip": "off, clipped"}.get(
                epsilon, f"{spent:g}" if spent else ""
            )
            delta = f"{own[0]['train']['delta']:g}" if epsilon.isdigit() else ""
            shown = [spread([value(cell, path) for cell in own]) for path in MEASURES.values()]
            lines.append(f"| {' | '.join([method, name, delta, str(len(own)), *shown])} |")
    return "\n".join(lines) + "\n"


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
