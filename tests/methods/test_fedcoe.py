from dataclasses import replace

import numpy as np
import pytest
from scipy.special import softmax

from fedcoe import correlation, neural_gate
from fedcoe.analytic import design_matrix, message_bytes, projections
from fedcoe.cold_start import predict_labels, predict_unlabelled
from fedcoe.errors import FedCoEError
from fedcoe.evaluate import evaluate, score_clients, score_global
from fedcoe.methods.base import Order, Scores
from fedcoe.methods.settings import method_class
from fedcoe.prediction import sample_losses
from fedcoe.rounds import finetune, gate_clients, plan_round, train_round, update_gate
from fedcoe.streams import stream

ALL = [0, 1, 2, 3, 4, 5]


def differing(state, seed=0):
    """The state with experts that differ from each other."""
    noise = np.random.default_rng(seed).standard_normal(state.experts.shape).astype(np.float32)
    return replace(state, experts=state.experts + 0.05 * noise)


def test_all_experts_start_equal_and_similar_clients_share_one(make_method):
    method = make_method(experts=2)
    state = method.init()
    np.testing.assert_array_equal(state.experts[0], state.experts[1])
    points = correlation.hellinger(method.federation.label_counts)
    c = correlation.from_similarity(points, 2, 4.0, stream(0, "similarity"))
    np.testing.assert_allclose(state.correlation, 0.95 * c + 0.025)
    groups = np.bincount(state.correlation.argmax(axis=1), minlength=2)
    assert groups.max() <= 3


def test_without_similarity_the_correlation_starts_uniform(make_method):
    for similarity in ("none", "updates"):
        state = make_method(similarity=similarity, experts=4).init()
        np.testing.assert_array_equal(state.correlation, 0.25)


def test_first_round_updates_seed_the_correlation_once(make_method, engine):
    method = make_method(similarity="updates", train={"cohort": 0.7, "rounds": 9})
    state, cohort = method.init(), method.cohort(method.init())
    after, _ = train_round(engine, method, state)
    outside = sorted(set(ALL) - set(cohort))
    np.testing.assert_array_equal(after.correlation[outside], 0.5)
    assert np.abs(after.correlation[cohort] - 0.5).max() > 0.05
    np.testing.assert_allclose(after.correlation.sum(axis=1), 1.0)
    later, _ = train_round(engine, method, after)
    np.testing.assert_array_equal(later.correlation, after.correlation)


def test_a_dropped_update_leaves_no_sketch(make_method, side, monkeypatch):
    method = make_method(similarity="updates", personal_expert=False)
    real = type(side.trainer)._fit

    def huge(self, fit, *rest):
        result = real(self, fit, *rest)
        if fit.client == 1:
            result.vector[-1] = 1e20
        return result

    monkeypatch.setattr(type(side.trainer), "_fit", huge)
    state = method.init()
    result = method.local_train(side, state, method.dispatch(state, ALL))
    assert sorted(result.sketches) == [0, 2, 3, 4, 5]


def test_dispatch_follows_the_correlation_and_is_seeded_by_round(make_method):
    method = make_method(experts=2)
    c = np.array([[0.9, 0.1], [0.1, 0.9]] * 3)
    orders = method.dispatch(replace(method.init(), correlation=c), ALL)
    assert [o.experts for o in orders] == [(0,), (1,)] * 3
    uniform = make_method(experts=3, similarity="none")
    states = [replace(uniform.init(), round=r) for r in range(6)]
    draws = [tuple(o.experts for o in uniform.dispatch(s, ALL)) for s in states]
    assert len(set(draws)) > 1
    assert draws[0] == tuple(o.experts for o in uniform.dispatch(states[0], ALL))


# ------------------------------------------------------------ responsibilities


