import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedcoe.config import PartitionSettings
from fedcoe.data import partition as module
from fedcoe.data.partition import (
    SPLITS,
    TEST,
    TRAIN,
    VALIDATION,
    Partition,
    load_partition,
    make_partition,
    save_partition,
)
from fedcoe.errors import FedCoEError

CLASSES = 10
Y = np.random.default_rng(7).permutation(np.arange(4000) % CLASSES)
WRITERS = np.random.default_rng(8).permutation(np.arange(4000) % 13)


def draw(y=Y, num_test=100, client_train=WRITERS, client_names=(), **values):
    settings = PartitionSettings(**values)
    classes = int(np.max(y)) + 1
    return make_partition(settings, y, num_test, classes, client_train, client_names)


def members(partition, client):
    return np.flatnonzero(partition.client == client)


def mixes(partition, y=Y):
    counts = partition.label_counts(y, CLASSES)
    return counts / counts.sum(axis=1, keepdims=True)


def hellinger(p, q):
    return np.sqrt(1 - np.sqrt(p * q).sum(axis=-1).clip(max=1))


# --- conservation -------------------------------------------------------------------------------


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    scheme=st.sampled_from(["dirichlet", "pathological", "iid", "natural"]),
    clients=st.integers(2, 12),
    classes=st.integers(2, 6),
    samples=st.integers(150, 400),
    alpha=st.floats(0.3, 100),
    new_clients=st.sampled_from([0.0, 0.2, 0.45]),
    by=st.sampled_from(["random", "feature_group", "label_mix"]),
    skew=st.sampled_from(["rotation", "inversion", "blur"]),
    shares=st.tuples(st.floats(0.01, 0.46), st.floats(0.01, 0.46)),
    min_samples=st.integers(4, 8),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_sample_goes_to_exactly_one_client_and_split(
    scheme, clients, classes, samples, alpha, new_clients, by, skew, shares, min_samples, seed
):
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(classes), rng.integers(0, classes, samples - classes)])
    owners = rng.permutation(np.arange(samples) % clients)
    settings = PartitionSettings(
        scheme=scheme,
        clients=clients,
        alpha=alpha,
        classes_per_client=max(1, -(-classes // clients)),
        new_clients=new_clients,
        new_clients_by=by,
        feature_skew=skew,
        feature_groups=2,
        min_samples=min_samples,
        validation=shares[0],
        test=shares[1],
        seed=seed,
    )
    try:
        partition = make_partition(settings, y, 50, classes, owners)
    except FedCoEError as refusal:
        assert "partition." in str(refusal)  # noqa: PT017
        assume(False)
    parts = [partition.indices(k, s) for k in range(partition.clients) for s in range(3)]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(samples))
    for k in range(partition.clients):
        own = [partition.indices(k, s) for s in range(3)]
        assert all(len(part) >= 1 and part.dtype == np.int64 for part in own)
        assert all(np.all(np.diff(part) > 0) for part in own)
        size = sum(map(len, own))
        assert size >= min_samples
        for part, share in ((own[VALIDATION], shares[0]), (own[TEST], shares[1])):
            assert abs(len(part) - max(1, size * share)) <= 1
        assert np.array_equal(np.sort(np.concatenate(own)), members(partition, k))
    assert partition.seen + partition.new == partition.clients == clients
    assert partition.label_counts(y, classes).sum() == samples
    assert set(partition.test_group) <= set(partition.group[: partition.seen])


# --- seeds and streams --------------------------------------------------------------------------

SCHEMES = [
    {"scheme": "dirichlet"},
    {"scheme": "pathological"},
    {"scheme": "iid"},
    {"scheme": "natural", "feature_skew": "blur"},
    {"scheme": "dirichlet", "feature_skew": "rotation", "new_clients_by": "label_mix"},
]


@pytest.mark.parametrize("values", SCHEMES)
def test_one_seed_gives_one_partition_and_another_seed_another(values):
    first, again, other = draw(**values), draw(**values), draw(seed=1, **values)
    for name in ("client", "split", "group", "test_group"):
        assert getattr(first, name).tobytes() == getattr(again, name).tobytes()
    assert first.fingerprint == again.fingerprint
    assert re.fullmatch("[0-9a-f]{16}", first.fingerprint)
    assert first.fingerprint != other.fingerprint
    assert not np.array_equal(first.split, other.split)
    assert not np.array_equal(first.client, other.client)


@pytest.mark.parametrize(
    ("name", "part"),
    [("client", 3), ("split", 1), ("group", 1), ("test_group", 1)],
)
def test_the_fingerprint_sees_every_entry_of_every_array(name, part):
    partition = draw(feature_skew="rotation")
    array = getattr(partition, name).copy()
    array[-1] = part if array[-1] != part else 0
    assert replace(partition, **{name: array}).fingerprint != partition.fingerprint


def test_the_fingerprint_sees_names_skew_and_who_is_new_but_not_how_warnings_are_worded():
    partition = draw()
    renamed = ("someone", *partition.names[1:])
    assert replace(partition, names=renamed).fingerprint != partition.fingerprint
    assert replace(partition, skew="blur").fingerprint != partition.fingerprint
    moved = replace(partition, seen=partition.seen - 1, new=partition.new + 1)
    assert moved.fingerprint != partition.fingerprint
    assert replace(partition, warnings=("other words",)).fingerprint == partition.fingerprint


def test_split_shares_do_not_change_who_owns_what_nor_each_other():
    one, more, other = (draw(validation=v, test=t) for v, t in ((0.1, 0.1), (0.3, 0.1), (0.1, 0.3)))
    assert np.array_equal(one.client, more.client) and np.array_equal(one.client, other.client)
    assert np.array_equal(one.split == TEST, more.split == TEST)
    assert np.array_equal(one.split == VALIDATION, other.split == VALIDATION)
    assert np.all(more.split[one.split == VALIDATION] == VALIDATION)


def test_holding_out_clients_or_skewing_features_only_renumbers_the_label_partition():
    plain = draw(new_clients=0.0)
    for other in (draw(), draw(new_clients_by="label_mix"), draw(feature_skew="rotation")):
        for k in range(other.clients):
            owners = np.unique(plain.client[members(other, k)])
            assert len(owners) == 1
            assert np.array_equal(members(plain, owners[0]), members(other, k))
        assert np.array_equal(plain.split, other.split)


def test_the_number_of_test_images_changes_nothing_about_clients():
    few, many = (draw(num_test=n, feature_skew="rotation") for n in (10, 1000))
    assert np.array_equal(few.client, many.client)
    assert np.array_equal(few.group, many.group)
    assert len(many.test_group) == 1000


# --- dirichlet ----------------------------------------------------------------------------------


def test_dirichlet_shares_of_a_class_have_the_moments_of_dir_alpha():
    # p_c[k] ~ Beta(alpha, (clients-1) alpha): mean 1/clients, variance (1/n)(1-1/n)/(n alpha + 1).
    clients, alpha, classes = 10, 0.5, 50
    y = np.repeat(np.arange(classes), 500)
    variance = (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1)
    drawn = [draw(y=y, clients=clients, alpha=alpha, new_clients=0, seed=s) for s in range(40)]
    shares = np.stack([partition.label_counts(y, classes) / 500 for partition in drawn])
    assert np.allclose(shares.sum(axis=1), 1)
    assert shares.var() == pytest.approx(variance, rel=0.05)
    # Classes are drawn independently, so client sizes vary as means of independent shares.
    assert shares.mean(axis=2).var() == pytest.approx(variance / classes, rel=0.2)


def test_dirichlet_lets_clients_grow_past_the_mean_size():
    # Hidden balancing closes a client to further classes once it holds N / clients samples.
    # Without it most clients above the mean got there by several classes and exceed it by far.
    sizes = np.concatenate([np.bincount(draw(seed=seed).client) for seed in range(10)])
    assert sizes.max() > 3 * 4000 / 20


def test_dirichlet_with_large_alpha_deals_every_class_evenly():
    counts = draw(alpha=1e7, clients=8, new_clients=0.0).label_counts(Y, CLASSES)
    assert abs(counts - 50).max() <= 1


def test_dirichlet_rounds_shares_below_one_sample_for_all_clients_alike():
    # 20 samples a class for 80 clients: a quarter each. Plain rounding of cumulative shares would
    # give the same 20 clients one of every class.
    y = np.repeat(np.arange(100), 20)
    sizes = np.bincount(draw(y=y, clients=80, alpha=1e7, new_clients=0.0).client, minlength=80)
    assert sizes.min() >= 10 and sizes.max() <= 45


@pytest.mark.parametrize("scheme", ["dirichlet", "pathological", "iid"])
def test_which_samples_of_a_class_a_client_gets_does_not_depend_on_their_order(scheme):
    partition = draw(y=np.arange(4000) // 400, scheme=scheme, alpha=100, classes_per_client=10)
    for k in range(partition.clients):
        assert (members(partition, k) % 400).mean() == pytest.approx(200, abs=40)


def test_small_alpha_skews_labels_more_than_large_alpha():
    top = [mixes(draw(alpha=a, new_clients=0.0)).max(axis=1).mean() for a in (0.1, 1, 100)]
    assert top[0] > top[1] + 0.1 > top[2] + 0.2


def test_redraws_are_counted_in_a_warning_and_end_with_every_client_large_enough():
    found = [draw(clients=40, seed=seed) for seed in range(3)]
    assert all(np.bincount(p.client).min() >= 10 for p in found)
    counted = [re.match(r"dirichlet: (\d+) redraws until", " ".join(p.warnings)) for p in found]
    assert all(counted)
    # The same bound on redraws that was needed suffices; one less does not.
    needed = int(counted[0][1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_REDRAWS", needed)
        assert draw(clients=40, seed=0).fingerprint == found[0].fingerprint
        patch.setattr(module, "MAX_REDRAWS", needed - 1)
        with pytest.raises(FedCoEError, match=f"in {needed} draws"):
            draw(clients=40, seed=0)


def test_a_draw_that_needs_no_redraw_is_the_same_for_any_smaller_minimum():
    partition = draw(alpha=1.0, min_samples=10)
    assert partition.warnings == ()
    assert partition.fingerprint == draw(alpha=1.0, min_samples=4).fingerprint


def test_a_dirichlet_partition_that_never_comes_says_what_to_change():
    with pytest.raises(
        FedCoEError, match=r"partition.alpha = 0.0001: in 1001 draws .* raise alpha"
    ):
        draw(alpha=1e-4)


def test_an_alpha_beyond_arithmetic_is_refused():
    with pytest.raises(ValidationError, match="finite"):
        draw(alpha=float("inf"))
    with pytest.raises(FedCoEError, match=r"partition.alpha"):
        draw(alpha=1e308)


@pytest.mark.parametrize("scheme", ["dirichlet", "pathological", "iid"])
def test_more_clients_than_samples_can_feed_are_refused_at_once(scheme):
    assert draw(scheme="iid", clients=400, min_samples=10).clients == 400
    with pytest.raises(FedCoEError, match=r"partition.clients = 401: 10 samples each"):
        draw(scheme=scheme, clients=401, min_samples=10)


# --- pathological, iid --------------------------------------------------------------------------


@pytest.mark.parametrize(("clients", "per_client"), [(20, 2), (7, 3), (10, 1), (5, 10), (33, 9)])
@pytest.mark.parametrize("seed", range(4))
def test_pathological_clients_have_exactly_their_number_of_classes_and_all_are_covered(
    clients, per_client, seed
):
    partition = draw(
        scheme="pathological",
        clients=clients,
        classes_per_client=per_client,
        seed=seed,
        new_clients=0.0,
    )
    counts = partition.label_counts(Y, CLASSES)
    assert np.all((counts > 0).sum(axis=1) == per_client)
    assert np.all(counts.sum(axis=0) == 400)


def test_pathological_shards_are_mcmahans_where_classes_divide_evenly():
    # 20 clients x 2 = 40 shards of 100 samples, 4 a class.
    counts = draw(scheme="pathological", new_clients=0.0).label_counts(Y, CLASSES)
    assert set(counts.ravel()) == {0, 100}
    assert np.all((counts > 0).sum(axis=0) == 4)


def test_pathological_shards_follow_class_sizes():
    # 600 : 200 : 100 : 100 over 10 shards of 100.
    y = np.repeat([0, 1, 2, 3], [600, 200, 100, 100])
    partition = draw(y=y, scheme="pathological", clients=10, classes_per_client=1, new_clients=0)
    counts = partition.label_counts(y, 4)
    assert sorted(map(tuple, counts)) == sorted(
        [(100, 0, 0, 0)] * 6 + [(0, 100, 0, 0)] * 2 + [(0, 0, 100, 0), (0, 0, 0, 100)]
    )


def test_pathological_pairs_of_classes_are_dealt_at_random():
    pairs = {
        tuple(np.flatnonzero(row))
        for seed in range(20)
        for row in draw(scheme="pathological", seed=seed).label_counts(Y, CLASSES)
    }
    assert len(pairs) == 45


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"classes_per_client": 11}, "has 10 classes"),
        ({"clients": 4, "classes_per_client": 2}, "at least 3 classes per client can"),
        ({"clients": 9, "classes_per_client": 1}, "cannot cover 10 classes"),
    ],
)
def test_impossible_pathological_partitions_are_refused(values, message):
    with pytest.raises(FedCoEError, match=message):
        draw(scheme="pathological", **values)


