from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from fedcoe.methods.base import Scores
from fedcoe.methods.settings import settings_for
from fedcoe.rounds import train_round


@pytest.fixture
def method(make_method):
    return make_method(name="ifca", experts=3)


def favouring(*right):
    """[M, n, 4] logits: expert m puts `right[m]` on class 1."""
    return np.array([[[0, r, 0, 0]] * 2 for r in right], np.float32)


ONES = np.array([1, 1])


def test_with_one_expert_it_is_fedavg_bit_for_bit(make_method, make_engine, train, same_bytes):
    for cohort in (1.0, 0.5):
        settings = {"train": {"cohort": cohort}, "server_momentum": 0.5}
        fedavg = train(make_engine(), make_method(name="fedavg", **settings), 3)
        ifca = train(make_engine(), make_method(name="ifca", experts=1, **settings), 3)
        same_bytes(ifca, fedavg)


def test_experts_start_apart_and_the_first_from_the_common_start(make_method, method):
    experts = method.init().experts
    assert experts[0].tobytes() == make_method(name="fedavg").init().experts[0].tobytes()
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(experts[a] - experts[b]).max() > 0.01
    np.testing.assert_array_equal(method.init().experts, experts)


def test_a_client_picks_and_trains_the_expert_with_the_least_training_loss(method, side):
    state = method.init()
    orders = method.dispatch(state, range(6))
    result = method.local_train(side, state, orders)
    n = method.federation.train_counts
    weights, picks = np.zeros(3), {}
    for client in range(6):
        images, labels = side.data.train(client)
        losses = []
        for vector in state.experts:
            logits, _ = side.trainer.outputs(vector, images, 64)
            z = logits.astype(np.float64)
            z -= np.log(np.exp(z).sum(axis=1, keepdims=True))
            losses.append(-z[np.arange(len(labels)), labels].mean())
        picks[client] = int(np.argmin(losses))
        weights[picks[client]] += n[client] / n.sum()
        assert method.pick(side, state, client) == picks[client]
        assert result.sketches[client].tolist() == [picks[client]]
    assert len(set(picks.values())) > 1, "the test must be able to notice the pick"
    np.testing.assert_allclose(result.weights.value(), weights, atol=1e-9)

    after = method.aggregate(state, orders, [result])
    assert after.correlation.tolist() == [np.eye(3)[picks[k]].tolist() for k in range(6)]
    assert after.dispatched.tolist() == after.correlation.tolist()
    for m in range(3):
        mine = [k for k in range(6) if picks[k] == m]
        expected = np.zeros(state.experts.shape[1])
        for k in mine:
            order = replace(orders[k], experts=(m,))
            [fit] = method.fits(side, state, order)
            [(_, trained)] = side.trainer.fit([fit], method.work(1), side.data)
            expected += n[k] / n[mine].sum() * trained.vector.astype(np.float64)
        expected = expected if mine else state.experts[m]
        np.testing.assert_allclose(after.experts[m], expected, rtol=0, atol=1e-6)


def test_the_last_pick_of_a_client_does_not_bind_it(method, side):
    state = method.init()
    forced = replace(state, correlation=np.tile([0.0, 0.0, 1.0], (6, 1)))
    a, b = (
        method.local_train(side, s, method.dispatch(s, range(6))).updates.total
        for s in (state, forced)
    )
    np.testing.assert_array_equal(a, b)


def test_a_client_outside_the_cohort_keeps_its_pick(make_method, engine):
    method = make_method(name="ifca", experts=3, train={"cohort": 0.3})
    state = method.init()
    cohort = method.cohort(state)
    after, record = train_round(engine, method, state)
    others = [k for k in range(6) if k not in cohort]
    np.testing.assert_array_equal(after.correlation[others], np.full((4, 3), 1 / 3))
    assert set(after.correlation[cohort].ravel()) == {0.0, 1.0}
    size = 4 * state.experts.shape[1]
    assert (record.bytes_up, record.bytes_down) == (2 * (size + 4), 2 * 3 * size)


def test_seen_clients_pick_again_when_evaluated_and_training_does_not_notice(
    method, make_engine, train, same_bytes
):
    state = method.init()
    losses_say = {0: 2, 3: 1}
    validation = {
        0: (Scores(favouring(0.0, 1.0, 2.0)), ONES),
        3: (Scores(favouring(-1.0, 1.0, 0.5)), ONES),
    }
    after = method.calibrate(state, validation)
    for client, m in losses_say.items():
        np.testing.assert_array_equal(after.correlation[client], np.eye(3)[m])
    np.testing.assert_array_equal(after.correlation[1], np.full(3, 1 / 3))
    same_bytes(train(make_engine(), method, 1, after), train(make_engine(), method, 1, state))


def test_the_personalized_prediction_is_the_picked_expert_alone(method):
    state = method.init()
    c = state.correlation.copy()
    c[2] = [0.0, 1.0, 0.0]
    scores = Scores(favouring(0.0, 1.0, 5.0))
    found = method.predict_client(replace(state, correlation=c), 2, scores, 0.0)
    expected = np.array([1, np.e, 1, 1]) / (3 + np.e)
    np.testing.assert_allclose(np.exp(found), [expected, expected], rtol=1e-6)


def test_a_new_client_picks_with_labels_and_gets_the_uniform_mixture_without(method):
    state, scores = method.init(), Scores(favouring(0.0, 1.0, 0.5))
    _, c = method.join_labelled(state, scores, ONES)
    np.testing.assert_array_equal(c, [0, 1, 0])
    prior, c = method.join_unlabelled(state, scores)
    np.testing.assert_allclose(c, 1 / 3)
    found = np.exp(method.predict_with(state, scores, prior, c))
    p = np.exp(favouring(0.0, 1.0, 0.5))
    p /= p.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(found, p.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(np.exp(method.predict_global(state, scores)), found, rtol=1e-12)


def test_with_balanced_softmax_the_pick_is_by_the_balanced_loss(make_method):
    plain, balanced = (
        make_method(name="ifca", experts=2, balanced_softmax=b) for b in (False, True)
    )
    labels = np.array([0, 0, 0, 1])
    # Expert 0 has learnt the client's frequencies, expert 1 nothing: balanced, it needs no more.
    frequent = np.tile(np.log(np.array([0.73, 0.25, 0.01, 0.01], np.float32)), (4, 1))
    logits = np.stack([frequent, np.zeros((4, 4), np.float32)])
    picks = [m.correlation_labelled(None, Scores(logits), labels) for m in (plain, balanced)]
    assert [int(c.argmax()) for c in picks] == [0, 1]


def test_it_runs_on_both_engines(method, runs_on_both_engines):
    found = runs_on_both_engines(method)
    assert set(found.state.correlation.ravel()) == {0.0, 1.0}


def test_its_settings_have_ranges():
    assert settings_for({"name": "ifca"}).experts == 4
    for bad in (0, 65):
        with pytest.raises(ValidationError, match="experts"):
            settings_for({"name": "ifca", "experts": bad})


def test_the_record_of_a_round_is_of_what_clients_picked_in_it(method, side, engine):
    state = method.init()
    picks = [method.pick(side, state, client) for client in range(6)]
    after, record = train_round(engine, method, state)
    load = np.bincount(picks, minlength=3) / 6
    load = load[load > 0]
    expected = -(load * np.log(load)).sum() / np.log(3)
    assert record.load_entropy == pytest.approx(expected) and expected > 0
    again = [method.pick(side, after, client) for client in range(6)]
    _, second = train_round(engine, method, after)
    assert second.churn == np.mean([a != b for a, b in zip(picks, again, strict=True)])
