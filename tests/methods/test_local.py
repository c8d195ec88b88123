from dataclasses import replace

import numpy as np
import pytest

from fedcoe.engine.trainer import Trainer
from fedcoe.evaluate import score_clients
from fedcoe.methods.base import Scores
from fedcoe.prediction import prior_from_counts


@pytest.fixture
def method(make_method):
    return make_method(name="local")


def test_every_client_goes_on_from_its_own_model_and_the_first_time_from_the_common_start(
    make_method, make_engine, train
):
    method = make_method(name="local", train={"cohort": 0.5})
    engine = make_engine()
    state, seen = method.init(), {}
    for rnd in (1, 2, 3, 4):
        cohort = method.cohort(state)
        state = train(engine, method, 1, state)
        side = engine.run(lambda side: side)
        for client in cohort:
            fit = method.fits(side, method.init(), method.dispatch(state, [client])[0])[0]
            fit = replace(fit, start=seen.get(client, method.init().experts[0]))
            [(_, expected)] = side.trainer.fit([fit], method.work(rnd), side.data)
            seen[client] = side.personal.load(client, rnd)
            np.testing.assert_array_equal(seen[client], expected.vector)
    assert len(seen) > 3
    assert set(np.flatnonzero(state.personal_round)) == set(seen)


def test_nothing_is_shared(method, engine, train):
    state = train(engine, method, 2)
    assert state.experts.tobytes() == method.init().experts.tobytes()
    assert method.round_bytes(state, method.dispatch(state, range(6))) == (0, 0)


def test_what_a_round_reports_is_about_the_own_models(method, side):
    state = method.init()
    orders = method.dispatch(state, range(6))
    result = method.local_train(side, state, orders)
    n = method.federation.train_counts.sum()
    assert (result.valid, result.samples, result.images) == (6, n, n)
    assert sorted(result.personal) == list(range(6))
    assert 0 < result.train_loss < 10


def test_a_model_that_is_not_finite_is_neither_stored_nor_counted(method, side, monkeypatch):
    real = Trainer._fit

    def broken(self, fit, *rest):
        result = real(self, fit, *rest)
        if fit.client == 2:
            result.vector[3] = np.nan
        return result

    monkeypatch.setattr(Trainer, "_fit", broken)
    state = method.init()
    orders = method.dispatch(state, range(6))
    result = method.local_train(side, state, orders)
    assert result.dropped == {"not finite": 1}
    assert result.valid == 5
    assert method.aggregate(state, orders, [result]).personal_round.tolist() == [1, 1, 0, 1, 1, 1]


def test_the_personalized_prediction_is_the_own_model_and_the_global_one_is_uniform(
    method, two_rounds
):
    found = two_rounds(method)
    np.testing.assert_array_equal(found.state.share, 1.0)
    assert found.evaluation.overall["nll"] == pytest.approx(np.log(4))
    assert found.evaluation.overall["accuracy"] == 0.25
    for mode in ("none", "unlabelled", "labels"):
        assert found.cold_start[mode]["nll"] == pytest.approx(np.log(4))
    assert abs(found.evaluation.personalized["nll"] - np.log(4)) > 0.01


def test_own_models_are_scored_alone_even_where_uniform_would_be_likelier(method, engine, train):
    state = train(engine, method, 1)
    [scores] = engine.run(score_clients, method, state, [0])
    p = np.array([[0.97, 0.01, 0.01, 0.01]], np.float32)
    own = replace(scores.test.rows(slice(1)), personal=np.log(p))
    np.testing.assert_allclose(np.exp(method.predict_client(state, 0, own, 1.0)), p, rtol=1e-5)


def test_with_reweighting_a_new_client_with_labels_gets_its_label_prior(make_method):
    method = make_method(name="local", reweighting=True)
    state, uniform = method.init(), Scores(np.zeros((1, 2, 4), np.float32))
    prior, c = method.join_labelled(state, uniform, np.array([1, 1, 1, 3]))
    np.testing.assert_allclose(prior, prior_from_counts(np.array([0, 3, 0, 1])))
    found = np.exp(method.predict_with(state, uniform, prior, c))
    np.testing.assert_allclose(found, [prior, prior], rtol=1e-6)


def test_it_runs_on_both_engines(method, runs_on_both_engines):
    found = runs_on_both_engines(method)
    assert found.state.personal_round.tolist() == [2] * 6
