"""The server's arithmetic by hand, and the clients' half on a small federation."""

from dataclasses import replace

import numpy as np
import pytest

from fedcoe.engine.trainer import Trainer
from fedcoe.faults import Update
from fedcoe.methods.base import LocalResult, Order, Scores, add_at, drift, merged
from fedcoe.prediction import prior_from_counts
from fedcoe.state import ServerState


def tiny_state(experts):
    experts = np.array(experts, np.float32)
    return ServerState(
        round=0,
        experts=experts,
        momentum=np.zeros_like(experts),
        correlation=np.full((6, len(experts)), 1 / len(experts)),
        dispatched=np.zeros((6, len(experts)), np.int64),
        personal_round=np.zeros(6, np.int64),
        share=np.zeros(6),
    )


def results(state, updates):
    """LocalResult of (expert, new parameters, weight) triples."""
    result = LocalResult.zeros(*state.experts.shape)
    for expert, vector, weight in updates:
        add_at(result, expert, np.array(vector) - state.experts[expert], weight)
    return result


ORDERS = [Order(0, (0,), (0.25,)), Order(2, (0,), (0.75,))]


def test_an_expert_moves_to_the_weighted_mean_of_its_updates(make_method):
    method = make_method(server_momentum=0.0)
    state = tiny_state([[1.0, 1.0], [5.0, 5.0]])
    result = results(state, [(0, [2.0, 0.0], 0.25), (0, [6.0, 4.0], 0.75)])
    after = method.aggregate(state, ORDERS, [result])
    np.testing.assert_allclose(after.experts[0], [5.0, 3.0])
    assert after.round == 1
    np.testing.assert_array_equal(after.dispatched.sum(axis=0), [2, 0])
    np.testing.assert_array_equal(after.dispatched[[0, 2], 0], [1, 1])
    assert after.experts.dtype == np.float32


def test_an_expert_that_nobody_trained_stays_as_it_is_with_its_momentum(make_method):
    method = make_method(server_momentum=0.5)
    state = replace(tiny_state([[1.0, 1.0], [5.0, 5.0]]), momentum=np.full((2, 2), 3, np.float32))
    after = method.aggregate(state, ORDERS, [results(state, [(0, [2.0, 2.0], 1.0)])])
    np.testing.assert_array_equal(after.experts[1], state.experts[1])
    np.testing.assert_array_equal(after.momentum[1], state.momentum[1])
    assert not np.array_equal(after.experts[0], state.experts[0])


def test_momentum_and_step_size_by_hand_over_two_rounds(make_method):
    method = make_method(server_momentum=0.5, server_lr=2.0)
    state = tiny_state([[0.0], [0.0]])
    state = method.aggregate(state, ORDERS, [results(state, [(0, [1.0], 1.0)])])
    np.testing.assert_allclose([state.experts[0, 0], state.momentum[0, 0]], [2.0, 1.0])
    # v = 0.5 * 1 + (5 - 2) = 3.5; theta = 2 + 2 * 3.5
    state = method.aggregate(state, ORDERS, [results(state, [(0, [5.0], 1.0)])])
    np.testing.assert_allclose([state.experts[0, 0], state.momentum[0, 0]], [9.0, 3.5])


def test_weights_of_dropped_updates_go_to_the_others(make_method):
    method = make_method(server_momentum=0.0)
    state = tiny_state([[0.0], [0.0]])
    inbox, result = method.inbox(state, ORDERS), LocalResult.zeros(*state.experts.shape)
    method.receive(inbox, result, Update(0, 0, 1, np.array([8.0], np.float32)))
    method.receive(inbox, result, Update(2, 0, 1, np.array([np.nan], np.float32)))
    assert result.dropped == {"not finite": 1}
    after = method.aggregate(state, ORDERS, [result])
    np.testing.assert_allclose(after.experts[0], [8.0])


def test_an_update_too_long_for_the_exact_sum_is_dropped_whole(make_method):
    method, state = make_method(name="fedavg"), tiny_state([[0.0, 0.0]])
    inbox, result = method.inbox(state, ORDERS), LocalResult.zeros(*state.experts.shape)
    method.receive(inbox, result, Update(0, 0, 1, np.array([5000.0, 1.0], np.float32)))
    assert result.dropped["too large"] == 1
    assert not result.updates.total.any()
    assert not result.weights.total.any()


