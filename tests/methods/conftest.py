"""What the tests of single methods share."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from fedcoe.cold_start import MODES, serve_clients, summary
from fedcoe.engine.pool import Engine, Site
from fedcoe.evaluate import Evaluation, evaluate, score_clients, score_global
from fedcoe.methods.base import Method
from fedcoe.state import ServerState


@dataclass(frozen=True)
class Outcome:
    state: ServerState
    evaluation: Evaluation
    cold_start: dict[str, dict[str, float]]


@pytest.fixture
def two_rounds(world, train, tmp_path: Path) -> Iterator[Callable[..., Outcome]]:
    """two_rounds(method, vectorized=False): train, evaluate and serve new clients."""
    with ExitStack() as stack:
        made: list[Engine] = []

        def run(method: Method, vectorized: bool = False) -> Outcome:
            site = Site(
                world.folder / "data",
                world.folder / "partitions",
                tmp_path / f"own-{len(made)}",
                "gn_cnn",
                vectorized=vectorized,
                build=method.build,
            )
            made.append(stack.enter_context(Engine(site, 1)))
            engine = made[-1]
            state = train(engine, method, 2)
            clients = engine.run(score_clients, method, state, range(6))
            overall = engine.run(score_global, method, state, np.arange(48))
            labels = np.asarray(world.dataset.y_test)
            state, evaluation = evaluate(method, state, clients, overall, labels)
            served = engine.run(serve_clients, method, state, [6, 7])
            return Outcome(state, evaluation, summary(served))

        yield run


@pytest.fixture
def runs_on_both_engines(two_rounds) -> Callable[[Method], Outcome]:
    """runs_on_both_engines(method): the same outcome to rounding, with figures everywhere."""

    def check(method: Method) -> Outcome:
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
