from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from fedcoe.methods.base import LocalResult, Scores
from fedcoe.methods.settings import settings_for


@pytest.fixture
def method(make_method):
    return make_method(name="fedem", experts=2)


# p(class 0) of two experts on two samples whose class is 0: [M, n].
P = np.array([[0.8, 0.1], [0.2, 0.4]])
LABELS = np.array([0, 0])


def logits(p):
    """[M, n, 4] logits of experts that give class 0 these probabilities."""
    rest = np.repeat(((1 - p) / 3)[..., None], 3, axis=-1)
    return np.log(np.concatenate([p[..., None], rest], axis=-1)).astype(np.float32)


def test_with_one_component_it_is_fedavg(make_method, make_engine, train):
    for cohort in (1.0, 0.5):
        settings = {"train": {"cohort": cohort}}
        fedavg = train(make_engine(), make_method(name="fedavg", **settings), 2)
        fedem = train(make_engine(), make_method(name="fedem", experts=1, **settings), 2)
        np.testing.assert_allclose(fedem.experts, fedavg.experts, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(fedem.correlation, 1.0)


def test_with_one_component_every_weight_is_one(make_method, side):
    method = make_method(name="fedem", experts=1)
    state = method.init()
    [fit] = method.fits(side, state, method.dispatch(state, [2])[0])
    np.testing.assert_array_equal(fit.sample_weights, 1.0)


def test_the_e_step_by_hand(method):
    # exp(-loss) = p(class 0): q ~ pi p
    q = method.responsibilities(logits(P), LABELS, np.array([0.25, 0.75]))
    expected = [[0.2 / 0.35, 0.15 / 0.35], [0.025 / 0.325, 0.3 / 0.325]]
    np.testing.assert_allclose(q, expected, rtol=1e-6)
    certain = method.responsibilities(logits(P), LABELS, np.array([0.0, 1.0]))
    np.testing.assert_allclose(certain, [[0, 1], [0, 1]], atol=1e-12)


def test_components_are_trained_on_their_responsibilities_and_pi_is_their_mean(method, side):
    state = replace(method.init(), correlation=np.tile([0.3, 0.7], (6, 1)))
    orders = method.dispatch(state, [1, 4])
    result = method.local_train(side, state, orders)
    after = method.aggregate(state, orders, [result])
    n = method.federation.train_counts[[1, 4]]
    expected = np.zeros(state.experts.shape)
    for client, samples in zip((1, 4), n, strict=True):
        images, labels = side.data.train(client)
        outputs = [side.trainer.outputs(v, images, 64)[0] for v in state.experts]
        q = method.responsibilities(np.stack(outputs), labels, np.array([0.3, 0.7]))
        np.testing.assert_allclose(after.correlation[client], q.mean(axis=0), atol=1e-6)
        for fit in method.fits(side, state, orders[(1, 4).index(client)]):
            np.testing.assert_allclose(fit.sample_weights, q[:, fit.name], atol=1e-6)
            np.testing.assert_array_equal(fit.start, state.experts[fit.name])
            [(_, trained)] = side.trainer.fit([fit], method.work(1), side.data)
            expected[fit.name] += samples / n.sum() * trained.vector.astype(np.float64)
    np.testing.assert_allclose(after.experts, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(after.correlation[[0, 2, 3, 5]], np.tile([0.3, 0.7], (4, 1)))
    np.testing.assert_allclose(after.correlation.sum(axis=1), 1.0)


def test_the_mean_is_by_samples_whatever_pi_says(method):
    pi = np.array([[0.99, 0.01]] * 3 + [[0.2, 0.8]] * 3)
    state = replace(method.init(), correlation=pi)
    n = method.federation.train_counts
    for order in method.dispatch(state, [0, 3]):
        assert order.experts == (0, 1)
        assert order.weights == pytest.approx([n[order.client] / (n[0] + n[3])] * 2)


def test_a_client_with_a_dropped_component_keeps_its_pi(method):
    state = method.init()
    result = LocalResult.zeros(*state.experts.shape)
    result.sketches = {0: np.array([0.9, np.nan]), 1: np.array([0.9, 0.1])}
    after = method.aggregate(state, [], [result])
    np.testing.assert_allclose(after.correlation[:2], [[0.5, 0.5], [0.9, 0.1]])


def test_components_start_apart_and_the_first_from_the_common_start(make_method, method):
    first, second = method.init().experts
    assert first.tobytes() == make_method(name="fedavg").init().experts[0].tobytes()
    assert np.abs(first - second).max() > 0.01


def test_the_personalized_prediction_is_the_mixture_by_pi(method):
    state = replace(method.init(), correlation=np.tile([0.25, 0.75], (6, 1)))
    scores = Scores(logits(P))
    found = np.exp(method.predict_client(state, 3, scores, 0.0))[:, 0]
    np.testing.assert_allclose(found, 0.25 * P[0] + 0.75 * P[1], rtol=1e-5)
    overall = np.exp(method.predict_global(state, scores))[:, 0]
    np.testing.assert_allclose(overall, P.mean(axis=0), rtol=1e-5)


def test_a_new_client_takes_one_e_step_with_labels_and_is_uniform_without(method):
    state, scores = method.init(), Scores(logits(P))
    _, c = method.join_labelled(state, scores, LABELS)
    np.testing.assert_allclose(c, [(0.8 + 0.2) / 2, (0.2 + 0.8) / 2], rtol=1e-5)
    _, c = method.join_labelled(state, Scores(logits(P[:, :1])), LABELS[:1])
    np.testing.assert_allclose(c, [0.8, 0.2], rtol=1e-5)
    np.testing.assert_allclose(method.join_unlabelled(state, scores)[1], 0.5)


def test_a_round_moves_every_component_each_way_and_trains_each(method, side):
    state = method.init()
    orders = method.dispatch(state, [0, 1, 2])
    size = 4 * state.experts.shape[1]
    assert method.round_bytes(state, orders) == (6 * (size + 4), 6 * size)
    images = method.local_train(side, state, orders).images
    assert images == 2 * method.federation.train_counts[:3].sum()


def test_it_runs_on_both_engines(method, runs_on_both_engines):
    found = runs_on_both_engines(method)
    assert np.abs(found.state.correlation - 0.5).max() > 1e-3


def test_its_settings_have_ranges():
    assert settings_for({"name": "fedem"}).experts == 3
    for bad in (0, 65):
        with pytest.raises(ValidationError, match="experts"):
            settings_for({"name": "fedem", "experts": bad})