def test_responsibilities_are_the_posterior_of_the_clients_experts(make_method, side):
    method = make_method(experts=3, experts_per_client=2, gate_temperature=0.5)
    c = np.tile([0.2, 0.5, 0.3], (6, 1))
    state = replace(differing(method.init()), correlation=c)
    fits = method.fits(side, state, Order(2, (0, 2), (0.5, 0.5)))
    assert [f.name for f in fits] == [0, 2, -1]
    images, labels = side.data.train(2)
    losses = np.stack(
        [
            sample_losses(side.trainer.outputs(state.experts[m], images, 64)[0][None], labels)[:, 0]
            for m in (0, 2)
        ],
        axis=1,
    )
    weight = np.array([0.2, 0.3]) * np.exp(-losses / 0.5)
    weight /= weight.sum(axis=1, keepdims=True)
    for i in range(2):
        np.testing.assert_allclose(fits[i].sample_weights, weight[:, i], rtol=1e-4)
    assert fits[2].sample_weights is None
    for fit in fits[:2]:
        np.testing.assert_array_equal(fit.start, state.experts[fit.name])


def test_one_expert_a_client_or_no_responsibility_weighs_all_samples_alike(make_method, side):
    for method in (
        make_method(experts=2, experts_per_client=1),
        make_method(experts=2, experts_per_client=2, responsibility="none"),
    ):
        state = method.init()
        [order, *_] = method.dispatch(state, ALL)
        assert all(f.sample_weights is None for f in method.fits(side, state, order))


def test_experts_train_on_balanced_softmax_and_the_personal_one_on_plain(make_method, side):
    method = make_method(personal_pull=0.1)
    state = replace(differing(method.init()), correlation=np.tile([0.25, 0.75], (6, 1)))
    expert, personal = method.fits(side, state, Order(1, (0,), (1.0,)))
    np.testing.assert_array_equal(expert.logit_shift, method.logit_shift(1))
    assert expert.anchor is None
    assert personal.logit_shift is None
    assert personal.pull == 0.1
    mixture = 0.25 * state.experts[0] + 0.75 * state.experts[1]
    np.testing.assert_allclose(personal.anchor, mixture, atol=1e-6)
    np.testing.assert_array_equal(personal.start, state.experts[1])


def test_without_a_personal_expert_none_is_trained(make_method, side):
    method = make_method(personal_expert=False)
    state = method.init()
    result = method.local_train(side, state, method.dispatch(state, ALL))
    assert not result.personal
    assert not side.personal.folder.exists()


# --------------------------------------------------------------- analytic gate


def posteriors_and_design(method, state, side, images, labels):
    """Targets and features from the trainer's outputs, in the words of the design."""
    out = [side.trainer.outputs(v, images, 64, features=True) for v in state.experts]
    logits, features = np.stack([o[0] for o in out]), [o[1] for o in out]
    losses = np.stack(
        [-np.log(softmax(z.astype(float), axis=1)[np.arange(len(labels)), labels]) for z in logits],
        axis=1,
    )
    q = softmax(-losses / method.settings.gate_temperature, axis=1)
    seed = method.federation.settings.train.seed
    kept = method.settings.gate_features
    p = projections(len(state.experts), features[0].shape[1], kept, seed)
    return losses, q, design_matrix(features, p)


@pytest.mark.parametrize("kept", [8, 0])
@pytest.mark.parametrize("workers", [1, 3])
def test_the_gate_update_solves_the_ridge_regression_of_the_pooled_data(
    make_method, make_engine, kept, workers
):
    method = make_method(experts=2, gate_features=kept)
    engine = make_engine()
    side = engine.run(lambda side: side)
    state = differing(method.init())
    engine.workers = workers
    after = update_gate(engine, method, state, ALL)

    data = [side.data.train(k) for k in ALL]
    images, labels = (np.concatenate(parts) for parts in zip(*data, strict=True))
    _, q, design = posteriors_and_design(method, state, side, images, labels)
    targets = np.concatenate([q, np.eye(4)[labels]], axis=1)
    gram = design.T @ design + method.settings.ridge * len(design) * np.eye(design.shape[1])
    expected = np.linalg.solve(gram, design.T @ targets)
    np.testing.assert_allclose(after.extra["gate"], expected[:, :2], rtol=0, atol=1e-5)
    np.testing.assert_allclose(after.extra["head"], expected[:, 2:], rtol=0, atol=1e-5)
    found = design @ np.concatenate([after.extra["gate"], after.extra["head"]], axis=1)
    np.testing.assert_allclose(found, design @ expected, rtol=0, atol=1e-6)


