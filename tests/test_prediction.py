from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcoe import prediction


def test_log_posterior_is_a_softmax_with_a_temperature():
    logits = np.array([[0.0, np.log(3.0)]], np.float32)
    np.testing.assert_allclose(np.exp(prediction.log_posterior(logits)), [[0.25, 0.75]], rtol=1e-6)
    np.testing.assert_allclose(
        np.exp(prediction.log_posterior(logits, 2.0)), [[0.1, 0.9]], rtol=1e-6
    )
    assert prediction.log_posterior(logits).dtype == np.float64


def test_a_mixture_adds_probabilities_by_weight():
    experts = np.log([[[0.9, 0.1], [0.5, 0.5]], [[0.2, 0.8], [0.4, 0.6]]])
    weights = np.log([[0.25, 0.75], [0.5, 0.5]])
    expected = [[0.25 * 0.9 + 0.75 * 0.2, 0.25 * 0.1 + 0.75 * 0.8], [0.45, 0.55]]
    np.testing.assert_allclose(np.exp(prediction.mixture(experts, weights)), expected)
    np.testing.assert_allclose(np.exp(prediction.mixture(experts, weights[0]))[1], [0.425, 0.575])


def test_interpolate_is_a_normalised_geometric_mean():
    a, b = np.log([[0.8, 0.2]]), np.log([[0.2, 0.8]])
    np.testing.assert_allclose(np.exp(prediction.interpolate(a, b, 0.5)), [[0.5, 0.5]])
    np.testing.assert_allclose(prediction.interpolate(a, b, 0.0), a)
    np.testing.assert_allclose(prediction.interpolate(a, b, 1.0), b)
    # 0.8^0.75 0.2^0.25 : 0.2^0.75 0.8^0.25 = 2 : 1
    np.testing.assert_allclose(np.exp(prediction.interpolate(a, b, 0.25)), [[2 / 3, 1 / 3]])


def test_blend_is_an_arithmetic_mean_and_exact_at_its_ends():
    a, b = np.log([[0.9, 0.1]]), np.log([[0.3, 0.7]])
    np.testing.assert_allclose(np.exp(prediction.blend(a, b, 0.25)), [[0.75, 0.25]])
    assert prediction.blend(a, b, 0.0) is a
    assert prediction.blend(a, b, 1.0) is b


def test_blend_ends_do_not_touch_impossible_classes():
    impossible = np.array([[0.0, -np.inf]])
    assert prediction.blend(impossible, np.log([[0.5, 0.5]]), 0.0)[0, 1] == -np.inf


def test_reweight_is_bayes_rule():
    log_p = np.log([[0.6, 0.4]])
    to, given_ = np.array([0.2, 0.8]), np.array([0.5, 0.5])
    expected = np.array([0.6 * 0.4, 0.4 * 1.6]) / (0.6 * 0.4 + 0.4 * 1.6)
    np.testing.assert_allclose(np.exp(prediction.reweight(log_p, to, given_))[0], expected)
    back = prediction.reweight(prediction.reweight(log_p, to, given_), given_, to)
    np.testing.assert_allclose(back, log_p)


def test_prior_from_counts_gives_every_class_a_tenth_of_a_sample():
    np.testing.assert_allclose(
        prediction.prior_from_counts(np.array([3, 0])), [3.1 / 3.2, 0.1 / 3.2]
    )
    both = prediction.prior_from_counts(np.array([[1, 1], [0, 0]]), smoothing=1.0)
    np.testing.assert_allclose(both, 0.5)


def posteriors(prior, given_, n, rng, separation=2.0):
    """Exact posteriors of a Gaussian mixture with the label prior `given_`, of inputs from
    `prior`."""
    classes = len(prior)
    y = rng.choice(classes, n, p=prior)
    x = rng.standard_normal((n, classes)) + separation * np.eye(classes)[y]
    logits = separation * x
    return prediction.log_posterior(logits + np.log(given_))


@pytest.mark.parametrize(
    "given_", [np.full(3, 1 / 3), np.array([0.5, 0.3, 0.2])], ids=["uniform", "skewed"]
)
def test_em_recovers_the_label_prior_of_unlabelled_inputs(given_):
    truth = np.array([0.7, 0.25, 0.05])
    log_p = posteriors(truth, given_, 6000, np.random.default_rng(0))
    found = prediction.prior_by_em(log_p, given_, 200)
    np.testing.assert_allclose(found, truth, atol=0.025)
    assert found.sum() == pytest.approx(1.0)


def test_one_em_step_is_the_mean_posterior():
    log_p = np.log([[0.9, 0.1], [0.5, 0.5]])
    np.testing.assert_allclose(prediction.prior_by_em(log_p, np.full(2, 0.5), 1), [0.7, 0.3])


def test_em_never_lowers_the_likelihood_and_keeps_priors_positive():
    given_ = np.full(3, 1 / 3)
    log_p = posteriors(np.array([0.98, 0.01, 0.01]), given_, 50, np.random.default_rng(1), 6.0)
    densities = np.exp(log_p) / given_
    likelihoods = [
        np.log(densities @ prediction.prior_by_em(log_p, given_, steps)).sum()
        for steps in (1, 2, 5, 20, 100)
    ]
    assert np.all(np.diff(likelihoods) >= -1e-6)
    assert prediction.prior_by_em(log_p, given_, 500).min() > 0


@given(st.integers(0, 2**32 - 1))
def test_coordinate_search_of_a_separable_loss_finds_the_best_grid_point(seed):
    rng = np.random.default_rng(seed)
    tables = {"a": rng.random(4), "b": rng.random(3)}
    grids = {"a": (0.0, 1.0, 2.0, 3.0), "b": (0.0, 1.0, 2.0)}

    def loss(point):
        return sum(tables[name][int(value)] for name, value in point.items())

    best = prediction.coordinate_search(loss, {"a": 3.0, "b": 2.0}, grids)
    brute = min(product(*grids.values()), key=lambda p: loss(dict(zip(grids, p, strict=True))))
    assert tuple(best.values()) == brute


def test_coordinate_search_takes_the_first_of_equals_and_leaves_single_values_alone():
    best = prediction.coordinate_search(
        lambda p: 0.0, {"a": 2.0, "b": 7.0}, {"a": (1.0, 2.0), "b": (9.0,)}
    )
    assert best == {"a": 1.0, "b": 7.0}


def test_coordinate_search_keeps_names_that_have_no_grid_and_stops_when_nothing_moves():
    calls = []

    def loss(point):
        calls.append(dict(point))
        return abs(point["a"] - 1.0)

    best = prediction.coordinate_search(loss, {"a": 1.0, "z": 5.0}, {"a": (0.0, 1.0)}, sweeps=9)
    assert best == {"a": 1.0, "z": 5.0}
    assert len(calls) == 2
