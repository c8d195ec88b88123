import numpy as np
import pytest
import torch
from scipy.special import softmax

from fedcoe.engine.trainer import Fit, Trainer
from fedcoe.evaluate import score_clients
from fedcoe.methods.base import Scores
from fedcoe.methods.fedrod import FedRoD
from fedcoe.models import build_expert
from fedcoe.models.flat import initial_vector

HEAD = 512 * 4 + 4
"""Parameters of each of the two heads: [body, private, generic]."""
PRIVATE = slice(-2 * HEAD, -HEAD)


@pytest.fixture
def method(make_method):
    return make_method(name="fedrod")


@pytest.fixture
def engine(make_engine):
    return make_engine(build=FedRoD.build)


@pytest.fixture
def plain(side):
    """A trainer of the same architecture without a private head."""
    info = side.data.dataset.info
    return Trainer("gn_cnn", (8, 8, 1), 4, info.mean, info.std)


def without_private(vector):
    return np.delete(vector, np.arange(len(vector))[PRIVATE])


def private(vector):
    """[4, 512] weights and [4] biases of the private head."""
    part = vector[PRIVATE]
    return part[: 4 * 512].reshape(4, 512), part[4 * 512 :]


def trained(method, side, state, client):
    [order] = method.dispatch(state, [client])
    [fit] = method.fits(side, state, order)
    [(_, result)] = side.trainer.fit([fit], method.work(state.round + 1), side.data)
    return fit, result.vector


def test_body_and_generic_head_start_where_all_methods_do_and_the_private_head_at_zero(
    make_method, method
):
    found = method.init().experts[0]
    expected = make_method(name="fedavg").init().experts[0]
    np.testing.assert_array_equal(without_private(found), expected)
    np.testing.assert_array_equal(found[PRIVATE], 0.0)
    assert len(found) == len(expected) + HEAD


def test_a_new_private_head_changes_nothing(method, side):
    images = np.array(side.data.dataset.x_test)
    vector = method.init().experts[0]
    generic, own = (
        side.trainer.outputs(vector, images, 64, head=h)[0] for h in ("head", "personal")
    )
    np.testing.assert_array_equal(own, generic)


@pytest.mark.parametrize("balanced", [True, False])
def test_body_and_generic_head_are_trained_as_if_there_were_no_private_one(
    make_method, side, plain, balanced
):
    train = {"momentum": 0.9, "weight_decay": 0.01, "clip_norm": 0.0, "local_epochs": 2}
    method = make_method(name="fedrod", balanced_softmax=balanced, train=train)
    fit, found = trained(method, side, method.init(), 3)
    shift = method.logit_shift(3) if balanced else None
    alone = Fit(3, 0, without_private(fit.start), shift)
    [(_, expected)] = plain.fit([alone], method.work(1), side.data)
    np.testing.assert_allclose(without_private(found), expected.vector, rtol=0, atol=1e-6)
    assert np.abs(found[PRIVATE]).max() > 1e-3


def test_the_private_heads_first_step_by_hand(make_method, side):
    """Plain cross-entropy of generic + private logits, without the generic head's shift."""
    train = {"batch_size": 1000, "lr": 0.1, "momentum": 0.0, "clip_norm": 0.0}
    method = make_method(name="fedrod", train=train)
    state = method.init()
    assert method.logit_shift(2) is not None
    images, labels = side.data.train(2)
    logits, hidden = side.trainer.outputs(state.experts[0], images, 64, features=True)
    error = (softmax(logits, axis=1) - np.eye(4)[labels]) / len(labels)
    _, found = trained(method, side, state, 2)
    weight, bias = private(found)
    np.testing.assert_allclose(weight, -0.1 * error.T @ hidden, rtol=0, atol=1e-6)
    np.testing.assert_allclose(bias, -0.1 * error.sum(axis=0), rtol=0, atol=1e-6)


def test_personal_logits_are_those_of_both_heads_on_the_averaged_body(method, engine, train):
    state = train(engine, method, 2)
    side = engine.run(lambda side: side)
    images = np.array(side.data.dataset.x_test)
    generic, hidden = side.trainer.outputs(state.experts[0], images, 64, features=True)
    np.testing.assert_array_equal(method.score(side.trainer, state, images).experts[0], generic)
    for client in (1, 4):
        weight, bias = private(side.personal.load(client, 2))
        found = method.personal_logits(side, state, client, images)
        np.testing.assert_allclose(found, generic + hidden @ weight.T + bias, rtol=0, atol=1e-4)
        assert np.abs(found - generic).max() > 1e-2


