"""Client-level differential privacy: bounds, noise, accounting, and what is refused."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld, rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

from fedcoe import correlation
from fedcoe.analytic import Statistics
from fedcoe.bundle import export_models, load_bundle
from fedcoe.config import FaultSettings, PrivacySettings, Settings, validate_settings
from fedcoe.data.dataset import DatasetInfo
from fedcoe.engine.pool import Engine
from fedcoe.errors import FedCoEError
from fedcoe.evaluate import evaluate, score_clients, score_global
from fedcoe.methods.base import Method, merged
from fedcoe.methods.settings import method_class, method_names
from fedcoe.privacy import (
    STATISTICS_NORM,
    Messages,
    Privacy,
    clipped,
    epsilon,
    multipliers,
    secure_normal,
)
from fedcoe.rounds import gate_clients, plan_round, update_gate
from tasks.model_card import Lineage, card

PRIVATE = {"epsilon": 8.0, "delta": 0.01, "clip": 0.5}
SUPPORTED = {"ditto", "fedadam", "fedavg", "fedavg_ft", "fedavgm", "fedcoe", "fedprox"}


@pytest.fixture
def make_private(make_federation) -> Callable[..., Method]:
    """make_private(privacy={}, train={}, evaluate={}, **method): a method with privacy."""

    def make(privacy=None, train=None, evaluate=None, **method):
        federation = make_federation(train=train or {}, evaluate=evaluate or {}, method=method)
        chosen = PrivacySettings(**PRIVATE | (privacy or {}))
        federation = replace(
            federation, settings=federation.settings.model_copy(update={"privacy": chosen})
        )
        return method_class(federation.settings.method.name)(federation)

    return make


def exact_delta(sigma: float, eps: float) -> float:
    """delta of the Gaussian mechanism of sensitivity 1 (Balle, Wang, ICML 2018, theorem 8)."""
    a, b = 1 / (2 * sigma) - eps * sigma, -1 / (2 * sigma) - eps * sigma
    return float(ndtr(a) - math.exp(eps) * ndtr(b))


# ------------------------------------------------------------------ accounting


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("delta", [1e-1, 1e-3, 1e-6])
def test_one_message_has_the_epsilon_of_the_analytic_gaussian_mechanism(sigma, delta):
    eps = epsilon(Messages(sigma, sigma, sigma), [Messages(1, 0, 0)], delta)
    if eps:
        assert exact_delta(sigma, eps) == pytest.approx(delta, rel=1e-6)
    else:
        assert exact_delta(sigma, 0.0) <= delta


@pytest.mark.parametrize(("sent", "z"), [((30, 0, 0), (5, 1, 1)), ((20, 3, 4), (6, 2.5, 4))])
def test_a_composition_is_what_the_accountants_of_dp_accounting_say(sent, z):
    event = dp_accounting.ComposedDpEvent(
        [
            dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(float(s)), n)
            for n, s in zip(sent, z, strict=True)
            if n
        ]
    )
    ours = epsilon(Messages(*z), [Messages(*sent)], 1e-4)
    tight = pld.PLDAccountant().compose(event).get_epsilon(1e-4)
    loose = rdp.RdpAccountant().compose(event).get_epsilon(1e-4)
    assert ours == pytest.approx(tight, rel=1e-3)
    assert tight * 0.999 <= ours < loose < 1.2 * ours


@pytest.mark.parametrize(
    ("noise", "q", "steps", "published"),
    # The MNIST tutorial of TensorFlow Privacy (15 epochs, batches of 250), and the example of
    # Abadi et al. 2016, section 3.
    [(1.3, 250 / 60_000, 3600, 1.18), (4.0, 0.01, 10_000, 1.26)],
)
def test_the_accountant_gives_the_published_figures_of_dp_sgd(noise, q, steps, published):
    event = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(noise))
    accountant = rdp.RdpAccountant().compose(event, steps)
    # Published with the older, looser conversion to epsilon (Mironov 2017, proposition 3).
    orders, curve = np.array(accountant._orders), np.array(accountant._rdp)
    assert (curve - math.log(1e-5) / (orders - 1)).min() == pytest.approx(published, abs=0.01)
    assert accountant.get_epsilon(1e-5) < published


@given(
    st.floats(0.1, 50),
    st.sampled_from([0.05, 1e-3, 1e-5]),
    st.integers(1, 500),
    st.integers(0, 20),
    st.integers(0, 20),
)
@settings(max_examples=40, deadline=None)
def test_the_whole_run_spends_the_budget_and_never_more(target, delta, rounds, gates, mixes):
    chosen = PrivacySettings(epsilon=target, delta=delta)
    planned = Messages(rounds, gates, mixes)
    z = multipliers(chosen, planned)
    assert epsilon(z, [planned], delta) <= target
    assert epsilon(z, [planned], delta) == pytest.approx(target, rel=1e-5)
    assert epsilon(z, [replace(planned, updates=rounds - 1)], delta) < target
    assert (z.statistics == 0) == (gates == 0)


def test_shares_of_the_budget_are_shares_of_the_sum_of_inverse_squares():
    chosen = PrivacySettings(epsilon=2, gate_share=0.3, correlation_share=0.1)
    z = multipliers(chosen, Messages(40, 5, 2))
    spent = np.array([40 / z.updates**2, 5 / z.statistics**2, 2 / z.correlation**2])
    np.testing.assert_allclose(spent / spent.sum(), [0.6, 0.3, 0.1])
    without = multipliers(chosen, Messages(40, 0, 2))
    spent = np.array([40 / without.updates**2, 2 / without.correlation**2])
    np.testing.assert_allclose(spent / spent.sum(), [6 / 7, 1 / 7])


def test_the_client_that_has_sent_most_decides_epsilon():
    z = Messages(3.0, 1.0, 1.0)
    few, many = Messages(2, 0, 0), Messages(9, 0, 0)
    assert epsilon(z, [few, many, few], 1e-3) == epsilon(z, [many], 1e-3)
    assert epsilon(z, [Messages()], 1e-3) == 0.0


def test_rounds_are_counted_as_the_schedule_of_cohorts_has_them(make_private):
    method = make_private(name="fedavg", train={"rounds": 40, "cohort": 0.34})
    taken = [0] * 6
    for round_ in range(1, 41):
        for client in method.cohort_of(round_):
            taken[client] += 1
    assert method.privacy.planned == Messages(max(taken), 0, 0)
    assert max(taken) < 40


def test_gate_updates_and_losses_are_counted_as_they_are_sent(make_private):
    at = {"train": {"rounds": 7}, "evaluate": {"every": 3}}
    assert make_private(**at).privacy.planned == Messages(7, 3, 3)
    assert make_private(**at, similarity="none").privacy.planned == Messages(7, 3, 2)
    assert make_private(**at, experts=1).privacy.planned == Messages(7, 3, 0)
    assert make_private(**at, gate_every=2).privacy.planned == Messages(7, 5, 5)
    assert make_private(**at, name="fedavg").privacy.planned == Messages(7, 0, 0)
    head = make_private(**at, name="fedavg", coordination_head=True)
    assert head.privacy.planned == Messages(7, 3, 0)


@pytest.mark.parametrize("name", ["fedavg", "fedcoe"])
def test_a_run_ends_with_the_epsilon_it_was_given(make_private, engine, train, name):
    method = make_private(name=name, train={"rounds": 2, "cohort": 0.5}, evaluate={"every": 1})
    start = method.privacy_spent(method.init())
    assert start["epsilon"] < 8.0 and start["delta"] == 0.01
    half = train(engine, method, 1)
    assert start["epsilon"] < method.privacy_spent(half)["epsilon"] < 8.0
    state = train(engine, method, 1, half)
    most = int(state.dispatched.sum(axis=1).max())
    assert method.privacy.planned.updates == most
    spent = method.privacy_spent(state)["epsilon"]
    assert spent == pytest.approx(8.0, rel=1e-6)
    sent = replace(method.messages(2), updates=most)
    event = dp_accounting.ComposedDpEvent(
        [
            dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(z), int(n))
            for n, z in zip(sent.values(), method.privacy.z.values(), strict=True)
            if n
        ]
    )
    assert spent == pytest.approx(pld.PLDAccountant().compose(event).get_epsilon(0.01), rel=1e-3)


# ----------------------------------------------------------------- sensitivity


@given(st.integers(1, 300), st.floats(1e-3, 100), st.floats(-8, 8), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_a_clipped_update_is_never_longer_and_a_short_one_is_itself(size, norm, scale, seed):
    delta = (10.0**scale * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)
    short = clipped(delta, norm)
    length, before = (np.linalg.norm(d.astype(np.float64)) for d in (short, delta))
    assert length <= norm
    if before < norm * 0.999:
        assert short is delta
    else:
        np.testing.assert_allclose(short / length, delta / before, atol=1e-5)


@given(
    st.integers(1, 40),
    st.sampled_from([1e-9, 1.0, 1e3]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_a_clients_statistics_move_the_sums_by_at_most_their_sensitivity(n, scale, same, seed):
    rng = np.random.default_rng(seed)
    design = scale * rng.standard_normal((n, 9))
    targets = rng.dirichlet(np.ones(5), n) * scale
    if same:
        design[:], targets[:] = design[0], targets[0]
    total = Statistics.zeros(9, 5)
    Privacy.add(total, rng.standard_normal((20, 9)), rng.dirichlet(np.ones(5), 20))
    before = [total.gram.value(), total.targets.value()]
    Privacy.add(total, design, targets)
    moved = [total.gram.value() - before[0], total.targets.value() - before[1]]
    assert math.sqrt(sum((part**2).sum() for part in moved)) <= STATISTICS_NORM
    assert not np.tril(moved[0], -1).any()


def noiseless(method: Method) -> Method:
    assert method.privacy is not None
    method.privacy.z = Messages()
    return method


class Silent:
    """An engine's stand-in for the federation without one client's data: it sends nothing."""

    def __init__(self, client: int) -> None:
        self.client = client

    def rest(self, items):
        of = [item if isinstance(item, int) else item.client for item in items]
        return [item for item, k in zip(items, of, strict=True) if k != self.client]


@pytest.mark.parametrize("method_settings", [{"name": "fedavg"}, {"experts_per_client": 2}])
def test_no_client_moves_the_sum_of_updates_by_more_than_the_clip(
    make_private, engine, method_settings
):
    method = make_private(train={"lr": 1.0}, **method_settings)
    state = method.init()
    plan = plan_round(method, state, engine)
    asked = np.bincount([m for o in plan.orders for m in o.experts], minlength=method.experts)

    def summed(orders):
        [result] = engine.map(method.local_train, state.for_clients(), over=[orders])
        return merged([result]).updates.value() * asked[:, None]

    everyone, lengths = summed(plan.orders), []
    for order in plan.orders:
        moved = everyone - summed(Silent(order.client).rest(plan.orders))
        lengths.append(float(np.linalg.norm(moved)))
    assert max(lengths) <= 0.5
    # Large steps: all are cut, and to no less than the bound.
    assert min(lengths) > 0.499


def test_no_client_moves_the_statistics_by_more_than_their_sensitivity(make_private, engine):
    for method in (make_private(), make_private(name="fedavg", coordination_head=True)):
        state = method.init()

        def summed(clients, method=method, state=state):
            [message] = engine.map(method.gate_message, state.for_clients(), over=[clients])
            return [message.statistics.gram.value(), message.statistics.targets.value()]

        everyone = summed(list(range(6)))
        for client in range(6):
            rest = summed(Silent(client).rest(list(range(6))))
            square = sum(((a - b) ** 2).sum() for a, b in zip(everyone, rest, strict=True))
            assert 0.1 < math.sqrt(square) <= STATISTICS_NORM


def test_the_mean_is_over_those_asked_so_one_that_fails_counts_as_nothing(make_private, engine):
    method = noiseless(make_private(name="fedavg", train={"cohort": 1.0}))
    state = method.init()
    plan = plan_round(method, state, engine)
    [all_of_them] = engine.map(method.local_train, state.for_clients(), over=[plan.orders])
    [fewer] = engine.map(method.local_train, state.for_clients(), over=[plan.orders[1:]])
    [first] = engine.map(method.local_train, state.for_clients(), over=[plan.orders[:1]])
    whole = method.aggregate(state, plan.orders, [all_of_them]).experts
    without = method.aggregate(state, plan.orders, [fewer]).experts
    np.testing.assert_allclose(whole - without, first.updates.value(), atol=1e-6)


def test_sample_counts_and_labels_of_others_decide_nothing_a_client_is_sent(make_private):
    method = make_private()
    state = method.init()
    orders = method.dispatch(state, list(range(6)))
    assert {w for order in orders for w in order.weights} == {1 / 3}
    federation = method.federation
    assert np.array_equal(federation.label_prior, np.full(4, 0.25))


@pytest.mark.parametrize("kind", ["losses", "label mixes"])
def test_a_message_about_one_client_is_bounded_before_it_is_noised(make_private, kind):
    privacy = make_private().privacy
    privacy.z = Messages()
    points = np.array([[3.0, 4.0, 0.0], [0.1, 0.2, 0.3], [0.0, 0.0, 0.0]])
    sent = privacy.report(points, kind, 1)
    np.testing.assert_allclose(sent, [[0.6, 0.8, 0.0], points[1], points[2]], atol=1e-5)
    assert np.linalg.norm(sent, axis=1).max() <= 1.0


# ----------------------------------------------------------------------- noise


def test_noise_on_updates_has_the_std_that_was_accounted_for(make_private):
    privacy = make_private(name="fedavg").privacy
    asked = np.array([3, 6, 0])
    noised = privacy.noised(np.full((3, 40_000), 2.0), asked, 1)
    expected = privacy.z.updates * 0.5 / np.array([3, 6])
    np.testing.assert_allclose(noised[:2].std(axis=1), expected, rtol=0.02)
    np.testing.assert_allclose(noised[:2].mean(axis=1), 2.0, atol=5 * expected[0] / 200)
    assert not noised[2].any()
    again = privacy.noised(np.full((3, 40_000), 2.0), asked, 1)
    assert np.array_equal(noised, again)
    assert not np.array_equal(noised, privacy.noised(np.full((3, 40_000), 2.0), asked, 2))


def test_noise_on_statistics_and_reports_has_the_std_that_was_accounted_for(
    make_private, monkeypatch
):
    privacy = make_private().privacy
    drawn = {}

    def spy(name, round_, shape):
        drawn[name] = np.ones(shape)
        return drawn[name]

    monkeypatch.setattr(privacy, "_normal", spy)
    statistics = Statistics.zeros(6, 2)
    statistics.gram.add(3.0 * np.eye(6))
    std = privacy.z.statistics * STATISTICS_NORM
    found = privacy.solve(statistics, 1e-3, 1)
    gram = 3.0 * np.eye(6) + std  # of the triangle, mirrored
    values, vectors = np.linalg.eigh(gram)
    inverse = vectors / (np.maximum(values, 0) + 2 * std * 6**0.5) @ vectors.T
    np.testing.assert_allclose(found, inverse @ np.full((6, 2), std), atol=1e-9)
    z = privacy.z.correlation
    shrunk = privacy.report(np.zeros((4, 3)), "losses", 1)
    np.testing.assert_allclose(shrunk, z / (1 + 3 * z**2))
    assert set(drawn) == {"gram", "targets", "losses"}


def test_without_noise_the_private_ridge_is_the_ridge_of_mean_statistics():
    rng = np.random.default_rng(3)
    clients = [(rng.standard_normal((n, 4)) / 4, rng.dirichlet([1, 1], n)) for n in (5, 9, 30)]
    private, plain = Statistics.zeros(4, 2), Statistics.zeros(4, 2)
    for design, targets in clients:
        Privacy.add(private, design, targets)
        plain.add(design / len(design) ** 0.5, targets / len(design) ** 0.5)
    plain.count = 3
    privacy = Privacy(PrivacySettings(**PRIVATE), 0, Messages(1, 1, 1))
    privacy.z = Messages()
    np.testing.assert_allclose(privacy.solve(private, 0.1, 1), plain.solve(0.1), atol=1e-8)


def test_secure_noise_is_standard_normal_and_never_the_same():
    drawn = secure_normal((200, 500))
    assert abs(drawn.mean()) < 0.02 and abs(drawn.std() - 1) < 0.02
    assert abs((drawn**3).mean()) < 0.05 and abs((drawn**4).mean() - 3) < 0.15
    assert np.isfinite(drawn).all()
    assert not np.array_equal(drawn, secure_normal((200, 500)))


def test_secure_noise_is_used_where_it_is_asked_for(make_private):
    secure = make_private(privacy={"noise": "secure"}).privacy
    one, two = (secure.noised(np.zeros((1, 9)), np.array([1]), 1) for _ in range(2))
    assert not np.array_equal(one, two)


# -------------------------------------------------------------------- whole runs


def test_another_seed_or_epsilon_gives_another_model_and_equal_ones_the_same(
    make_private, make_engine, train
):
    def last(**changed):
        return train(make_engine(), make_private(privacy=changed), 2)

    one, same, other = last(), last(), last(epsilon=7.0)
    assert np.array_equal(one.experts, same.experts)
    assert np.array_equal(one.extra["gate"], same.extra["gate"])
    assert not np.array_equal(one.experts, other.experts)


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(make_private, make_engine, train):
    one, two = (train(make_engine(workers), make_private(), 2) for workers in (1, 2))
    assert np.array_equal(one.experts, two.experts)
    assert np.array_equal(one.extra["head"], two.extra["head"])
    assert np.array_equal(one.correlation, two.correlation)


def test_with_privacy_nothing_is_calibrated_and_no_clients_gates_are_compared(
    make_private, engine: Engine, train, world
):
    method = make_private(train={"rounds": 2})
    state = train(engine, method, 2)
    assert "gating_inconsistency" not in state.diagnostics
    scored = engine.run(score_clients, method, state, range(6))
    overall = engine.run(score_global, method, state, np.arange(48))
    state, found = evaluate(method, state, scored, overall, np.asarray(world.dataset.y_test))
    assert state.calibration == {}
    assert 0 <= found.overall["accuracy"] <= 1


def test_losses_after_the_last_round_are_not_sent(make_private, engine, train):
    method = make_private(train={"rounds": 2}, evaluate={"every": 1})
    first = train(engine, method, 1)
    assert not np.array_equal(first.correlation, method.init().correlation)
    assert np.array_equal(train(engine, method, 1, first).correlation, first.correlation)


def test_a_client_whose_features_are_not_finite_still_reports(make_private, engine):
    method = make_private(train={"rounds": 4}, evaluate={"every": 1})
    state = replace(method.init(), round=1)
    broken = replace(state, experts=np.full_like(state.experts, np.nan))
    [message] = engine.map(method.gate_message, broken.for_clients(), over=[[0, 1, 2]])
    assert message.statistics.count == 3 and sorted(message.losses) == [0, 1, 2]
    assert not message.statistics.gram.value().any()
    after = update_gate(engine, method, state, [0, 1, 2])
    assert np.isfinite(after.extra["gate"]).all()


def test_how_many_clients_answered_a_gate_update_is_not_told(make_private, engine):
    faults = {"dropout": 0.9}
    for chosen in ({}, {"name": "fedavg", "coordination_head": True}):
        method = make_private(**chosen)
        changed = method.federation.settings.model_copy(update={"faults": FaultSettings(**faults)})
        method = type(method)(replace(method.federation, settings=changed))
        [message] = engine.map(
            method.gate_message, method.init().for_clients(), over=[[0, 1, 2, 3, 4, 5]]
        )
        assert message.dropped.total() > 0 and message.statistics.count == 6


def test_every_message_that_is_counted_is_noised_and_each_with_noise_of_its_own(
    make_private, engine, train, monkeypatch
):
    drawn, real = [], Privacy._normal

    def spy(self, name, round_, shape):
        drawn.append((name, round_))
        return real(self, name, round_, shape)

    monkeypatch.setattr(Privacy, "_normal", spy)
    train(engine, make_private(train={"rounds": 3}, evaluate={"every": 1}), 3)
    every = [(name, r) for name in ("updates", "gram", "targets") for r in (1, 2, 3)]
    assert sorted(drawn) == sorted([*every, ("label mixes", 0), ("losses", 1), ("losses", 2)])


def test_without_noise_private_losses_move_the_correlation_as_plain_ones_do(make_private, side):
    method = make_private(train={"rounds": 9}, correlation_momentum=0.0)
    method.privacy.z = Messages()
    state = replace(method.init(), round=1)
    noise = np.random.default_rng(0).standard_normal(state.experts.shape).astype(np.float32)
    state = replace(state, experts=state.experts + 0.01 * noise)
    message = method.gate_message(side, state, range(6))
    losses = np.stack([message.losses[k] for k in range(6)])
    c = correlation.from_losses(losses, method.settings.loss_sharpness)
    after = method.gate_update(state, [message])
    np.testing.assert_allclose(after.correlation, correlation.normalise(c, 0.05), atol=1e-5)


def test_a_client_that_trains_two_experts_a_round_has_sent_one_message(make_private):
    method = make_private(experts=2, experts_per_client=2, train={"rounds": 2})
    state = replace(method.init(), round=2, dispatched=np.full((6, 2), 2))
    assert method.privacy_spent(state)["epsilon"] == pytest.approx(8.0, rel=1e-6)


@pytest.mark.parametrize("chosen", [{}, {"name": "fedavg", "coordination_head": True}])
def test_what_a_gate_update_publishes_is_solved_of_noised_sums(make_private, engine, chosen):
    def head(z):
        method = make_private(**chosen)
        method.privacy.z = z
        return update_gate(engine, method, method.init(), [0, 1, 2]).extra["head"]

    exact, noised = head(Messages()), head(Messages(statistics=0.5))
    assert not np.allclose(exact, noised, atol=0.01)


def test_a_gate_update_of_the_cohort_is_never_sent_uncounted(make_private):
    method = make_private(train={"rounds": 6, "cohort": 0.5}, evaluate={"every": 4}, gate_every=1)
    sent = 0
    for round_ in range(1, 7):
        sent += bool(gate_clients(method, round_))
    assert sent == method.privacy.planned.statistics == 6


# --------------------------------------------------------------------- refused


def test_methods_whose_messages_are_not_all_bounded_are_refused(make_private):
    for name in method_names():
        if name in SUPPORTED:
            assert make_private(name=name).privacy is not None
        else:
            with pytest.raises(FedCoEError, match=f"privacy.epsilon: method {name} sends what"):
                make_private(name=name)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"gate": "neural", "coordination_head": False}, "gate = neural"),
        ({"similarity": "updates"}, "similarity = updates"),
        ({"similarity": "features", "branch_after": 1}, "similarity = features sends means"),
        ({"dispatch": "label_clusters"}, "label_clusters"),
        ({"name": "fedavg", "robust": "median"}, "robust = median"),
    ],
)
def test_settings_that_would_send_something_unaccounted_are_refused(make_private, changed, said):
    with pytest.raises(FedCoEError, match=said):
        make_private(**changed)


def test_a_delta_that_would_allow_publishing_a_client_is_refused(make_private):
    method = make_private(name="fedavg", privacy={"delta": 0.1})
    counts = np.ones((10, 4), np.int64)
    with pytest.raises(FedCoEError, match="must be below 1 / 10 seen clients"):
        type(method)(replace(method.federation, label_counts=counts))


def test_off_the_section_is_in_no_dump_so_keys_of_older_results_stay():
    assert "privacy" not in Settings().model_dump(mode="json")
    on = Settings(privacy=PrivacySettings(epsilon=2.0))
    assert on.model_dump(mode="json")["privacy"]["epsilon"] == 2.0
    assert on.fingerprint() != Settings().fingerprint()


@pytest.mark.parametrize(
    "wrong",
    ["delta=0.00123456789", "gate_share=0.9", "clip=0.0", "epsilon=-1", "noise=none"],
)
def test_impossible_settings_are_refused_in_one_line(wrong):
    key, value = wrong.split("=")
    value = value if key == "noise" else float(value)
    with pytest.raises(FedCoEError, match="privacy") as caught:
        validate_settings({"privacy": {"epsilon": 1.0, key: value}}, "params.yaml")
    assert "\n" not in str(caught.value)


def test_the_card_says_how_private_a_model_is_and_what_that_does_not_cover():
    shape = {"shape": [8, 8, 1], "train": 9, "test": 9, "mean": [0.5], "std": [0.2]}
    told = {"source": "drawn", "licence": "CC0", "hash": "0" * 64, "clients": []}
    info = DatasetInfo(name="shapes", classes=["round", "square"], **shape, **told)
    tags = {"accuracy_global": "0.5", "accuracy_personalized": "0.5"}

    def said(**privacy):
        chosen = Settings(privacy=PrivacySettings(**privacy))
        return card("fedcoe", Lineage(chosen, info, "f", 9, 1, "c", "r"), tags)

    text = said(epsilon=2.0, delta=1e-3)
    assert "epsilon 2, delta 0.001" in text and "not the figures on this card" in text
    assert "a seed that undoes it" in text
    assert "undoes" not in said(epsilon=2.0, noise="secure")
    assert "there is no differential privacy in it" in said()


def test_what_is_exported_knows_no_clients_labels_but_a_client_still_does(
    make_private, engine, train, tmp_path
):
    method = make_private()
    state = replace(train(engine, method, 2), share=np.linspace(0, 1, 6))
    side = engine.run(lambda side: side)
    export_models(tmp_path / "models", method, state, side.personal)
    told = json.loads((tmp_path / "models" / "state.json").read_text())
    assert not np.any(told["label_counts"]) and not np.any(told["share"])
    assert told["diagnostics"] == {} and not np.any(told["personal_round"])
    assert not np.any(told["groups"])
    whole = load_bundle(tmp_path / "models", "fp32")
    counts = method.federation.label_counts
    assert np.array_equal(whole.method.federation.label_counts, counts)
    assert np.array_equal(whole.state.share, state.share)
    assert np.array_equal(whole.state.personal_round, state.personal_round)
    images = np.array(side.data.dataset.x_test)
    expected = method.predict_global(state, method.score(side.trainer, state, images))
    shutil.rmtree(tmp_path / "models" / "personal")
    released = load_bundle(tmp_path / "models", "fp32")
    assert released.predict(images).tobytes() == expected.tobytes()
