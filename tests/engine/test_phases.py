"""Phases, corrections and modules with several outputs, on both trainers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedcoe.engine.trainer import CACHED, Fit, LocalWork, Phase, Trainer, mean_loss
from fedcoe.engine.vectorized import VectorizedTrainer
from fedcoe.models import Expert, build_expert
from fedcoe.models.flat import initial_vector

WORK = LocalWork(2, 2, 8, 0.01, 0.9, 0.0, 0.0, "none", 5)
FULL_BATCH = replace(WORK, batch_size=1000, epochs=1, momentum=0.0)
ARGUMENTS = ("cnn4", (8, 8, 1), 4, (0.4,), (0.25,))
HEAD = 512 * 4 + 4


class Twice(Expert):
    """Two outputs that share everything below: the second is not detached from the first."""

    def __init__(self, expert: Expert) -> None:
        nn.Module.__init__(self)
        self.body, self.second, self.head = expert.body, nn.Linear(512, 4), expert.head

    def forward(self, x):
        hidden = self.features(x)
        first = self.head(hidden)
        return first, first + self.second(hidden)

    def other(self, hidden):
        return self.second(hidden)


def build_twice(name, shape, classes, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Twice(build_expert(name, shape, classes, seed))


START = initial_vector(build_expert("cnn4", (8, 8, 1), 4, 1))
START2 = initial_vector(build_twice("cnn4", (8, 8, 1), 4, 1))
CLASSES = {"sequential": Trainer, "vectorized": VectorizedTrainer}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(params=CLASSES)
def trainer(request):
    return CLASSES[request.param](*ARGUMENTS)


def fitted(trainer, world, work=WORK, client=3, start=START, **values):
    [(_, result)] = trainer.fit([Fit(client, 0, start, **values)], work, world.data)
    return result


def mixed_fits(start, data):
    rng = np.random.default_rng(0)
    shift = np.log(np.array([0.6, 0.2, 0.1, 0.1], np.float32))
    weights = rng.random(len(data.train(3)[1])).astype(np.float32)
    near, push = (0.05 * rng.standard_normal((2, *start.shape))).astype(np.float32)
    body, head, whole = Phase(2, "body"), Phase(1, "head"), Phase(1)
    return [
        Fit(0, 0, start, logit_shift=shift, phases=(head, body)),
        Fit(3, 1, start * 0.9, sample_weights=weights, phases=(body, whole), correction=push),
        Fit(5, -1, start, anchor=start + near, pull=0.5, phases=(body,)),
        Fit(1, 2, start),
        Fit(3, 3, start, logit_shift=shift, sample_weights=weights, correction=push),
        Fit(2, 4, start, phases=(whole, whole, body), anchor=start + near, pull=0.1),
        Fit(4, 5, start, correction=-push, phases=(head, whole)),
    ]


def assert_same(fits, work, data, **arguments):
    expected = list(Trainer(*ARGUMENTS, **arguments).fit(iter(fits), work, data))
    found = list(VectorizedTrainer(*ARGUMENTS, **arguments).fit(iter(fits), work, data))
    assert [fit.name for fit, _ in found] == [fit.name for fit in fits]
    for (fit, a), (_, b) in zip(expected, found, strict=True):
        moved = np.abs(a.vector - fit.start).max()
        assert moved > 1e-4
        np.testing.assert_allclose(b.vector, a.vector, rtol=0, atol=2e-3 * moved, err_msg=str(fit))
        assert b.loss == pytest.approx(a.loss, rel=1e-4)
        assert b.images == a.images


CHANGES = {
    "plain": {},
    "decay and clip": {"weight_decay": 0.1, "clip_norm": 0.5},
    "augmented": {"augment": "crop_flip", "epochs": 1},
    "full batch": {"batch_size": 1000, "epochs": 1},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_both_trainers_agree_on_phases_and_corrections(world, changes):
    assert_same(mixed_fits(START, world.data), replace(WORK, **changes), world.data)


def test_both_trainers_agree_on_modules_with_two_outputs(world):
    shift = np.log(np.array([0.6, 0.2, 0.1, 0.1], np.float32))
    rng = np.random.default_rng(0)
    weights = rng.random(len(world.data.train(3)[1])).astype(np.float32)
    fits = [
        Fit(0, 0, START2, logit_shift=shift),
        Fit(3, 1, START2, sample_weights=weights, phases=(Phase(1, "body"), Phase(1))),
        Fit(5, 2, START2 * 0.9, logit_shift=shift, correction=0.01 * START2),
    ]
    assert_same(fits, WORK, world.data, build=build_twice)


def test_both_trainers_agree_on_the_head_phase_of_modules_with_two_outputs(world):
    """The second output depends on the head as well: its loss counts in that phase too."""
    fits = [Fit(0, 0, START2, phases=(Phase(2, "head"),))]
    assert_same(fits, WORK, world.data, build=build_twice)


def test_both_trainers_agree_in_small_chunks(world):
    fits = mixed_fits(START, world.data)
    whole = list(VectorizedTrainer(*ARGUMENTS).fit(fits, WORK, world.data))
    parts = list(VectorizedTrainer(*ARGUMENTS, chunk=2).fit(fits, WORK, world.data))
    for (fit, a), (_, b) in zip(whole, parts, strict=True):
        moved = np.abs(a.vector - fit.start).max()
        np.testing.assert_allclose(b.vector, a.vector, rtol=0, atol=2e-3 * moved)


# ------------------------------------------------------------------------ phases


def test_without_phases_the_whole_model_is_trained_for_the_rounds_epochs(trainer, world):
    found = fitted(trainer, world, phases=(Phase(2),))
    plain = fitted(trainer, world)
    np.testing.assert_array_equal(found.vector, plain.vector)
    assert (found.loss, found.images) == (plain.loss, plain.images)


def test_phases_not_the_rounds_work_say_for_how_long(trainer, world):
    longer = fitted(trainer, world, phases=(Phase(3),))
    by_work = fitted(trainer, world, replace(WORK, epochs=3))
    np.testing.assert_array_equal(longer.vector, by_work.vector)


def test_what_a_phase_freezes_stays_bit_for_bit_whatever_pulls_at_it(trainer, world):
    work = replace(WORK, weight_decay=0.5, clip_norm=0.5)
    pulls = {"anchor": START + 1, "pull": 0.5, "correction": np.full_like(START, 0.1)}
    head = fitted(trainer, world, work, phases=(Phase(2, "head"),), **pulls).vector
    body = fitted(trainer, world, work, phases=(Phase(2, "body"),), **pulls).vector
    assert head[:-HEAD].tobytes() == START[:-HEAD].tobytes()
    assert body[-HEAD:].tobytes() == START[-HEAD:].tobytes()
    assert np.abs(head - START)[-HEAD:].min() > 0
    assert np.abs(body - START)[:-HEAD].max() > 1e-4


def test_a_phase_trains_its_part_as_the_whole_would_in_one_step(trainer, world):
    whole = fitted(trainer, world, FULL_BATCH).vector
    for part, rows in (("body", slice(-HEAD)), ("head", slice(-HEAD, None))):
        found = fitted(trainer, world, FULL_BATCH, phases=(Phase(1, part),)).vector
        np.testing.assert_allclose(found[rows], whole[rows], rtol=0, atol=1e-7)
        assert np.abs(whole - START)[rows].max() > 1e-5


def test_only_what_is_trained_counts_in_the_length_that_clipping_limits(trainer, world):
    work = replace(FULL_BATCH, clip_norm=1e-3, lr=1.0)
    for part in ("all", "body", "head"):
        found = fitted(trainer, world, work, phases=(Phase(1, part),)).vector
        assert np.linalg.norm(found - START) == pytest.approx(1e-3, rel=1e-2)


def test_the_optimizer_starts_afresh_in_a_phase(trainer, world):
    work = replace(FULL_BATCH, momentum=0.9)
    one, two = Phase(1), Phase(2)
    found = fitted(trainer, world, work, phases=(one, one)).vector
    first = fitted(trainer, world, work, phases=(one,)).vector
    again = fitted(trainer, world, work, start=first, phases=(one,)).vector
    np.testing.assert_allclose(found, again, rtol=0, atol=1e-6)
    carried = fitted(trainer, world, work, phases=(two,)).vector
    assert np.abs(carried - found).max() > 1e-4


def test_an_epoch_shows_the_same_batches_however_epochs_are_cut_into_phases(trainer, world):
    work = replace(WORK, momentum=0.0)
    one = fitted(trainer, world, work, phases=(Phase(3),)).vector
    three = fitted(trainer, world, work, phases=(Phase(1), Phase(2))).vector
    np.testing.assert_allclose(three, one, rtol=0, atol=1e-7)


def test_images_of_all_phases_count_and_the_loss_is_that_of_the_last_epoch(trainer, world):
    n = len(world.data.train(3)[1])
    found = fitted(trainer, world, phases=(Phase(2, "head"), Phase(3, "body")))
    assert found.images == 5 * n
    # Still models: every epoch has the loss of the start.
    still = replace(WORK, lr=0.0)
    start = fitted(trainer, world, still, phases=(Phase(1),)).loss
    for phases in ((Phase(2, "head"),), (Phase(1, "body"), Phase(2, "head"))):
        assert fitted(trainer, world, still, phases=phases).loss == pytest.approx(start, rel=1e-5)
    last = fitted(trainer, world, phases=(Phase(4), Phase(1))).loss
    assert last < start


def test_steps_are_batches_of_all_epochs():
    work = replace(WORK, epochs=3, batch_size=8)
    assert [work.steps(n) for n in (1, 8, 9, 17)] == [3, 3, 6, 9]


def test_epochs_of_a_fit_are_those_of_its_phases_or_the_rounds():
    phased = Fit(0, 0, START, phases=(Phase(3, "head"), Phase(2)))
    assert phased.epochs(WORK) == 5
    assert Fit(0, 0, START).epochs(WORK) == 2
    assert Fit(0, 0, START).plan(WORK) == (Phase(2, "all"),)


# ------------------------------------------------------------------- corrections


def test_a_correction_is_added_to_the_gradient(trainer, world):
    v = np.random.default_rng(0).standard_normal(START.shape).astype(np.float32)
    plain = fitted(trainer, world, FULL_BATCH).vector
    found = fitted(trainer, world, FULL_BATCH, correction=v).vector
    np.testing.assert_allclose(found - plain, -FULL_BATCH.lr * v, rtol=0, atol=1e-6)


def test_a_correction_is_added_in_every_batch_and_gathers_momentum(trainer, world):
    """With so large a correction the gradient hardly matters: 1 + 1.9 steps of it."""
    n = len(world.data.train(3)[1])
    work = replace(WORK, epochs=1, batch_size=-(-n // 2), lr=1e-5)
    v = np.full_like(START, 1000.0)
    found = fitted(trainer, world, work, correction=v).vector
    np.testing.assert_allclose(found - START, -1e-5 * 2.9 * v, rtol=1e-2, atol=0)


def test_a_correction_is_clipped_with_the_gradient(trainer, world):
    work = replace(FULL_BATCH, clip_norm=1.0, lr=1.0)
    found = fitted(trainer, world, work, correction=np.full_like(START, 10.0)).vector
    assert np.linalg.norm(found - START) == pytest.approx(1.0, rel=1e-2)


def test_a_correction_of_zero_changes_nothing(trainer, world):
    found = fitted(trainer, world, correction=np.zeros_like(START)).vector
    np.testing.assert_array_equal(found, fitted(trainer, world).vector)


# --------------------------------------------------------------- several outputs

LOGITS = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[0.5, 0.5], [3.0, 0.0]]])
LABELS = torch.tensor([0, 1])


def test_losses_of_all_outputs_are_added_and_the_shift_is_for_the_first():
    first, second = LOGITS
    shift = torch.tensor([0.7, -0.7])
    expected = F.cross_entropy(first + shift, LABELS) + F.cross_entropy(second, LABELS)
    torch.testing.assert_close(mean_loss((first, second), LABELS, shift, None), expected)
    alone = mean_loss(first, LABELS, None, None)
    torch.testing.assert_close(alone, F.cross_entropy(first, LABELS))


def test_samples_weights_hold_for_every_output():
    weights = torch.tensor([3.0, 1.0])
    expected = sum(
        (3 * F.cross_entropy(z[:1], LABELS[:1]) + F.cross_entropy(z[1:], LABELS[1:])) / 4
        for z in LOGITS
    )
    torch.testing.assert_close(mean_loss(tuple(LOGITS), LABELS, None, weights), expected)


@pytest.mark.parametrize("kind", CLASSES)
def test_one_step_on_two_outputs_follows_the_sum_of_their_gradients(world, kind):
    images, labels = world.data.train(3)
    shift = np.log(np.array([0.6, 0.2, 0.1, 0.1], np.float32))
    model = build_twice("cnn4", (8, 8, 1), 4, 1)
    x = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.4) / 0.25
    y = torch.from_numpy(labels)
    first, second = model(x)
    (F.cross_entropy(first + torch.from_numpy(shift), y) + F.cross_entropy(second, y)).backward()
    gradient = torch.cat([p.grad.ravel() for p in model.parameters()]).numpy()
    trainer = CLASSES[kind](*ARGUMENTS, build=build_twice)
    found = fitted(trainer, world, FULL_BATCH, start=START2, logit_shift=shift).vector
    np.testing.assert_allclose(found, START2 - 0.01 * gradient, rtol=0, atol=1e-6)


# --------------------------------------------------------------- running a model


def test_outputs_are_those_of_the_head_that_is_named(world):
    trainer = Trainer(*ARGUMENTS, build=build_twice)
    images = np.array(world.dataset.x_test)
    first, hidden = trainer.outputs(START2, images, 16, features=True)
    model = build_twice("cnn4", (8, 8, 1), 4, 1)
    with torch.inference_mode():
        expected = [head(torch.from_numpy(hidden)).numpy() for head in (model.head, model.second)]
    found = trainer.outputs(START2, images, 16, head="other")[0]
    np.testing.assert_allclose(first, expected[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found, expected[1], rtol=0, atol=1e-5)
    assert np.abs(found - first).max() > 1e-2


def test_a_processor_runs_no_more_images_at_once_than_its_cache_holds(world, monkeypatch):
    trainer, sizes = Trainer(*ARGUMENTS), []
    real = trainer.prepare
    monkeypatch.setattr(trainer, "prepare", lambda x: (sizes.append(len(x)), real(x))[1])
    images = np.concatenate([np.array(world.dataset.x_test)] * 5)
    whole = trainer.outputs(START, images, 1000)[0]
    assert sizes == [CACHED, CACHED, len(images) - 2 * CACHED]
    np.testing.assert_allclose(whole, trainer.outputs(START, images, 7)[0], rtol=0, atol=1e-5)
    assert max(sizes[3:]) == 7
