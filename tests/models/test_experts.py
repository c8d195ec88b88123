import numpy as np
import pytest
import torch

from fedcoe.models import EXPERTS, GateNetwork, build_expert
from fedcoe.models.experts import MaxPool

SHAPES = [(8, 8, 1), (28, 28, 1), (32, 32, 3), (64, 64, 3)]


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("shape", "parameters"), [((32, 32, 3), 878_538), ((28, 28, 1), 582_026)])
def test_cnn4_has_the_parameters_of_the_literature(shape, parameters):
    assert count(build_expert("cnn4", shape, 10, 0)) == parameters


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", EXPERTS)
def test_every_model_takes_every_shape(name, shape):
    model = build_expert(name, shape, 7, 0)
    x = torch.randn(2, shape[2], shape[0], shape[1])
    with torch.inference_mode():
        features = model.features(x)
        logits = model(x)
        torch.testing.assert_close(model.head(features), logits)
    assert features.shape == (2, model.head.in_features)
    assert logits.shape == (2, 7)
    assert not list(model.buffers())


@pytest.mark.parametrize("shape", [(9, 13, 1), (20, 28, 3)])
@pytest.mark.parametrize("name", ["cnn4", "gn_cnn", "resnet8"])
def test_images_need_not_be_square(name, shape):
    with torch.inference_mode():
        x = torch.zeros(1, shape[2], shape[0], shape[1])
        assert build_expert(name, shape, 3, 0)(x).shape == (1, 3)


def weights(model):
    return torch.cat([p.detach().ravel() for p in model.parameters()])


def test_initial_weights_depend_on_the_seed_and_on_nothing_else():
    torch.manual_seed(1)
    first = weights(build_expert("gn_cnn", (8, 8, 1), 4, 3))
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert drawn == torch.rand(1), "building a model must leave the global generator alone"
    assert torch.equal(first, weights(build_expert("gn_cnn", (8, 8, 1), 4, 3)))
    assert not torch.equal(first, weights(build_expert("gn_cnn", (8, 8, 1), 4, 4)))


def test_an_unknown_model_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match=r"no model 'vgg'.*cnn4"):
        build_expert("vgg", (8, 8, 1), 4, 0)


def test_one_image_does_not_change_anothers_output():
    model = build_expert("resnet8", (8, 8, 1), 4, 0)
    x = torch.randn(3, 1, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(model(x)[:1], model(x[:1]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_new_gate_is_uniform_for_any_image(shape):
    gate = GateNetwork(shape, 3, 0)
    x = torch.randn(4, shape[2], shape[0], shape[1])
    assert torch.equal(gate(x), torch.zeros(4, 3))


def test_gates_differ_by_seed_below_their_last_layer():
    a, b = (weights(GateNetwork((8, 8, 1), 3, seed)) for seed in (0, 1))
    assert not torch.equal(a, b)
    assert 4_800 < len(a) < 6_000
    assert np.all(a.numpy()[-3 - 96 :] == 0)


@pytest.mark.parametrize("side", [6, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_gives_the_same_numbers_with_and_without_gradients(side, dtype):
    x = torch.randn(3, 5, side, side + 1, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.inference_mode():
        without = MaxPool()(x)
    assert torch.equal(without, torch.nn.functional.max_pool2d(x, 2))
    assert torch.equal(MaxPool()(x), without)
