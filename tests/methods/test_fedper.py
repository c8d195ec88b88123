import numpy as np
import pytest

from fedcoe.bundle import export_models, load_bundle
from fedcoe.evaluate import score_clients
from fedcoe.methods.base import LocalResult, Scores
from fedcoe.methods.fedper import FedPer
from fedcoe.rounds import train_round
from fedcoe.state import PersonalStore

HEAD = 512 * 4 + 4
"""Parameters of gn_cnn's head for 4 classes."""


@pytest.fixture
def method(make_method):
    return make_method(name="fedper")


def trained(method, side, state, client):
    [order] = method.dispatch(state, [client])
    [(_, result)] = side.trainer.fit(
        method.fits(side, state, order), method.work(state.round + 1), side.data
    )
    return result.vector


def test_clients_bodies_are_averaged_and_their_heads_stay(method, side):
    state = method.init()
    for rnd in (1, 2):
        models = np.stack([trained(method, side, state, k) for k in range(6)])
        orders = method.dispatch(state, range(6))
        after = method.aggregate(state, orders, [method.local_train(side, state, orders)])
        n = method.federation.train_counts
        mean = (n / n.sum()) @ models.astype(np.float64)
        np.testing.assert_allclose(after.experts[0], mean, rtol=0, atol=1e-6)
        for client in range(6):
            [order] = method.dispatch(after, [client])
            [fit] = method.fits(side, after, order)
            assert fit.start[:-HEAD].tobytes() == after.experts[0, :-HEAD].tobytes()
            assert fit.start[-HEAD:].tobytes() == models[client, -HEAD:].tobytes()
            np.testing.assert_array_equal(side.personal.load(client, rnd), models[client])
        assert np.ptp(models[:, -HEAD:], axis=0).max() > 1e-3
        state = after


@pytest.mark.parametrize("cohort", [1.0, 0.5])
def test_with_the_head_shared_too_it_is_fedavg_bit_for_bit(
    make_method, make_engine, train, same_bytes, monkeypatch, cohort
):
    settings = {"train": {"cohort": cohort}, "server_momentum": 0.5, "balanced_softmax": True}
    fedavg = train(make_engine(), make_method(name="fedavg", **settings), 3)
    own_heads = train(make_engine(), make_method(name="fedper", **settings), 3)
    monkeypatch.setattr(FedPer, "own", ())
    shared = train(make_engine(), make_method(name="fedper", **settings), 3)
    same_bytes(shared, fedavg)
    assert own_heads.experts.tobytes() != fedavg.experts.tobytes()


def test_the_servers_momentum_and_step_do_not_touch_heads(make_method, side):
    method = make_method(name="fedper", server_momentum=0.5, server_lr=0.5)
    state, momentum = method.init(), 0.0
    n = method.federation.train_counts
    for _ in range(3):
        models = np.stack([trained(method, side, state, k) for k in range(6)])
        mean = (n / n.sum()) @ models.astype(np.float64)
        momentum = 0.5 * momentum + (mean - state.experts[0])
        body = state.experts[0] + 0.5 * momentum
        orders = method.dispatch(state, range(6))
        state = method.aggregate(state, orders, [method.local_train(side, state, orders)])
        np.testing.assert_allclose(state.experts[0, -HEAD:], mean[-HEAD:], rtol=0, atol=1e-6)
        np.testing.assert_allclose(state.experts[0, :-HEAD], body[:-HEAD], rtol=0, atol=1e-5)
        np.testing.assert_array_equal(state.momentum[:, -HEAD:], 0.0)
        assert state.momentum.any()


def test_a_client_in_its_first_cohort_starts_with_the_head_everyone_starts_with(
    make_method, engine, train
):
    """Not with the mean of others' heads: that is not sent to clients."""
    method = make_method(name="fedper", train={"cohort": 0.3})
    state = train(engine, method, 2)
    side = engine.run(lambda side: side)
    client = int(np.flatnonzero(state.personal_round == 0)[0])
    [order] = method.dispatch(state, [client])
    [fit] = method.fits(side, state, order)
    np.testing.assert_array_equal(fit.start[:-HEAD], state.experts[0, :-HEAD])
    np.testing.assert_array_equal(fit.start[-HEAD:], method.init().experts[0, -HEAD:])


def test_the_personal_model_is_the_averaged_body_under_the_clients_own_head(method, engine, train):
    state = train(engine, method, 2)
    side = engine.run(lambda side: side)
    images = np.array(side.data.dataset.x_test)
    for client in (0, 5):
        own = side.personal.load(client, 2)
        joined = np.concatenate([state.experts[0, :-HEAD], own[-HEAD:]])
        expected = side.trainer.outputs(joined, images, 64)[0]
        found = method.personal_logits(side, state, client, images)
        np.testing.assert_array_equal(found, expected)
        for other in (own, state.experts[0]):
            assert np.abs(found - side.trainer.outputs(other, images, 64)[0]).max() > 1e-3