def test_the_correlation_follows_losses_and_the_gate_with_momentum_and_floor(make_method, engine):
    method = make_method(experts=2, correlation_momentum=0.25, loss_sharpness=3.0)
    side = engine.run(lambda side: side)
    state = differing(method.init())
    after = update_gate(engine, method, state, [1, 4])
    for k in (1, 4):
        losses, _, _ = posteriors_and_design(method, state, side, *side.data.train(k))
        posterior = softmax(-3.0 * losses.mean(axis=0))
        mixed = 0.25 * state.correlation[k] + 0.75 * posterior
        np.testing.assert_allclose(after.correlation[k], 0.95 * mixed + 0.025, atol=1e-6)
    np.testing.assert_array_equal(after.correlation[[0, 2]], state.correlation[[0, 2]])


def test_equal_experts_under_a_uniform_gate_belong_to_everyone_alike(make_method, engine):
    method = make_method(experts=4, similarity="none")
    after = update_gate(engine, method, method.init(), ALL)
    np.testing.assert_allclose(after.correlation, 0.25, atol=1e-12)


def test_an_outdated_gate_has_no_say_in_the_correlation(make_method, engine):
    method = make_method(experts=2, correlation_momentum=0.0)
    state = update_gate(engine, method, differing(method.init()), ALL)
    shouting = state.with_extra(gate=state.extra["gate"] * 100)
    once, twice = (update_gate(engine, method, s, ALL) for s in (state, shouting))
    np.testing.assert_array_equal(once.correlation, twice.correlation)


def test_clients_whose_features_are_not_finite_are_left_out_of_the_gate(make_method, engine):
    method = make_method(experts=2)
    state = method.init()
    broken = replace(state, experts=np.full_like(state.experts, np.nan))
    after = update_gate(engine, method, broken, ALL)
    assert after.diagnostics == {"gate_messages_dropped": len(ALL)}
    np.testing.assert_array_equal(after.correlation, state.correlation)
    assert "gate" not in after.extra


def test_gating_inconsistency_is_a_divergence(make_method, engine):
    method = make_method(experts=2)
    same = update_gate(engine, method, differing(method.init()), [2])
    assert same.diagnostics["gating_inconsistency"] == pytest.approx(0.0, abs=1e-9)
    many = update_gate(engine, method, differing(method.init()), ALL)
    assert 1e-6 < many.diagnostics["gating_inconsistency"] <= np.log(2)


def test_diagnostics_and_clients_order_do_not_change_the_gate(make_method, side):
    method = make_method(experts=2)
    state = differing(method.init())

    def result(*shards):
        return method.gate_update(state, [method.gate_message(side, state, s) for s in shards])

    a, b = result(ALL), result([4, 1], [5], [0, 3, 2])
    assert a.extra["gate"].tobytes() == b.extra["gate"].tobytes()
    assert a.extra["head"].tobytes() == b.extra["head"].tobytes()
    assert a.correlation.tobytes() == b.correlation.tobytes()
    assert a.diagnostics == b.diagnostics


def test_gate_bytes_are_those_of_the_message(make_method, side):
    method = make_method(experts=2, gate_features=8)
    state = method.init()
    up, down = method.gate_bytes(state, 3, 1)
    message = method.gate_message(side, state, [0])
    assert up == 3 * (message_bytes(*message.statistics.targets.total.shape) + 4 * 2)
    assert down >= 3 * state.experts.nbytes


# ----------------------------------------------------------------- neural gate

NEURAL = {"gate": "neural", "coordination_head": False}


