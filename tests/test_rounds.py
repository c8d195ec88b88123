from dataclasses import asdict, replace

import numpy as np
import pytest

from fedcoe.engine.trainer import Trainer
from fedcoe.errors import FedCoEError
from fedcoe.methods.base import LocalResult, Order, add_at
from fedcoe.rounds import (
    RoundPlan,
    evaluation_due,
    finish_round,
    gate_clients,
    plan_round,
    train_round,
)


def same(a, b):
    """Whether two server states are equal byte for byte."""
    names = ("experts", "momentum", "correlation", "dispatched", "personal_round", "share")
    return (
        all(getattr(a, n).tobytes() == getattr(b, n).tobytes() for n in names)
        and {n: v.tobytes() for n, v in a.extra.items()}
        == {n: v.tobytes() for n, v in b.extra.items()}
        and dict(a.diagnostics) == dict(b.diagnostics)
        and a.round == b.round
    )


def test_a_plan_deals_every_order_of_the_cohort_to_exactly_one_shard(make_method, make_engine):
    method = make_method(train={"cohort": 0.7})
    engine = make_engine()
    engine.workers = 3
    plan = plan_round(method, method.init(), engine)
    assert plan.round == 1
    assert sorted(o.client for o in plan.orders) == method.cohort(method.init())
    dealt = [order for shard in plan.shards for order in shard]
    assert sorted(dealt, key=lambda o: o.client) == plan.orders
    assert len(plan.shards) == 3


def test_one_round_moves_the_experts_and_is_recorded(make_method, engine):
    method = make_method(experts=2, experts_per_client=2)
    state = method.init()
    after, record = train_round(engine, method, state)
    n = int(method.federation.train_counts.sum())
    assert (record.round, record.cohort, record.dropped) == (1, 6, {})
    assert record.images == n * 3, "two experts and the personal one see each image"
    assert (record.bytes_up, record.bytes_down) == method.round_bytes(
        state, method.dispatch(state, range(6))
    )
    assert record.load_entropy == pytest.approx(1.0)
    assert record.churn == 0.0
    assert len(record.drift) == 2
    assert min(record.drift) > 0
    assert 0.5 < record.train_loss < 3
    assert after.round == 1
    assert np.all(np.abs(after.experts - state.experts).max(axis=1) > 0)
    assert all(not isinstance(v, np.generic) for v in asdict(record).values())


def test_training_learns(make_method, engine, train):
    method = make_method(name="fedavg", server_momentum=0.5, train={"lr": 0.02})
    _, first = train_round(engine, method, method.init())
    state = train(engine, method, 7)
    _, last = train_round(engine, method, state)
    assert last.train_loss < 0.6 * first.train_loss


def test_rounds_are_the_same_when_run_again_and_when_resumed(make_method, make_engine, train):
    method = make_method(train={"cohort": 0.7})
    straight = train(make_engine(), method, 3)
    engine = make_engine()
    assert same(straight, train(engine, method, 1, train(engine, method, 2)))


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_fedcoe_with_one_expert_and_nothing_else_is_fedavg_bit_for_bit(
    make_method, make_engine, train, momentum
):
    fedavg = make_method(name="fedavg", server_momentum=momentum)
    fedcoe = make_method(
        experts=1,
        balanced_softmax=False,
        server_momentum=momentum,
        personal_expert=False,
        reweighting=False,
    )
    a = train(make_engine(), fedavg, 2)
    b = train(make_engine(), fedcoe, 2)
    assert b.extra, "a gate update took place between the rounds"
    assert a.experts.shape == b.experts.shape == (1, a.experts.size)
    assert a.experts.tobytes() == b.experts.tobytes()
    assert a.momentum.tobytes() == b.momentum.tobytes()


def test_each_switch_of_fedcoe_departs_from_fedavg(make_method, make_engine, train):
    off = {
        "experts": 1, "balanced_softmax": False, "server_momentum": 0.0, "personal_expert": False,
    }  # fmt: skip
    base = train(make_engine(), make_method(**off), 2).experts.tobytes()
    for switch in ({"balanced_softmax": True}, {"server_momentum": 0.7}, {"server_lr": 0.9}):
        assert train(make_engine(), make_method(**off | switch), 2).experts.tobytes() != base
    personal = train(make_engine(), make_method(**off | {"personal_expert": True}), 2)
    assert personal.experts.tobytes() == base, "personal experts never touch the global ones"


