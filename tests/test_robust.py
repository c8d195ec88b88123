"""Robust aggregation by hand, its identities, and every method with each kind of it."""

from dataclasses import replace

import numpy as np
import pytest

from fedcoe import robust
from fedcoe.errors import FedCoEError
from fedcoe.faults import Update
from fedcoe.methods.base import LocalResult, Order, merged
from fedcoe.methods.settings import MethodSettings, method_class, method_names
from fedcoe.robust import Single, clipped_mean, combine, median, shortened, trimmed_mean
from fedcoe.rounds import train_round, update_gate

KINDS = ("norm_clip", "trimmed_mean", "median")


def vectors(*rows):
    return [np.array(row, np.float32) for row in rows]


def settings(**values):
    return MethodSettings(name="fedavg", **values)


# -------------------------------------------------------------------- by hand


def test_the_median_is_the_value_in_the_middle_of_each_coordinate():
    np.testing.assert_array_equal(median(vectors([1, 9], [3, -50], [100, 7])), [3, 7])
    np.testing.assert_array_equal(median(vectors([1, 9], [3, -50], [100, 7], [5, 8])), [4, 7.5])
    np.testing.assert_array_equal(median(vectors([1, 2], [3, 6])), [2, 4])


def test_the_median_of_one_client_is_its_update():
    [own] = vectors([0.1, -3e-7, 5])
    np.testing.assert_array_equal(median([own]), own)
    np.testing.assert_array_equal(trimmed_mean([own], 0.4), own)


@pytest.mark.parametrize(
    ("trim", "expected"),
    [
        (0.0, 23.2),  # (1 + 2 + 4 + 9 + 100) / 5
        (0.1, 5.0),  # one on either side: (2 + 4 + 9) / 3
        (0.2, 5.0),
        (0.21, 4.0),  # two on either side
        (0.49, 4.0),
    ],
)
def test_the_trimmed_mean_leaves_a_share_rounded_up_out_on_either_side(trim, expected):
    found = trimmed_mean(vectors([100], [2], [9], [1], [4]), trim)
    assert found[0] == pytest.approx(expected)


def test_0_28_of_25_clients_are_7_though_the_product_is_a_little_more():
    values = vectors(*[[k**2] for k in range(25)])
    expected = np.mean([k**2 for k in range(7, 18)])
    assert trimmed_mean(values, 0.28)[0] == pytest.approx(expected)


def test_a_trimmed_mean_of_few_always_leaves_someone():
    np.testing.assert_allclose(trimmed_mean(vectors([1], [5]), 0.4), [3])
    np.testing.assert_allclose(trimmed_mean(vectors([1], [5], [90]), 0.4), [5])
    np.testing.assert_allclose(trimmed_mean(vectors([1], [5], [7], [90]), 0.49), [6])


def test_without_trimming_it_is_the_mean_of_clients():
    drawn = np.random.default_rng(0).standard_normal((7, 70_000)).astype(np.float32)
    np.testing.assert_allclose(trimmed_mean(list(drawn), 0.0), drawn.mean(axis=0), atol=1e-6)


def test_blocks_of_coordinates_are_put_together_in_order():
    drawn = np.random.default_rng(1).standard_normal((5, 2 * robust._BLOCK + 3)).astype(np.float32)
    np.testing.assert_array_equal(median(list(drawn)), np.median(drawn, axis=0))


