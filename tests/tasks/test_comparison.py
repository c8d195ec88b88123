"""Statistics of comparisons against numbers worked out by hand, and what tables show of them."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from fedcoe.errors import FedCoEError
from flows.compare import render
from tasks.comparison import (
    Comparison,
    comparison_figures,
    differences,
    load_cells,
    metrics,
    paired_interval,
    results,
    shown,
    shown_difference,
    summary,
    table_rows,
    win_rate,
    write_comparison,
)
from tasks.report import build_comparison_page

SECTIONS = ("partition", "model", "train", "evaluate", "cold_start", "runtime")


def make_cell(
    method: str, row: str, seed: int, clients: list[float], *, has_global: bool = True, **more: Any
) -> dict[str, Any]:
    """A cell with these personalized accuracies of clients, all equally large."""
    mean = sum(clients) / len(clients)

    def scored(accuracies: list[float]) -> dict[str, Any]:
        mean = sum(accuracies) / len(accuracies)
        own = {"accuracy": mean, "mean": mean, "worst10": min(accuracies)}
        return {
            "evaluate": {"global": {"accuracy": mean - 0.1}, "personalized": own},
            "cold_start": {m: {"accuracy": mean} for m in ("none", "unlabelled", "labels")},
            "clients": [{"client": f"c{i}", "accuracy": a} for i, a in enumerate(accuracies)],
            "new_clients": [],
        }

    curve = {"global_accuracy": mean, "personalized_accuracy": mean, "cold_unlabelled": mean}
    return {
        "method": method,
        "row": row,
        "seed": seed,
        "has_global": has_global,
        **scored(clients),
        "train": {"rounds": 4, "bytes_up": 6_000_000, "bytes_down": 2_000_000}
        | {"images_trained": 1200},
        "curves": [{"round": r, "bytes": 2e6 * r, **curve} for r in (2, 4)],
        "timing": {"train_seconds": 3.0 + seed, "processor": "abacus", "gpu": None}
        | {"cores": 2, "workers": 1, "torch": "2"}
        # Cells of before do not say it.
        | ({"dtype": "float32"} if seed else {}),
        "settings": {section: {} for section in SECTIONS}
        | {"method": {"name": method}, "train": {"rounds": 4, "seed": seed}},
        "dataset": "toys",
        "data_hash": "d" * 64,
        "partition_fingerprint": f"p{seed}",
        "commit": "c" * 40,
    } | more


def line(lines: Any, *key: str) -> dict[str, Any]:
    return dict(lines.set_index(["method", "row"]).loc[key])


def test_a_tie_with_local_counts_half() -> None:
    rival = {"a": 0.5, "b": 0.5, "c": 0.5, "d": 0.5}
    assert win_rate({"a": 0.6, "b": 0.9, "c": 0.5, "d": 0.1}, rival) == 2.5 / 4
    assert win_rate(rival, rival) == 0.5
    assert win_rate({"a": 0.5000001}, rival) == 1.0


def test_clients_are_matched_by_name_not_by_place() -> None:
    assert win_rate({"a": 0.9, "b": 0.1}, {"b": 0.0, "a": 0.8}) == 1.0


def test_the_paired_interval_is_that_of_students_t() -> None:
    # Differences 1, 2, 3: mean 2, s = 1, t(0.975; 2) = 4.302653, half width 4.302653 / sqrt 3.
    mean, low, high = paired_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert (low, high) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-6)
    # Two pairs: t(0.975; 1) = 12.706205, s = sqrt 2, half width 12.706205 * sqrt 2 / sqrt 2.
    assert paired_interval([1.0, 3.0])[1] == pytest.approx(2 - 12.706205, abs=1e-5)


def test_equal_differences_have_an_interval_of_no_width() -> None:
    assert paired_interval([2.0, 2.0]) == (2.0, 2.0, 2.0)


def test_one_seed_has_a_difference_and_no_interval() -> None:
    mean, low, high = paired_interval([1.5])
    assert mean == 1.5 and math.isnan(low) and math.isnan(high)
    assert shown_difference(mean, low, high) == "+1.50 [-]"
    assert shown_difference(*paired_interval([])) == "-"


def test_an_interval_without_zero_is_bold() -> None:
    assert shown_difference(2.0, 0.5, 3.5) == "**+2.00 [+0.50, +3.50]**"
    assert shown_difference(-2.0, -3.5, 0.5) == "-2.00 [-3.50, +0.50]"


def test_no_figure_is_a_dash_and_no_spread_is_not_shown() -> None:
    assert (shown(math.nan, math.nan), shown(12.345, math.nan)) == ("-", "12.35")
    assert shown(12.344, 0.5) == "12.34 ± 0.50"
    assert shown(1234.4, math.nan, 0) == "1,234"


def test_means_and_spreads_are_over_seeds() -> None:
    cells = [make_cell("fedavg", "all", seed, [a, a]) for seed, a in ((0, 0.5), (1, 0.7))]
    row = line(summary(results(Comparison("x", cells))), "fedavg", "all")
    assert row["personalized"] == pytest.approx(60)
    assert row["personalized std"] == pytest.approx(math.sqrt(200))  # of 50 and 70, n - 1 = 1
    assert row["MB a round"] == 2.0  # (6 + 2) MB over 4 rounds
    assert row["seconds"] == 3.5 and row["images"] == 1200 and row["seeds"] == 2


def test_the_reweighting_row_is_the_plain_training_predicted_again() -> None:
    again = make_cell("fedavg", "plain", 0, [0.9, 0.9])
    cell = make_cell("fedavg", "plain", 0, [0.5, 0.7], reweighted=again)
    lines = results(Comparison("x", [cell]))
    plain, reweighted = (line(lines, "fedavg", row) for row in ("plain", "reweighting"))
    assert plain["personalized"] == pytest.approx(60)
    assert reweighted["personalized"] == pytest.approx(90)
    assert reweighted["images"] == plain["images"] and reweighted["seconds"] == plain["seconds"]


def test_without_a_global_model_its_figures_are_dashes() -> None:
    cells = [make_cell("local", "plain", 0, [0.5, 0.7], has_global=False)]
    head, rows = table_rows(summary(results(Comparison("x", cells))))
    shown_row = dict(zip(head, rows[0], strict=True))
    dashes = {name for name, text in shown_row.items() if text == "-"}
    assert dashes == {f"cold start, {m}" for m in ("none", "unlabelled", "labels")} | {"global"}
    assert shown_row["personalized"] == "60.00" and shown_row["win rate"] == "50.00"
    assert "cold_start_none" not in metrics({"cold start, none": math.nan})


def test_the_win_rate_is_against_local_plain_with_the_same_seed_only() -> None:
    cells = [
        make_cell("fedavg", "all", 0, [0.6, 0.6]),
        make_cell("fedavg", "all", 1, [0.6, 0.6]),
        make_cell("local", "all", 0, [0.1, 0.1], has_global=False),
        make_cell("local", "plain", 0, [0.5, 0.6], has_global=False),
    ]
    lines = results(Comparison("x", cells)).set_index(["method", "row", "seed"])
    assert lines.loc[("fedavg", "all", 0), "win rate"] == 75.0
    assert math.isnan(lines.loc[("fedavg", "all", 1), "win rate"])


def test_differences_pair_equal_seeds_and_leave_the_others_out() -> None:
    cells = [make_cell("fedcoe", "all", seed, [0.9, 0.9]) for seed in (0, 1)]
    cells += [make_cell("fedavg", "all", seed, [a, a]) for seed, a in ((0, 0.8), (1, 0.6), (2, 0))]
    gaps = differences(results(Comparison("x", cells)), ("fedcoe", "all"))
    [own] = gaps[gaps["measure"] == "personalized"].to_dict("records")
    assert (own["method"], own["pairs"]) == ("fedavg", 2)
    assert own["difference"] == pytest.approx(-20)  # of -10 and -30
    assert own["low"] == pytest.approx(-20 - 127.06205, abs=1e-4)
    assert len(differences(results(Comparison("x", cells[2:])), ("fedcoe", "all"))) == 0


def save(folder: Path, cells: list[dict[str, Any]]) -> Path:
    (folder / "cells").mkdir(parents=True)
    for cell in cells:
        name = f"{cell['method']}-{cell['row']}-seed{cell['seed']}.json"
        (folder / "cells" / name).write_text(json.dumps(cell))
    return folder


def test_tables_figures_and_page_have_the_same_bytes_each_time(tmp_path: Path) -> None:
    cells = [
        make_cell(method, row, seed, [0.5 + seed / 10, 0.8], has_global=method != "local")
        for method in ("local", "fedcoe", "a<b")
        for row in ("plain", "all")
        for seed in (0, 1)
    ]
    folder = save(tmp_path / "x", cells)
    found = []
    for _ in range(2):
        comparison = Comparison("x", load_cells(folder))
        write_comparison(folder, comparison)
        build_comparison_page(folder, comparison)
        found.append({p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()})
    assert found[0] == found[1]
    pictures = {"curves-rounds.png", "curves-bytes.png", "differences.png"}
    texts = {"table.csv", "table.md", "differences.csv", "differences.md", "index.html"}
    assert set(found[0]) == pictures | texts
    page = found[0]["index.html"].decode()
    assert "a&lt;b" in page and "a<b" not in page and "abacus" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    with (folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows][::3] == ["fedcoe", "a<b", "local"]
    assert rows[-1]["global"] == "" and rows[0]["personalized std"] != ""


def test_without_fedcoe_differences_are_to_the_first_row_and_uncommitted_code_is_marked(
    tmp_path: Path,
) -> None:
    cells = [
        make_cell(method, "plain", seed, [0.1 * seed + up, 0.5], commit="c" * 40 + "+changes")
        for method, up in (("fedavg", 0.2), ("mine", 0.4))
        for seed in (0, 1)
    ]
    folder = save(tmp_path / "results" / "own", cells)
    render(tmp_path, "own")
    text = (folder / "differences.md").read_text()
    assert "Minus fedavg, plain" in text and "mine" in text and "No row" not in text
    assert "cccccccccccc+changes" in (folder / "index.html").read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data_hash": "e" * 64}, "data"),
        ({"partition_fingerprint": "other"}, "partition"),
        ({"settings": make_cell("b", "all", 0, [1])["settings"] | {"train": {"rounds": 9}}},
         "train.rounds = 4 and 9"),
    ],
)  # fmt: skip
def test_cells_on_different_footings_are_not_compared(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    cells = [make_cell("a", "all", 0, [0.5]), make_cell("b", "all", 0, [0.5]) | change]
    with pytest.raises(FedCoEError, match=f"a-all-seed0 and b-all-seed0.*{words}"):
        load_cells(save(tmp_path / "x", cells))


def test_cells_from_before_there_were_rows_are_left_alone(tmp_path: Path) -> None:
    folder = save(tmp_path / "x", [make_cell("a", "all", 0, [0.5])])
    (folder / "cells" / "fedavg-seed0.json").write_text('{"curves": []}')
    assert len(load_cells(folder)) == 1


def test_a_damaged_cell_and_an_empty_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(FedCoEError, match="no cells here"):
        load_cells(tmp_path / "nowhere")
    folder = save(tmp_path / "x", [make_cell("a", "all", 0, [0.5])])
    (folder / "cells" / "b-all-seed0.json").write_text("{")
    with pytest.raises(FedCoEError, match=r"b-all-seed0.json: damaged"):
        load_cells(folder)


def test_curves_name_their_axes_and_leave_out_of_bytes_what_sends_nothing() -> None:
    cells = [make_cell(method, "all", 0, [0.5, 0.8]) for method in ("fedcoe", "fedavg", "local")]
    for row in cells[2]["curves"]:
        row["bytes"] = 0
    comparison = Comparison("x", cells)
    drawn = comparison_figures(comparison, results(comparison))
    for name, words in (("curves-rounds", "round"), ("curves-bytes", "MB up and down")):
        assert [axes.get_xlabel()[: len(words)] for axes in drawn[name].axes] == [words, words]
    points = [len(line.get_xdata()) for line in drawn["curves-bytes"].axes[1].lines]
    assert points == [2, 2, 0]
    # 2 MB a round: round 4 is at 8 MB.
    assert list(drawn["curves-bytes"].axes[1].lines[0].get_xdata()) == [4.0, 8.0]


@pytest.mark.parametrize("changed", [{"patch_filters": 400}, {"balanced_head": True}])
def test_rows_with_every_switch_are_refused_beside_others_with_other_heads(tmp_path, changed):
    def write(*cells):
        for cell in cells:
            path = tmp_path / "cells" / f"{cell['method']}-{cell['row']}-seed0.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(cell))

    ours, plain, rival = (
        make_cell(method, row, 0, [0.5, 0.7])
        for method, row in (("fedcoe", "all"), ("fedavg", "plain"), ("fedavg", "all"))
    )
    ours["settings"]["method"] = changed
    write(ours, plain)
    assert len(load_cells(tmp_path)) == 2
    write(rival)
    with pytest.raises(FedCoEError, match=rf"method\.{next(iter(changed))} = \w+ and \w+"):
        load_cells(tmp_path)