@pytest.mark.parametrize(
    ("experts", "each"), [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (4, 1), (4, 2)]
)
def test_every_number_of_experts_runs(make_method, engine, train, experts, each):
    method = make_method(experts=experts, experts_per_client=each, train={"cohort": 0.7})
    state = train(engine, method, 2)
    assert state.experts.shape[0] == experts
    assert np.isfinite(state.experts).all()
    np.testing.assert_allclose(state.correlation.sum(axis=1), 1.0)
    assert state.dispatched.sum() == 2 * 4 * each


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        {"name": "fedavg"},
        {"experts": 2, "experts_per_client": 2},
        {"experts": 2, "gate": "neural", "coordination_head": False, "similarity": "updates"},
    ],
    ids=["fedavg", "analytic", "neural"],
)
def test_one_worker_and_two_give_the_same_bytes(make_method, make_engine, train, method):
    made = make_method(**method)
    states, personal = [], []
    for workers in (1, 2):
        engine = make_engine(workers)
        states.append(train(engine, made, 2))
        files = sorted(engine.site.personal.glob("*"))
        personal.append({f.name: f.read_bytes() for f in files})
    assert same(*states)
    assert personal[0] == personal[1]
    if method.get("name") != "fedavg":
        assert "gate" in states[0].extra
        assert personal[0]


def test_personal_experts_outside_the_cohort_stay_untouched(make_method, engine, train):
    method = make_method(train={"cohort": 0.5, "seed": 1})
    state = train(engine, method, 1)
    first = set(method.cohort(method.init()))
    folder = engine.site.personal
    before = {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in folder.iterdir()}
    assert set(before) == {f"{k}-1.safetensors" for k in first}
    second = set(method.cohort(state))
    assert first != second
    after = train(engine, method, 1, state)
    now = {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in folder.iterdir()}
    assert {name: now[name] for name in before} == before
    assert set(now) - set(before) == {f"{k}-2.safetensors" for k in second}
    expected = [2 if k in second else 1 if k in first else 0 for k in range(6)]
    np.testing.assert_array_equal(after.personal_round, expected)


def test_a_personal_expert_goes_on_from_its_own_last_parameters(make_method, engine, train):
    method = make_method()
    state = train(engine, method, 1)
    side = engine.run(lambda side: side)
    [*_, fit] = method.fits(side, state, Order(3, (0,), (1.0,)))
    assert fit.name == -1
    np.testing.assert_array_equal(fit.start, side.personal.load(3, 1))
    assert fit.logit_shift is None
    [*_, fresh] = method.fits(side, method.init(), Order(3, (0,), (1.0,)))
    np.testing.assert_array_equal(fresh.start, method.init().experts[0])


# -------------------------------------------------------------------- quorum


@pytest.fixture
def breaking(monkeypatch):
    """breaking(clients, personal): these clients' models come back as NaN."""
    real = Trainer._fit

    def install(clients, personal=None):
        def broken(self, fit, work, images, labels):
            result = real(self, fit, work, images, labels)
            if fit.client in clients and personal in (None, fit.name < 0):
                result.vector[:] = np.nan
            return result

        monkeypatch.setattr(Trainer, "_fit", broken)

    return install


def test_a_round_goes_on_above_the_quorum_and_counts_what_it_dropped(make_method, engine, breaking):
    method = make_method(name="fedavg")
    breaking({0, 2, 5})
    after, record = train_round(engine, method, method.init())
    assert record.dropped == {"not finite": 3}
    assert record.images == method.federation.train_counts.sum()
    assert np.isfinite(after.experts).all()
    assert np.isfinite(record.train_loss)
    assert all(np.isfinite(record.drift))


def test_below_the_quorum_the_round_stops_and_says_why(make_method, engine, breaking):
    method = make_method(name="fedavg")
    breaking({0, 2, 4, 5})
    state = method.init()
    with pytest.raises(FedCoEError, match=r"round 1: only 2 of 6 .*4 not finite.*train.lr") as e:
        train_round(engine, method, state)
    assert "\n" not in str(e.value)
    assert state.round == 0