def test_a_long_update_is_shortened_and_a_short_one_left_to_the_bit():
    [long] = vectors([3, 4])
    np.testing.assert_allclose(shortened(long, 1.0), [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(long, [3, 4])
    assert shortened(long, 5.0) is long


def test_clipping_to_the_median_length_by_hand():
    # Lengths 5, 1, 10: the last is halved. (0.5 * 4 + 0.25 * 0 + 0.25 * 3, ... * 8 / 2)
    found = clipped_mean(vectors([4, 3], [0, 1], [6, 8]), [0.5, 0.25, 0.25])
    np.testing.assert_allclose(found, [2.75, 2.75], rtol=1e-6)


def test_clipping_equal_lengths_is_the_weighted_mean():
    found = clipped_mean(vectors([4, 3], [-3, 4], [5, 0]), [0.25, 0.25, 0.125])
    np.testing.assert_allclose(found, [0.875 / 0.625, 1.75 / 0.625], rtol=1e-9)


def test_each_expert_is_combined_over_the_clients_that_trained_it():
    singles = [Single(2, 1.0, d) for d in vectors([1, 1], [2, 2], [60, -60])] + [
        Single(0, 0.3, d) for d in vectors([7, 8])
    ]
    found = combine(settings(robust="median"), singles, (3, 2))
    np.testing.assert_array_equal(found, [[7, 8], [0, 0], [2, 1]])


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_clients_does_not_show_in_any_bit(kind):
    rng = np.random.default_rng(2)
    drawn = rng.standard_normal((6, 1000)).astype(np.float32) * 10 ** rng.uniform(-3, 1, (6, 1))
    singles = [
        Single(0, w, d.astype(np.float32)) for w, d in zip(rng.random(6), drawn, strict=True)
    ]
    found = {
        combine(settings(robust=kind), [singles[i] for i in order], (1, 1000)).tobytes()
        for order in (range(6), range(5, -1, -1), (3, 0, 5, 1, 4, 2))
    }
    assert len(found) == 1


# ------------------------------------------------------------ in a round


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_moves_the_expert_by_what_the_defence_makes_of_the_updates(make_method, kind):
    method = make_method(name="fedavg", robust=kind)
    state = method.init()
    orders = [Order(k, (0,), (w,)) for k, w in enumerate((0.5, 0.25, 0.25))]
    deltas = np.zeros((3, state.experts.shape[1]), np.float32)
    deltas[:, :2] = [[4, 3], [0, 1], [6, 8]]
    inbox, parts = method.inbox(state, orders), []
    for client, delta in enumerate(deltas):
        parts.append(LocalResult.zeros(*state.experts.shape))
        method.receive(inbox, parts[-1], Update(client, 0, 1, delta))
    after = method.aggregate(state, orders, parts)
    expected = {"norm_clip": [2.75, 2.75], "trimmed_mean": [4, 3], "median": [4, 3]}[kind]
    moved = (after.experts - state.experts)[0]
    np.testing.assert_allclose(moved[:2], expected, atol=1e-6)
    assert not moved[2:].any()


def test_updates_are_clipped_to_a_fixed_length_as_they_arrive(make_method):
    method = make_method(name="fedavg", robust="norm_clip", robust_clip=1.0)
    state = method.init()
    orders = [Order(0, (0,), (0.5,)), Order(1, (0,), (0.5,))]
    inbox, result = method.inbox(state, orders), LocalResult.zeros(*state.experts.shape)
    for client, value in ((0, 30.0), (1, 0.5)):
        delta = np.zeros(state.experts.shape[1], np.float32)
        delta[0] = value
        method.receive(inbox, result, Update(client, 0, 1, delta))
    assert result.singles == []
    after = method.aggregate(state, orders, [result])
    assert (after.experts - state.experts)[0, 0] == pytest.approx(0.75, abs=1e-6)


def test_clipping_that_never_clips_is_fedavg_bit_for_bit(make_method, make_engine, train):
    plain = train(make_engine(), make_method(name="fedavg"), 2)
    huge = train(make_engine(), make_method(name="fedavg", robust="norm_clip", robust_clip=1e6), 2)
    tight = train(make_engine(), make_method(name="fedavg", robust="norm_clip", robust_clip=0.1), 2)
    assert plain.experts.tobytes() == huge.experts.tobytes()
    assert plain.experts.tobytes() != tight.experts.tobytes()


def test_single_updates_are_kept_only_where_a_defence_needs_them(make_method, side):
    for values, kept in (
        ({}, 0),
        ({"robust": "norm_clip", "robust_clip": 1.0}, 0),
        ({"robust": "norm_clip"}, 6),
        ({"robust": "trimmed_mean"}, 6),
        ({"robust": "median"}, 6),
    ):
        method = make_method(name="fedavg", **values)
        state = method.init()
        orders = method.dispatch(state, range(6))
        halves = [method.local_train(side, state, part) for part in (orders[:4], orders[4:])]
        assert len(merged(halves).singles) == kept, values
        assert len(halves[0].singles) == (4 if kept else 0), "merging leaves the parts alone"


@pytest.mark.parametrize("kind", KINDS)
def test_attackers_pull_a_defended_round_less_than_a_plain_one(make_federation, make_engine, kind):
    def after(robust, **faults):
        found = make_federation(method={"name": "fedavg", "robust": robust}, faults=faults)
        method = method_class("fedavg")(found)
        state, record = train_round(make_engine(), method, method.init())
        assert not record.dropped
        return state.experts

    attack = {"attack": "scale", "attack_scale": -50.0, "attackers": 0.34}
    pulled = {r: np.linalg.norm(after(r, **attack) - after(r)) for r in ("none", kind)}
    assert pulled[kind] < 0.2 * pulled["none"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", method_names())
def test_every_method_takes_each_defence_or_refuses_it_in_one_line(
    make_method, make_engine, name, kind
):
    if name == "scaffold":
        with pytest.raises(FedCoEError, match=r"method\.robust = .*scaffold.*only none") as e:
            make_method(name=name, robust=kind)
        assert "\n" not in str(e.value)
        return
    method, plain = make_method(name=name, robust=kind), make_method(name=name)
    state = method.init()
    after, _ = train_round(make_engine(build=method.build), method, state)
    if name == "local":
        assert method.inert() == ["robust: Local shares no model that it could change"]
        return
    assert method.inert() == []
    expected, _ = train_round(make_engine(build=method.build), plain, state)
    assert np.isfinite(after.experts).all()
    assert (after.experts != state.experts).any()
    if name != "centralized":  # one update has nothing to be combined with
        assert (after.experts != expected.experts).any(), "the defence changes something"
    if method.coordinates:
        assert np.isfinite(update_gate(make_engine(), method, after, range(6)).correlation).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_in_which_nobody_counts_leaves_the_experts(make_federation, make_engine, kind):
    found = make_federation(
        method={"name": "fedavg", "robust": kind}, train={"quorum": 0.0}, faults={"nan": 1.0}
    )
    method = method_class("fedavg")(found)
    state = replace(method.init(), momentum=np.ones_like(method.init().momentum))
    after, record = train_round(make_engine(), method, state)
    np.testing.assert_array_equal(after.experts, state.experts)
    assert record.dropped == {"not finite": 6}


@pytest.mark.parametrize(
    "values", [{"robust": "krum"}, {"robust_trim": 0.5}, {"robust_trim": -0.1}, {"robust_clip": -1}]
)
def test_impossible_defences_are_refused(make_method, values):
    [key] = values
    with pytest.raises(FedCoEError, match=rf"method\.{key} = "):
        make_method(name="fedavg", **values)


def test_a_clip_without_clipping_says_that_it_changes_nothing(make_method):
    [said] = make_method(name="fedavg", robust="median", robust_clip=1.0).inert()
    assert said == "robust_clip: robust = median has no such limit"
