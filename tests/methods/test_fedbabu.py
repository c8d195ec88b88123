from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from fedcoe.engine.trainer import Fit, LocalWork, Phase
from fedcoe.evaluate import score_clients
from fedcoe.methods.base import Scores
from fedcoe.methods.settings import settings_for
from fedcoe.rounds import finetune

HEAD = 512 * 4 + 4
"""Parameters of gn_cnn's head for 4 classes."""


@pytest.fixture
def method(make_method):
    return make_method(name="fedbabu", finetune_epochs=2)


@pytest.mark.parametrize("cohort", [1.0, 0.5])
def test_the_head_never_changes_and_the_body_does(make_method, engine, train, cohort):
    method = make_method(
        name="fedbabu",
        finetune_epochs=1,
        server_momentum=0.7,
        balanced_softmax=True,
        train={"cohort": cohort, "weight_decay": 0.1, "clip_norm": 1.0},
    )
    start, state = method.init(), None
    for _ in range(3):
        before = start if state is None else state
        state = train(engine, method, 1, state)
        assert state.experts[:, -HEAD:].tobytes() == start.experts[:, -HEAD:].tobytes()
        assert np.abs(state.experts - before.experts)[:, :-HEAD].max() > 1e-3


def test_the_body_is_the_weighted_mean_of_bodies_trained_under_the_frozen_head(method, side):
    state = method.init()
    orders = method.dispatch(state, range(6))
    after = method.aggregate(state, orders, [method.local_train(side, state, orders)])
    n = method.federation.train_counts
    expected = np.zeros(state.experts.shape[1])
    for client in range(6):
        fit = Fit(client, 0, state.experts[0], phases=(Phase(1, "body"),))
        [(_, trained)] = side.trainer.fit([fit], method.work(1), side.data)
        assert trained.vector[-HEAD:].tobytes() == state.experts[0, -HEAD:].tobytes()
        expected += n[client] / n.sum() * trained.vector.astype(np.float64)
    np.testing.assert_allclose(after.experts[0], expected, rtol=0, atol=1e-6)


def test_a_client_trains_the_body_for_the_rounds_epochs(make_method, side):
    method = make_method(name="fedbabu", train={"local_epochs": 3})
    state = method.init()
    orders = method.dispatch(state, [2])
    [fit] = method.fits(side, state, orders[0])
    assert fit.phases == (Phase(3, "body"),)
    images = method.local_train(side, state, orders).images
    assert images == 3 * method.federation.train_counts[2]


def test_fine_tuning_trains_body_and_head(make_method, engine, train):
    settings = {"momentum": 0.9, "weight_decay": 0.0, "clip_norm": 0.0, "augment": "none"}
    method = make_method(name="fedbabu", finetune_epochs=2, train=settings)
    state = train(engine, method, 2)
    side = engine.run(lambda side: side)
    work = LocalWork(2, 2, 16, 0.05, 0.9, 0.0, 0.0, "none", 0)
    for client in range(6):
        own = side.personal.load(client, 2)
        moved = np.abs(own - state.experts[0])
        assert moved[:-HEAD].max() > 1e-3 and moved[-HEAD:].max() > 1e-3
        [(_, expected)] = side.trainer.fit([Fit(client, 0, state.experts[0])], work, side.data)
        np.testing.assert_array_equal(own, expected.vector)


def test_it_is_only_fine_tuned_when_an_evaluation_is_due_for_the_epochs_set(
    make_method, engine, train
):
    method, state, found = make_method(name="fedbabu", finetune_epochs=1), None, []
    for _ in range(4):
        state = train(engine, method, 1, state)
        found.append(set(state.personal_round.tolist()))
    assert found == [{0}, {2}, {2}, {4}]
    longer = make_method(name="fedbabu", finetune_epochs=3)
    images = [finetune(engine, m, state)[1] for m in (method, longer)]
    n = method.federation.train_counts.sum()
    assert images == [n, 3 * n]


def test_fine_tuning_leaves_the_common_model_alone(make_method, make_engine, train, same_bytes):
    states = [
        train(make_engine(), make_method(name="fedbabu", finetune_epochs=1, evaluate=evaluate), 2)
        for evaluate in ({"every": 1}, {"every": 100})
    ]
    same_bytes(*states)


def test_the_personalized_prediction_is_the_fine_tuned_model_alone(method, engine, train):
    state = train(engine, method, 2)
    assert method.shares == (1.0,)
    side = engine.run(lambda side: side)
    [scores] = engine.run(score_clients, method, state, [3])
    images = np.concatenate([side.data.images(3, split) for split in (1, 2)])
    expected = side.trainer.outputs(side.personal.load(3, 2), images, 64)[0]
    np.testing.assert_allclose(scores.test.personal, expected[-len(scores.test_labels) :])
    p = np.array([[0.1, 0.7, 0.1, 0.1]], np.float32)
    own = Scores(np.zeros((1, 1, 4), np.float32), personal=np.log(p))
    np.testing.assert_allclose(np.exp(method.predict_client(state, 3, own, 1.0)), p, rtol=1e-5)


def test_before_the_first_fine_tuning_a_client_gets_the_averaged_body_under_the_first_head(
    method, engine, train
):
    state = train(engine, method, 1)
    joined = np.concatenate([state.experts[0, :-HEAD], method.init().experts[0, -HEAD:]])
    side = engine.run(lambda side: side)
    [scores] = engine.run(score_clients, method, state, [1])
    assert scores.test.personal is None
    images = np.concatenate([side.data.images(1, split) for split in (1, 2)])
    expected = side.trainer.outputs(joined, images, 64)[0]
    np.testing.assert_allclose(scores.test.experts[0], expected[-len(scores.test_labels) :])
    np.testing.assert_array_equal(
        method.predict_client(state, 1, scores.test, 0.0),
        method.predict_global(state, scores.test),
    )


def test_a_client_that_no_cohort_included_is_fine_tuned_all_the_same(make_method, engine, train):
    method = make_method(name="fedbabu", finetune_epochs=1, train={"cohort": 0.3})
    state = train(engine, method, 2)
    assert (state.dispatched.sum(axis=1) == 0).any()
    assert state.personal_round.tolist() == [2] * 6


def test_a_round_moves_the_body_alone(method):
    state = replace(method.init(), round=3)
    body = 4 * (state.experts.shape[1] - HEAD)
    orders = method.dispatch(state, [0, 3, 4])
    assert method.round_bytes(state, orders) == (3 * (body + 4), 3 * body)


def test_it_runs_on_both_engines(make_method, runs_on_both_engines):
    method = make_method(name="fedbabu", finetune_epochs=1, train={"cohort": 0.5})
    assert runs_on_both_engines(method).state.personal_round.tolist() == [2] * 6


def test_its_settings_have_ranges():
    assert settings_for({"name": "fedbabu"}).finetune_epochs == 5
    with pytest.raises(ValidationError, match="finetune_epochs"):
        settings_for({"name": "fedbabu", "finetune_epochs": 0})
