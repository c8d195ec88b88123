import numpy as np
import pytest
from sklearn.metrics import accuracy_score, log_loss

from fedcoe.metrics import Tally, calibration_error, over_clients, tally
from fedcoe.prediction import log_posterior


def test_tally_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    log_p, labels = log_posterior(rng.standard_normal((200, 5)) * 2), rng.integers(0, 5, 200)
    found = tally(log_p, labels)
    assert found.count == 200
    assert found.accuracy == pytest.approx(accuracy_score(labels, log_p.argmax(1)))
    expected = log_loss(labels, np.exp(log_p), labels=range(5))
    assert found.nll / found.count == pytest.approx(expected)


def test_an_impossible_true_class_costs_at_most_log_1e12():
    found = tally(np.array([[0.0, -np.inf]]), np.array([1]))
    assert found.nll == pytest.approx(12 * np.log(10))
    assert found.correct == 0


def test_accuracy_of_no_images_is_zero():
    assert Tally(0, 0, 0.0).accuracy == 0.0


def test_calibration_error_by_hand():
    # Two predictions at 0.9, one of them right: |0.9 - 0.5| over 2 of 4; two at 0.6, both right:
    # |0.6 - 1| over 2 of 4.
    log_p = np.log([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]])
    assert calibration_error(log_p, np.array([0, 1, 0, 0])) == pytest.approx(0.4)


def test_calibration_error_nets_out_within_a_bin_but_not_across_bins():
    log_p = np.log([[0.75, 0.25]] * 4)
    assert calibration_error(log_p, np.array([0, 0, 0, 1])) == pytest.approx(0.0, abs=1e-12)
    log_p = np.log([[0.95, 0.05], [0.55, 0.45]])
    assert calibration_error(log_p, np.array([0, 1]), bins=10) == pytest.approx(0.3)
    assert calibration_error(log_p, np.array([0, 1]), bins=1) == pytest.approx(0.25)


def test_full_confidence_falls_into_the_last_bin():
    assert calibration_error(np.array([[0.0, -np.inf]]), np.array([0])) == 0.0


def test_over_clients_weighs_by_samples_and_also_plainly():
    found = over_clients([Tally(10, 9, 2.0), Tally(30, 15, 30.0)])
    assert found["accuracy"] == pytest.approx(24 / 40)
    assert found["mean"] == pytest.approx(0.7)
    assert found["std"] == pytest.approx(0.2)
    assert found["worst10"] == pytest.approx(0.5)
    assert found["nll"] == pytest.approx(0.8)


def test_worst10_is_the_mean_of_the_worst_tenth_and_at_least_one_client():
    tallies = [Tally(100, k, 0.0) for k in range(100, 80, -1)]
    assert over_clients(tallies)["worst10"] == pytest.approx(np.mean([0.81, 0.82]))
    assert over_clients(tallies[:3])["worst10"] == pytest.approx(0.98)
