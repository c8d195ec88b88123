"""The vectorized trainer reproduces the sequential one to rounding."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedcoe.engine.clients import ClientData
from fedcoe.engine.trainer import Fit, LocalWork, Trainer
from fedcoe.engine.vectorized import VectorizedTrainer
from fedcoe.models import build_expert
from fedcoe.models.flat import initial_vector

WORK = LocalWork(2, 2, 8, 0.01, 0.9, 0.0, 0.0, "none", 5)
ARGUMENTS = ("cnn4", (8, 8, 1), 4, (0.4,), (0.25,))
START = initial_vector(build_expert("cnn4", (8, 8, 1), 4, 1))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def plain_fits(data):
    return [Fit(k, m, START) for k in (0, 3, 5) for m in (0, 1)]


def mixed_fits(data):
    rng = np.random.default_rng(0)
    shift = np.log(np.array([0.6, 0.2, 0.1, 0.1], np.float32))
    weights = rng.random(len(data.train(3)[1])).astype(np.float32)
    anchor = START + rng.standard_normal(START.shape).astype(np.float32) * 0.1
    return [
        Fit(0, 0, START, logit_shift=shift),
        Fit(3, 1, START * 0.9, sample_weights=weights),
        Fit(5, -1, START, anchor=anchor, pull=0.5),
        Fit(1, 2, START),
        Fit(3, 3, START, logit_shift=shift, sample_weights=weights, anchor=anchor, pull=0.1),
        Fit(2, 4, START, anchor=anchor, pull=0.0),
    ]


def assert_same(trainers, fits, work, data):
    expected, found = (list(t.fit(iter(fits), work, data)) for t in trainers)
    assert [fit.name for fit, _ in found] == [fit.name for fit in fits]
    for (fit, a), (_, b) in zip(expected, found, strict=True):
        moved = np.abs(a.vector - fit.start).max()
        np.testing.assert_allclose(b.vector, a.vector, rtol=0, atol=2e-3 * moved, err_msg=str(fit))
        assert b.loss == pytest.approx(a.loss, rel=1e-4)
        assert b.images == a.images


@pytest.mark.parametrize("fits", [plain_fits, mixed_fits])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weight_decay": 0.1, "clip_norm": 0.5},
        {"augment": "crop_flip"},
        {"batch_size": 1000, "epochs": 1},
    ],
    ids=["plain", "decay and clip", "augmented", "full batch"],
)
def test_every_fit_is_that_of_the_sequential_trainer(world, fits, changes):
    trainers = Trainer(*ARGUMENTS), VectorizedTrainer(*ARGUMENTS)
    assert_same(trainers, fits(world.data), replace(WORK, **changes), world.data)


@pytest.mark.parametrize("model", ["cnn4", "gn_cnn", "resnet8"])
def test_one_model_alone_on_images_in_colour(make_world, world, model):
    """Its images lie channels-last, which GroupNorm does not take under vmap."""

    def in_colour(raw):
        x_train, x_test = (np.repeat(x, 3, axis=3) for x in (raw.x_train, raw.x_test))
        return replace(raw, x_train=x_train, x_test=x_test)

    data = make_world(in_colour, world.partition).data
    arguments = (model, (8, 8, 3), 4, (0.4,) * 3, (0.25,) * 3)
    start = initial_vector(build_expert(model, (8, 8, 3), 4, 1))
    work = replace(WORK, epochs=1)
    assert_same(
        (Trainer(*arguments), VectorizedTrainer(*arguments)), [Fit(0, 0, start)], work, data
    )


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_the_size_of_a_chunk_does_not_matter(world, chunk):
    trainers = Trainer(*ARGUMENTS), VectorizedTrainer(*ARGUMENTS, chunk=chunk)
    assert_same(trainers, mixed_fits(world.data), WORK, world.data)


def test_feature_skew_is_applied_to_what_lies_on_the_device(world):
    groups = np.arange(world.partition.clients) % 4
    data = ClientData(world.dataset, replace(world.partition, group=groups, skew="rotation"))
    trainers = Trainer(*ARGUMENTS), VectorizedTrainer(*ARGUMENTS)
    assert_same(trainers, plain_fits(data), WORK, data)
    plain, turned = (
        next(iter(VectorizedTrainer(*ARGUMENTS).fit([Fit(3, 0, START)], WORK, d)))[1].vector
        for d in (world.data, data)
    )
    assert np.abs(plain - turned).max() > 1e-4


def test_a_model_that_diverges_does_not_touch_its_neighbours(world):
    broken = START.copy()
    broken[0] = np.nan
    trainer = VectorizedTrainer(*ARGUMENTS)
    fits = [Fit(0, 0, START), Fit(3, 1, broken), Fit(5, 2, START)]
    found = [r.vector for _, r in trainer.fit(fits, WORK, world.data)]
    alone = [r.vector for _, r in Trainer(*ARGUMENTS).fit(fits[::2], WORK, world.data)]
    assert np.isnan(found[1]).any()
    np.testing.assert_allclose(found[0], alone[0], atol=1e-4)
    np.testing.assert_allclose(found[2], alone[1], atol=1e-4)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError,
        lambda: RuntimeError("GET was unable to find an engine to execute this computation"),
        lambda: RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
    ids=["torch", "no workspace", "cudnn"],
)
def test_starts_are_left_alone_and_memory_running_out_halves_the_chunk(world, monkeypatch, error):
    trainer, sizes = VectorizedTrainer(*ARGUMENTS), []
    real = VectorizedTrainer._fit_together

    def small(self, fits, work, data):
        sizes.append(len(fits))
        if len(fits) > 2:
            raise error()
        return real(self, fits, work, data)

    monkeypatch.setattr(VectorizedTrainer, "_fit_together", small)
    before = START.copy()
    fits = mixed_fits(world.data)
    assert_same((Trainer(*ARGUMENTS), trainer), fits, WORK, world.data)
    np.testing.assert_array_equal(START, before)
    assert max(sizes) == 6
    assert trainer.chunk <= 2


def test_another_error_is_not_taken_for_a_lack_of_memory(world, monkeypatch):
    trainer = VectorizedTrainer(*ARGUMENTS)

    def broken(self, fits, work, data):
        raise RuntimeError("expected scalar type Float but found Half")

    monkeypatch.setattr(VectorizedTrainer, "_fit_together", broken)
    with pytest.raises(RuntimeError, match="expected scalar type"):
        list(trainer.fit(mixed_fits(world.data), WORK, world.data))