def test_a_head_trained_on_shifted_logits_predicts_with_the_shift(make_method, engine, train):
    images = np.array(engine.run(lambda side: side.data.dataset.x_test))
    found = {}
    method = make_method(name="fedper", balanced_softmax=True)
    state = train(engine, method, 1)
    side = engine.run(lambda side: side)
    for balanced in (True, False):
        m = make_method(name="fedper", balanced_softmax=balanced)
        found[balanced] = m.personal_logits(side, state, 2, images)
    shift = np.tile(method.logit_shift(2), (len(images), 1))
    np.testing.assert_allclose(found[True] - found[False], shift, rtol=0, atol=1e-5)


def test_the_global_prediction_uses_the_mean_head(method, side):
    state = method.init()
    models = np.stack([trained(method, side, state, k) for k in range(6)]).astype(np.float64)
    orders = method.dispatch(state, range(6))
    after = method.aggregate(state, orders, [method.local_train(side, state, orders)])
    n = method.federation.train_counts
    mean = ((n / n.sum()) @ models).astype(np.float32)
    images = np.array(side.data.dataset.x_test)
    scores = method.score(side.trainer, after, images)
    expected = side.trainer.outputs(mean, images, 64)[0]
    np.testing.assert_allclose(scores.experts[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["fedper", "fedrep", "pfedmoe"])
def test_the_mean_of_own_parts_is_that_of_all_clients_not_of_the_last_cohort(
    make_method, make_engine, train, name
):
    method = make_method(name=name, train={"cohort": 0.5})
    engine = make_engine(build=method.build)
    state = train(engine, method, 5)
    side = engine.run(lambda side: side)
    assert np.unique(state.personal_round).size > 2
    own = [method.own_of(method.personal_start(side, state, k)).astype(float) for k in range(6)]
    n = method.federation.train_counts
    mean = (n / n.sum()) @ np.stack(own)
    found = method.own_of(state.experts[0])
    np.testing.assert_allclose(found, mean, rtol=0, atol=1e-6)


def test_a_model_that_diverged_stays_out_of_the_mean_of_own_parts(make_method, side):
    method = make_method(name="fedper")
    state = method.init()
    [fit] = method.fits(side, state, method.dispatch(state, [2])[0])
    side.personal.save(2, 1, np.full_like(fit.start, np.nan))
    result = LocalResult.zeros(*state.experts.shape)
    method.note(side, state, result, fit, fit.start)
    assert not result.extra


def test_the_personalized_prediction_is_the_personal_model_alone(method, two_rounds):
    found = two_rounds(method)
    np.testing.assert_array_equal(found.state.share, 1.0)
    p = np.array([[0.1, 0.7, 0.1, 0.1]], np.float32)
    scores = Scores(np.zeros((1, 1, 4), np.float32), personal=np.log(p))
    np.testing.assert_allclose(
        np.exp(method.predict_client(found.state, 0, scores, 1.0)), p, rtol=1e-5
    )


def test_a_client_that_no_cohort_included_gets_the_global_model(make_method, engine, train):
    method = make_method(name="fedper", train={"cohort": 0.3})
    state = train(engine, method, 2)
    never = np.flatnonzero(state.dispatched.sum(axis=1) == 0)
    assert 0 < len(never) < 6
    np.testing.assert_array_equal(state.personal_round == 0, state.dispatched[:, 0] == 0)
    for scores in engine.run(score_clients, method, state, range(6)):
        assert (scores.test.personal is None) == (scores.client in never)
        if scores.client in never:
            np.testing.assert_array_equal(
                method.predict_client(state, scores.client, scores.test, 0.0),
                method.predict_global(state, scores.test),
            )


def test_a_client_outside_the_cohort_keeps_its_head(make_method, engine, train):
    method = make_method(name="fedper", train={"cohort": 0.5})
    state = train(engine, method, 2)
    last = state.personal_round.copy()
    cohort = method.cohort(state)
    after, _ = train_round(engine, method, state)
    others = [k for k in range(6) if k not in cohort]
    np.testing.assert_array_equal(after.personal_round[others], last[others])
    np.testing.assert_array_equal(after.personal_round[cohort], 3)


def test_a_round_moves_the_body_alone(method):
    state = method.init()
    body = 4 * (state.experts.shape[1] - HEAD)
    orders = method.dispatch(state, [0, 3, 4])
    assert method.round_bytes(state, orders) == (3 * (body + 4), 3 * body)


def test_exported_models_predict_the_same(method, engine, train, tmp_path):
    state = train(engine, method, 2)
    side = engine.run(lambda side: side)
    folder = tmp_path / "models"
    export_models(folder, method, state, side.personal)
    bundle = load_bundle(folder, "fp32")
    images = np.array(side.data.dataset.x_test)
    exported = PersonalStore(folder / "personal", bundle.trainer.flat.layout)
    there = type(side)(side.data, bundle.trainer, exported)
    for client in range(6):
        np.testing.assert_array_equal(
            bundle.method.personal_logits(there, bundle.state, client, images),
            method.personal_logits(side, state, client, images),
        )


@pytest.mark.parametrize("cohort", [1.0, 0.5])
def test_it_runs_on_both_engines(make_method, runs_on_both_engines, cohort):
    runs_on_both_engines(make_method(name="fedper", train={"cohort": cohort}))
