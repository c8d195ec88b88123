import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedcoe.exact_sum import ExactSum

FINITE = st.floats(-1e3, 1e3, allow_nan=False, width=64)


def total(terms, weights, order):
    result = ExactSum.zeros(3)
    for i in order:
        result.add(terms[i], weights[i])
    return result


@given(
    arrays(np.float64, (6, 3), elements=FINITE),
    st.lists(st.floats(0, 1), min_size=6, max_size=6),
    st.permutations(range(6)),
    st.integers(0, 6),
)
def test_any_order_and_any_split_of_the_terms_gives_the_same_bytes(terms, weights, order, cut):
    straight = total(terms, weights, range(6))
    first, second = total(terms, weights, order[:cut]), total(terms, weights, order[cut:])
    second.merge(first)
    assert straight.value().tobytes() == second.value().tobytes()


def test_the_sum_is_right_to_half_a_grid_step_a_term():
    assert ExactSum.zeros(2).bits == 40
    result = ExactSum.zeros(2)
    result.add(np.array([0.1, -2.5]), 0.5)
    result.add(np.array([0.2, 1.0]), 2.0)
    np.testing.assert_allclose(result.value(), [0.45, 0.75], rtol=0, atol=2 * 2.0**-41)


def test_values_on_the_grid_are_kept_exactly_and_finer_ones_are_rounded_to_it():
    result = ExactSum.zeros(3, bits=10)
    result.add(np.array([3 * 2.0**-10, 0.4 * 2.0**-10, 0.6 * 2.0**-10]))
    np.testing.assert_array_equal(result.value(), [3 * 2.0**-10, 0.0, 2.0**-10])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2.0**14, -(2.0**14)])
def test_a_term_that_is_not_finite_or_too_large_is_refused_and_leaves_the_sum_alone(value):
    result = ExactSum.zeros(2)
    result.add(np.array([1.0, 2.0]))
    with pytest.raises(OverflowError, match="not finite or too large"):
        result.add(np.array([0.5, value]))
    np.testing.assert_array_equal(result.value(), [1.0, 2.0])


def test_the_weight_counts_towards_the_limit():
    result = ExactSum.zeros(1)
    result.add(np.array([2.0**13]), 0.5)
    with pytest.raises(OverflowError):
        result.add(np.array([2.0**13]), 2.0)


def test_five_hundred_of_the_largest_terms_still_fit():
    result = ExactSum.zeros(1)
    largest = np.nextafter(2.0**14, 0)
    for _ in range(500):
        result.add(np.array([largest]))
    assert result.value()[0] == pytest.approx(500 * largest, rel=1e-12)


def test_float32_terms_are_widened_before_they_are_scaled():
    result = ExactSum.zeros(1)
    result.add(np.array([0.1], np.float32), 1 / 3)
    assert result.value()[0] == pytest.approx(float(np.float32(0.1)) / 3, abs=1e-12)


def test_merging_leaves_the_other_sum_alone():
    a, b = ExactSum.zeros(1), ExactSum.zeros(1)
    b.add(np.array([2.0]))
    a.merge(b)
    a.merge(b)
    assert (a.value()[0], b.value()[0]) == (4.0, 2.0)
