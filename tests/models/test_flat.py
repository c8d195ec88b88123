import numpy as np
import pytest
import torch
from torch import nn

from fedcoe.models import build_expert
from fedcoe.models.flat import FlatModel, from_tensors, initial_vector, to_tensors


@pytest.fixture
def model():
    return build_expert("gn_cnn", (8, 8, 1), 4, 0)


def test_parameters_are_views_of_the_vector_and_backward_fills_the_gradient_anew(model):
    flat = FlatModel(model)
    x = torch.randn(2, 1, 8, 8)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model(x).square().sum().backward()
    stacked = torch.cat([p.grad.ravel() for p in model.parameters()])
    assert stacked.abs().max() > 0
    for _ in range(2):
        flat.backward(model(x).square().sum())
        assert torch.equal(flat.gradient, stacked)
    flat.vector.zero_()
    assert torch.equal(model(x), torch.zeros(2, 4))


def test_what_a_loss_does_not_hang_on_has_gradient_zero(model):
    flat = FlatModel(model)
    x = torch.randn(2, 1, 8, 8)
    flat.backward(model(x).sum())
    flat.backward(model.head(model.features(x).detach()).sum())
    head = sum(p.numel() for p in model.head.parameters())
    assert not flat.gradient[:-head].any() and flat.gradient[-head:].any()


def test_wrapping_a_model_keeps_its_weights_and_loading_sets_them(model):
    start = initial_vector(model)
    flat = FlatModel(model)
    np.testing.assert_array_equal(flat.read(), start)
    other = np.arange(len(start), dtype=np.float32)
    flat.load(other)
    np.testing.assert_array_equal(flat.read(), other)
    first = next(model.parameters())
    np.testing.assert_array_equal(first.detach().numpy().ravel(), other[: first.numel()])


def test_what_is_read_is_a_copy(model):
    flat = FlatModel(model)
    before = flat.read()
    kept = before.copy()
    flat.vector.add_(1.0)
    np.testing.assert_array_equal(before, kept)


def test_a_vector_of_another_length_is_refused(model):
    flat = FlatModel(model)
    with pytest.raises(RuntimeError):
        flat.load(np.zeros(3, np.float32))


def test_batch_statistics_are_refused_by_name():
    with pytest.raises(ValueError, match=r"1\.running_mean"):
        FlatModel(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))


def test_tensors_by_name_make_the_same_vector_again(model):
    flat = FlatModel(model)
    tensors = to_tensors(flat.read(), flat.layout)
    assert list(tensors) == [name for name, _ in model.named_parameters()]
    for name, p in model.named_parameters():
        np.testing.assert_array_equal(tensors[name], p.detach().numpy())
    shuffled = dict(reversed(tensors.items()))
    np.testing.assert_array_equal(from_tensors(shuffled, flat.layout), flat.read())
    assert from_tensors(tensors, flat.layout).dtype == np.float32


def test_missing_unknown_and_misshapen_tensors_are_named(model):
    flat = FlatModel(model)
    tensors = to_tensors(flat.read(), flat.layout)
    missing = {k: v for k, v in tensors.items() if k != "head.bias"}
    with pytest.raises(ValueError, match=r"head\.bias"):
        from_tensors(missing, flat.layout)
    with pytest.raises(ValueError, match="extra"):
        from_tensors(tensors | {"extra": tensors["head.bias"]}, flat.layout)
    with pytest.raises(ValueError, match=r"head\.weight has shape \(512, 4\)"):
        from_tensors(tensors | {"head.weight": tensors["head.weight"].T}, flat.layout)
