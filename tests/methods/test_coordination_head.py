"""The coordination head as a switch of every method."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import softmax

from fedcoe.analytic import design_matrix, projections
from fedcoe.bundle import export_models, load_bundle
from fedcoe.engine.clients import TEST
from fedcoe.evaluate import evaluate, score_clients, score_global
from fedcoe.methods.base import Scores
from fedcoe.methods.settings import method_names
from fedcoe.prediction import prior_from_counts
from fedcoe.rounds import gate_clients, update_gate

ALL = list(range(6))
SMALL = {"experts": 2, "finetune_epochs": 1, "gate_features": 8}
"""Settings that keep methods quick, given to those that have them."""


@pytest.fixture
def make(make_method):
    """make(name, **settings): a method, switched on, whose rounds all end in an evaluation."""

    def build(name, on=True, **settings):
        fields = type(make_method(name=name).settings).model_fields
        small = {key: value for key, value in SMALL.items() if key in fields}
        settings = small | {"coordination_head": on} | settings
        return make_method(name=name, evaluate={"every": 1}, **settings)

    return build


@pytest.fixture
def method(make):
    return make("fedavg")


def evaluated(engine, method, state):
    clients = engine.run(score_clients, method, state, ALL)
    overall = engine.run(score_global, method, state, np.arange(48))
    labels = np.asarray(engine.run(lambda side: side.data.dataset.y_test))
    state, figures = evaluate(method, state, clients, overall, labels)
    predictions = [
        method.predict_client(state, c.client, c.test, state.share[c.client]) for c in clients
    ]
    return state, figures, [*predictions, method.predict_global(state, overall)]


def noisy(state, seed=0):
    """The state with experts that differ from each other."""
    noise = np.random.default_rng(seed).standard_normal(state.experts.shape).astype(np.float32)
    return replace(state, experts=state.experts + 0.05 * noise)


def pooled_ridge(method, side, state, ridge):
    """[D, C] ridge regression on all clients' features put together."""
    data = [side.data.train(k) for k in ALL]
    images, labels = (np.concatenate(parts) for parts in zip(*data, strict=True))
    hidden = [side.trainer.outputs(v, images, 64, features=True)[1] for v in state.experts]
    projection = projections(len(hidden), hidden[0].shape[1], method.gate_features, 0)
    design = design_matrix(hidden, projection)
    gram = design.T @ design + ridge * len(design) * np.eye(design.shape[1])
    return design, np.linalg.solve(gram, design.T @ np.eye(4)[labels])


# ------------------------------------------------------------------ what is solved


@pytest.mark.parametrize("ridge", [1e-3, 0.1])
@pytest.mark.parametrize("workers", [1, 4])
def test_the_head_is_the_ridge_solution_of_the_pooled_data(make, make_engine, workers, ridge):
    method = make("fedavg", ridge=ridge)
    engine = make_engine()
    side = engine.run(lambda side: side)
    engine.workers = workers
    state = noisy(method.init())
    after = update_gate(engine, method, state, ALL)
    _, expected = pooled_ridge(method, side, state, ridge)
    assert after.extra["head"].dtype == np.float32
    np.testing.assert_allclose(after.extra["head"], expected, rtol=0, atol=1e-6)
    assert after.diagnostics == {"gate_messages_dropped": 0.0}


def test_with_several_experts_the_head_is_on_all_their_features(make, engine):
    method = make("fedem", experts=2)
    side = engine.run(lambda side: side)
    state = noisy(method.init())
    after = update_gate(engine, method, state, ALL)
    design, expected = pooled_ridge(method, side, state, method.settings.ridge)
    assert after.extra["head"].shape == (2 * 512 + 1, 4)
    np.testing.assert_allclose(after.extra["head"], expected, rtol=0, atol=1e-5)
    images = np.concatenate([side.data.images(k, 0) for k in ALL])
    found = method.score(side.trainer, after, images).head
    np.testing.assert_allclose(found, design @ expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["fedavg", "fedcoe"])
