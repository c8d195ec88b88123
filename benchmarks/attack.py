"""Fashion-MNIST with a fifth of the clients attacking: each defence beside the undefended run.

The clients of params.yaml (20, of which 4 never train, Dirichlet 0.1) and 6 rounds. Of the 16
others 3 attack in every round: they send -1 or 10 times their updates.
FedAvg as its authors left it (row `plain` of a comparison), FedCoE with all switches (`all`).

    fedcoe fetch fashion-mnist
    python benchmarks/attack.py [--seeds 0 1 2] [--methods fedavg fedcoe] [--attacks ...]

One JSON file a training in `results/attack/cells/`, `table.md` from those that are there. A
training whose file has the same settings and data is not done again.
"""

import argparse

from cells import ROOT, Grid

from fedcoe.config import load_settings
from flows.compare import Cell, row_settings

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
GRID = Grid("attack", MEASURES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seeds", type=int, nargs="*", default=[0, 1, 2], help="none: draw the table only"
    )
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
                    write_table()
    write_table()


def train(method: str, attack: str, defence: str, seed: int) -> None:
    """Make one cell, unless its file is there."""
    row = ROWS[method]
    overrides = (*COMMON, f"partition.seed={seed}", f"train.seed={seed}", *ATTACKS[attack])
    settings = load_settings(ROOT / "params.yaml", [*overrides, f"method.name={method}"])
    settings = row_settings(settings, method, row)
    chosen = settings.method.model_copy(update={"robust": defence})
    settings = settings.model_copy(update={"method": chosen})
    words = "-".join([method, *attack.replace(",", "").split(), defence])
    cell = Cell(method, row, seed, settings, overrides, "")
    mapping = settings.method.model_dump(mode="json")
    GRID.train(words, cell, mapping, attack=attack, defence=defence)


def write_table() -> None:
    """One line a method, attack and defence."""
    found = GRID.found()
    places = [(m, attack, d) for m in ROWS for attack in ATTACKS for d in DEFENCES]
    rows = [
        (place, [c for c in found if (c["method"], c["attack"], c["defence"]) == place])
        for place in places
    ]
    GRID.write_table(("method", "attack", "defence"), rows)


if __name__ == "__main__":
    main()
