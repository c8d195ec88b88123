from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedcoe.bundle import export_models
from fedcoe.engine.trainer import Fit, Trainer
from fedcoe.evaluate import score_clients
from fedcoe.methods.base import Order
from fedcoe.methods.scaffold import Scaffold, effective_steps
from fedcoe.models import build_expert

FULL_BATCH = {"batch_size": 1000, "lr": 0.1, "momentum": 0.0, "clip_norm": 0.0}


@pytest.fixture
def method(make_method):
    return make_method(name="scaffold")


def own_variates(engine, method, state):
    """[S, P] every client's c_k."""
    side = engine.run(lambda side: side)
    return np.stack([method.variate(side, state, k) for k in range(6)])


def training_gradient(side, state, client):
    """[P] of the mean loss on all of a client's samples, by torch alone."""
    images, labels = side.data.train(client)
    info = side.data.dataset.info
    model = build_expert("gn_cnn", (8, 8, 1), 4, 0)
    torch.nn.utils.vector_to_parameters(torch.from_numpy(state.experts[0]), model.parameters())
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    x = (x - info.mean[0]) / info.std[0]
    F.cross_entropy(model(x), torch.from_numpy(labels)).backward()
    return torch.cat([p.grad.ravel() for p in model.parameters()]).numpy()


def test_its_first_round_is_fedavgs_bit_for_bit(make_method, make_engine, train, same_bytes):
    for cohort in (1.0, 0.5):
        settings = {"train": {"cohort": cohort}, "server_momentum": 0.5}
        fedavg = train(make_engine(), make_method(name="fedavg", **settings), 1)
        scaffold = train(make_engine(), make_method(name="scaffold", **settings), 1)
        same_bytes(scaffold, fedavg)


def test_with_variates_held_at_zero_it_is_fedavg_bit_for_bit(
    make_method, make_engine, train, same_bytes, monkeypatch
):
    settings = {"train": {"cohort": 0.5}, "server_momentum": 0.5}
    fedavg = train(make_engine(), make_method(name="fedavg", **settings), 3)
    method = make_method(name="scaffold", **settings)
    free = train(make_engine(), method, 3)
    monkeypatch.setattr(Scaffold, "note", lambda *_: None)
    held = train(make_engine(), method, 3)
    same_bytes(held, fedavg)
    assert not held.extra["variate"].any()
    assert np.abs(free.experts - held.experts).max() > 1e-4, "the test must notice variates"


def test_a_federation_of_one_client_is_plain_sgd(method, side):
    state = method.init()
    order = Order(4, (0,), (1.0,))
    after = method.aggregate(state, [order], [method.local_train(side, state, [order])])
    [(_, plain)] = side.trainer.fit([Fit(4, 0, state.experts[0])], method.work(1), side.data)
    np.testing.assert_allclose(after.experts[0], plain.vector, rtol=0, atol=1e-7)


def test_effective_steps_by_hand():
    assert [effective_steps(n, 0.0) for n in (1, 2, 7)] == [1, 2, 7]
    assert effective_steps(1, 0.9) == pytest.approx(1.0)
    assert effective_steps(2, 0.9) == pytest.approx(1 + 1.9)
    assert effective_steps(3, 0.9) == pytest.approx(1 + 1.9 + 2.71)


def given_variates(method, side, scale=0.01):
    """A state in round 1 with some c, and client 4's c_k kept."""
    rng = np.random.default_rng(0)
    state = replace(method.init(), round=1)
    c, own = (scale * rng.standard_normal((2, state.experts.shape[1]))).astype(np.float32)
    side.personal.save(4, 1, own)
    rounds = np.zeros(6, np.int64)
    rounds[4] = 1
    return replace(state, personal_round=rounds).with_extra(variate=c), c, own


def test_after_one_step_a_clients_variate_is_its_gradient(make_method, side):
    method = make_method(name="scaffold", train=FULL_BATCH)
    state, _, old = given_variates(method, side)
    gradient = training_gradient(side, state, 4)
    orders = method.dispatch(state, [4])
    after = method.aggregate(state, orders, [method.local_train(side, state, orders)])
    found = method.variate(side, after, 4)
    np.testing.assert_allclose(found, gradient, rtol=0, atol=1e-5)
    assert np.abs(found - old).max() > 1e-2
    np.testing.assert_array_equal(side.personal.load(4, 2), found)


def test_the_step_a_client_takes_follows_its_gradient_plus_c_minus_its_own(make_method, side):
    method = make_method(name="scaffold", train=FULL_BATCH)
    state, c, own = given_variates(method, side)
    gradient = training_gradient(side, state, 4)
    orders = method.dispatch(state, [4])
    after = method.aggregate(state, orders, [method.local_train(side, state, orders)])
    expected = state.experts[0] - 0.1 * (gradient + c - own)
    np.testing.assert_allclose(after.experts[0], expected, rtol=0, atol=1e-6)


