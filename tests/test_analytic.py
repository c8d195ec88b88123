import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcoe.analytic import Statistics, design_matrix, message_bytes, projections, ridge

RNG = np.random.default_rng(0)
FEATURES = [RNG.standard_normal((60, 5)).astype(np.float32) ** 2 for _ in range(3)]
TARGETS = np.concatenate([RNG.dirichlet(np.ones(3), 60), np.eye(4)[RNG.integers(0, 4, 60)]], axis=1)
DESIGN = design_matrix(FEATURES, None)
STRENGTH = 1e-3


def pooled():
    """The textbook solution on all samples together, in another way than the library's."""
    width = DESIGN.shape[1]
    rows = np.vstack([DESIGN, np.sqrt(STRENGTH * len(DESIGN)) * np.eye(width)])
    targets = np.vstack([TARGETS, np.zeros((width, TARGETS.shape[1]))])
    return np.linalg.lstsq(rows, targets, rcond=None)[0]


def statistics(rows):
    sums = Statistics.zeros(DESIGN.shape[1], TARGETS.shape[1])
    sums.add(DESIGN[rows], TARGETS[rows])
    return sums


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 6), min_size=60, max_size=60), st.permutations(range(7)))
def test_gate_and_head_of_any_partition_are_those_of_the_pooled_data(owner, order):
    total = Statistics.zeros(DESIGN.shape[1], TARGETS.shape[1])
    for client in order:
        total.merge(statistics(np.flatnonzero(np.array(owner) == client)))
    np.testing.assert_allclose(total.solve(STRENGTH), pooled(), rtol=0, atol=1e-6)


def test_clients_in_another_order_give_the_same_bytes():
    parts = [statistics(rows) for rows in np.array_split(np.arange(60), 7)]
    solutions = []
    for order in (range(7), reversed(range(7))):
        total = Statistics.zeros(DESIGN.shape[1], TARGETS.shape[1])
        for i in order:
            total.merge(parts[i])
        solutions.append(total.solve(STRENGTH).tobytes())
    assert solutions[0] == solutions[1]


@pytest.mark.parametrize("count", [3, 16, 60])
def test_ridge_of_one_client_is_the_same_through_either_gram_matrix(count):
    design, targets = DESIGN[:count], TARGETS[:count]
    gram = design.T @ design + 0.1 * count * np.eye(design.shape[1])
    expected = np.linalg.solve(gram, design.T @ targets)
    np.testing.assert_allclose(ridge(design, targets, 0.1), expected, atol=1e-9)
    np.testing.assert_allclose(statistics(np.arange(count)).solve(0.1), expected, atol=1e-6)


def test_each_experts_features_have_equal_length_and_a_constant_follows():
    assert DESIGN.shape == (60, 16)
    for m in range(3):
        part = DESIGN[:, 5 * m : 5 * m + 5]
        np.testing.assert_allclose(np.linalg.norm(part, axis=1), 1 / np.sqrt(3), rtol=1e-6)
    np.testing.assert_array_equal(DESIGN[:, -1], 1.0)


def test_the_length_of_features_does_not_matter_and_zero_features_stay_zero():
    scaled = design_matrix([7 * FEATURES[0], FEATURES[1], FEATURES[2]], None)
    np.testing.assert_allclose(scaled, DESIGN, atol=1e-6)
    dead = design_matrix([np.zeros((2, 5), np.float32)], None)
    np.testing.assert_array_equal(dead, [[0, 0, 0, 0, 0, 1]] * 2)


def test_projections_are_redrawn_from_the_seed_and_differ_by_expert():
    first = projections(2, 50, 8, 1)
    assert first.shape == (2, 50, 8)
    np.testing.assert_array_equal(first, projections(2, 50, 8, 1))
    assert not np.array_equal(first, projections(2, 50, 8, 2))
    assert not np.array_equal(first[0], first[1])


def test_projections_nearly_keep_inner_products():
    x = np.random.default_rng(0).standard_normal((2, 400))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    [p] = projections(1, 400, 300, 0)
    np.testing.assert_allclose((x @ p) @ (x @ p).T, x @ x.T, atol=0.25)


@pytest.mark.parametrize("features", [0, 5, 9])
def test_nothing_is_projected_when_all_features_are_kept(features):
    assert projections(3, 5, features, 0) is None


def test_projected_designs_are_narrower():
    assert design_matrix(FEATURES, projections(3, 5, 2, 0)).shape == (60, 7)


def test_a_message_is_the_upper_triangle_and_the_targets_in_float32():
    assert message_bytes(3, 2) == 4 * (6 + 6)


def test_features_that_are_not_finite_are_refused():
    design = DESIGN.copy()
    design[0, 0] = np.nan
    with pytest.raises(OverflowError):
        Statistics.zeros(16, 7).add(design, TARGETS)


SOLUTION = """
import numpy as np, sys
from threadpoolctl import threadpool_limits
from fedcoe.analytic import Statistics
rng = np.random.default_rng(0)
sums = Statistics.zeros(900, 14)
with threadpool_limits(1):  # as workers are
    sums.add(rng.standard_normal((1200, 900)) / 30, rng.random((1200, 14)))
sys.stdout.buffer.write(sums.solve(1e-5).tobytes())
"""


FILTERS = """
import sys
from fedcoe.patches import _filters  # the features are float32, which hides most of it
sys.stdout.buffer.write(_filters(6, 3, 400, 0).tobytes())
"""


@pytest.mark.parametrize("code", [SOLUTION, FILTERS], ids=["solution", "patch filters"])
def test_the_environments_number_of_threads_changes_no_digit(code):
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads},
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        for threads in ("1", "2")
    }
    assert len(found) == 1