def test_pathological_refuses_when_a_rare_class_cannot_reach_every_client():
    y = np.repeat([0, 1], [400, 3])
    with pytest.raises(FedCoEError, match="too few samples"):
        draw(y=y, scheme="pathological", clients=10, classes_per_client=2)


def test_pathological_refuses_clients_below_the_minimum():
    y = np.repeat([0, 1], [400, 6])
    with pytest.raises(FedCoEError, match="smallest of 5 clients has 6 samples, wanted 10"):
        draw(y=y, scheme="pathological", clients=5, classes_per_client=1)


def test_pathological_ignores_classes_without_samples():
    y = np.repeat([0, 2], 100)
    partition = draw(y=y, scheme="pathological", clients=4, classes_per_client=2, new_clients=0)
    assert (partition.label_counts(y, 3) > 0).tolist() == [[True, False, True]] * 4


def test_iid_clients_are_near_equal_in_size_and_alike_in_labels():
    partition = draw(scheme="iid", clients=7, new_clients=0.0)
    assert sorted(np.bincount(partition.client)) == [571] * 4 + [572] * 3
    assert abs(mixes(partition) - 0.1).max() < 0.05


# --- natural ------------------------------------------------------------------------------------


def test_natural_partition_keeps_the_datas_own_clients_and_their_names():
    names = tuple(f"writer {chr(97 + k)}" for k in range(13))
    partition = draw(scheme="natural", client_names=names, clients=99)
    assert (partition.clients, partition.seen, partition.new) == (13, 10, 3)
    assert sorted(partition.names) == sorted(names) and partition.names != names
    for k, name in enumerate(partition.names):
        assert np.array_equal(members(partition, k), np.flatnonzero(names.index(name) == WRITERS))