def test_a_balanced_head_is_that_of_classes_repeated_until_all_are_as_frequent(make, engine, name):
    strength = 1e-3
    method, usual = (make(name, balanced_head=on, ridge=strength) for on in (True, False))
    side = engine.run(lambda side: side)
    state = noisy(method.init())
    design, _ = pooled_ridge(method, side, state, strength)
    labels = np.concatenate([side.data.train(k)[1] for k in ALL])
    counts = np.bincount(labels, minlength=4)
    assert len(set(counts)) > 1
    every = counts.prod()
    gram, targets = np.zeros((design.shape[1],) * 2), np.zeros((design.shape[1], 4))
    for c in range(4):
        mine = design[labels == c]
        times = every // counts[c]
        gram += times * mine.T @ mine
        targets[:, c] = times * mine.sum(axis=0)
    gram += strength * every * 4 * np.eye(len(gram))
    found = update_gate(engine, method, state, ALL).extra["head"]
    # The prior behind the weights gives every class a tenth of a sample more.
    np.testing.assert_allclose(found, np.linalg.solve(gram, targets), rtol=0, atol=2e-3)
    assert np.abs(found - update_gate(engine, usual, state, ALL).extra["head"]).max() > 2e-2
    assert method.head_prior.tolist() == [0.25] * 4
    np.testing.assert_allclose(usual.head_prior, counts / counts.sum(), atol=1e-3)


def test_a_balanced_head_without_a_head_or_with_privacy_is_said_to_be_inert(
    make_method, make_federation
):
    assert any("balanced_head" in s for s in make_method(name="fedavg", balanced_head=True).inert())
    on = {"name": "fedavg", "balanced_head": True, "coordination_head": True}
    assert not make_method(**on).inert()
    # An analytic gate is solved from the same sums.
    assert not make_method(balanced_head=True, coordination_head=False).inert()
    private = make_federation(method=on, privacy={"epsilon": 8.0, "delta": 0.01})
    method = type(make_method(**on))(private)
    assert any("balanced_head" in s for s in method.inert())
    (same,) = method.weighed(np.arange(4), np.eye(4))
    assert same.tolist() == np.eye(4).tolist()


def test_how_clients_are_dealt_to_workers_does_not_change_a_bit(method, side):
    state = method.init()

    def head(*shards):
        messages = [method.gate_message(side, state, shard) for shard in shards]
        return method.gate_update(state, messages).extra["head"].tobytes()

    assert head(ALL) == head([4, 1], [5], [0, 3, 2])


def test_clients_whose_features_are_not_finite_are_left_out(method, engine, side):
    broken = replace(method.init(), experts=np.full_like(method.init().experts, np.nan))
    after = update_gate(engine, method, broken, ALL)
    assert after.diagnostics == {"gate_messages_dropped": len(ALL)}
    assert "head" not in after.extra


def test_the_head_is_renewed_by_every_gate_update(method, engine):
    first = update_gate(engine, method, method.init(), ALL)
    again = update_gate(engine, method, replace(noisy(first)), ALL)
    direct = update_gate(engine, method, noisy(method.init()), ALL)
    np.testing.assert_array_equal(again.extra["head"], direct.extra["head"])
    assert (first.extra["head"] != again.extra["head"]).any()


# ------------------------------------------------------------------ every method


@pytest.mark.parametrize("name", method_names())
def test_every_method_takes_a_head_but_local(make, make_engine, train, name):
    method = make(name)
    engine = make_engine(build=method.build)
    state = train(engine, method, 1)
    images = engine.run(lambda side: np.array(side.data.dataset.x_test))
    scores = engine.run(lambda side: method.score(side.trainer, state, images))
    state, figures, predictions = evaluated(engine, method, state)
    if name == "local":
        assert scores.head is None and not state.extra
        assert any("coordination_head" in sentence for sentence in method.inert())
    else:
        assert scores.head.shape == (48, 4) and np.isfinite(scores.head).all()
        assert state.extra["head"].shape == (method.design_width, 4)
        assert {"global.head", "client.head_sharpness"} <= set(state.calibration)
        assert not any("coordination_head" in sentence for sentence in method.inert())
    for part in (figures.overall, figures.personalized, figures.validation):
        assert np.isfinite(list(part.values())).all()
    for log_p in predictions:
        np.testing.assert_allclose(np.exp(log_p).sum(axis=1), 1.0)


