import numpy as np
import pytest
from pydantic import ValidationError

from fedcoe.methods.settings import settings_for


def test_without_pull_it_is_fedavg_bit_for_bit_and_with_pull_it_is_not(
    make_method, make_engine, train, same_bytes
):
    fedavg = train(make_engine(), make_method(name="fedavg"), 2)
    same_bytes(train(make_engine(), make_method(name="fedprox", mu=0.0), 2), fedavg)
    pulled = train(make_engine(), make_method(name="fedprox", mu=1.0), 2)
    assert not np.array_equal(pulled.experts, fedavg.experts)


def test_every_client_is_pulled_to_the_model_it_received(make_method, side):
    method = make_method(name="fedprox", mu=0.3)
    state = method.init()
    [order] = method.dispatch(state, [4])
    [fit] = method.fits(side, state, order)
    assert fit.pull == 0.3
    np.testing.assert_array_equal(fit.anchor, state.experts[0])
    np.testing.assert_array_equal(fit.start, state.experts[0])


def test_a_step_by_hand(make_method, side):
    """Two steps of plain SGD: the second gradient has mu (w_1 - w_0) added, the first nothing."""
    n = make_method(name="fedavg").federation.train_counts[4]
    train = {"batch_size": int(n), "lr": 0.1, "momentum": 0.0, "clip_norm": 0.0}
    one = make_method(name="fedavg", train=train)
    two = {"local_epochs": 2, **train}
    plain = make_method(name="fedavg", train=two)
    pulled = make_method(name="fedprox", mu=2.0, train=two)

    def trained(method):
        state = method.init()
        fits = method.fits(side, state, method.dispatch(state, [4])[0])
        [(_, result)] = side.trainer.fit(fits, method.work(1), side.data)
        return result.vector

    first, second = trained(one), trained(plain)
    expected = second - 0.1 * 2.0 * (first - one.init().experts[0])
    np.testing.assert_allclose(trained(pulled), expected, rtol=0, atol=1e-6)


def test_the_harder_the_pull_the_shorter_the_update(make_method, side):
    lengths = []
    for mu in (0.0, 0.5, 5.0):
        method = make_method(name="fedprox", mu=mu, train={"local_epochs": 5})
        state = method.init()
        result = method.local_train(side, state, method.dispatch(state, [4]))
        lengths.append(result.square_norms.value()[0])
    assert lengths[0] > lengths[1] > lengths[2] > 0


def test_it_runs_on_both_engines(make_method, runs_on_both_engines):
    runs_on_both_engines(make_method(name="fedprox", mu=0.1))


def test_its_settings_have_ranges():
    assert settings_for({"name": "fedprox"}).mu == 0.01
    for bad in (-0.1, 101.0, "much"):
        with pytest.raises(ValidationError, match="mu"):
            settings_for({"name": "fedprox", "mu": bad})