@pytest.mark.parametrize("ids", [WRITERS * 10 + 5, np.array([f"w{k}" for k in WRITERS])])
def test_natural_clients_without_names_are_named_by_their_ids(ids):
    partition = draw(scheme="natural", client_train=ids)
    for k, name in enumerate(partition.names):
        assert np.array_equal(members(partition, k), np.flatnonzero(ids.astype(str) == name))


def test_feature_groups_and_new_clients_travel_with_natural_clients():
    plain, held = (draw(scheme="natural", feature_skew="blur", new_clients=n) for n in (0, 0.3))
    assert plain.names != held.names
    assert dict(zip(plain.names, plain.group, strict=True)) == dict(
        zip(held.names, held.group, strict=True)
    )


def test_natural_partition_of_data_without_clients_says_how_to_give_them():
    with pytest.raises(FedCoEError, match=r"client/class or from an .npz with client_train"):
        draw(scheme="natural", client_train=None)


def test_natural_clients_below_the_minimum_are_named_and_nothing_is_left_out():
    ids = np.array(["ann"] * 3985 + ["bob"] * 8 + ["cy"] * 7)
    with pytest.raises(
        FedCoEError, match=r"training images: bob \(8\), cy \(7\); set it to 7, or merge"
    ):
        draw(scheme="natural", client_train=ids)
    assert sorted(np.bincount(draw(scheme="natural", client_train=ids, min_samples=7).client)) == [
        7,
        8,
        3985,
    ]