@pytest.mark.parametrize("name", [n for n in method_names() if n not in ("local", "fedcoe")])
def test_switched_off_nothing_of_it_is_left(make, make_engine, train, same_bytes, name):
    states, methods = {}, {}
    for on in (True, False):
        method = make(name, on)
        engine = make_engine(build=method.build)
        methods[on] = method
        states[on] = train(engine, method, 1)
    method = methods[False]
    assert not method.settings.coordination_head and not method.coordinates
    # Training does not notice the head.
    same_bytes(states[True], states[False])
    assert set(states[True].extra) - set(states[False].extra) == {"head"}
    assert set(states[False].extra) == set(method.init().extra)
    assert (states[False].calibration, states[False].diagnostics) == ({}, {})
    assert gate_clients(method, 1) == []
    assert method.gate_bytes(states[False], 0, 1) == (0, 0)
    assert gate_clients(methods[True], 1) == ALL


@pytest.mark.parametrize("name", method_names())
def test_no_method_reads_a_label_of_a_test_split(world, make_world, make, make_engine, train, name):
    rng = np.random.default_rng(0)

    def garble(raw):
        labels, test = np.array(raw.y_train), np.array(raw.y_test)
        held = world.partition.split == TEST
        labels[held] = (labels[held] + rng.integers(1, 4, held.sum())) % 4
        return replace(raw, y_train=labels, y_test=(test + 1) % 4)

    found = []
    for where in (world, make_world(garble, world.partition)):
        method = make(name)
        engine = make_engine(world=where, build=method.build)
        state, figures, predictions = evaluated(engine, method, train(engine, method, 1))
        found.append((state, [p.tobytes() for p in predictions], figures))
    (a, true, figures), (b, false, others) = found
    assert a.experts.tobytes() == b.experts.tobytes()
    assert a.correlation.tobytes() == b.correlation.tobytes()
    assert a.share.tobytes() == b.share.tobytes()
    assert {k: v.tobytes() for k, v in a.extra.items()} == {
        k: v.tobytes() for k, v in b.extra.items()
    }
    assert a.calibration == b.calibration
    assert true == false
    assert figures.personalized != others.personalized, "the test must be able to notice labels"


def test_local_says_which_switches_do_nothing(make_method):
    assert make_method(name="local").inert() == []
    found = make_method(
        name="local", coordination_head=True, balanced_softmax=True, server_momentum=0.5
    )
    said = found.inert()
    assert [sentence.split(":")[0] for sentence in said] == [
        "balanced_softmax",
        "server_momentum",
        "coordination_head",
    ]
    assert not found.coordinates


def test_a_head_kept_from_elsewhere_is_not_used_when_it_is_switched_off(make, side):
    method = make("fedavg", on=False)
    state = method.init().with_extra(head=np.ones((513, 4), np.float32))
    scores = method.score(side.trainer, state, np.array(side.data.dataset.x_test))
    assert scores.head is None


# ------------------------------------------------------------------- predictions

A, HEAD = np.array([0.7, 0.1, 0.1, 0.1]), np.array([0.9, 0.1, 0.2, 0.3])
CALIBRATION = {"head": 0.25, "head_sharpness": 2.0, "experts": 1.0}


def calibrated(method):
    values = {f"{scope}.{k}": v for k, v in CALIBRATION.items() for scope in ("global", "client")}
    return replace(method.init(), calibration=values)


