import numpy as np
import pytest
import torch

from fedcoe.evaluate import score_clients
from fedcoe.methods.base import Scores
from fedcoe.methods.pfedmoe import PFedMoE
from fedcoe.models import build_expert
from fedcoe.models.flat import FlatModel, initial_vector, to_tensors

HEAD = 512 * 4 + 4


@pytest.fixture
def method(make_method):
    return make_method(name="pfedmoe")


@pytest.fixture
def engine(make_engine):
    return make_engine(build=PFedMoE.build)


@pytest.fixture
def model():
    return PFedMoE.build("gn_cnn", (8, 8, 1), 4, 3)


BODY = len(initial_vector(build_expert("gn_cnn", (8, 8, 1), 4, 0))) - HEAD
X = torch.from_numpy(np.random.default_rng(0).standard_normal((9, 1, 8, 8)).astype(np.float32))


def saturated(model, shared, local):
    """The gate's last layer says the same of every image."""
    last = model.gate[4]
    torch.nn.init.zeros_(last.weight)
    last.bias.data = torch.tensor([shared, local])
    return model


def trained(method, side, state, client):
    [fit] = method.fits(side, state, method.dispatch(state, [client])[0])
    [(_, result)] = side.trainer.fit([fit], method.work(state.round + 1), side.data)
    return result.vector


def test_the_gates_weights_are_two_shares_of_one(model):
    share = model.gate(X)
    assert share.shape == (9, 2)
    assert (share > 0).all()
    torch.testing.assert_close(share.sum(dim=1), torch.ones(9))
    assert (share[:, 0].max() - share[:, 0].min()) > 1e-3, "the gate looks at the image"


def test_the_gate_by_hand(model):
    first, norm, last = (model.gate[i] for i in (1, 2, 4))
    torch.nn.init.normal_(norm.weight)
    hidden = (X.flatten(1) @ first.weight.T + first.bias).detach().numpy()
    hidden -= hidden.mean(axis=1, keepdims=True)
    hidden /= np.sqrt(hidden.var(axis=1, keepdims=True) + 1e-5)
    hidden = hidden * norm.weight.detach().numpy() + norm.bias.detach().numpy()
    scores = 1 / (1 + np.exp(-hidden)) @ last.weight.detach().numpy().T + last.bias.detach().numpy()
    expected = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(model.gate(X).detach().numpy(), expected, rtol=1e-4)


def test_features_are_the_gates_mixture_of_two_extractors(model):
    share = model.gate(X)
    expected = share[:, 0, None] * model.body(X) + share[:, 1, None] * model.local(X)
    torch.testing.assert_close(model.features(X), expected)
    torch.testing.assert_close(model(X), model.head(expected))
    assert (model.body(X) - model.local(X)).abs().max() > 0.1, "extractors start apart"


def test_a_gate_that_trusts_the_shared_extractor_alone_gives_the_plain_experts_outputs(model):
    found = saturated(model, 60.0, -60.0)(X)
    torch.testing.assert_close(found, build_expert("gn_cnn", (8, 8, 1), 4, 3)(X))


def test_a_gate_that_trusts_the_own_extractor_alone_ignores_the_shared_one(model):
    saturated(model, -60.0, 60.0)
    before = model(X)
    for p in model.body.parameters():
        torch.nn.init.normal_(p)
    torch.testing.assert_close(model(X), before)


def test_the_shared_extractor_and_head_start_where_all_methods_do(make_method, method):
    f = method.federation
    layout = FlatModel(method.build("gn_cnn", f.shape, f.classes, 0)).layout
    found = to_tensors(method.init().experts[0], layout)
    common = make_method(name="fedavg").init().experts[0]
    np.testing.assert_array_equal(
        np.concatenate([v.ravel() for n, v in found.items() if n.startswith(("body.", "head."))]),
        common,
    )
    np.testing.assert_array_equal(method.init().experts, method.init().experts)


def test_building_leaves_other_draws_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    PFedMoE.build("gn_cnn", (8, 8, 1), 4, 3)
    torch.testing.assert_close(torch.rand(3), expected)


def test_only_the_body_is_shared(method, side):
    state = method.init()
    models = np.stack([trained(method, side, state, k) for k in range(6)])
    orders = method.dispatch(state, range(6))
    after = method.aggregate(state, orders, [method.local_train(side, state, orders)])
    n = method.federation.train_counts
    mean = (n / n.sum()) @ models.astype(np.float64)
    np.testing.assert_allclose(after.experts[0, :BODY], mean[:BODY], rtol=0, atol=1e-6)
    moved = np.abs(models - state.experts[0])
    for client, order in enumerate(method.dispatch(after, range(6))):
        [fit] = method.fits(side, after, order)
        np.testing.assert_array_equal(fit.start[:BODY], after.experts[0, :BODY])
        np.testing.assert_array_equal(fit.start[BODY:], models[client, BODY:])
    for name, values in to_tensors(moved[0], side.trainer.flat.layout).items():
        assert values.max() > 0, f"{name} is trained"


def test_a_client_in_its_first_cohort_starts_with_the_parts_everyone_starts_with(
    make_method, engine, train
):
    method = make_method(name="pfedmoe", train={"cohort": 0.3})
    state = train(engine, method, 1)
    side = engine.run(lambda side: side)
    client = int(np.flatnonzero(state.personal_round == 0)[0])
    [fit] = method.fits(side, state, method.dispatch(state, [client])[0])
    np.testing.assert_array_equal(fit.start[:BODY], state.experts[0, :BODY])
    np.testing.assert_array_equal(fit.start[BODY:], method.init().experts[0, BODY:])


def test_the_personal_model_is_the_averaged_body_with_the_clients_own_parts(method, engine, train):
    state = train(engine, method, 1)
    side = engine.run(lambda side: side)
    images = np.array(side.data.dataset.x_test)
    own = side.personal.load(2, 1)
    joined = np.concatenate([state.experts[0, :BODY], own[BODY:]])
    found = method.personal_logits(side, state, 2, images)
    np.testing.assert_array_equal(found, side.trainer.outputs(joined, images, 64)[0])
    assert np.abs(found - side.trainer.outputs(own, images, 64)[0]).max() > 1e-3


def test_the_personalized_prediction_is_the_personal_model_alone(method):
    assert method.shares == (1.0,)
    p = np.array([[0.1, 0.7, 0.1, 0.1]], np.float32)
    scores = Scores(np.zeros((1, 1, 4), np.float32), personal=np.log(p))
    found = np.exp(method.predict_client(method.init(), 0, scores, 1.0))
    np.testing.assert_allclose(found, p, rtol=1e-5)


def test_a_client_that_no_cohort_included_gets_the_global_model(make_method, engine, train):
    method = make_method(name="pfedmoe", train={"cohort": 0.3})
    state = train(engine, method, 2)
    never = np.flatnonzero(state.personal_round == 0)
    assert 0 < len(never) < 6
    for scores in engine.run(score_clients, method, state, never):
        assert scores.test.personal is None
        np.testing.assert_array_equal(
            method.predict_client(state, scores.client, scores.test, 0.0),
            method.predict_global(state, scores.test),
        )


def test_a_round_moves_one_body(method):
    state = method.init()
    orders = method.dispatch(state, [0, 3, 4])
    assert method.round_bytes(state, orders) == (3 * (4 * BODY + 4), 3 * 4 * BODY)


@pytest.mark.parametrize("cohort", [1.0, 0.5])
def test_it_runs_on_both_engines(make_method, runs_on_both_engines, cohort):
    runs_on_both_engines(make_method(name="pfedmoe", train={"cohort": cohort}))