def test_training_returns_both_heads_logits_and_the_generic_ones_first(method):
    model = method.build("gn_cnn", (8, 8, 1), 4, 0)
    torch.nn.init.normal_(model.private.weight)
    x = torch.randn(5, 1, 8, 8)
    generic, both = model(x)
    hidden = model.features(x)
    torch.testing.assert_close(generic, build_expert("gn_cnn", (8, 8, 1), 4, 0)(x))
    torch.testing.assert_close(both, model.head(hidden) + model.private(hidden))
    torch.testing.assert_close(model.personal(hidden), both)
    both.sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {"private.weight", "private.bias"}


def test_the_server_averages_body_and_generic_head_and_a_client_keeps_its_private_one(method, side):
    state = method.init()
    orders = method.dispatch(state, range(6))
    models = np.stack([trained(method, side, state, k)[1] for k in range(6)])
    after = method.aggregate(state, orders, [method.local_train(side, state, orders)])
    n = method.federation.train_counts
    mean = (n / n.sum()) @ models.astype(np.float64)
    np.testing.assert_allclose(
        without_private(after.experts[0]), without_private(mean), rtol=0, atol=1e-6
    )
    for client, order in enumerate(method.dispatch(after, range(6))):
        [fit] = method.fits(side, after, order)
        np.testing.assert_array_equal(without_private(fit.start), without_private(after.experts[0]))
        np.testing.assert_array_equal(fit.start[PRIVATE], models[client, PRIVATE])


def test_a_private_head_starts_at_zero_in_later_rounds_too(make_method, engine, train):
    method = make_method(name="fedrod", train={"cohort": 0.3})
    state = train(engine, method, 2)
    side = engine.run(lambda side: side)
    client = int(np.flatnonzero(state.personal_round == 0)[0])
    [fit] = method.fits(side, state, method.dispatch(state, [client])[0])
    np.testing.assert_array_equal(fit.start[PRIVATE], 0.0)


def test_a_client_that_no_cohort_included_gets_the_generic_head(make_method, engine, train):
    method = make_method(name="fedrod", train={"cohort": 0.3})
    state = train(engine, method, 2)
    never = np.flatnonzero(state.personal_round == 0)
    assert 0 < len(never) < 6
    for scores in engine.run(score_clients, method, state, never):
        assert scores.test.personal is None
        np.testing.assert_array_equal(
            method.predict_client(state, scores.client, scores.test, 0.0),
            method.predict_global(state, scores.test),
        )


def test_the_global_prediction_ignores_private_heads(method, engine, train):
    state = train(engine, method, 1)
    side = engine.run(lambda side: side)
    images = np.array(side.data.dataset.x_test)
    loud = state.experts.copy()
    loud[:, PRIVATE] += 3.0
    found = [
        method.score(side.trainer, type(state)(**{**vars(state), "experts": experts}), images)
        for experts in (state.experts, loud)
    ]
    np.testing.assert_array_equal(found[0].experts, found[1].experts)


def test_the_personalized_prediction_is_the_personal_logits_alone(method, two_rounds):
    found = two_rounds(method)
    np.testing.assert_array_equal(found.state.share, 1.0)
    p = np.array([[0.1, 0.7, 0.1, 0.1]], np.float32)
    scores = Scores(np.zeros((1, 1, 4), np.float32), personal=np.log(p))
    np.testing.assert_allclose(
        np.exp(method.predict_client(found.state, 0, scores, 1.0)), p, rtol=1e-5
    )


def test_a_round_moves_body_and_generic_head(make_method, method):
    state = method.init()
    orders = method.dispatch(state, [0, 3, 4])
    size = 4 * len(initial_vector(build_expert("gn_cnn", (8, 8, 1), 4, 0)))
    assert method.round_bytes(state, orders) == (3 * (size + 4), 3 * size)


@pytest.mark.parametrize("cohort", [1.0, 0.5])
def test_it_runs_on_both_engines(make_method, runs_on_both_engines, cohort):
    runs_on_both_engines(make_method(name="fedrod", train={"cohort": cohort}))


def test_balanced_softmax_is_part_of_it(method):
    assert method.settings.balanced_softmax
    np.testing.assert_array_equal(method.trained_prior, 0.25)