def test_a_neural_gate_learns_a_separable_target(side):
    rng = np.random.default_rng(0)
    bright = rng.random(120) < 0.5
    images = rng.integers(0, 60, (120, 8, 8, 1)) + 190 * bright[:, None, None, None]
    images = images.astype(np.uint8)
    targets = np.eye(2)[bright.astype(int)]
    start = neural_gate.initial((8, 8, 1), 2, 0)
    np.testing.assert_array_equal(neural_gate.scores(side.trainer, start, 2, images, 50), 0.0)
    work = neural_gate.Work(epochs=30, lr=0.3, load_balance=0.0)
    trained = neural_gate.fit(side.trainer, start, images, targets, work, rng)
    scores = neural_gate.scores(side.trainer, trained, 2, images, 50)
    assert (scores.argmax(axis=1) == bright).mean() > 0.95


def test_load_balance_keeps_a_gate_from_closing(side):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 8, 8, 1), dtype=np.uint8)
    targets = np.tile([1.0, 0.0], (60, 1))
    start = neural_gate.initial((8, 8, 1), 2, 0)
    rare = []
    for balance in (0.0, 1.0):
        work = neural_gate.Work(10, 0.2, balance)
        v = neural_gate.fit(side.trainer, start, images, targets, work, np.random.default_rng(0))
        scores = neural_gate.scores(side.trainer, v, 2, images, 60)
        rare.append(softmax(scores, axis=1)[:, 1].mean())
    assert rare[0] < 0.15 < rare[1]
    # Minimum of -log(1 - p) - (log(p) + log(1 - p)) / 2 is at p = 1/4.
    assert rare[1] == pytest.approx(0.25, abs=0.1)


def test_the_server_averages_neural_gates_by_number_of_samples(make_method, engine):
    method = make_method(experts=2, **NEURAL)
    side = engine.run(lambda side: side)
    state = differing(method.init())
    after = update_gate(engine, method, state, [0, 3])
    n = method.federation.train_counts
    expected = 0.0
    for k in (0, 3):
        images, labels = side.data.train(k)
        _, q, _ = posteriors_and_design(method, state, side, images, labels)
        trained = neural_gate.fit(
            side.trainer, state.extra["gate"], images, q, neural_gate.Work(1, 0.1, 0.1),
            stream(0, "gate", 0, k),
        )  # fmt: skip
        expected = expected + n[k] / (n[0] + n[3]) * trained.astype(np.float64)
    np.testing.assert_allclose(after.extra["gate"], expected, atol=1e-6)
    assert np.abs(after.extra["gate"] - state.extra["gate"]).max() > 1e-4
    assert "head" not in after.extra


def test_large_clients_with_large_gate_parameters_can_be_added_up(make_method, side, monkeypatch):
    method = make_method(experts=2, **NEURAL)
    state = method.init()
    big = np.full_like(state.extra["gate"], 2000.0)
    monkeypatch.setattr(neural_gate, "fit", lambda *_: big)
    after = method.gate_update(state, [method.gate_message(side, state, ALL)])
    np.testing.assert_allclose(after.extra["gate"], 2000.0)


def test_a_whole_round_runs_with_a_neural_gate(make_method, engine, train):
    method = make_method(experts=2, **NEURAL)
    state = train(engine, method, 2)
    images = np.array(engine.run(lambda side: side.data.dataset.x_test))
    side = engine.run(lambda side: side)
    scores = method.score(side.trainer, state, images)
    assert scores.gate.shape == (48, 2)
    assert scores.head is None
    np.testing.assert_allclose(np.exp(method.log_gate(state, scores)).sum(axis=1), 1.0)
    np.testing.assert_allclose(np.exp(method.predict_global(state, scores)).sum(axis=1), 1.0)
    up, down = method.gate_bytes(state, 2, 1)
    assert (up, down) == (2 * 4 * (state.extra["gate"].size + 2), 2 * state.experts.nbytes)