def test_with_momentum_and_several_steps_the_variate_is_still_the_gradient(make_method, side):
    """At a small step the gradient stays the same all along."""
    small = FULL_BATCH | {"lr": 1e-4, "momentum": 0.9, "local_epochs": 4}
    method = make_method(name="scaffold", train=small)
    state, _, _ = given_variates(method, side, scale=0.0)
    gradient = training_gradient(side, state, 4)
    orders = method.dispatch(state, [4])
    after = method.aggregate(state, orders, [method.local_train(side, state, orders)])
    error = np.linalg.norm(method.variate(side, after, 4) - gradient)
    assert error < 0.1 * np.linalg.norm(gradient)


@pytest.mark.parametrize("cohort", [1.0, 0.5])
def test_c_is_the_sample_weighted_mean_of_all_clients_variates(
    make_method, make_engine, train, cohort
):
    method = make_method(name="scaffold", train={"cohort": cohort})
    engine, state = make_engine(), None
    n = method.federation.train_counts
    for _ in range(3):
        state = train(engine, method, 1, state)
        own = own_variates(engine, method, state).astype(np.float64)
        expected = (n[:, None] * own).sum(axis=0) / n.sum()
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(state.extra["variate"], expected, rtol=0, atol=1e-6)
    trained = (own != 0).any(axis=1)
    np.testing.assert_array_equal(trained, state.personal_round > 0)
    assert trained.all() or cohort < 1


def test_a_client_outside_the_cohort_keeps_its_variate(make_method, engine, train):
    method = make_method(name="scaffold", train={"cohort": 0.5})
    state = train(engine, method, 1)
    before = own_variates(engine, method, state)
    cohort = method.cohort(state)
    after = own_variates(engine, method, train(engine, method, 1, state))
    others = [k for k in range(6) if k not in cohort]
    np.testing.assert_array_equal(after[others], before[others])
    assert all((after[k] != before[k]).any() for k in cohort)


def test_how_clients_are_dealt_to_workers_does_not_matter(method, side):
    state, _, _ = given_variates(method, side)
    orders = method.dispatch(state, range(6))
    found = []
    for shards in ([orders], [orders[:1], orders[3:], orders[1:3]]):
        results = [method.local_train(side, state, shard) for shard in shards]
        found.append(method.aggregate(state, orders, results).extra["variate"])
    assert found[0].tobytes() == found[1].tobytes()


def test_a_huge_variate_is_dropped_and_counted_and_the_model_is_kept(
    make_method, side, monkeypatch
):
    method = make_method(name="scaffold", train={"lr": 1e-6})
    state = method.init()
    orders = method.dispatch(state, range(6))
    alone = method.local_train(side, state, [o for o in orders if o.client != 2])
    real = Trainer._fit

    def far(self, fit, *rest):
        result = real(self, fit, *rest)
        if fit.client == 2:
            result.vector[7] += 1.0
        return result

    monkeypatch.setattr(Trainer, "_fit", far)
    found = method.local_train(side, state, orders)
    assert found.dropped == {"variate too large": 1}
    assert found.valid == 6
    assert sorted(found.personal) == [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(found.extra["variate"].total, alone.extra["variate"].total)
    assert method.aggregate(state, orders, [found]).personal_round[2] == 0


def test_variates_are_no_models(method, engine, train, two_rounds, tmp_path):
    found = two_rounds(method).state
    np.testing.assert_array_equal(found.share, 0.0)
    assert found.personal_round.tolist() == [2] * 6
    state = train(engine, method, 2)
    side = engine.run(lambda side: side)
    assert sorted(p.stem for p in side.personal.folder.iterdir() if p.stem.endswith("-2")) == [
        f"{k}-2" for k in range(6)
    ]
    for scores in engine.run(score_clients, method, state, range(6)):
        assert scores.test.personal is None
    export_models(tmp_path / "models", method, state, side.personal)
    assert not (tmp_path / "models" / "personal").exists()
    assert not (tmp_path / "models" / "gate.safetensors").exists()


def test_every_client_is_predicted_with_the_global_model(method, engine, train):
    state = train(engine, method, 1)
    [scores] = engine.run(score_clients, method, state, [3])
    found = method.predict_client(state, 3, scores.test, 0.0)
    np.testing.assert_array_equal(found, method.predict_global(state, scores.test))


def test_a_round_moves_a_model_and_a_variate_each_way(method):
    state = method.init()
    size = 4 * state.experts.shape[1]
    orders = method.dispatch(state, [0, 2, 5])
    assert method.round_bytes(state, orders) == (3 * 2 * (size + 4), 3 * 2 * size)


def test_it_runs_on_both_engines(make_method, runs_on_both_engines):
    found = runs_on_both_engines(make_method(name="scaffold", train={"cohort": 0.5}))
    assert np.isfinite(found.state.extra["variate"]).all()
