from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from fedcoe.methods.base import LocalResult, Order, add_at
from fedcoe.methods.settings import settings_for

ORDER = [Order(0, (0,), (1.0,))]


@pytest.fixture
def method(make_method):
    return make_method(
        name="fedadam", server_lr=0.5, server_momentum=0.9, second_momentum=0.75, adaptivity=0.1
    )


@pytest.fixture
def state(method):
    return replace(
        method.init(),
        experts=np.array([[1.0, -2.0]], np.float32),
        momentum=np.zeros((1, 2), np.float32),
        extra={"server_second_moment": np.full((1, 2), 0.01, np.float32)},
    )


def moved(method, state, *updates):
    result = LocalResult.zeros(1, 2)
    for update, weight in updates:
        add_at(result, 0, np.array(update, np.float32), weight)
    return method.aggregate(state, ORDER, [result])


def test_one_step_by_hand(method, state):
    # d = 0.25 (0, 0) + 0.75 (4, -0.8) = (3, -0.6)
    after = moved(method, state, ([0.0, 0.0], 0.25), ([4.0, -0.8], 0.75))
    m = np.array([0.3, -0.06])
    v = 0.75 * 0.01 + 0.25 * np.array([9.0, 0.36])
    np.testing.assert_allclose(after.momentum, [m], rtol=1e-6)
    np.testing.assert_allclose(after.extra["server_second_moment"], [v], rtol=1e-6)
    np.testing.assert_allclose(
        after.experts, [[1.0, -2.0] + 0.5 * m / (np.sqrt(v) + 0.1)], rtol=1e-6
    )
    # 0.15 / (1.502498 + 0.1) and 0.03 / (0.312250 + 0.1)
    np.testing.assert_allclose(after.experts, [[1.093604, -2.072771]], atol=1e-6)
    assert after.round == 1
    assert after.experts.dtype == after.extra["server_second_moment"].dtype == np.float32


def test_the_second_step_remembers_the_first(method, state):
    after = moved(method, moved(method, state, ([3.0, -0.6], 1.0)), ([1.0, 0.0], 1.0))
    np.testing.assert_allclose(after.momentum, [[0.9 * 0.3 + 0.1, -0.9 * 0.06]], rtol=1e-5)
    v = [0.75 * (0.0075 + 2.25) + 0.25, 0.75 * (0.0075 + 0.09)]
    np.testing.assert_allclose(after.extra["server_second_moment"], [v], rtol=1e-5)


def test_a_round_without_a_valid_update_changes_no_moment(method, state):
    after = moved(method, state)
    for name in ("experts", "momentum"):
        np.testing.assert_array_equal(getattr(after, name), getattr(state, name))
    np.testing.assert_array_equal(
        after.extra["server_second_moment"], state.extra["server_second_moment"]
    )
    assert after.round == 1


def test_the_second_moment_starts_at_tau_squared_and_the_state_is_left_alone(method, state):
    np.testing.assert_allclose(method.init().extra["server_second_moment"], 0.01, rtol=1e-6)
    moved(method, state, ([3.0, -0.6], 1.0))
    np.testing.assert_array_equal(state.extra["server_second_moment"], np.float32(0.01))


def test_clients_train_as_in_fedavg(make_method, method, side):
    fedavg, first = make_method(name="fedavg"), method.init()
    results = [
        m.local_train(side, first, m.dispatch(first, range(6))).updates for m in (fedavg, method)
    ]
    assert results[0].total.tobytes() == results[1].total.tobytes()


def test_it_runs_on_both_engines(make_method, runs_on_both_engines):
    found = runs_on_both_engines(make_method(name="fedadam"))
    assert (found.state.extra["server_second_moment"] >= 0).all()


def test_its_settings_have_ranges():
    found = settings_for({"name": "fedadam"})
    assert (found.server_lr, found.server_momentum) == (0.01, 0.9)
    assert (found.second_momentum, found.adaptivity) == (0.99, 1e-3)
    for key, bad in (("second_momentum", 1.0), ("adaptivity", 0.0), ("server_lr", 0.0)):
        with pytest.raises(ValidationError, match=key):
            settings_for({"name": "fedadam", key: bad})
