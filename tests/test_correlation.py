from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcoe import correlation


def random_c(clients, experts, seed=0):
    return np.random.default_rng(seed).dirichlet(np.ones(experts), clients)


def test_normalise_by_hand():
    np.testing.assert_allclose(
        correlation.normalise(np.array([[1.0, 3.0]]), 0.2),
        [[0.8 * 0.25 + 0.1, 0.8 * 0.75 + 0.1]],
    )


def test_the_floor_puts_every_expert_within_reach():
    c = correlation.normalise(np.array([[1.0, 0.0, 0.0, 0.0]]), 0.05)
    np.testing.assert_allclose(c, [[0.9625, 0.0125, 0.0125, 0.0125]])
    np.testing.assert_allclose(correlation.normalise(c, 1.0), 0.25)


def test_from_losses_is_a_softmax_of_negative_losses():
    c = correlation.from_losses(np.array([[0.0, np.log(2.0)], [5.0, 5.0]]), 2.0)
    np.testing.assert_allclose(c, [[0.8, 0.2], [0.5, 0.5]])


def test_from_losses_survives_huge_losses():
    c = correlation.from_losses(np.array([[1e4, 2e4], [1e-9, 0.0]]), 5.0)
    np.testing.assert_allclose(c, [[1.0, 0.0], [0.5, 0.5]], atol=1e-8)


def test_hellinger_points_have_hellinger_distances():
    points = correlation.hellinger(np.array([[4, 0], [0, 9], [2, 2], [0, 0]]))
    assert np.linalg.norm(points[0] - points[1]) == pytest.approx(np.sqrt(2))
    expected = np.sqrt((1 - np.sqrt(0.5)) ** 2 + 0.5)
    assert np.linalg.norm(points[0] - points[2]) == pytest.approx(expected)
    np.testing.assert_array_equal(points[3], 0.0)


def test_feature_shift_by_hand():
    counts, by_class = np.array([[3, 1], [0, 4], [1, 1]]), np.array([[4.0, 0.0], [0.0, 8.0]])
    expected = np.array([[3.0, 2.0], [0.0, 8.0], [2.0, 4.0]])
    off = np.array([[0.0, 5.0], [-0.3, 0.4], [0.0, 0.0]])
    shift = correlation.feature_shift(expected + off, counts, by_class)
    np.testing.assert_allclose(shift, [[0.0, 1.0], [-0.6, 0.8], [0.0, 0.0]], atol=1e-12)


def test_feature_shift_finds_groups_that_label_mixes_hide():
    rng = np.random.default_rng(0)
    group = np.arange(12) % 3
    of_class, of_group = 3 * rng.standard_normal((10, 32)), 0.3 * rng.standard_normal((3, 32))
    labels = [rng.choice(10, 200, p=rng.dirichlet(np.full(10, 0.3))) for _ in group]
    features = [
        of_class[y] + of_group[g] + rng.standard_normal((200, 32))
        for g, y in zip(group, labels, strict=True)
    ]
    counts = np.stack([np.bincount(y, minlength=10) for y in labels])
    means, stacked = np.stack([f.mean(axis=0) for f in features]), np.concatenate(features)
    every = np.concatenate(labels)
    by_class = np.stack([stacked[every == c].mean(axis=0) for c in range(10)])

    def together(points):
        c = correlation.from_similarity(points, 3, 4.0, np.random.default_rng(0))
        owner = c.argmax(axis=1)
        return (owner[:, None] == owner).astype(int)

    truth = (group[:, None] == group).astype(int)
    shift = correlation.feature_shift(means, counts, by_class)
    np.testing.assert_array_equal(together(shift), truth)
    raw = means - means.mean(axis=0)
    assert not np.array_equal(together(raw / np.linalg.norm(raw, axis=1, keepdims=True)), truth)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 25), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_dispatch_gives_each_client_k_experts_and_each_expert_its_capacity(n, m, k, seed):
    k = min(k, m)
    rng = np.random.default_rng(seed)
    # Very uneven: everyone would like the first expert.
    c = correlation.normalise(rng.dirichlet(np.r_[20.0, np.full(m - 1, 0.3)], n), 0.01)
    chosen = correlation.dispatch(c, k, rng)
    assert chosen.shape == (n, k)
    assert np.all(np.diff(chosen, axis=1) > 0)
    load = np.bincount(chosen.ravel(), minlength=m)
    assert load.min() >= n * k // m
    assert load.max() <= -(-n * k // m)


@pytest.mark.parametrize(
    ("n", "m", "k"), [(1, 2, 1), (3, 2, 1), (4, 3, 1), (4, 3, 2), (3, 4, 2), (5, 2, 1), (2, 4, 3)]
)
@pytest.mark.parametrize("seed", range(4))
def test_dispatch_is_the_best_of_all_by_brute_force(n, m, k, seed):
    log_c = np.log(random_c(n, m, seed))
    low, high = n * k // m, -(-n * k // m)
    best = max(
        sum(log_c[i, list(mine)].sum() for i, mine in enumerate(choice))
        for choice in product(combinations(range(m), k), repeat=n)
        if low <= np.bincount(np.ravel(choice), minlength=m).min()
        and np.bincount(np.ravel(choice), minlength=m).max() <= high
    )
    chosen = correlation.dispatch(np.exp(log_c), k, np.random.default_rng(seed))
    assert np.take_along_axis(log_c, chosen, axis=1).sum() == pytest.approx(best, abs=1e-4)


def test_dispatch_prefers_what_clients_belong_to():
    c = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8]])
    chosen = correlation.dispatch(c, 1, np.random.default_rng(0))
    np.testing.assert_array_equal(chosen, [[0], [0], [1], [1]])


