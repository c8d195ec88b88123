import math
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tasks.comparison import COMPARED, measures

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from headline import CURVES, Figures, Found, equal_images, tally, targets, verdict


def lines(**accuracies: float | list[float]) -> Figures:
    """Every measure of `method_row` has the same value, or one a seed."""
    table = [
        {"method": key.split("_")[0], "row": key.split("_")[1], "seed": seed}
        | dict.fromkeys(COMPARED, value)
        for key, values in accuracies.items()
        for seed, value in enumerate(values if isinstance(values, list) else [values])
    ]
    return Figures(pd.DataFrame(table))


def test_margins_are_to_the_rival_that_each_target_names() -> None:
    f = lines(
        fedcoe_all=70.0,
        fedcoe_plain=99.0,
        fedavg_plain=60.0,
        fedavg_reweighting=66.0,
        fedavg_all=68.5,
        ditto_plain=61.0,
        centralized_plain=72.0,
        centralized_reweighting=99.0,
    )
    found = {what: (need, value.mean) for what, need, value in targets("cifar10-dir01", f)}
    assert found["global accuracy"] == (72.0, 70.0)
    assert found["global: over the best rival in any row (fedavg + all)"] == (0.0, 1.5)
    assert found["global over Centralized"] == (-3.0, -2.0)
    assert found["labels over Centralized + reweighting"] == (0.0, -29.0)
    assert found["personalized over plain FedAvg"] == (29.19, 10.0)
    assert found["cold start none, over the best plain baseline (ditto + plain)"] == (12.54, 9.0)
    need, value = found["personalized: plain over plain FedAvg"]
    assert math.isnan(need) and value == 39.0
    need, value = found["cold start none: plain over the best plain baseline (ditto + plain)"]
    assert math.isnan(need) and value == 38.0
    need, value = found[
        "cold start labels, over the best that reads the same (fedavg + reweighting)"
    ]
    assert math.isnan(need) and value == 4.0
    assert found["global: the pool over one expert (fedavg + all)"] == (2.0, 1.5)
    rotated = {what: need for what, need, _ in targets("cifar10-rot4", f)}
    assert rotated["unlabelled: the pool over one expert (fedavg + all)"] == 5.0
    need, value = found["labels: the pool over one expert (fedavg + all)"]
    assert math.isnan(need) and value == 1.5


def test_margins_are_paired_by_seed_and_take_seeds_that_both_have() -> None:
    f = lines(fedcoe_all=[70.0, 50.0, 40.0], centralized_plain=72.0, fedavg_all=[69.0, 47.0])
    assert f.over(("centralized", "plain"), "global")[::3] == (-2.0, 1)
    mean, low, high, seeds = f.over(("fedavg", "all"), "global")
    # t(0.975, 1) = 12.706; the deviation of 1 and 3 is sqrt(2), their error 1.
    assert (mean, seeds) == (2.0, 2)
    assert (low, high) == pytest.approx((2.0 - 12.706, 2.0 + 12.706), abs=1e-3)
    assert f.ours["global"].seeds == 3 and f.ours["global"].mean == pytest.approx(53.333, abs=1e-3)
    # Centralized is no rival.
    gap, who = f.over_best("global", ("all", "plain"))
    assert (gap.mean, who) == (2.0, "fedavg + all")


def test_the_best_rival_is_the_better_one_on_the_seeds_that_both_have() -> None:
    # On seed 0 FedAvg is ahead of Ditto, though over all its seeds it leaves FedCoE more.
    f = lines(fedcoe_all=[70.0, 50.0], fedavg_all=[69.0, 40.0], ditto_plain=68.5, local_plain=1.0)
    gap, who = f.over_best("global", ("all", "plain"))
    assert (gap.mean, gap.seeds, who) == (5.5, 2, "fedavg + all")
    gap, who = f.over_best("global", ("plain",))
    assert (gap.mean, gap.seeds, who) == (1.5, 1, "ditto + plain")
    ahead = lines(fedcoe_all=[70.0, 50.0], fedavg_all=[69.0, 40.0], ditto_plain=69.5)
    assert ahead.over_best("labels", ("all", "plain"))[1] == "ditto + plain"


