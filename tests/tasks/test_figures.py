"""Figures show the numbers they were given, and give the same bytes every time."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from tasks.figures import (
    MAX_ROWS,
    clients_by_classes,
    correlation_heatmap,
    expert_client_accuracy,
    learning_curves,
    pool_heatmaps,
    to_svg,
)

CURVES = pd.DataFrame(
    {
        "round": [1, 2, 3],
        "global_accuracy": [0.2, np.nan, 0.6],
        "personalized_accuracy": [0.5, 0.6, 0.7],
        "cold_none": [0.1, 0.2, 0.3],
        "cold_unlabelled": [0.2, 0.3, 0.4],
        "cold_labels": [0.3, 0.4, 0.5],
    }
)
CLIENTS = pd.DataFrame(
    {
        "client": ["a", "b", "c"],
        "accuracy_global": [0.6, 0.7, 0.8],
        "accuracy": [0.9, 0.8, 0.7],
        "correlation_0": [0.1, 0.9, 0.6],
        "correlation_1": [0.9, 0.1, 0.4],
        "gate_0": [0.3, 0.6, 0.5],
        "gate_1": [0.7, 0.4, 0.5],
        "expert_accuracy_0": [0.2, 0.8, 0.5],
        "expert_accuracy_1": [0.7, 0.1, 0.4],
    }
)


def cells(figure: Figure, axes: int = 0) -> np.ndarray:
    array = figure.axes[axes].collections[0].get_array()
    assert array is not None
    return np.asarray(array)


def row_labels(figure: Figure, axes: int = 0) -> list[str]:
    return [label.get_text() for label in figure.axes[axes].get_yticklabels()]


def every_figure() -> dict[str, Figure]:
    counts = np.array([[3, 0], [0, 5], [2, 2]])
    return {
        "curves": learning_curves(CURVES, CURVES),
        "correlation": correlation_heatmap(CLIENTS),
        "pool": pool_heatmaps(CLIENTS),
        "accuracy": expert_client_accuracy(CLIENTS),
        "partition": clients_by_classes(counts, ["cat", "dog"], 2, names=["a", "b", "c"]),
    }


def test_learning_curves_draw_the_rounds_that_were_evaluated() -> None:
    lines = {line.get_label(): line for line in learning_curves(CURVES).axes[0].lines}
    np.testing.assert_array_equal(lines["FedCoE"].get_xydata(), [[1, 0.2], [3, 0.6]])


def test_learning_curves_draw_the_baseline_only_where_one_is_given() -> None:
    baseline = CURVES.assign(personalized_accuracy=[0.11, 0.22, 0.33])
    alone, compared = learning_curves(CURVES), learning_curves(CURVES, baseline)
    assert [len(axes.lines) for axes in alone.axes] == [1, 1, 3]
    assert [len(axes.lines) for axes in compared.axes] == [2, 2, 4]
    drawn = {str(line.get_label()): line.get_ydata() for line in compared.axes[1].lines}
    np.testing.assert_array_equal(drawn["FedAvg"], [0.11, 0.22, 0.33])


def test_learning_curves_survive_a_run_that_was_never_evaluated() -> None:
    nothing = CURVES.assign(**dict.fromkeys(CURVES.columns[1:], np.nan))
    assert to_svg(learning_curves(nothing, columns=1)).startswith("<svg")


def test_correlation_heatmap_groups_clients_by_the_expert_they_belong_to_most() -> None:
    figure = correlation_heatmap(CLIENTS)
    assert row_labels(figure) == ["b", "c", "a"]
    np.testing.assert_allclose(cells(figure), [[0.9, 0.1], [0.6, 0.4], [0.1, 0.9]])


def test_pool_heatmaps_show_correlation_and_gate_in_the_same_rows() -> None:
    figure = pool_heatmaps(CLIENTS)
    order = [1, 2, 0]
    assert row_labels(figure) == ["b", "c", "a"] and row_labels(figure, 1) == []
    np.testing.assert_array_equal(
        cells(figure), CLIENTS[["correlation_0", "correlation_1"]].to_numpy()[order]
    )
    np.testing.assert_array_equal(cells(figure, 1), CLIENTS[["gate_0", "gate_1"]].to_numpy()[order])
    assert "Correlation: 53%, 47%; Gate: 47%, 53%" in figure.get_label()


def test_expert_accuracy_keeps_the_order_of_the_correlation_heatmap_and_adds_mixtures() -> None:
    figure = expert_client_accuracy(CLIENTS)
    assert row_labels(figure) == row_labels(correlation_heatmap(CLIENTS))
    np.testing.assert_allclose(cells(figure), [[0.8, 0.1], [0.5, 0.4], [0.2, 0.7]])
    np.testing.assert_allclose(cells(figure, 1), [[0.7, 0.8], [0.8, 0.7], [0.6, 0.9]])


def test_partition_colours_shares_and_prints_counts_of_seen_and_new_clients_apart() -> None:
    figure = every_figure()["partition"]
    np.testing.assert_allclose(cells(figure, 0), [[1, 0], [0, 1]])
    np.testing.assert_allclose(cells(figure, 2), [[0.5, 0.5]])
    assert [text.get_text() for text in figure.axes[0].texts] == ["3", "5"]
    assert [bar.get_width() for bar in figure.axes[1].patches] == [3, 5]  # type: ignore[attr-defined]


def test_many_clients_share_rows_as_means() -> None:
    n = 4 * MAX_ROWS
    share = np.linspace(0.9, 0.6, n)
    many = pd.DataFrame({"client": range(n), "correlation_0": share, "correlation_1": 1 - share})
    figure = correlation_heatmap(many)
    assert cells(figure).shape == (MAX_ROWS, 2)
    np.testing.assert_allclose(cells(figure)[0, 0], share[:4].mean())
    assert row_labels(figure) == [] and "160 clients" in figure.axes[0].get_ylabel()
    pool = pool_heatmaps(many.assign(gate_0=share, gate_1=1 - share))
    assert row_labels(pool) == [] and "160 clients" in pool.axes[0].get_ylabel()


def test_many_classes_are_added_up_and_lose_no_sample() -> None:
    counts = np.random.default_rng(0).integers(0, 9, (6, 100))
    figure = clients_by_classes(counts, [str(c) for c in range(100)], 5)
    np.testing.assert_allclose(cells(figure).sum(axis=1), 1)


@pytest.mark.parametrize("name", ["curves", "correlation", "accuracy", "partition"])
def test_svg_is_the_same_each_time_it_is_drawn(name: str) -> None:
    figure = every_figure()[name]
    first = to_svg(figure)
    assert to_svg(figure) == first == to_svg(every_figure()[name])


def test_svg_is_well_formed_responsive_described_and_themed() -> None:
    for figure in every_figure().values():
        svg = to_svg(figure)
        root = ElementTree.fromstring(svg)
        assert root.get("width") == "100%" and root.get("height") is None and root.get("viewBox")
        assert root.get("role") == "img" and root.get("aria-label") == figure.get_label()
        assert "<text" in svg and "var(--figure-ink" in svg
        assert "<metadata" not in svg and "<image" not in svg
        assert not re.search(r'(?:href|src)="(?!#)', svg)


def test_svgs_on_one_page_share_no_id() -> None:
    ids = [re.findall(r'\bid="([^"]+)"', to_svg(figure)) for figure in every_figure().values()]
    flat = [name for names in ids for name in names]
    assert flat and len(flat) == len(set(flat))


def test_svg_shows_names_literally_whatever_they_hold() -> None:
    hostile = ["<script>x", "$\\frac$ &amp;", ": #1f2a37;"]
    svg = to_svg(correlation_heatmap(CLIENTS.assign(client=hostile)))
    texts = {element.text for element in ElementTree.fromstring(svg).iter()}
    assert set(hostile) <= texts