def test_a_named_natural_client_without_samples_is_refused():
    with pytest.raises(FedCoEError, match=r"empty \(0\); merge or remove"):
        draw(scheme="natural", client_names=[*map(str, range(13)), "empty"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"client_train": WRITERS[:-1]}, "shape"),
        ({"client_train": WRITERS[:, None]}, "shape"),
        ({"client_names": ["a", "b"]}, "client_train must lie in 0 to 1, found 0 to 12"),
        ({"client_names": ["x"] * 13}, "x stands for more than one client"),
    ],
)
def test_client_ids_that_do_not_fit_are_refused(values, message):
    with pytest.raises(FedCoEError, match=message):
        draw(scheme="natural", **values)


# --- feature groups and new clients -------------------------------------------------------------


def test_without_skew_there_is_one_feature_group():
    partition = draw()
    assert not partition.group.any() and not partition.test_group.any()


def test_feature_groups_are_near_equal_in_size_and_dealt_at_random():
    one, other = (
        draw(scheme="iid", clients=22, feature_skew="rotation", new_clients=0.0, seed=seed)
        for seed in (0, 1)
    )
    assert sorted(np.bincount(one.group)) == sorted(np.bincount(other.group)) == [5, 5, 6, 6]
    assert not np.array_equal(one.group, other.group)