@pytest.mark.parametrize(
    ("need", "found", "said"),
    [
        (2.0, Found(2.5, 2.0, 3.0, 3), "met"),
        (2.0, Found(2.5, 1.9, 3.1, 3), "met in the mean"),
        (2.0, Found(2.0, seeds=1), "met on one seed"),
        (2.0, Found(1.25, 0.0, 2.5, 3), "missed by 0.75"),
        (-3.0, Found(-4.0, seeds=1), "missed by 1.00"),
        (2.0, Found(), "not measured"),
        (math.nan, Found(1.0), "no target"),
    ],
)
def test_a_target_is_met_only_where_the_whole_interval_is(
    need: float, found: Found, said: str
) -> None:
    assert verdict(need, found) == said


def test_the_tally_counts_each_verdict_once() -> None:
    found = ["met", "met in the mean", "missed by 0.70", "missed by 1.00", "no target"]
    said = "Of 4 targets: 1 met, 1 met in the mean, 0 met on one seed, 2 missed."
    assert tally(found) == said


def test_at_equal_images_only_rows_that_trained_more_are_cut_short() -> None:
    def cell(method: str, images: list[int]) -> dict[str, Any]:
        curves = [
            {"round": r, "images": n} | dict.fromkeys(CURVES.values(), r / 100)
            for r, n in enumerate(images, 1)
        ]
        trained = {"images_trained": images[-1]}
        names = {"method": method, "row": "plain", "seed": 0, "has_global": method != "local"}
        return names | {"train": trained, "curves": curves}

    cells = [cell("fedavg", [50, 100]), cell("fedcoe", [50, 104]), cell("local", [51, 102, 153])]
    assert equal_images(cells) == [["local", "plain", "2", "-", "2.00", "-", "-", "-"]]


def test_without_a_cell_of_fedcoe_nothing_is_found() -> None:
    f = lines(local_plain=90.0)
    assert all(math.isnan(found.mean) for _, _, found in targets("fashion-dir01", f))
    assert f.over(("local", "plain"), "global") == Found()


def test_every_column_comes_from_its_own_figure() -> None:
    own = {"accuracy": 0.2, "mean": 0.3, "worst10": 0.4}
    modes = {"none": 0.5, "unlabelled": 0.6, "labels": 0.7, "few_shot": 0.8}
    cell = {"has_global": True, "timing": {"train_seconds": 1}}
    cell |= {"evaluate": {"global": {"accuracy": 0.1}, "personalized": own}}
    cell |= {"cold_start": {mode: {"accuracy": v} for mode, v in modes.items()}}
    cell |= {"train": {"rounds": 1, "bytes_up": 0, "bytes_down": 0, "images_trained": 0}}
    found = measures(cell, cell)
    assert {k: found[k] for k in COMPARED if k in found} == {
        "global": 0.1, "personalized": 0.2, "mean of clients": 0.3, "worst tenth": 0.4,
        "cold start, none": 0.5, "cold start, unlabelled": 0.6, "cold start, labels": 0.7,
        "few-shot": 0.8,
    }  # fmt: skip


def test_every_target_is_held_against_its_own_column() -> None:
    rows = ("all", "plain", "reweighting")
    table = [
        {"method": method, "row": row, "seed": 0}
        | {name: 10.0 * i * (method == "fedcoe") for i, name in enumerate(COMPARED)}
        for method in ("fedcoe", "fedavg", "centralized")
        for row in rows[: 3 if method != "fedcoe" else 2]
    ]
    column = {"global": 0.0, "personalized": 10.0, "none": 40.0, "unlabelled": 50.0, "labels": 60.0}
    f = Figures(pd.DataFrame(table))
    assert {name: found.mean for name, found in f.ours.items()} == column
    for what, _, found in targets("cifar10-rot4", f):
        words = what.replace(",", " ").replace(":", " ").split()
        name = next(w for w in words if w in column)
        assert found.mean == column[name], what