def test_personal_experts_do_not_count_towards_the_quorum(make_method, engine, breaking):
    method = make_method(train={"quorum": 1.0})
    breaking({0, 1, 2, 3}, personal=True)
    after, record = train_round(engine, method, method.init())
    assert sum(record.dropped.values()) == 4
    np.testing.assert_array_equal(after.personal_round, [0, 0, 0, 0, 1, 1])


def test_updates_that_never_came_count_against_the_quorum(make_method):
    method = make_method(name="fedavg")
    state = method.init()
    orders = method.dispatch(state, range(6))
    result = LocalResult.zeros(*state.experts.shape)
    add_at(result, 0, np.zeros(state.experts.shape[1]), 1.0)
    with pytest.raises(FedCoEError, match="only 1 of 6"):
        finish_round(method, state, RoundPlan(1, orders, [orders]), [result])


def test_every_update_broken_stops_even_without_a_quorum_or_leaves_the_experts(
    make_method, engine, breaking
):
    method = make_method(name="fedavg", train={"quorum": 0.0})
    breaking(set(range(6)))
    state = method.init()
    after, record = train_round(engine, method, state)
    np.testing.assert_array_equal(after.experts, state.experts)
    assert record.dropped == {"not finite": 6}
    assert (record.train_loss, record.drift) == (0.0, [0.0])


# ----------------------------------------------------------------- figures


def orders_of(pairs):
    by_client = {}
    for client, expert in pairs:
        by_client.setdefault(client, []).append(expert)
    return [Order(k, tuple(ms), (1.0,) * len(ms)) for k, ms in by_client.items()]


def finished(method, state, orders):
    result = LocalResult.zeros(*state.experts.shape)
    for order in orders:
        for m in order.experts:
            add_at(result, m, np.ones(state.experts.shape[1]), 1.0)
    return finish_round(method, state, RoundPlan(state.round + 1, orders, [orders]), [result])


def test_churn_is_the_share_of_pairs_never_dispatched_before(make_method):
    method = make_method(experts=2)
    state, record = finished(method, method.init(), orders_of([(0, 0), (1, 1), (2, 0), (3, 1)]))
    assert record.churn == 0.0, "the first round is no change"
    _, record = finished(method, state, orders_of([(0, 0), (1, 1), (2, 0), (4, 1)]))
    assert record.churn == 0.25


def test_load_entropy_is_one_when_even_and_zero_when_one_expert_has_all(make_method):
    method = make_method(experts=2)
    for pairs, expected in (
        ([(0, 0), (1, 1)], 1.0),
        ([(0, 0), (1, 0)], 0.0),
        ([(0, 0), (1, 0), (2, 0), (3, 1)], 0.8112781),
    ):
        _, record = finished(method, method.init(), orders_of(pairs))
        assert record.load_entropy == pytest.approx(expected)
    single = make_method(name="fedavg")
    assert finished(single, single.init(), orders_of([(0, 0)]))[1].load_entropy == 1.0


def test_evaluation_is_due_every_so_often_and_at_the_end(make_method):
    method = make_method(train={"rounds": 5}, evaluate={"every": 2})
    due = [r for r in range(1, 6) if evaluation_due(method, replace(method.init(), round=r))]
    assert due == [2, 4, 5]


def test_the_gate_is_updated_by_all_clients_before_an_evaluation_and_else_by_the_cohort(
    make_method,
):
    evaluate, everyone = {"every": 4}, [0, 1, 2, 3, 4, 5]
    train = {"rounds": 9, "cohort": 0.34}
    method = make_method(evaluate=evaluate, train=train, gate_every=3)
    cohort = method.cohort(replace(method.init(), round=2))
    assert len(cohort) == 2
    assert [gate_clients(method, r) for r in (1, 2, 3, 4, 9)] == [
        [], [], cohort, everyone, everyone,
    ]  # fmt: skip
    assert gate_clients(make_method(evaluate=evaluate, train=train), 3) == []
    assert gate_clients(make_method(name="fedavg"), 4) == []


def test_a_server_step_that_breaks_the_model_is_named(make_method, engine, monkeypatch):
    method = make_method(name="fedavg")

    def broken(state, update):
        return replace(state, experts=state.experts * np.float32(np.nan))

    monkeypatch.setattr(method, "server_step", broken)
    with pytest.raises(FedCoEError, match=r"round 1: .* after the server step of fedavg the model"):
        train_round(engine, method, method.init())