def test_test_images_are_balanced_over_the_groups_of_seen_clients_in_random_order():
    partition = draw(num_test=103, feature_skew="rotation")
    assert sorted(np.bincount(partition.test_group)) == [25, 26, 26, 26]
    other = draw(num_test=103, feature_skew="rotation", seed=1)
    assert np.mean(partition.test_group != other.test_group) > 0.5
    neighbours = np.diff(partition.test_group)
    assert np.mean(neighbours == 0) > 0.1 and np.mean(neighbours == 1) < 0.4


@pytest.mark.parametrize(("share", "new"), [(0.0, 0), (0.2, 4), (0.26, 5), (0.9, 18)])
def test_random_new_clients_are_the_rounded_share_and_come_last(share, new):
    partition = draw(new_clients=share)
    assert (partition.seen, partition.new) == (20 - new, new)
    assert partition.names[0] == "client-000" and partition.names[-1] == "client-019"


def test_random_new_clients_vary_with_the_seed():
    chosen = set()
    for seed in range(8):
        partition = draw(scheme="natural", seed=seed)
        chosen.add(partition.names[partition.seen :])
    assert len(chosen) > 5


def test_a_held_out_feature_group_is_new_as_a_whole_and_absent_from_the_test_set():
    held_out = set()
    for seed in range(10):
        partition = draw(
            clients=22, feature_skew="rotation", new_clients_by="feature_group", seed=seed
        )
        seen, new = partition.group[: partition.seen], partition.group[partition.seen :]
        assert len(set(new)) == 1 and set(new).isdisjoint(seen)
        assert set(partition.test_group) == set(seen) == set(range(4)) - set(new)
        # 22 clients, 4 wanted, groups of 5 and 6: a group of 5 is nearest.
        assert partition.new == 5
        warning = f"asks for 4 of 22 clients; feature group {new[0]}, held out whole, has 5"
        assert any(warning in text for text in partition.warnings)
        held_out.add(new[0])
    assert held_out == {2, 3}


def test_a_held_out_feature_group_of_the_size_asked_for_needs_no_warning():
    partition = draw(
        scheme="iid", new_clients=0.25, feature_skew="rotation", new_clients_by="feature_group"
    )
    assert partition.new == 5 and partition.warnings == ()


def test_asking_for_no_new_clients_holds_out_no_feature_group():
    partition = draw(new_clients=0, feature_skew="rotation", new_clients_by="feature_group")
    assert partition.new == 0 and set(partition.group) == {0, 1, 2, 3}


def test_a_held_out_label_mix_is_the_farthest_client_and_its_nearest_neighbours():
    # Natural clients by hand: a, b, c hold classes 0 and 1; d holds 2, e mostly 2, f 0 to 2.
    counts = {
        "a": [50, 50, 0],
        "b": [55, 45, 0],
        "c": [45, 55, 0],
        "d": [0, 0, 100],
        "e": [5, 0, 95],
        "f": [40, 40, 20],
    }
    y = np.concatenate([np.repeat([0, 1, 2], row) for row in counts.values()])
    ids = np.repeat(list(counts), 100)
    for new, expected in ((1, {"d"}), (2, {"d", "e"}), (3, {"d", "e", "f"})):
        partition = draw(
            y=y,
            client_train=ids,
            scheme="natural",
            new_clients=new / 6,
            new_clients_by="label_mix",
        )
        assert set(partition.names[partition.seen :]) == expected


