"""FedCoE with one of its ideas replaced."""

from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from fedcoe import correlation
from fedcoe.methods.base import Scores
from fedcoe.methods.settings import settings_for
from fedcoe.rounds import gate_view, train_round, update_gate
from fedcoe.streams import stream

ALL = list(range(6))
C = np.array(
    [
        [0.7, 0.2, 0.1],
        [0.1, 0.6, 0.3],
        [0.5, 0.1, 0.4],
        [0.8, 0.12, 0.08],
        [0.6, 0.3, 0.1],
        [0.9, 0.06, 0.04],
    ]
)


def noisy(state, seed=0):
    """The state with experts that differ from each other."""
    noise = np.random.default_rng(seed).standard_normal(state.experts.shape).astype(np.float32)
    return replace(state, experts=state.experts + 0.05 * noise)


def chosen(orders):
    return [o.experts for o in orders]


# ---------------------------------------------------------------------- dispatch


def test_top_k_gives_every_client_the_experts_it_is_most_correlated_with(make_method):
    method = make_method(experts=3, dispatch="top_k")
    state = replace(method.init(), correlation=C)
    assert chosen(method.dispatch(state, ALL)) == [(0,), (1,), (0,), (0,), (0,), (0,)]
    assert chosen(method.dispatch(state, [1, 2])) == [(1,), (0,)]
    two = make_method(experts=3, experts_per_client=2, dispatch="top_k")
    expected = [(0, 1), (1, 2), (0, 2), (0, 1), (0, 1), (0, 1)]
    assert chosen(two.dispatch(state, ALL)) == expected
    fair = make_method(experts=3, dispatch="equal_capacity")
    loads = np.bincount(np.ravel(chosen(fair.dispatch(state, ALL))), minlength=3)
    assert loads.tolist() == [2, 2, 2], "the test must be able to notice the rule"


def test_random_dispatch_is_another_each_round_and_the_same_for_a_seed(make_method):
    method = make_method(experts=3, experts_per_client=2, dispatch="random")
    state = method.init()

    def draws(method, c=state.correlation):
        states = [replace(state, round=r, correlation=c) for r in range(6)]
        return [tuple(chosen(method.dispatch(s, ALL))) for s in states]

    assert len(set(draws(method))) > 3
    assert draws(method) == draws(method)
    seeded = make_method(experts=3, experts_per_client=2, dispatch="random", train={"seed": 1})
    assert draws(seeded) != draws(method)
    assert draws(method, c=C) == draws(method), "whatever the correlation"
    for experts in np.array(draws(method)).reshape(-1, 2):
        assert experts[0] < experts[1], "two different ones"
    load = np.bincount(np.ravel(draws(method)), minlength=3)
    assert load.min() > 0.2 * load.sum()


def test_label_clusters_come_from_label_counts_and_never_change(make_method):
    method = make_method(experts=2, dispatch="label_clusters")
    points = correlation.hellinger(method.federation.label_counts)
    c = correlation.from_similarity(points, 2, 4.0, stream(0, "similarity"))
    expected = [(int(m),) for m in c.argmax(axis=1)]
    assert len(set(expected)) == 2
    learned = np.where(c == c.max(axis=1, keepdims=True), 0.01, 0.99)
    for rnd in (0, 5):
        state = replace(method.init(), round=rnd, correlation=learned)
        assert chosen(method.dispatch(state, ALL)) == expected
        assert chosen(method.dispatch(state, [5, 2])) == [expected[5], expected[2]]


@pytest.mark.parametrize("dispatch", ["top_k", "random", "label_clusters"])
def test_every_dispatch_trains(make_method, engine, train, dispatch):
    method = make_method(experts=2, dispatch=dispatch, train={"cohort": 0.5})
    state = train(engine, method, 2)
    assert state.dispatched.sum() == 2 * 3
    assert np.isfinite(state.experts).all() and "gate" in state.extra


# ------------------------------------------------------------------- aggregation


@pytest.mark.parametrize("dispatch", ["equal_capacity", "top_k"])
def test_uniform_aggregation_weighs_updates_by_samples_alone(make_method, dispatch):
    state = replace(make_method(experts=3).init(), correlation=C)
    orders = {
        aggregation: make_method(
            experts=3, dispatch=dispatch, experts_per_client=2, aggregation=aggregation
        ).dispatch(state, ALL)
        for aggregation in ("uniform", "correlation")
    }
    n = make_method().federation.train_counts
    assert chosen(orders["uniform"]) == chosen(orders["correlation"])
    for aggregation, weight in (("uniform", np.ones_like(C)), ("correlation", C)):
        for m in range(3):
            raw = {
                o.client: n[o.client] * weight[o.client, m]
                for o in orders["uniform"]
                if m in o.experts
            }
            for order in orders[aggregation]:
                if m in order.experts:
                    found = order.weights[order.experts.index(m)]
                    assert found == pytest.approx(raw[order.client] / sum(raw.values()))
    np.testing.assert_array_equal(state.correlation, C)


def test_uniform_aggregation_leaves_the_correlation_to_everything_else(make_method, engine, train):
    method = make_method(experts=2, aggregation="uniform")
    state = train(engine, method, 2)
    assert np.abs(state.correlation - 0.5).max() > 0.01


# -------------------------------------------------------------------------- gate


