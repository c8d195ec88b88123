from dataclasses import replace

import numpy as np
import pytest

from fedcoe import cold_start
from fedcoe.cold_start import (
    MODES,
    predict_labels,
    predict_none,
    predict_unlabelled,
    rows,
    serve_clients,
    summary,
)
from fedcoe.engine.clients import TEST, TRAIN
from fedcoe.metrics import Tally

NEW = [6, 7]
KINDS = [
    {},
    {"gate": "neural", "coordination_head": False},
    {"name": "fedavg"},
    {"name": "fedavg", "reweighting": True},
]
IDS = ["analytic", "neural", "fedavg", "fedavg reweighted"]


@pytest.fixture
def recorded(monkeypatch):
    """Log probabilities that `serve_clients` scores, in the order it scores them."""
    seen = []

    def record(log_p, labels):
        seen.append(log_p.copy())
        return Tally(len(labels), 0, 0.0)

    monkeypatch.setattr(cold_start, "tally", record)
    return seen


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_none_and_unlabelled_never_read_a_label(
    world, make_world, make_method, make_engine, train, recorded, kind
):
    rng = np.random.default_rng(0)

    def garble(raw):
        labels = np.array(raw.y_train)
        new = world.partition.client >= world.partition.seen
        labels[new] = (labels[new] + rng.integers(1, 4, new.sum())) % 4
        return replace(raw, y_train=labels)

    garbled = make_world(garble, world.partition)
    new = world.partition.client >= world.partition.seen
    assert np.all(world.dataset.y_train[new] != garbled.dataset.y_train[new])
    np.testing.assert_array_equal(world.dataset.y_train[~new], garbled.dataset.y_train[~new])

    method = make_method(**kind)
    state = train(make_engine(), method, 2)
    by_mode = []
    for where in (world, garbled):
        recorded.clear()
        side = make_engine(world=where).run(lambda side: side)
        served = serve_clients(side, method, state, NEW)
        modes = [(c.client, mode) for c in served for mode in c.tallies]
        by_mode.append(dict(zip(modes, recorded, strict=True)))
    true, false = by_mode
    assert len(true) == 8
    differs = {
        mode: any(true[k, mode].tobytes() != false[k, mode].tobytes() for k in NEW)
        for mode in (*MODES, "few_shot")
    }
    assert not differs["none"]
    assert not differs["unlabelled"]
    assert differs["few_shot"]
    if kind.get("name") != "fedavg" or kind.get("reweighting"):
        assert differs["labels"], "the test must be able to notice labels"


def test_each_mode_is_the_prediction_of_its_name_on_the_clients_test_split(
    make_method, engine, train, recorded
):
    method = make_method()
    state = train(engine, method, 2)
    side = engine.run(lambda side: side)
    [served] = serve_clients(side, method, state, [7])
    inputs, images = side.data.images(7, TRAIN), side.data.images(7, TEST)
    labels = side.data.labels(7, TRAIN)
    both = method.score(side.trainer, state, np.concatenate([inputs, images]))
    given, test = both.rows(slice(len(inputs))), both.rows(slice(len(inputs), None))
    expected = {
        "none": predict_none(method, state, test),
        "unlabelled": predict_unlabelled(method, state, test, given),
        "labels": predict_labels(method, state, test, given, labels),
    }
    assert list(served.tallies) == [*MODES, "few_shot"]
    for found, mode in zip(recorded, expected, strict=False):
        np.testing.assert_array_equal(found, expected[mode])
    none, unlabelled, with_labels = expected.values()
    joined = method.predict_with(state, test, *method.join_unlabelled(state, given))
    np.testing.assert_array_equal(unlabelled, joined)
    assert not np.allclose(none, unlabelled)
    assert not np.allclose(unlabelled, with_labels)
    counts = np.bincount(labels, minlength=4) + 0.1
    correlation = method.correlation_labelled(state, given, labels)
    by_hand = method.predict_with(state, test, counts / counts.sum(), correlation)
    np.testing.assert_allclose(with_labels, by_hand)
    np.testing.assert_allclose(served.correlation, correlation)
    assert served.samples == len(inputs)


def test_serving_a_client_changes_neither_the_state_nor_the_disk(make_method, engine, train):
    method = make_method()
    state = train(engine, method, 2)
    experts = state.experts.copy()
    folder = engine.site.personal
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    first = engine.run(serve_clients, method, state, NEW)
    again = engine.run(serve_clients, method, state, NEW[::-1])[::-1]
    np.testing.assert_array_equal(state.experts, experts)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [c.tallies for c in first] == [c.tallies for c in again]


def test_few_shot_starts_from_the_experts_and_can_be_left_out(make_federation, engine):
    from fedcoe.methods.settings import method_class

    for epochs, modes in ((0, list(MODES)), (1, [*MODES, "few_shot"])):
        federation = make_federation(cold_start={"few_shot_epochs": epochs})
        method = method_class("fedcoe")(federation)
        [served] = engine.run(serve_clients, method, method.init(), [6])
        assert list(served.tallies) == modes


def test_figures_are_summed_by_mode_and_a_row_names_its_client(make_method, engine, world):
    method = make_method()
    served = engine.run(serve_clients, method, method.init(), NEW)
    figures = summary(served)
    assert set(figures) == {*MODES, "few_shot"}
    tallies = [c.tallies["none"] for c in served]
    expected = sum(t.correct for t in tallies) / sum(t.count for t in tallies)
    assert figures["none"]["accuracy"] == pytest.approx(expected)
    assert [t.count for t in tallies] == [len(world.data.labels(k, TEST)) for k in NEW]
    table = rows(served[::-1], world.data)
    assert [row["client"] for row in table] == list(world.partition.names[6:])
    assert table[0]["labels"] == served[0].tallies["labels"].accuracy
    assert table[1]["correlation_1"] == pytest.approx(served[1].correlation[1])


def test_without_new_clients_there_are_no_figures(world):
    assert summary([]) == {}
    assert rows([], world.data) == []