def test_a_new_neural_gate_is_uniform(make_method, side):
    method = make_method(experts=3, **NEURAL)
    state = method.init()
    scores = method.score(side.trainer, state, side.data.dataset.x_test)
    np.testing.assert_allclose(np.exp(method.log_gate(state, scores)), 1 / 3)


# ------------------------------------------------------------------ prediction


def scores_of(*experts, gate=None, head=None):
    logits = np.log(np.array(experts))[:, None, :].astype(np.float32)
    return Scores(
        logits,
        None if gate is None else np.array([gate], np.float32),
        None if head is None else np.array([head], np.float32),
    )


PLAIN = {
    "global.head": 0.5,
    "global.head_sharpness": 2.0,
    "global.gate": 1.0,
    "global.experts": 1.0,
}
PLAIN |= {name.replace("global", "client"): v for name, v in PLAIN.items()}
PLAIN["client.correlation"] = 1.0
A, B = [0.7, 0.1, 0.1, 0.1], [0.1, 0.6, 0.2, 0.1]


def calibrated(method, **changes):
    values = PLAIN | {k.replace("_", ".", 1): v for k, v in changes.items()}
    return replace(method.init(), calibration=values)


def test_the_global_prediction_is_the_gates_mixture_of_experts(make_method):
    method = make_method(experts=2)
    gate = [np.log(0.8), np.log(0.2)]
    found = np.exp(method.predict_global(calibrated(method), scores_of(A, B, gate=gate)))
    np.testing.assert_allclose(found[0], 0.8 * np.array(A) + 0.2 * np.array(B), rtol=1e-5)


def test_the_head_is_pooled_with_the_mixture_after_its_prior_is_taken_out(make_method):
    method = make_method(experts=2)
    head = [0.9, 0.1, 0.2, 0.3]
    scores = scores_of(A, B, gate=[0.0, 0.0], head=head)
    found = np.exp(method.predict_global(calibrated(method), scores))[0]
    balanced = softmax(2.0 * np.array(head)) / method.federation.label_prior
    mixture = (np.array(A) + np.array(B)) / 2
    expected = np.sqrt(mixture * balanced / balanced.sum())
    np.testing.assert_allclose(found, expected / expected.sum(), rtol=1e-5)


def test_a_clients_prediction_adds_its_correlation_and_its_label_prior(make_method):
    method = make_method(experts=2)
    state = calibrated(method)
    c, prior = np.array([0.9, 0.1]), np.array([0.4, 0.3, 0.2, 0.1])
    scores = scores_of(A, B, gate=[np.log(0.5), np.log(0.5)])
    found = np.exp(method.predict_with(state, scores, prior, c))[0]
    expected = (0.9 * np.array(A) + 0.1 * np.array(B)) * prior
    np.testing.assert_allclose(found, expected / expected.sum(), rtol=1e-5)
    without = make_method(experts=2, reweighting=False)
    found = np.exp(without.predict_with(state, scores, prior, c))[0]
    np.testing.assert_allclose(found, 0.9 * np.array(A) + 0.1 * np.array(B), rtol=1e-5)


def test_experts_trained_on_plain_loss_have_their_prior_taken_out(make_method):
    method = make_method(experts=1, balanced_softmax=False)
    found = np.exp(method.predict_global(calibrated(method), scores_of(A)))[0]
    expected = np.array(A) / method.federation.label_prior
    np.testing.assert_allclose(found, expected / expected.sum(), rtol=1e-5)


def test_calibration_prefers_what_explains_the_validation_labels(make_method):
    method = make_method(experts=2)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 80)
    right = np.eye(4, dtype=np.float32)[labels] * 4
    noise = 4 * rng.standard_normal((80, 4)).astype(np.float32)

    def fitted(experts, head):
        scores = Scores(np.stack([experts, experts]), np.zeros((80, 2), np.float32), head)
        return method.calibrate(method.init(), {0: (scores, labels)}).calibration

    good_head = fitted(noise, right)
    assert good_head["global.head"] == good_head["client.head"] == 1.0
    good_experts = fitted(right, noise)
    assert good_experts["global.head"] == good_experts["client.head"] == 0.0
    assert good_experts["global.experts"] == 1.25