def test_a_held_out_label_mix_is_one_region_around_its_centre():
    partition = draw(new_clients_by="label_mix", new_clients=0.3)
    mix = mixes(partition)
    new = range(partition.seen, partition.clients)
    centre = max(new, key=lambda k: hellinger(mix[k], mix.mean(axis=0)))
    distance = hellinger(mix, mix[centre])
    assert distance[partition.seen :].max() <= distance[: partition.seen].min()
    assert hellinger(mix[centre], mix.mean(axis=0)) == pytest.approx(
        hellinger(mix, mix.mean(axis=0)).max()
    )


def test_a_held_out_label_mix_that_is_no_different_is_warned_about():
    same = draw(scheme="iid", new_clients_by="label_mix").warnings
    assert any("hardly different" in text for text in same)
    assert not any("hardly different" in text for text in draw(new_clients_by="label_mix").warnings)


def test_classes_that_only_new_clients_hold_are_warned_about():
    y = np.repeat(np.arange(4), 100)
    partition = draw(y=y, scheme="pathological", clients=4, classes_per_client=1, new_clients=0.25)
    (held,) = np.unique(y[partition.client == 3])
    assert partition.warnings == (f"no seen client trains on class {held}",)


def test_feature_groups_that_lost_every_seen_client_are_warned_about():
    partition = draw(scheme="iid", clients=4, new_clients=0.5, feature_skew="rotation")
    lost = ", ".join(map(str, sorted(partition.group[2:])))
    assert partition.warnings == (f"no seen client is in feature group {lost}",)


def test_a_share_of_new_clients_that_rounds_to_none_is_warned_about():
    partition = draw(clients=4, new_clients=0.1, scheme="iid")
    assert partition.new == 0
    assert partition.warnings == ("partition.new_clients = 0.1 of 4 clients rounds to none",)


def test_holding_out_every_natural_client_is_refused():
    with pytest.raises(FedCoEError, match="leaves none of 13 clients"):
        draw(scheme="natural", new_clients=0.99)


def test_a_lone_natural_client_is_all_seen_and_cannot_be_held_out():
    alone = {"scheme": "natural", "client_train": np.zeros(4000, int)}
    assert draw(**alone).seen == 1
    with pytest.raises(FedCoEError, match="leaves none of 1 clients"):
        draw(**alone, new_clients=0.6)


# --- splits and look-ups ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "validation", "test", "expected"),
    [
        (100, 0.15, 0.25, (60, 15, 25)),
        (10, 0.01, 0.01, (8, 1, 1)),
        (4, 0.47, 0.47, (1, 2, 1)),
        (4, 0.01, 0.93, (1, 1, 2)),
        (4, 0.93, 0.01, (1, 2, 1)),
        (11, 0.3, 0.3, (5, 3, 3)),
        (11, 0.15, 0.25, (6, 2, 3)),
    ],
)
def test_split_sizes_are_the_rounded_shares_and_never_empty(size, validation, test, expected):
    y = np.arange(2 * size) % 2
    partition = draw(
        y=y,
        scheme="natural",
        client_train=np.arange(2 * size) // size,
        min_samples=4,
        validation=validation,
        test=test,
    )
    for k in range(2):
        assert tuple(len(partition.indices(k, s)) for s in range(3)) == expected


