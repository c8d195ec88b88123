from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from fedcoe.methods.base import LocalResult, Order, add_at
from fedcoe.methods.settings import settings_for


def test_without_momentum_it_is_fedavg_bit_for_bit_and_with_it_it_is_not(
    make_method, make_engine, train, same_bytes
):
    fedavg = train(make_engine(), make_method(name="fedavg"), 2)
    same_bytes(train(make_engine(), make_method(name="fedavgm", server_momentum=0.0), 2), fedavg)
    heavy = train(make_engine(), make_method(name="fedavgm"), 2)
    assert not np.array_equal(heavy.experts, fedavg.experts)


def test_it_is_fedavg_with_the_switch_on(make_method, make_engine, train, same_bytes):
    switched = train(make_engine(), make_method(name="fedavg", server_momentum=0.9), 2)
    same_bytes(train(make_engine(), make_method(name="fedavgm"), 2), switched)


def test_two_rounds_by_hand(make_method):
    method = make_method(name="fedavgm")
    state = replace(method.init(), experts=np.zeros((1, 1), np.float32))
    state = replace(state, momentum=np.zeros((1, 1), np.float32))
    found = []
    for target in (1.0, 3.0):
        result = LocalResult.zeros(1, 1)
        add_at(result, 0, np.array([target]) - state.experts[0], 1.0)
        state = method.aggregate(state, [Order(0, (0,), (1.0,))], [result])
        found.append((state.momentum[0, 0], state.experts[0, 0]))
    # v = 1, w = 1; then v = 0.9 + (3 - 1) = 2.9, w = 3.9
    np.testing.assert_allclose(found, [(1.0, 1.0), (2.9, 3.9)], rtol=1e-6)


def test_it_runs_on_both_engines(make_method, runs_on_both_engines):
    runs_on_both_engines(make_method(name="fedavgm"))


def test_its_settings_have_ranges():
    assert settings_for({"name": "fedavgm"}).server_momentum == 0.9
    with pytest.raises(ValidationError, match="server_momentum"):
        settings_for({"name": "fedavgm", "server_momentum": 1.0})
