"""What the tests of single methods share."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedcoe.cold_start import MODES
from fedcoe.methods.base import Method
from fedcoe.state import ServerState


@pytest.fixture
def runs_on_both_engines(two_rounds) -> Callable[[Method], Any]:
    """runs_on_both_engines(method): the same outcome to rounding, with figures everywhere."""

    def check(method: Method) -> Any:
        outcome, other = two_rounds(method), two_rounds(method, vectorized=True)
        start = method.init()
        moved = np.abs(outcome.state.experts - start.experts).max()
        np.testing.assert_allclose(
            other.state.experts, outcome.state.experts, rtol=0, atol=0.02 * moved
        )
        np.testing.assert_allclose(
            other.state.correlation, outcome.state.correlation, rtol=0, atol=0.02
        )
        np.testing.assert_array_equal(other.state.personal_round, outcome.state.personal_round)
        for found in (outcome, other):
            assert found.state.round == 2
            assert set(found.cold_start) == {*MODES, "few_shot"}
            for figures in (
                found.evaluation.overall,
                found.evaluation.personalized,
                *found.cold_start.values(),
            ):
                assert 0 <= figures["accuracy"] <= 1 and np.isfinite(figures["nll"])
        return outcome

    return check


@pytest.fixture
def same_bytes() -> Callable[[ServerState, ServerState], None]:
    """same_bytes(a, b): two states have the same experts and momentum, bit for bit."""

    def check(a: ServerState, b: ServerState) -> None:
        assert a.experts.tobytes() == b.experts.tobytes()
        assert a.momentum.tobytes() == b.momentum.tobytes()

    return check