def pool(method, balanced):
    """Expert and head, each with the label prior it has learnt taken out, pooled."""
    prior = method.federation.label_prior
    expert = A if balanced else A / prior
    expert = expert / expert.sum()
    head = softmax(2.0 * HEAD) / prior
    p = expert**0.75 * (head / head.sum()) ** 0.25
    return p / p.sum()


@pytest.mark.parametrize("balanced", [True, False])
def test_the_global_prediction_pools_the_model_with_the_head(make, balanced):
    method = make("fedavg", balanced_softmax=balanced)
    scores = Scores(np.log(A)[None, None].astype(np.float32), head=HEAD[None].astype(np.float32))
    found = np.exp(method.predict_global(calibrated(method), scores))[0]
    np.testing.assert_allclose(found, pool(method, balanced), rtol=1e-5)


@pytest.mark.parametrize("reweighting", [True, False])
def test_a_clients_label_prior_comes_on_top_where_reweighting_is_on(make, reweighting):
    method = make("fedavg", reweighting=reweighting)
    scores = Scores(np.log(A)[None, None].astype(np.float32), head=HEAD[None].astype(np.float32))
    found = np.exp(method.predict_client(calibrated(method), 3, scores, 0.0))[0]
    expected = pool(method, False)
    if reweighting:
        expected = expected * prior_from_counts(method.federation.label_counts[3])
    np.testing.assert_allclose(found, expected / expected.sum(), rtol=1e-5)


def test_a_clients_correlation_weighs_experts_beside_the_head(make):
    method = make("fedem", balanced_softmax=True)
    b = np.array([0.1, 0.6, 0.2, 0.1])
    scores = Scores(
        np.log(np.stack([A, b]))[:, None].astype(np.float32), head=HEAD[None].astype(np.float32)
    )
    state = replace(calibrated(method), correlation=np.tile([0.9, 0.1], (6, 1)))
    found = np.exp(method.predict_client(state, 0, scores, 0.0))[0]
    head = softmax(2.0 * HEAD) / method.federation.label_prior
    p = (0.9 * A + 0.1 * b) ** 0.75 * (head / head.sum()) ** 0.25
    np.testing.assert_allclose(found, p / p.sum(), rtol=1e-5)


def test_calibration_trusts_whoever_explains_the_validation_labels(method):
    assert set(method.grids()) == {"head", "head_sharpness", "experts"}
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 80)
    right = np.eye(4, dtype=np.float32)[labels] * 4
    noise = 4 * rng.standard_normal((80, 4)).astype(np.float32)

    def fitted(experts, head):
        return method.calibrate(method.init(), {0: (Scores(experts[None], head=head), labels)})

    for experts, head, share in ((noise, right, 1.0), (right, noise, 0.0)):
        state = fitted(experts, head)
        assert state.calibration["global.head"] == state.calibration["client.head"] == share
        again = method.calibrate(state, {0: (Scores(experts[None], head=head), labels)})
        assert again.calibration == state.calibration


# -------------------------------------------------------------------- accounting


def test_gate_bytes_by_hand(make):
    for name, features, models in (("fedavg", 512, 1), ("fedem", 1024, 2)):
        method = make(name)
        state = method.init()
        d = features + 1
        up = 4 * (d * (d + 1) // 2 + d * 4)
        down = 4 * models * state.experts.shape[1]
        assert method.design_width == d
        assert method.gate_bytes(state, 3, 1) == (3 * up, 3 * down)


def test_an_exported_head_predicts_the_same(method, engine, train, tmp_path):
    state = evaluated(engine, method, train(engine, method, 1))[0]
    side = engine.run(lambda side: side)
    export_models(tmp_path / "models", method, state, side.personal)
    images = np.array(side.data.dataset.x_test)
    scores = method.score(side.trainer, state, images)
    found = load_bundle(tmp_path / "models", "fp32").predict(images)
    assert found.tobytes() == method.predict_global(state, scores).tobytes()