def test_splits_are_drawn_at_random_within_a_client():
    partition = draw(scheme="natural", client_train=np.arange(4000) // 2000)
    for k in range(2):
        for split in (TRAIN, VALIDATION, TEST):
            middle = members(partition, k).mean()
            assert partition.indices(k, split).mean() == pytest.approx(middle, abs=150)


def hand_made(**changes):
    values = {
        "client": [1, 0, 1, 0, 1, 1, 0, 1],
        "split": [0, 1, 2, 0, 0, 1, 2, 0],
        "group": [0, 1],
        "test_group": [0, 0],
        "seen": 1,
        "new": 1,
        "skew": "blur",
        "names": ("ann", "bob"),
    }
    return Partition(**(values | changes))


def test_indices_and_label_counts_of_a_partition_made_by_hand():
    partition = hand_made()
    assert partition.indices(1, TRAIN).tolist() == [0, 4, 7]
    assert partition.indices(0, TEST).tolist() == [6]
    y = [2, 0, 1, 0, 2, 2, 1, 0]
    assert partition.label_counts(y, 3).tolist() == [[2, 1, 0], [1, 1, 3]]
    assert partition.label_counts(y, 3, TRAIN).tolist() == [[1, 0, 0], [1, 0, 2]]
    assert partition.label_counts(y, 4, TEST).tolist() == [[0, 1, 0, 0], [0, 1, 0, 0]]


@pytest.mark.parametrize("y", [[0], [0] * 7, [0] * 7 + [3], [0] * 7 + [-1]])
def test_counting_labels_of_other_data_is_an_error(y):
    with pytest.raises(ValueError, match="labels"):
        hand_made().label_counts(y, 3)


@pytest.mark.parametrize(("client", "split"), [(-1, 0), (2, 0), (0, 3), (0, -1)])
def test_asking_for_a_client_or_split_that_is_not_there_is_an_error(client, split):
    with pytest.raises(IndexError):
        hand_made().indices(client, split)


def test_a_partition_cannot_be_changed_through_its_arrays_or_look_ups():
    partition = hand_made()
    with pytest.raises(ValueError, match="read-only"):
        partition.client[0] = 0
    partition.indices(1, TRAIN)[0] = 99
    assert partition.indices(1, TRAIN)[0] == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"client": [[0]]},
        {"client": [0]},
        {"client": [2] * 8},
        {"client": [-1] * 8},
        {"split": [3] * 8},
        {"group": [0]},
        {"seen": 0, "new": 2},
        {"seen": 3, "new": -1},
        {"names": ("ann", "ann")},
    ],
)
def test_parts_that_do_not_fit_together_make_no_partition(changes):
    with pytest.raises(ValueError, match=r"\w"):
        hand_made(**changes)


@pytest.mark.parametrize(
    "y", [[], [[0, 1]], [0.5] * 400, [-1] * 400, [10] * 400, ["a"] * 400], ids=str
)
def test_labels_that_are_no_class_numbers_are_refused(y):
    with pytest.raises(FedCoEError, match="labels must"):
        make_partition(PartitionSettings(), y, 10, 10)


def test_two_thousand_clients_are_looked_up_fast(monkeypatch):
    y = np.arange(50_000) % 10
    partition = draw(y=y, scheme="iid", clients=2000)
    sorts = []
    real = np.argsort
    monkeypatch.setattr(np, "argsort", lambda *a, **k: sorts.append(1) or real(*a, **k))
    assert sum(len(partition.indices(k, s)) for k in range(2000) for s in range(3)) == 50_000
    assert len(sorts) == 1


# --- on disk ------------------------------------------------------------------------------------

NAMES = [f"digit {c}" for c in range(CLASSES)]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def saved(tmp_path):
    settings = PartitionSettings(feature_skew="rotation", clients=30)
    partition = make_partition(settings, Y, 100, CLASSES)
    save_partition(partition, settings, Y, NAMES, tmp_path / "partitions")
    return partition, settings, tmp_path / "partitions"


def test_a_saved_partition_comes_back_the_same(saved):
    partition, _, folder = saved
    back = load_partition(folder)
    assert back.fingerprint == partition.fingerprint
    for name in ("client", "split", "group", "test_group"):
        assert np.array_equal(getattr(back, name), getattr(partition, name))
        assert getattr(back, name).dtype == getattr(partition, name).dtype
    for name in ("seen", "new", "skew", "names", "warnings"):
        assert getattr(back, name) == getattr(partition, name)
    assert partition.warnings


def test_saving_again_replaces_the_folder_with_the_same_bytes_and_leaves_nothing_else(saved):
    partition, settings, folder = saved
    before = contents(folder)
    assert set(before) == {
        "client.npy",
        "split.npy",
        "group.npy",
        "test_group.npy",
        "manifest.json",
    }
    (folder.parent / ".partitions.tmp").mkdir()
    (folder.parent / ".partitions.tmp" / "half.npy").touch()
    save_partition(partition, settings, Y, NAMES, folder)
    assert contents(folder) == before
    save_partition(draw(seed=5), settings, Y, NAMES, folder)
    assert load_partition(folder).fingerprint != partition.fingerprint
    assert [path.name for path in folder.parent.iterdir()] == ["partitions"]


