import math
import sys
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from headline import MEASURES, Figures, targets, verdict


def rows(**accuracies: float) -> Figures:
    """Every measure of `method_row` has the same mean."""
    table = [
        {"method": key.split("_")[0], "row": key.split("_")[1]}
        | dict.fromkeys(MEASURES.values(), value)
        for key, value in accuracies.items()
    ]
    return Figures(pd.DataFrame(table))


def test_margins_are_to_the_rival_that_each_target_names() -> None:
    f = rows(
        fedcoe_all=70.0,
        fedcoe_plain=99.0,
        fedavg_plain=60.0,
        fedavg_reweighting=66.0,
        fedavg_all=68.5,
        ditto_plain=61.0,
        centralized_plain=72.0,
        centralized_reweighting=99.0,
    )
    found = {what: (need, value) for what, need, value in targets("cifar10-dir01", f)}
    assert found["global accuracy"] == (72.0, 70.0)
    assert found["global: over the best rival in any row (fedavg + all)"] == (0.0, 1.5)
    assert found["global over Centralized"] == (-3.0, -2.0)
    assert found["labels over Centralized + reweighting"] == (0.0, -29.0)
    assert found["personalized over plain FedAvg"] == (29.19, 10.0)
    assert found["cold start none, over the best plain baseline (ditto + plain)"] == (12.54, 9.0)
    assert found["global: the pool over one expert (fedavg + all)"] == (2.0, 1.5)
    rotated = {what: need for what, need, _ in targets("cifar10-rot4", f)}
    assert rotated["unlabelled: the pool over one expert (fedavg + all)"] == 5.0


@pytest.mark.parametrize(
    ("need", "found", "said"),
    [
        (2.0, 2.0, "met"),
        (2.0, 1.25, "missed by 0.75"),
        (-3.0, -4.0, "missed by 1.00"),
        (2.0, math.nan, "not measured"),
    ],
)
def test_a_target_without_cells_is_neither_met_nor_missed(
    need: float, found: float, said: str
) -> None:
    assert verdict(need, found) == said


def test_without_a_cell_of_fedcoe_nothing_is_found() -> None:
    assert all(math.isnan(v) for _, _, v in targets("fashion-dir01", rows(local_plain=90.0)))