def test_calibration_never_makes_the_validation_likelihood_worse(make_method, side, engine, train):
    method = make_method(experts=2)
    state = train(engine, method, 2)
    validation = {}
    for k in ALL:
        images, labels = side.data.images(k, 1), side.data.labels(k, 1)
        validation[k] = (method.score(side.trainer, state, images), labels)

    def nll(state):
        total = 0.0
        for k, (scores, labels) in validation.items():
            log_p = method.predict_client(state, k, scores, 0.0)
            total -= log_p[np.arange(len(labels)), labels].sum()
        return total

    assert nll(method.calibrate(state, validation)) <= nll(state) + 1e-9


def test_a_new_clients_correlation_comes_from_the_gate_or_with_labels_from_losses(make_method):
    method = make_method(experts=2, loss_sharpness=2.0)
    state = calibrated(method)
    scores = scores_of(A, B, gate=[np.log(0.6), np.log(0.4)])
    unlabelled = method.correlation_unlabelled(state, scores)
    np.testing.assert_allclose(unlabelled, 0.95 * np.array([0.6, 0.4]) + 0.025, rtol=1e-5)
    labelled = method.correlation_labelled(state, scores, np.array([1]))
    weight = np.array([0.1**2, 0.6**2])
    np.testing.assert_allclose(labelled, 0.95 * weight / weight.sum() + 0.025, rtol=1e-4)


def test_sample_losses_by_hand():
    logits = np.log(np.array([[[0.5, 0.5], [0.9, 0.1]], [[0.25, 0.75], [0.2, 0.8]]], np.float32))
    expected = -np.log([[0.5, 0.75], [0.9, 0.2]])
    np.testing.assert_allclose(sample_losses(logits, np.array([1, 0])), expected, rtol=1e-5)


def test_a_round_is_planned_from_what_travels_to_workers(make_method, engine):
    method = make_method(experts=2)
    state = method.init()
    assert plan_round(method, state, engine) == plan_round(method, state.for_clients(), engine)
    assert state.for_clients().momentum.size == 0


def test_until_they_branch_the_experts_are_one_model_and_that_of_a_pool_of_one(
    make_method, make_engine, train
):
    pool = make_method(experts=2, branch_after=2, personal_expert=False, train={"rounds": 4})
    one = make_method(experts=1, personal_expert=False, train={"rounds": 4})
    engine = make_engine()
    together, alone = train(engine, pool, 2), train(engine, one, 2)
    assert together.experts[0].tobytes() == together.experts[1].tobytes()
    assert together.momentum[0].tobytes() == together.momentum[1].tobytes()
    assert together.experts[0].tobytes() == alone.experts[0].tobytes()
    parted = train(engine, pool, 1, together)
    assert not np.array_equal(parted.experts[0], parted.experts[1])
    np.testing.assert_array_equal(
        np.diff([together.dispatched.sum(axis=0), parted.dispatched.sum(axis=0)], axis=0), [[3, 3]]
    )


def test_before_they_branch_losses_do_not_wash_out_similarity(make_method, engine, train):
    pool = make_method(experts=2, branch_after=1, train={"rounds": 3})
    state = train(engine, pool, 1)
    updated = update_gate(engine, pool, state, ALL)
    np.testing.assert_array_equal(updated.correlation, state.correlation)
    assert "gate" in updated.extra
    later = train(engine, pool, 1, updated)
    assert not np.array_equal(update_gate(engine, pool, later, ALL).correlation, state.correlation)