def test_the_manifest_tells_counts_settings_and_totals(saved):
    partition, settings, folder = saved
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["fingerprint"] == partition.fingerprint
    assert PartitionSettings(**manifest["settings"]) == settings
    assert manifest["classes"] == NAMES
    assert manifest["names"] == list(partition.names)
    assert manifest["warnings"] == list(partition.warnings)
    assert (manifest["seen"], manifest["new"], manifest["skew"]) == (24, 6, "rotation")
    assert manifest["totals"]["samples"] == 4000
    assert len(manifest["clients"]) == 30
    for s, split in enumerate(SPLITS):
        rows = [client[split] for client in manifest["clients"]]
        assert rows == partition.label_counts(Y, CLASSES, s).tolist()
        assert manifest["totals"][split] == np.sum(rows) == np.sum(partition.split == s)
    assert [client["seen"] for client in manifest["clients"]] == [True] * 24 + [False] * 6
    assert [client["group"] for client in manifest["clients"]] == partition.group.tolist()


def test_names_in_any_script_survive_the_disk(tmp_path):
    names = ("Zoë", "北京", "a/b\n", *map(str, range(10)))
    partition = draw(scheme="natural", client_names=names)
    settings = PartitionSettings(scheme="natural")
    save_partition(partition, settings, Y, NAMES, tmp_path / "deep" / "partitions")
    assert load_partition(tmp_path / "deep" / "partitions").names == partition.names


def test_a_folder_with_other_files_is_never_replaced(saved):
    partition, settings, folder = saved
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(FedCoEError, match=r"holds thesis.tex; move it"):
        save_partition(partition, settings, Y, NAMES, folder)
    assert (folder / "thesis.tex").read_text() == "years of work"


def test_a_failed_write_leaves_the_last_partition_whole(saved, monkeypatch):
    _partition, settings, folder = saved
    before = contents(folder)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full_disk)
    with pytest.raises(FedCoEError, match=r"cannot be written: .*No space left"):
        save_partition(draw(seed=5), settings, Y, NAMES, folder)
    assert contents(folder) == before


@pytest.mark.parametrize("name", sorted(module._FILES))
def test_a_missing_file_is_named_with_what_to_run(saved, name):
    folder = saved[2]
    (folder / name).unlink()
    with pytest.raises(FedCoEError, match=rf"{name}: no such file; run `dvc repro partition`$"):
        load_partition(folder)


@pytest.mark.parametrize("name", sorted(module._FILES))
@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "text"])
def test_a_damaged_file_is_named_with_what_to_run(saved, name, damage):
    path = saved[2] / name
    whole = path.read_bytes()
    path.write_bytes(
        {
            "cut": whole[: len(whole) // 2],
            "empty": b"",
            "noise": b"\xff\x00" * 60,
            "text": whole.replace(b"{", b"[(", 1),
        }[damage]
    )
    with pytest.raises(FedCoEError, match=rf"{name}: damaged .*run `dvc repro partition`") as error:
        load_partition(saved[2])
    assert "\n" not in str(error.value)


def test_an_array_of_another_partition_is_noticed(saved):
    _, _, folder = saved
    split = np.load(folder / "split.npy")
    split[0] = (split[0] + 1) % 3
    np.save(folder / "split.npy", split)
    with pytest.raises(FedCoEError, match=r"fingerprint is .*run `dvc repro partition`"):
        load_partition(folder)


@pytest.mark.parametrize(
    "change",
    [lambda a: a + 0.4, lambda a: a[:, None], lambda a: a[:3]],
    ids=["type", "axes", "cut"],
)
def test_an_array_of_another_type_or_shape_is_noticed(saved, change):
    np.save(saved[2] / "split.npy", change(saved[0].split))
    with pytest.raises(FedCoEError, match=r"damaged .*run `dvc repro partition`"):
        load_partition(saved[2])


def test_a_pickled_array_is_never_executed(saved, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("boom").touch, ())

    np.save(saved[2] / "group.npy", np.array([Bomb()], object), allow_pickle=True)
    with pytest.raises(FedCoEError, match=r"group.npy: damaged"):
        load_partition(saved[2])
    assert not tmp_path.joinpath("boom").exists()


@pytest.mark.parametrize("change", [{"seen": 3}, {"seen": "24"}, {"names": None}, {"skew": 1}])
def test_a_manifest_that_was_edited_is_noticed(saved, change):
    path = saved[2] / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FedCoEError, match=r"damaged .*run `dvc repro partition`"):
        load_partition(saved[2])
