import numpy as np
import pytest
from pydantic import ValidationError

from fedcoe.methods.base import Scores
from fedcoe.methods.settings import settings_for


def personal(engine, state):
    side = engine.run(lambda side: side)
    return {
        k: side.personal.load(k, int(last)) for k, last in enumerate(state.personal_round) if last
    }


@pytest.mark.parametrize("cohort", [1.0, 0.5])
def test_without_pull_it_is_fedavg_beside_local_bit_for_bit(
    make_method, make_engine, train, same_bytes, cohort
):
    own, states = {}, {}
    for name, settings in (("ditto", {"mu": 0.0}), ("local", {}), ("fedavg", {})):
        engine = make_engine()
        method = make_method(name=name, train={"cohort": cohort}, **settings)
        states[name] = train(engine, method, 3)
        own[name] = personal(engine, states[name])
    same_bytes(states["ditto"], states["fedavg"])
    assert set(own["ditto"]) == set(own["local"])
    assert own["ditto"]
    for client, vector in own["ditto"].items():
        assert vector.tobytes() == own["local"][client].tobytes()


def test_the_pull_changes_personal_models_and_leaves_the_global_one_alone(
    make_method, make_engine, train, same_bytes
):
    found = {}
    for mu in (0.0, 2.0):
        engine = make_engine()
        state = train(engine, make_method(name="ditto", mu=mu), 2)
        found[mu] = state, personal(engine, state)
    same_bytes(found[0.0][0], found[2.0][0])
    target = found[0.0][0].experts[0]
    distance = {
        mu: np.mean([np.linalg.norm(v - target) for v in own.values()])
        for mu, (_, own) in found.items()
    }
    assert distance[2.0] < distance[0.0]


def test_a_personal_model_is_pulled_to_the_received_global_one(make_method, engine, train):
    method = make_method(name="ditto", mu=0.3)
    state = train(engine, method, 1)
    side = engine.run(lambda side: side)
    shared, own = method.fits(side, state, method.dispatch(state, [4])[0])
    assert (shared.name, shared.anchor, own.name, own.pull) == (0, None, -1, 0.3)
    np.testing.assert_array_equal(shared.start, state.experts[0])
    np.testing.assert_array_equal(own.anchor, state.experts[0])
    np.testing.assert_array_equal(own.start, side.personal.load(4, 1))
    assert not np.array_equal(own.start, own.anchor)


def test_a_personal_step_by_hand(make_method, engine, train):
    """From its own v: v - lr (gradient + mu (v - w)); mu = 0 gives the gradient."""
    n = int(make_method(name="ditto").federation.train_counts[4])
    work = {"batch_size": n, "lr": 0.1, "momentum": 0.0, "clip_norm": 0.0}
    plain, pulled = (make_method(name="ditto", mu=mu, train=work) for mu in (0.0, 2.0))
    state = train(engine, plain, 2)
    side = engine.run(lambda side: side)

    def trained(method):
        fit = method.fits(side, state, method.dispatch(state, [4])[0])[1]
        [(_, result)] = side.trainer.fit([fit], method.work(3), side.data)
        return fit.start, result.vector

    (v, free), (_, held) = trained(plain), trained(pulled)
    expected = free - 0.1 * 2.0 * (v - state.experts[0])
    np.testing.assert_allclose(held, expected, rtol=0, atol=1e-6)
    assert np.abs(held - free).max() > 1e-4


def test_the_personalized_prediction_is_the_personal_model_alone(make_method, two_rounds):
    method = make_method(name="ditto")
    found = two_rounds(method)
    np.testing.assert_array_equal(found.state.share, 1.0)
    p = np.array([[0.1, 0.7, 0.1, 0.1]], np.float32)
    scores = Scores(np.zeros((1, 1, 4), np.float32), personal=np.log(p))
    share = float(found.state.share[0])
    np.testing.assert_allclose(
        np.exp(method.predict_client(found.state, 0, scores, share)), p, rtol=1e-5
    )


def test_a_client_without_a_personal_model_gets_the_global_one(make_method, two_rounds):
    method = make_method(name="ditto", train={"cohort": 0.3})
    state = two_rounds(method).state
    np.testing.assert_array_equal(state.share, state.personal_round > 0)
    assert 0 < state.share.sum() < 6
    scores = Scores(np.log(np.array([[[0.4, 0.3, 0.2, 0.1]]], np.float32)))
    client = int(np.flatnonzero(state.share == 0)[0])
    found = np.exp(method.predict_client(state, client, scores, 0.0))
    np.testing.assert_allclose(found, [[0.4, 0.3, 0.2, 0.1]], rtol=1e-5)


def test_it_trains_two_models_a_client_and_sends_one(make_method, side):
    ditto, fedavg = make_method(name="ditto"), make_method(name="fedavg")
    state = ditto.init()
    orders = ditto.dispatch(state, range(6))
    images = [m.local_train(side, state, orders).images for m in (ditto, fedavg)]
    assert images[0] == 2 * images[1]
    assert ditto.round_bytes(state, orders) == fedavg.round_bytes(state, orders)


def test_it_runs_on_both_engines(make_method, runs_on_both_engines):
    runs_on_both_engines(make_method(name="ditto"))


def test_its_settings_have_ranges():
    assert settings_for({"name": "ditto"}).mu == 0.1
    with pytest.raises(ValidationError, match="mu"):
        settings_for({"name": "ditto", "mu": -1.0})