@pytest.mark.parametrize("gate", [{}, {"gate": "neural", "coordination_head": False}])
def test_when_they_branch_clients_with_alike_inputs_share_an_expert(
    make_method, side, train, engine, monkeypatch, gate
):
    own = {"rounds": 9, "cohort": 0.5}
    method = make_method(similarity="features", branch_after=2, train=own, **gate)
    np.testing.assert_array_equal(method.init().correlation, 0.5)
    state = train(engine, method, 2)
    real = type(side.data).train

    def inverted(data, client):  # for odd clients, whatever their labels
        images, labels = real(data, client)
        return (255 - images if client % 2 else images), labels

    monkeypatch.setattr(type(side.data), "train", inverted)
    shards = [0, 3, 5], [1, 2, 4]
    messages = [method.gate_message(side, state, shard) for shard in shards]
    after = method.gate_update(state, messages)
    owner = after.correlation.argmax(axis=1)
    assert owner.tolist() in ([0, 1] * 3, [1, 0] * 3)
    np.testing.assert_allclose(after.correlation.sum(axis=1), 1.0)
    messages = [method.gate_message(side, state, shard) for shard in ([4, 0, 1], [5], [3, 2])]
    assert method.gate_update(state, messages).correlation.tobytes() == after.correlation.tobytes()


def test_features_are_sent_once_by_everybody_and_counted(make_method, side):
    own = {"rounds": 9, "cohort": 0.5}
    method = make_method(similarity="features", branch_after=2, train=own, evaluate={"every": 9})
    state = method.init()
    for round_ in (1, 2, 3):
        parts = round_ == 2
        assert gate_clients(method, round_) == (ALL if parts else [])
        message = method.gate_message(side, replace(state, round=round_), [0, 1])
        assert sorted(message.features) == ([0, 1] if parts else [])
        size = message.class_features.total.size + sum(len(f) for f in message.features.values())
        width, classes = method.feature_width, method.federation.classes
        assert size == ((classes + 2) * width if parts else 0)
        more = np.subtract(method.gate_bytes(state, 3, round_), method.gate_bytes(state, 3, 9))
        assert more.tolist() == [3 * 4 * (classes + 1) * width if parts else 0, 0]
    one = make_method(similarity="features", branch_after=2, experts=1, train=own)
    assert not one.gate_message(side, replace(one.init(), round=2), [0]).features


def test_a_client_whose_features_are_lost_is_dropped_and_its_expert_is_drawn(
    make_method, side, monkeypatch
):
    own = {"rounds": 9, "cohort": 0.5}
    method = make_method(similarity="features", branch_after=2, dispatch="top_k", train=own)
    state = replace(method.init(), round=2)
    real = type(side.trainer).outputs

    def huge(trainer, vector, images, *rest):
        logits, features = real(trainer, vector, images, *rest)
        lost = len(images) == len(side.data.train(1)[0])
        return logits, features * 1e9 if lost and features is not None else features

    message = method.gate_message(side, state, [0, 2, 3, 4, 5])
    with monkeypatch.context() as patch:
        patch.setattr(type(side.trainer), "outputs", huge)
        bad = method.gate_message(side, state, [1])
    assert bad.dropped == {"too large": 1} and not bad.features and not bad.losses
    after = method.gate_update(state, [message, bad])
    np.testing.assert_array_equal(after.correlation[1], 0.5)
    assert np.abs(after.correlation[[0, 2, 3, 4, 5]] - 0.5).min() > 0.2
    later = [replace(after, round=r) for r in range(2, 12)]
    assert {method.dispatch(s, [1])[0].experts for s in later} == {(0,), (1,)}
    assert len({method.dispatch(s, [0])[0].experts for s in later}) == 1


def test_features_cannot_be_compared_without_a_common_model(make_method):
    with pytest.raises(FedCoEError, match="set branch_after"):
        make_method(similarity="features")


def test_a_branch_that_never_comes_is_said(make_method):
    said = make_method(experts=2, branch_after=3, train={"rounds": 3}).inert()
    assert any("never part" in sentence for sentence in said)
    assert not make_method(experts=2, branch_after=2, train={"rounds": 3}).inert()


