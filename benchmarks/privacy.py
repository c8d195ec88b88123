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

from cells import ROOT, Grid

from fedcoe.config import load_settings
from flows.compare import Cell

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
GRID = Grid("privacy", MEASURES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seeds", type=int, nargs="*", default=[0], help="none: draw the table only"
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--epsilons", nargs="+", default=list(EPSILONS), choices=list(EPSILONS))
    args = parser.parse_args()
    for seed in args.seeds:
        for epsilon in args.epsilons:
            for method in args.methods:
                train(method, epsilon, seed)
                write_table()
    write_table()


def train(method: str, epsilon: str, seed: int) -> None:
    """Make one cell, unless its file is there."""
    privacy = (f"privacy.epsilon={EPSILONS[epsilon]}", f"privacy.delta={DELTA}")
    privacy = (*privacy, f"privacy.clip={CLIP}") if EPSILONS[epsilon] else ()
    overrides = (*COMMON, *METHODS[method], *privacy)
    overrides = (*overrides, f"partition.seed={seed}", f"train.seed={seed}")
    settings = load_settings(ROOT / "params.yaml", overrides)
    GRID.train(f"{method}-{epsilon}", Cell(method, epsilon, seed, settings, overrides, ""))


def write_table() -> None:
    """One line a method and epsilon."""
    found, rows = GRID.found(), []
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
            rows.append(((method, name, delta), own))
    GRID.write_table(("method", "epsilon", "delta"), rows)


if __name__ == "__main__":
    main()