def test_the_server_state_is_left_alone_by_aggregation(make_method):
    method, state = make_method(), tiny_state([[1.0], [2.0]])
    result = results(state, [(1, [3.0], 1.0)])
    result.personal.append(2)
    before = result.updates.total.copy()
    after = method.aggregate(state, ORDERS, [result, results(state, [(0, [3.0], 1.0)])])
    assert (state.experts[1, 0], state.round, state.personal_round[2]) == (2.0, 0, 0)
    assert after.personal_round[2] == 1
    assert not state.dispatched.any()
    np.testing.assert_array_equal(result.updates.total, before)


def test_order_weights_are_n_times_c_normalised_over_the_cohort_for_each_expert(make_method):
    method = make_method()
    n = method.federation.train_counts
    c = np.array([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8], [0.5, 0.5], [0.3, 0.7], [0.5, 0.5]])
    state = replace(method.init(), correlation=c)
    orders = method.orders(state, [0, 2, 4], np.array([[0], [0], [1]]))
    total = n[0] * 0.9 + n[2] * 0.2
    assert orders[0].weights == pytest.approx((n[0] * 0.9 / total,))
    assert orders[1].weights == pytest.approx((n[2] * 0.2 / total,))
    assert orders[2] == Order(4, (1,), (1.0,))


def test_a_uniform_correlation_means_averaging_by_number_of_samples(make_method, side):
    method = make_method(
        experts=2,
        experts_per_client=2,
        similarity="none",
        server_momentum=0.0,
        responsibility="none",
        personal_expert=False,
    )
    state, cohort = method.init(), [0, 1, 2, 3, 4, 5]
    np.testing.assert_array_equal(state.correlation, 0.5)
    orders = method.dispatch(state, cohort)
    after = method.aggregate(state, orders, [method.local_train(side, state, orders)])

    n = method.federation.train_counts
    expected = np.zeros_like(state.experts, np.float64)
    for order in orders:
        for fit in method.fits(side, state, order):
            [(_, trained)] = side.trainer.fit([fit], method.work(1), side.data)
            expected[fit.name] += n[order.client] / n.sum() * trained.vector.astype(np.float64)
    np.testing.assert_allclose(after.experts, expected, rtol=0, atol=1e-6)
    assert np.abs(after.experts - state.experts).max() > 1e-2


