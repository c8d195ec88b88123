from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from fedcoe.engine.trainer import Fit, Phase
from fedcoe.evaluate import score_clients
from fedcoe.methods.settings import settings_for

HEAD = 512 * 4 + 4
"""Parameters of gn_cnn's head for 4 classes."""
FULL_BATCH = {"batch_size": 1000, "momentum": 0.0, "local_epochs": 2}


@pytest.fixture
def method(make_method):
    return make_method(name="fedrep", head_epochs=3)


def fitted(side, method, fit):
    [(_, result)] = side.trainer.fit([fit], method.work(1), side.data)
    return result


def test_the_head_is_trained_first_and_then_the_body(make_method, side):
    method = make_method(name="fedrep", head_epochs=3, train=FULL_BATCH)
    state = method.init()
    [fit] = method.fits(side, state, method.dispatch(state, [4])[0])
    assert fit.phases == (Phase(3, "head"), Phase(2, "body"))
    found = fitted(side, method, fit).vector

    def after(*phases):
        vector = state.experts[0]
        for phase in phases:
            vector = fitted(side, method, Fit(4, 0, vector, phases=(phase,))).vector
        return vector

    head, body = fit.phases
    np.testing.assert_allclose(found, after(head, body), rtol=0, atol=1e-6)
    assert np.abs(found - after(body, head)).max() > 1e-4


def test_what_a_phase_does_not_train_stays_bit_for_bit(make_method, side):
    train = {"weight_decay": 0.1, "momentum": 0.9, "clip_norm": 1.0}
    method = make_method(name="fedrep", train=train, balanced_softmax=True)
    state = method.init()
    [fit] = method.fits(side, state, method.dispatch(state, [4])[0])
    start = fit.start
    head, body = (
        fitted(side, method, replace(fit, phases=(phase,))).vector for phase in fit.phases
    )
    assert head[:-HEAD].tobytes() == start[:-HEAD].tobytes()
    assert body[-HEAD:].tobytes() == start[-HEAD:].tobytes()
    assert np.abs(head - start)[-HEAD:].max() > 1e-3
    assert np.abs(body - start)[:-HEAD].max() > 1e-3


def test_the_server_averages_bodies_and_a_client_goes_on_with_its_head(method, side):
    state = method.init()
    orders = method.dispatch(state, range(6))
    models = np.stack([fitted(side, method, *method.fits(side, state, o)).vector for o in orders])
    after = method.aggregate(state, orders, [method.local_train(side, state, orders)])
    n = method.federation.train_counts
    mean = (n / n.sum()) @ models.astype(np.float64)
    np.testing.assert_allclose(after.experts[0], mean, rtol=0, atol=1e-6)
    for client, order in enumerate(method.dispatch(after, range(6))):
        [fit] = method.fits(side, after, order)
        np.testing.assert_array_equal(fit.start[:-HEAD], after.experts[0, :-HEAD])
        np.testing.assert_array_equal(fit.start[-HEAD:], models[client, -HEAD:])
        assert [phase.part for phase in fit.phases] == ["head", "body"]


def test_images_of_both_phases_count(method, side):
    state = method.init()
    images = method.local_train(side, state, method.dispatch(state, [1, 2])).images
    assert images == (3 + 1) * method.federation.train_counts[[1, 2]].sum()


def test_a_client_that_no_cohort_included_gets_the_global_model(make_method, engine, train):
    method = make_method(name="fedrep", train={"cohort": 0.3})
    state = train(engine, method, 2)
    never = np.flatnonzero(state.personal_round == 0)
    assert 0 < len(never) < 6
    for scores in engine.run(score_clients, method, state, never):
        assert scores.test.personal is None
        np.testing.assert_array_equal(
            method.predict_client(state, scores.client, scores.test, 0.0),
            method.predict_global(state, scores.test),
        )


def test_a_round_moves_the_body_alone(method):
    state = method.init()
    body = 4 * (state.experts.shape[1] - HEAD)
    orders = method.dispatch(state, [0, 3, 4])
    assert method.round_bytes(state, orders) == (3 * (body + 4), 3 * body)


@pytest.mark.parametrize("cohort", [1.0, 0.5])
def test_it_runs_on_both_engines(make_method, runs_on_both_engines, cohort):
    found = runs_on_both_engines(make_method(name="fedrep", train={"cohort": cohort}))
    np.testing.assert_array_equal(found.state.share, found.state.personal_round > 0)


def test_its_settings_have_ranges():
    assert settings_for({"name": "fedrep"}).head_epochs == 1
    with pytest.raises(ValidationError, match="head_epochs"):
        settings_for({"name": "fedrep", "head_epochs": 0})