def test_a_frozen_random_gate_does_not_change_between_updates(make_method, engine):
    method = make_method(experts=2, gate="frozen_random")
    first = update_gate(engine, method, noisy(method.init()), ALL)
    second = update_gate(engine, method, noisy(replace(first, round=3), 1), ALL)
    np.testing.assert_array_equal(second.extra["gate"], first.extra["gate"])
    assert first.extra["gate"].shape == (2 * 8 + 1, 2)
    assert first.extra["gate"].std() == pytest.approx(1.0, abs=0.4)
    assert (second.extra["head"] != first.extra["head"]).any()
    other = make_method(experts=2, gate="frozen_random", train={"seed": 1})
    assert (
        other.gate_update(first, [message(other, engine)]).extra["gate"] != first.extra["gate"]
    ).any()


def message(method, engine):
    return engine.run(method.gate_message, method.init().for_clients(), ALL)


def test_only_the_gate_is_random_head_and_correlation_are_as_ever(make_method, engine):
    states = {
        gate: update_gate(
            engine, make_method(experts=2, gate=gate), noisy(make_method().init()), ALL
        )
        for gate in ("analytic", "frozen_random", "uniform")
    }
    for gate in ("frozen_random", "uniform"):
        np.testing.assert_array_equal(states[gate].extra["head"], states["analytic"].extra["head"])
        np.testing.assert_array_equal(states[gate].correlation, states["analytic"].correlation)
    assert (states["frozen_random"].extra["gate"] != states["analytic"].extra["gate"]).any()


def test_a_uniform_gate_has_no_scores_and_tells_nothing_of_a_new_client(make_method, engine):
    method = make_method(experts=2, gate="uniform")
    state = update_gate(engine, method, noisy(method.init()), ALL)
    assert set(state.extra) == {"head"}
    side = engine.run(lambda side: side)
    scores = method.score(side.trainer, state, np.array(side.data.dataset.x_test))
    assert scores.gate is None and scores.head is not None
    np.testing.assert_allclose(np.exp(method.log_gate(state, scores)), 0.5)
    np.testing.assert_allclose(method.correlation_unlabelled(state, scores), 0.5)
    p = np.array([[[0.7, 0.1, 0.1, 0.1]], [[0.1, 0.6, 0.2, 0.1]]])
    plain = replace(state, calibration={"global.head": 0.0})
    log_p = method.predict_global(plain, Scores(np.log(p).astype(np.float32)))
    np.testing.assert_allclose(np.exp(log_p), p.mean(axis=0), rtol=1e-5)


@pytest.mark.parametrize("gate", ["frozen_random", "uniform"])
def test_every_gate_runs_on_both_engines(make_method, runs_on_both_engines, gate):
    found = runs_on_both_engines(make_method(experts=2, gate=gate))
    assert ("gate" in found.state.extra) == (gate == "frozen_random")


@pytest.mark.parametrize("gate", ["analytic", "frozen_random", "uniform"])
def test_without_a_coordination_head_there_are_only_gates(make_method, engine, train, gate):
    method = make_method(experts=2, gate=gate, coordination_head=False)
    state = train(engine, method, 2)
    assert set(state.extra) == ({"gate"} if gate != "uniform" else set())
    targets = 2
    d = 2 * 8 + 1
    up = 4 * (d * (d + 1) // 2 + d * targets) + 4 * 2
    assert method.gate_bytes(state, 3, 1) == (3 * up, 3 * state.experts.nbytes)


def test_the_gate_can_be_fitted_to_the_experts_as_they_were_before_the_round(make_method, engine):
    stale, fresh = (make_method(experts=2, gate_before_aggregation=b) for b in (True, False))
    before = noisy(stale.init())
    after, _ = train_round(engine, stale, before)
    assert np.abs(after.experts - before.experts).max() > 1e-3
    old = update_gate(engine, fresh, replace(after, experts=before.experts), ALL)
    new = update_gate(engine, fresh, after, ALL)
    found = update_gate(engine, stale, after, ALL, before)
    for name in ("gate", "head"):
        np.testing.assert_array_equal(found.extra[name], old.extra[name])
        assert (found.extra[name] != new.extra[name]).any()
    np.testing.assert_array_equal(found.correlation, old.correlation)
    np.testing.assert_array_equal(found.experts, after.experts)
    same = update_gate(engine, fresh, after, ALL, before)
    np.testing.assert_array_equal(same.extra["gate"], new.extra["gate"])


def test_what_clients_see_for_the_gate_is_all_new_but_the_experts(make_method):
    method = make_method(experts=2, gate_before_aggregation=True)
    before = method.init()
    after = replace(noisy(before), round=1, correlation=np.tile([0.9, 0.1], (6, 1)))
    seen = gate_view(method, before, after.with_extra(server_secret=np.ones(1)))
    np.testing.assert_array_equal(seen.experts, before.experts)
    np.testing.assert_array_equal(seen.correlation, after.correlation)
    assert seen.round == 1 and "server_secret" not in seen.extra
    plain = gate_view(make_method(experts=2), before, after)
    np.testing.assert_array_equal(plain.experts, after.experts)


# ---------------------------------------------------------------- what is inert


def test_with_one_expert_it_says_that_there_is_nothing_to_decide(make_method):
    [sentence] = make_method(experts=1).inert()
    assert "experts = 1" in sentence
    for word in ("gate", "correlation", "dispatch"):
        assert word in sentence
    assert make_method(experts=2).inert() == []


def test_defaults_are_no_ablation():
    found = settings_for({"name": "fedcoe"})
    assert (found.dispatch, found.aggregation, found.gate) == (
        "equal_capacity",
        "correlation",
        "analytic",
    )
    assert not found.gate_before_aggregation
    for key in ("dispatch", "aggregation", "gate"):
        with pytest.raises(ValidationError, match=key):
            settings_for({"name": "fedcoe", key: "nonsense"})