def test_drift_by_hand():
    state = tiny_state([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    # Expert 0: mean (.5, .5), spread 1 - .5, length^2 .5. Expert 1: all agree.
    result = results(
        state,
        [(0, [1.0, 0.0], 0.5), (0, [0.0, 1.0], 0.5), (1, [2.0, 1.0], 0.3), (1, [2.0, 1.0], 0.7)],
    )
    np.testing.assert_allclose(drift(result), [1.0, 0.0, 0.0], atol=1e-4)


def test_drift_does_not_depend_on_the_scale_of_weights():
    state = tiny_state([[0.0, 0.0]])
    updates = [(0, [3.0, 0.0], 0.2), (0, [1.0, 1.0], 0.1)]
    whole = results(state, updates)
    halved = results(state, [(m, v, w / 2) for m, v, w in updates])
    # mean (7/3, 1/3), mean square (2 * 9 + 2) / 3
    square = (49 + 1) / 9
    expected = np.sqrt((20 / 3 - square) / square)
    assert drift(whole)[0] == pytest.approx(expected, rel=1e-4)
    assert drift(halved)[0] == pytest.approx(expected, rel=1e-4)


def test_merging_adds_everything_and_leaves_the_parts_alone():
    state = tiny_state([[0.0]])
    a, b = (results(state, [(0, [v], 0.5)]) for v in (1.0, 3.0))
    a.images, b.images, a.samples, b.samples = 3, 4, 3, 4
    a.personal.append(1)
    b.personal.append(5)
    a.sketches[1], b.sketches[5] = np.zeros(2), np.ones(2)
    b.dropped["not finite"] += 2
    total = merged([a, b])
    assert total.updates.value()[0, 0] == 2.0
    assert total.weights.value()[0] == 1.0
    assert (total.images, total.samples, total.personal) == (7, 7, [1, 5])
    assert set(total.sketches) == {1, 5}
    assert total.dropped == {"not finite": 2}
    assert (a.images, a.personal, a.dropped) == (3, [1], {})
    assert a.updates.value()[0, 0] == 0.5


def run_shards(method, side, state, shards):
    return [method.local_train(side, state, shard) for shard in shards]


@pytest.mark.parametrize("name", ["fedavg", "fedcoe"])
def test_clients_in_any_order_on_any_number_of_shards_give_the_same_bytes(make_method, side, name):
    method = make_method(name=name, experts=2, experts_per_client=2)
    state = method.init()
    o = method.dispatch(state, [0, 1, 2, 3, 4, 5])
    seen = set()
    for shards in ([o], [o[::-1]], [o[4:], o[:1], o[1:4]], [[o[i]] for i in (3, 0, 5, 1, 4, 2)]):
        found = run_shards(method, side, state, shards)
        after = method.aggregate(state, o, found)
        personal = after.personal_round.tobytes()
        d = drift(merged(found)).tobytes()
        seen.add(after.experts.tobytes() + after.momentum.tobytes() + personal + d)
    assert len(seen) == 1


def test_the_reported_training_loss_does_not_depend_on_the_order_of_clients(make_method, side):
    method = make_method(name="fedavg")
    state = method.init()
    o = method.dispatch(state, [0, 1, 2, 3, 4, 5])
    losses = set()
    for shards in ([o], [o[::-1]], [o[4:], o[:1], o[1:4]], [[o[i]] for i in (3, 0, 5, 1, 4, 2)]):
        total = merged(run_shards(method, side, state, shards))
        losses.add(float(total.train_loss))
    assert len(losses) == 1
    assert 0 < losses.pop() < 10
    extreme = LocalResult.zeros(1, 1)
    extreme.losses, extreme.samples = [2.0**53, *[0.5] * 8], 1
    assert extreme.train_loss == 2.0**53 + 4


def test_a_weight_is_used_with_the_expert_it_belongs_to(make_method, side):
    method = make_method(experts=2, experts_per_client=2, personal_expert=False)
    state = method.init()
    [order] = method.dispatch(state, [3])
    skewed = replace(order, weights=(0.125, 0.875))
    result = method.local_train(side, state, [skewed])
    np.testing.assert_allclose(result.weights.value(), [0.125, 0.875])


@pytest.fixture
def broken_clients(monkeypatch):
    """Make the training of these clients' models fail: broken_clients(personal, 0, 3)."""
    real = Trainer._fit

    def install(*clients, value=np.nan, personal=None):
        def broken(self, fit, work, images, labels):
            result = real(self, fit, work, images, labels)
            if fit.client in clients and personal in (None, fit.name < 0):
                result.vector[7] = value
            return result

        monkeypatch.setattr(Trainer, "_fit", broken)

    return install


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_a_broken_update_is_dropped_and_counted_and_the_rest_is_as_without_it(
    make_method, side, broken_clients, value
):
    method = make_method(name="fedavg")
    state = method.init()
    orders = method.dispatch(state, range(6))
    good = method.local_train(side, state, [o for o in orders if o.client not in (1, 4)])
    broken_clients(1, 4, value=value)
    found = method.local_train(side, state, orders)
    assert sum(found.dropped.values()) == 2
    np.testing.assert_array_equal(found.updates.total, good.updates.total)
    np.testing.assert_array_equal(found.weights.total, good.weights.total)
    assert found.samples == good.samples
    assert found.train_loss == good.train_loss
    after = method.aggregate(state, orders, [found])
    assert np.isfinite(after.experts).all()


def test_a_broken_personal_expert_is_not_stored(make_method, side, broken_clients):
    method = make_method()
    state = method.init()
    orders = method.dispatch(state, range(6))
    broken_clients(2, personal=True)
    found = method.local_train(side, state, orders)
    assert sorted(found.personal) == [0, 1, 3, 4, 5]
    assert not side.personal._path(2, 1).exists()
    after = method.aggregate(state, orders, [found])
    assert after.personal_round[2] == 0


# ----------------------------------------------------------- cohorts and work


def test_cohorts_are_seeded_sorted_of_the_right_size_and_equal_for_all_methods(make_method):
    train = {"cohort": 0.5}
    methods = [make_method(name=name, train=train) for name in ("fedavg", "fedcoe")]
    draws = []
    for rnd in range(12):
        a, b = (m.cohort(replace(m.init(), round=rnd)) for m in methods)
        assert a == b == sorted(set(a))
        assert len(a) == 3
        draws.append(tuple(a))
    assert len(set(draws)) > 3
    assert set().union(*draws) == set(range(6))
    other = make_method(name="fedavg", train=train | {"seed": 1})
    assert [tuple(other.cohort(replace(other.init(), round=r))) for r in range(12)] != draws


@pytest.mark.parametrize(("share", "size"), [(0.001, 1), (0.3, 2), (1.0, 6)])
def test_a_cohort_is_never_empty(make_method, share, size):
    method = make_method(name="fedavg", train={"cohort": share})
    assert len(method.cohort(method.init())) == size


def test_the_learning_rate_falls_along_a_half_cosine(make_method):
    method = make_method(train={"lr": 0.2, "lr_schedule": "cosine", "rounds": 4})
    found = [method.work(r).lr for r in (1, 2, 3, 4)]
    expected = [0.2, 0.1 * (1 + np.sqrt(0.5)), 0.1, 0.1 * (1 - np.sqrt(0.5))]
    np.testing.assert_allclose(found, expected)
    constant = make_method(train={"lr": 0.2, "lr_schedule": "constant"})
    assert [constant.work(r).lr for r in (1, 4)] == [0.2, 0.2]


def test_local_work_is_what_the_settings_say(make_method):
    train = {
        "local_epochs": 3, "batch_size": 7, "momentum": 0.3, "weight_decay": 0.02, "clip_norm": 4.0,
        "augment": "crop", "seed": 9,
    }  # fmt: skip
    work = make_method(train=train).work(2)
    assert (work.round, work.epochs, work.batch_size, work.momentum) == (2, 3, 7, 0.3)
    assert (work.weight_decay, work.clip_norm, work.augment, work.seed) == (0.02, 4.0, "crop", 9)


def test_the_logit_shift_is_the_clients_own_log_prior_or_nothing(make_method):
    on, off = make_method(balanced_softmax=True), make_method(balanced_softmax=False)
    counts = on.federation.label_counts[2]
    np.testing.assert_allclose(
        on.logit_shift(2), np.log((counts + 0.1) / (counts + 0.1).sum()), rtol=1e-6
    )
    assert off.logit_shift(2) is None


def test_the_federation_counts_training_labels_of_seen_clients_only(federation, world):
    assert federation.clients == 6
    for k in range(6):
        expected = np.bincount(world.data.train(k)[1], minlength=4)
        np.testing.assert_array_equal(federation.label_counts[k], expected)
    np.testing.assert_array_equal(federation.train_counts, federation.label_counts.sum(axis=1))
    total = federation.label_counts.sum(axis=0)
    np.testing.assert_allclose(federation.label_prior, (total + 0.1) / (total.sum() + 0.4))


# ----------------------------------------------------------------- prediction


def test_prediction_of_one_model_is_its_softmax_reweighted_for_a_client(make_method):
    method = make_method(name="fedavg", reweighting=True)
    state = method.init()
    logits = np.log(np.array([[[0.4, 0.3, 0.2, 0.1]]], np.float32))
    scores = Scores(logits)
    np.testing.assert_allclose(np.exp(method.predict_global(state, scores)), np.exp(logits[0]))
    prior = prior_from_counts(method.federation.label_counts[1])
    expected = np.exp(logits[0]) * prior / method.federation.label_prior
    expected /= expected.sum()
    np.testing.assert_allclose(
        np.exp(method.predict_client(state, 1, scores, 0.0)), expected, rtol=1e-5
    )
    plain = make_method(name="fedavg")
    np.testing.assert_allclose(
        np.exp(plain.predict_client(state, 1, scores, 0.0)), np.exp(logits[0]), rtol=1e-5
    )


def test_the_personal_expert_counts_by_its_share(make_method):
    method = make_method(name="fedavg")
    state = method.init()
    scores = Scores(
        np.log(np.array([[[0.7, 0.1, 0.1, 0.1]]], np.float32)),
        personal=np.log(np.array([[0.1, 0.7, 0.1, 0.1]], np.float32)),
    )
    found = np.exp(method.predict_client(state, 0, scores, 0.25))
    np.testing.assert_allclose(found, [[0.55, 0.25, 0.1, 0.1]], rtol=1e-5)


def test_trained_prior_is_uniform_exactly_with_balanced_softmax(make_method):
    np.testing.assert_array_equal(make_method(balanced_softmax=True).trained_prior, 0.25)
    off = make_method(balanced_softmax=False)
    np.testing.assert_array_equal(off.trained_prior, off.federation.label_prior)


def test_a_round_moves_a_model_a_client_and_an_expert_each_way(make_method):
    method = make_method(experts=2, experts_per_client=2)
    state = method.init()
    up, down = method.round_bytes(state, method.dispatch(state, [0, 1, 2]))
    size = 4 * state.experts.shape[1]
    assert (up, down) == (6 * (size + 4), 6 * size)


def test_rows_of_scores_are_cut_from_every_output():
    scores = Scores(
        np.arange(12.0).reshape(2, 3, 2), gate=np.arange(6.0).reshape(3, 2), personal=np.eye(3)
    )
    part = scores.rows(slice(1, None))
    np.testing.assert_array_equal(part.experts, scores.experts[:, 1:])
    np.testing.assert_array_equal(part.gate, scores.gate[1:])
    np.testing.assert_array_equal(part.personal, scores.personal[1:])
    assert part.head is None
