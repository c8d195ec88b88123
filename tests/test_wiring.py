"""That each step reads and gives what it says: the wiring between functions that have tests of
their own. Every number here differs from every other, so that a swap shows."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from fedcoe import correlation, prediction
from fedcoe.bundle import export_models, load_bundle
from fedcoe.cold_start import serve_clients
from fedcoe.config import FaultSettings
from fedcoe.engine.clients import TRAIN
from fedcoe.engine.trainer import Trainer
from fedcoe.evaluate import ClientScores, evaluate
from fedcoe.faults import Faults
from fedcoe.join import join
from fedcoe.methods.base import Method, Scores
from fedcoe.methods.fedcoe import FedCoE
from fedcoe.metrics import calibration_error
from fedcoe.release import grade_clients
from fedcoe.rounds import gate_traffic

ALL = list(range(6))


@pytest.mark.parametrize("balanced", [True, False])
def test_the_mix_of_unlabelled_inputs_is_ems_and_counts_as_that_many_labels(make_method, balanced):
    usual = make_method(name="fedavg", reweighting=True, balanced_softmax=balanced)
    counts = np.tile([60, 20, 10, 10], (6, 1))
    method = type(usual)(replace(usual.federation, label_counts=counts))
    logits = 2 * np.random.default_rng(0).standard_normal((1, 30, 4)).astype(np.float32)
    prior, _ = method.join_unlabelled(method.init(), Scores(logits))
    given = np.full(4, 0.25) if balanced else (counts.sum(0) + 0.1) / (600 + 0.4)
    estimate = prediction.prior_by_em(prediction.log_posterior(logits[0]), given, 5)
    np.testing.assert_allclose(prior, (30 * estimate + 0.1) / 30.4, rtol=1e-6)


def test_a_clients_prediction_uses_the_clients_calibration(make_method):
    method = make_method(experts=2)
    both = {"head": 0.5, "head_sharpness": 2.0, "gate": 1.0, "experts": 1.0}
    values = {f"global.{k}": v for k, v in both.items()}
    values |= {f"client.{k}": v for k, v in both.items()}
    values |= {"client.correlation": 2.0, "client.gate": 0.5, "client.experts": 0.8}
    state = replace(method.init(), calibration=values)
    a, b = np.array([0.7, 0.1, 0.1, 0.1]), np.array([0.1, 0.6, 0.2, 0.1])
    gate, c, prior = np.array([0.8, 0.2]), np.array([0.9, 0.1]), np.array([0.4, 0.3, 0.2, 0.1])
    scores = Scores(
        np.log(np.stack([a, b]))[:, None].astype(np.float32), np.log(gate)[None].astype(np.float32)
    )
    found = np.exp(method.predict_with(state, scores, prior, c))[0]
    w = c**2 * gate**0.5
    soft = np.stack([a**0.8 / (a**0.8).sum(), b**0.8 / (b**0.8).sum()])
    expected = (w / w.sum()) @ soft * prior
    np.testing.assert_allclose(found, expected / expected.sum(), rtol=1e-5)


def test_what_calibration_minimises_is_the_loss_of_what_is_predicted(make_method, monkeypatch):
    usual = make_method(experts=2)
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 90, (6, 4))
    method = type(usual)(replace(usual.federation, label_counts=counts))
    state = replace(method.init(), correlation=rng.dirichlet([1, 1], 6))
    validation = {
        k: (
            Scores(
                *(rng.standard_normal(s).astype(np.float32) for s in ((2, 9, 4), (9, 2), (9, 4)))
            ),
            rng.integers(0, 4, 9),
        )
        for k in ALL
    }
    losses = []
    monkeypatch.setattr(
        prediction, "coordinate_search", lambda loss, start, _: losses.append(loss) or dict(start)
    )
    method.calibrate(state, validation)
    point = {"head": 0.25, "head_sharpness": 3.0, "experts": 0.6, "gate": 3.0, "correlation": 2.0}
    at = replace(
        state, calibration={f"{s}.{k}": v for s in ("global", "client") for k, v in point.items()}
    )

    def nll(predict):
        return -sum(predict(k, s)[np.arange(9), y].sum() for k, (s, y) in validation.items())

    overall, own = (loss(point) for loss in losses)
    assert own == pytest.approx(nll(lambda k, s: method.predict_client(at, k, s, 0.0)))
    # The seen clients' label mix, which validation has.
    mix = (counts.sum(axis=0) + 0.1) / (counts.sum() + 0.4)
    shifted = nll(
        lambda _, s: prediction.reweight(method.predict_global(at, s), mix, np.full(4, 0.25))
    )
    assert overall == pytest.approx(shifted)


def test_no_mode_is_graded_on_what_it_has_read(make_method, engine, side, train, monkeypatch):
    method, read = make_method(), []
    state = train(engine, method, 2)
    for name in ("join_labelled", "join_unlabelled"):
        real = getattr(Method, name)

        def spy(self, state, inputs, *labels, real=real):
            read.append((inputs.experts.shape[1], *labels))
            return real(self, state, inputs, *labels)

        monkeypatch.setattr(Method, name, spy)
    grade_clients(side, method, state, [6])
    truth = side.data.labels(6, TRAIN)
    assert [n for n, *_ in read] == [len(truth)] * 2
    [labels] = [labels for _, *given in read for labels in given]
    np.testing.assert_array_equal(labels, truth)


def test_a_branch_groups_clients_by_what_labels_do_not_explain(make_method, side, monkeypatch):
    method = make_method(similarity="features", branch_after=2, train={"rounds": 9})
    state, seen = replace(method.init(), round=2), []
    monkeypatch.setattr(
        FedCoE, "_similar", lambda _, points: seen.append(points) or np.full((len(points), 2), 0.5)
    )
    method.gate_update(state, [method.gate_message(side, state, k) for k in ([4, 0, 1], [5, 3, 2])])
    data = [side.data.train(k) for k in ALL]
    hidden = [side.trainer.outputs(state.experts[0], x, 64, True)[1].astype(float) for x, _ in data]
    stacked, labels = np.concatenate(hidden), np.concatenate([y for _, y in data])
    by_class = np.stack([stacked[labels == c].mean(axis=0) for c in range(4)])
    means = np.stack([h.mean(axis=0) for h in hidden])
    expected = correlation.feature_shift(means, method.federation.label_counts, by_class)
    np.testing.assert_allclose(seen[0], expected, atol=1e-4)


def test_how_far_the_first_correlation_is_from_even_by_hand():
    # Own group: squared distance 0, the other 2; the group's lead of 2 on top.
    c = correlation.from_similarity(np.eye(2)[[0, 1, 0, 1]], 2, 0.25, np.random.default_rng(0))
    np.testing.assert_allclose(c.max(axis=1), 1 / (1 + np.exp(-1.0)))


def test_validation_figures_by_hand(make_method):
    def logits(labels, right):
        return (right * np.eye(4)[labels]).astype(np.float32)

    method, labels = make_method(name="fedavg"), np.arange(10) % 4
    shared = np.concatenate([logits(labels[:4], 4.0), logits((labels[4:] + 1) % 4, 4.0)])
    scores = Scores(shared[None], personal=logits(labels, 9.0))
    clients = [ClientScores(k, scores, labels, scores, labels) for k in ALL]
    _, found = evaluate(method, method.init(), clients, Scores(shared[None]), labels)
    p, own = np.exp(4) / (np.exp(4) + 3), np.exp(9) / (np.exp(9) + 3)
    assert found.validation == pytest.approx(
        {
            "global_nll": -(4 * np.log(p) + 6 * np.log((1 - p) / 3)) / 10,
            "global_accuracy": 0.4,
            "personalized_accuracy": 1.0,
            "personalized_nll": -np.log(own),
        }
    )


def test_what_is_said_of_each_expert_by_hand(make_method, engine, train, tmp_path):
    method = make_method()
    state, side = train(engine, method, 2), engine.run(lambda side: side)
    export_models(tmp_path / "models", method, state, side.personal)
    bundle = load_bundle(tmp_path / "models", "fp32")
    images, labels = side.data.images(6, TRAIN), side.data.labels(6, TRAIN)
    joined, scores = join(bundle, images, labels), bundle.score(images)
    p = np.exp(join(bundle, images, None, "unlabelled").log_p)
    by_labels = method.correlation_labelled(state, scores, labels)
    by_gate = method.correlation_unlabelled(state, scores)
    for m, row in enumerate(joined.experts):
        own = prediction.log_posterior(scores.experts[m])
        pick = scores.experts[m].argmax(axis=1)
        assert row["loss"] == pytest.approx(-own[np.arange(len(labels)), labels].mean())
        assert row["expected_accuracy"] == pytest.approx(p[np.arange(len(p)), pick].mean())
        assert row["correlation_by_labels"] == pytest.approx(by_labels[m])
        assert row["correlation"] == pytest.approx(by_gate[m])


def test_gate_traffic_is_that_of_all_who_report(make_method):
    method = make_method(evaluate={"every": 4}, train={"rounds": 9, "cohort": 0.34}, gate_every=3)
    state = method.init()
    found = [gate_traffic(method, state, r) for r in (1, 3, 4)]
    assert found == [(0, 0), method.gate_bytes(state, 2, 3), method.gate_bytes(state, 6, 4)]


def test_few_shot_starts_from_the_expert_that_suits_the_client_best(make_method, side, monkeypatch):
    method, starts = make_method(experts=2), []
    rng = np.random.default_rng(0)
    state = method.init()
    state = replace(
        state,
        experts=state.experts + 0.05 * rng.standard_normal(state.experts.shape).astype(np.float32),
    )
    real = Trainer._fit
    monkeypatch.setattr(
        Trainer, "_fit", lambda self, fit, *rest: starts.append(fit) or real(self, fit, *rest)
    )
    for mixture in (state, replace(state, experts=state.experts[::-1].copy())):
        served = serve_clients(side, method, mixture, [6, 7])
        for client, fit in zip(served, starts[-2:], strict=True):
            np.testing.assert_array_equal(fit.start, mixture.experts[client.correlation.argmax()])


@pytest.mark.parametrize("seed", [0, 2, 7])
def test_of_several_starts_the_best_groups_are_kept(seed):
    points = np.random.default_rng(seed).random((8, 3))
    owner = correlation.from_similarity(points, 2, 4.0, np.random.default_rng(0)).argmax(axis=1)

    def cost(second):
        other = [i for i in range(8) if i not in second]
        return sum(((points[g] - points[g].mean(axis=0)) ** 2).sum() for g in (list(second), other))

    best = min(cost(second) for second in combinations(range(8), 4))
    assert cost(tuple(np.flatnonzero(owner))) == pytest.approx(best)


def test_calibration_error_has_15_bins_by_default():
    # 0.61 right and 0.67 wrong fall into bins 9 and 10 of 15, into one of 10.
    log_p = np.log([[0.61, 0.39], [0.67, 0.33]])
    assert calibration_error(log_p, np.array([0, 1])) == pytest.approx((0.39 + 0.67) / 2)


def test_flipped_targets_by_hand():
    attack = FaultSettings(attack="sign_flip", attackers=1.0, attack_statistics=True)
    design, targets = np.ones((2, 1)), np.array([[1, 0], [0.25, 0.75]])
    found, reason = Faults(attack, 0, 1).statistics(1, 0, design, targets)
    assert reason is None
    np.testing.assert_allclose(found, [[0, 1], [0.75, 0.25]])