def test_a_branch_with_several_experts_a_client_is_not_accounted_for(make_method):
    method = make_method(experts=4, experts_per_client=2, branch_after=2)
    assert any("branch_after" in reason for reason in method.unaccounted())
    assert not make_method(experts=4, branch_after=2).unaccounted()


def test_fine_tuned_personal_experts_start_from_the_most_correlated_expert_and_cost_no_round(
    make_method, make_engine, train
):
    method = make_method(experts=2, personal_epochs=2, train={"rounds": 3})
    assert method.finetune_epochs == 2
    assert make_method(personal_epochs=2, personal_expert=False).finetune_epochs == 0
    state = differing(method.init())
    engine = make_engine()
    side = engine.run(lambda side: side)
    orders = method.dispatch(state, ALL)
    assert all(fit.name >= 0 for order in orders for fit in method.fits(side, state, order))
    for client in ALL:
        best = state.correlation[client].argmax()
        np.testing.assert_array_equal(method.finetune_start(state, client), state.experts[best])
    _, images = finetune(engine, method, state)
    assert images == 2 * method.federation.train_counts.sum()
    pool = train(engine, method, 3)
    alone = make_method(experts=2, personal_expert=False, train={"rounds": 3})
    assert pool.experts.tobytes() == train(make_engine(), alone, 3).experts.tobytes()
    assert (pool.personal_round == 3).all()


def test_with_one_expert_and_no_switch_it_predicts_as_fedavg_does(make_method, engine, train):
    """So what it is ahead of FedAvg in row plain, experts and gate have brought."""
    off = {"balanced_softmax": False, "server_momentum": 0.0, "coordination_head": False}
    one = {"name": "fedcoe", "experts": 1, "personal_expert": False}
    for reweighting in (False, True):
        method = make_method(**one, **off, reweighting=reweighting)
        fedavg = make_method(name="fedavg", **off, reweighting=reweighting)
        state = train(engine, method, 2)
        side = engine.run(lambda side: side)
        clients = engine.run(score_clients, method, state, ALL)
        overall = engine.run(score_global, method, state, np.arange(48))
        state, _ = evaluate(method, state, clients, overall, np.array(side.data.dataset.y_test))
        theirs = replace(state, extra={}, calibration={}, share=np.zeros(6))
        np.testing.assert_array_equal(state.share, 0.0)
        scores = fedavg.score(side.trainer, theirs, np.array(side.data.dataset.x_test))
        ours = method.score(side.trainer, state, np.array(side.data.dataset.x_test))
        assert ours.gate is not None and len({*method.federation.label_prior}) > 1
        given, labels = ours.rows(slice(9)), np.arange(9) % 4
        for predict, more in (
            (lambda m, st, sc: m.predict_global(st, sc), ()),
            (lambda m, st, sc: m.predict_client(st, 3, sc, 0.0), ()),
            (predict_unlabelled, (given,)),
            (predict_labels, (given, labels)),
        ):
            expected = predict(fedavg, theirs, scores, *more)
            np.testing.assert_allclose(predict(method, state, ours, *more), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("fedavg", {}),
        ("fedcoe", {"experts": 1}),
        ("fedcoe", {"experts": 2}),
        ("fedcoe", {"experts": 3, "experts_per_client": 2}),
    ],
    ids=["fedavg", "M=1", "M=2", "M=3 K=2"],
)
def test_a_round_on_the_vectorized_engine_is_the_sequential_one_to_1e_5(
    make_federation, one_round, name, own
):
    changes = {"model": {"name": "cnn4"}, "evaluate": {"every": 1}}
    method = method_class(name)(make_federation(method={"name": name, **own}, **changes))
    ours, theirs = (one_round(method, vectorized=v) for v in (False, True))
    assert np.abs(ours.experts - method.init().experts).max() > 1e-3
    np.testing.assert_allclose(theirs.experts, ours.experts, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(theirs.correlation, ours.correlation, rtol=1e-4)