def test_dispatch_breaks_ties_by_its_stream_alone():
    c = np.full((12, 3), 1 / 3)
    draws = [correlation.dispatch(c, 1, np.random.default_rng(s)) for s in range(6)]
    np.testing.assert_array_equal(draws[0], correlation.dispatch(c, 1, np.random.default_rng(0)))
    assert len({d.tobytes() for d in draws}) > 1


def test_dispatch_of_all_experts_needs_no_draw():
    chosen = correlation.dispatch(random_c(3, 2), 2, np.random.default_rng(0))
    np.testing.assert_array_equal(chosen, [[0, 1]] * 3)


def test_similar_clients_get_the_same_expert_in_groups_of_equal_size():
    rng = np.random.default_rng(3)
    home = rng.permutation(np.arange(12) % 3)
    points = np.eye(3)[home] + 0.05 * rng.standard_normal((12, 3))
    c = correlation.from_similarity(points, 3, 4.0, np.random.default_rng(0))
    np.testing.assert_allclose(c.sum(axis=1), 1.0)
    for group in range(3):
        assert len(np.unique(c.argmax(axis=1)[home == group])) == 1
    np.testing.assert_array_equal(np.bincount(c.argmax(axis=1)), [4, 4, 4])


def test_groups_stay_balanced_when_nearly_all_clients_are_alike():
    points = np.vstack([np.zeros((7, 2)), [[0.6, 0.6]]])
    points += 1e-3 * np.random.default_rng(0).standard_normal(points.shape)
    c = correlation.from_similarity(points, 4, 50.0, np.random.default_rng(1))
    # Distances alone would send seven clients to one centre; there is room for two each.
    near = c[:7]
    assert np.bincount(near.argmax(axis=1), minlength=4).max() <= 2


@pytest.mark.parametrize(("clients", "experts"), [(1, 4), (3, 4), (5, 2), (7, 3), (4, 1)])
def test_from_similarity_takes_any_number_of_clients(clients, experts):
    points = np.random.default_rng(0).random((clients, 5))
    c = correlation.from_similarity(points, experts, 4.0, np.random.default_rng(0))
    assert c.shape == (clients, experts)
    np.testing.assert_allclose(c.sum(axis=1), 1.0)
    again = correlation.from_similarity(points, experts, 4.0, np.random.default_rng(0))
    assert c.tobytes() == again.tobytes()


def test_sharpness_zero_knows_nothing():
    points = np.random.default_rng(0).random((6, 3))
    c = correlation.from_similarity(points, 3, 0.0, np.random.default_rng(0))
    np.testing.assert_allclose(c, 1 / 3)
