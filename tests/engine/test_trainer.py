from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedcoe.engine.trainer import Fit, LocalWork, Trainer, batches, move
from fedcoe.models import build_expert
from fedcoe.models.flat import initial_vector
from fedcoe.streams import stream

MEAN, STD = (0.4,), (0.25,)
WORK = LocalWork(1, 1, 64, 0.1, 0.0, 0.0, 0.0, "none", 0)
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
LABELS = RNG.integers(0, 4, 40)
START = initial_vector(build_expert("gn_cnn", (8, 8, 1), 4, 1))


class OneClient:
    """Stands in for ClientData."""

    def train(self, client):
        return IMAGES.copy(), LABELS.copy()


@pytest.fixture
def trainer():
    torch.set_num_threads(1)
    return Trainer("gn_cnn", (8, 8, 1), 4, MEAN, STD)


def fit(trainer, work=WORK, **values):
    [(_, result)] = trainer.fit([Fit(3, 0, START, **values)], work, OneClient())
    return result


def prepared(images=IMAGES):
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (x - MEAN[0]) / STD[0]


def plain_model():
    return build_expert("gn_cnn", (8, 8, 1), 4, 1)


def read(model):
    return torch.cat([p.detach().ravel() for p in model.parameters()]).numpy()


def gradient(loss_of_logits):
    model = plain_model()
    loss_of_logits(model(prepared())).backward()
    return torch.cat([p.grad.ravel() for p in model.parameters()]).numpy()


def step_gradient(result, lr=WORK.lr):
    """What gradient one full-batch step without momentum must have followed."""
    return (START.astype(np.float64) - result.vector) / lr


def test_training_is_what_torchs_sgd_does_on_a_plain_module(trainer):
    work = replace(WORK, epochs=2, batch_size=16, lr=0.05, momentum=0.9, weight_decay=0.01)
    found = fit(trainer, work)
    model = plain_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    rng = stream(work.seed, "batches", work.round, 3)
    for _ in range(2):
        order, losses = rng.permutation(40), []
        for rows in np.split(order, [16, 32]):
            loss = F.cross_entropy(model(prepared(IMAGES[rows])), torch.from_numpy(LABELS[rows]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item() * len(rows))
    np.testing.assert_allclose(found.vector, read(model), rtol=0, atol=1e-6)
    assert np.abs(found.vector - START).max() > 1e-2
    assert found.loss == pytest.approx(sum(losses) / 40, abs=1e-5)
    assert found.images == 80


def test_the_start_is_left_alone_and_the_result_is_the_callers_own(trainer):
    before = START.copy()
    first = fit(trainer)
    kept = first.vector.copy()
    fit(trainer, replace(WORK, lr=0.3))
    np.testing.assert_array_equal(START, before)
    np.testing.assert_array_equal(first.vector, kept)


def test_balanced_softmax_adds_the_shift_inside_the_loss_alone(trainer):
    shift = np.log(np.array([0.7, 0.2, 0.05, 0.05], np.float32))
    expected = gradient(
        lambda z: F.cross_entropy(z + torch.from_numpy(shift), torch.from_numpy(LABELS))
    )
    found = step_gradient(fit(trainer, logit_shift=shift))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    plain = step_gradient(fit(trainer))
    assert np.abs(found - plain).max() > 1e-3


def test_a_class_never_seen_is_not_pushed_down_by_balanced_softmax(trainer):
    images, labels = IMAGES[LABELS < 3], LABELS[LABELS < 3]

    class Without3:
        def train(self, client):
            return images.copy(), labels.copy()

    shift = np.log(np.array([1 / 3, 1 / 3, 1 / 3, 1e-9], np.float32))
    moved = []
    for s in (None, shift):
        [(_, result)] = trainer.fit([Fit(3, 0, START, logit_shift=s)], WORK, Without3())
        moved.append(abs(result.vector[-1] - START[-1]))
    assert moved[0] > 1e-3
    assert moved[1] < 1e-6


def test_responsibilities_make_a_weighted_mean(trainer):
    r = np.random.default_rng(1).random(40).astype(np.float32)
    weights = torch.from_numpy(r)

    def loss(z):
        each = F.cross_entropy(z, torch.from_numpy(LABELS), reduction="none")
        return (weights * each).sum() / weights.sum()

    expected = gradient(loss)
    found = step_gradient(fit(trainer, sample_weights=r))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    halved = step_gradient(fit(trainer, sample_weights=r / 2))
    np.testing.assert_allclose(halved, expected, atol=1e-5)


def test_samples_without_responsibility_do_not_count(trainer):
    r = np.zeros(40, np.float32)
    r[:10] = 1.0
    labels = torch.from_numpy(LABELS[:10])
    expected = gradient(lambda z: F.cross_entropy(z[:10], labels))
    np.testing.assert_allclose(step_gradient(fit(trainer, sample_weights=r)), expected, atol=1e-5)
    nothing = fit(trainer, sample_weights=np.zeros(40, np.float32))
    np.testing.assert_array_equal(nothing.vector, START)


def test_the_proximal_pull_draws_towards_the_anchor(trainer):
    anchor = START + np.float32(0.5)
    expected = gradient(lambda z: F.cross_entropy(z, torch.from_numpy(LABELS)))
    found = step_gradient(fit(trainer, anchor=anchor, pull=0.3))
    np.testing.assert_allclose(found, expected + 0.3 * (START - anchor), atol=1e-5)
    without = fit(trainer, anchor=anchor, pull=0.0)
    assert without.vector.tobytes() == fit(trainer).vector.tobytes()


def test_clipping_limits_the_length_of_the_gradient_and_keeps_its_direction(trainer):
    full = step_gradient(fit(trainer))
    norm = np.linalg.norm(full)
    clipped = step_gradient(fit(trainer, replace(WORK, clip_norm=norm / 4)))
    np.testing.assert_allclose(clipped, full / 4, atol=1e-5)
    loose = fit(trainer, replace(WORK, clip_norm=2 * norm))
    assert loose.vector.tobytes() == fit(trainer).vector.tobytes()


def test_prepare_normalises_each_channel():
    trainer = Trainer("gn_cnn", (8, 8, 3), 4, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    expected = (images / 255 - [0.1, 0.2, 0.3]) / [0.4, 0.5, 0.6]
    found = trainer.prepare(images)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-5)
    torch.testing.assert_close(trainer.prepare(torch.from_numpy(images)), found)


def test_the_same_seed_gives_the_same_bytes_and_seed_round_and_client_each_matter(trainer):
    work = replace(WORK, batch_size=8, augment="crop_flip", epochs=2)
    base = fit(trainer, work).vector.tobytes()
    assert fit(Trainer("gn_cnn", (8, 8, 1), 4, MEAN, STD), work).vector.tobytes() == base
    assert fit(trainer, replace(work, seed=1)).vector.tobytes() != base
    assert fit(trainer, replace(work, round=2)).vector.tobytes() != base
    [(_, other)] = trainer.fit([Fit(4, 0, START)], work, OneClient())
    assert other.vector.tobytes() != base


def test_fits_after_one_another_do_not_influence_each_other(trainer):
    work = replace(WORK, batch_size=8, momentum=0.9)
    fits = [Fit(3, 0, START), Fit(4, 1, START * 2), Fit(3, 0, START)]
    results = list(trainer.fit(fits, work, OneClient()))
    assert [f.name for f, _ in results] == [0, 1, 0]
    assert results[0][1].vector.tobytes() == results[2][1].vector.tobytes()


def test_augmentation_is_part_of_training(trainer):
    assert fit(trainer, replace(WORK, augment="crop")).loss != fit(trainer).loss


def test_bf16_stays_close_to_fp32(trainer):
    half = Trainer("gn_cnn", (8, 8, 1), 4, MEAN, STD, "bf16")
    work = replace(WORK, batch_size=8, lr=0.01)
    a, b = fit(trainer, work), fit(half, work)
    assert a.vector.tobytes() != b.vector.tobytes()
    moved = np.linalg.norm(a.vector - START)
    assert np.linalg.norm(a.vector - b.vector) < 0.3 * moved
    assert b.loss == pytest.approx(a.loss, rel=0.03)
    assert b.vector.dtype == np.float32
    exact, rough = (t.outputs(START, IMAGES, 16)[0] for t in (trainer, half))
    assert rough.dtype == np.float32
    np.testing.assert_allclose(rough, exact, atol=0.05)


def test_outputs_are_the_models_whatever_the_batch_size(trainer):
    model = plain_model()
    with torch.inference_mode():
        expected = model(prepared()).numpy()
        hidden = model.features(prepared()).numpy()
    for batch_size in (7, 40, 1000):
        logits, features = trainer.outputs(START, IMAGES, batch_size, features=True)
        np.testing.assert_allclose(logits, expected, atol=1e-5)
        np.testing.assert_allclose(features, hidden, atol=1e-5)
    assert trainer.outputs(START, IMAGES, 16)[1] is None


def test_the_heads_parameters_stand_last(trainer):
    model = plain_model()
    head = torch.cat([model.head.weight.detach().ravel(), model.head.bias.detach()])
    np.testing.assert_array_equal(START[-trainer.head_parameters :], head)


# ------------------------------------------------------------- batches and moves

BATCH = torch.from_numpy(np.random.default_rng(3).integers(1, 256, (64, 16, 24, 3), dtype=np.uint8))


def drawn(kind, **changes):
    """All moves of one client's 300 images of height 16."""
    work = replace(WORK, augment=kind, batch_size=64, **changes)
    [epoch] = batches(work, work.epochs, 3, 300, 16)
    return np.concatenate([batch.moves for batch in epoch])


def test_an_epoch_shows_every_sample_once_in_another_order():
    work = replace(WORK, epochs=3, batch_size=16)
    epochs = list(batches(work, work.epochs, 3, 40, 8))
    orders = [np.concatenate([batch.rows for batch in epoch]) for epoch in epochs]
    assert [[len(b.rows) for b in epoch] for epoch in epochs] == [[16, 16, 8]] * 3
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], np.arange(40))


def test_a_client_smaller_than_a_batch_has_one_batch():
    [[batch]] = batches(WORK, WORK.epochs, 3, 5, 8)
    assert len(batch.rows) == 5
    assert batch.moves is None


def test_moves_go_up_to_an_eighth_of_the_side_in_each_direction():
    moves = drawn("crop")
    assert moves.shape == (300, 3)
    for axis in (0, 1):
        assert set(moves[:, axis]) == {0, 1, 2, 3, 4}
    assert not moves[:, 2].any()
    assert np.any(moves[:, 0] != moves[:, 1])
    mirrored = drawn("crop_flip")[:, 2]
    assert set(mirrored) == {0, 1}
    assert 0.4 < mirrored.mean() < 0.6


def test_a_move_is_a_shifted_and_mirrored_copy_of_its_own_image():
    moves = drawn("crop_flip")[:64]
    found = move(BATCH, torch.from_numpy(moves))
    assert found.dtype == torch.uint8
    padded = np.pad(BATCH.numpy(), ((0, 0), (2, 2), (2, 2), (0, 0)))
    for image, out, (down, right, mirrored) in zip(padded, found.numpy(), moves, strict=True):
        crop = image[down : down + 16, right : right + 24]
        np.testing.assert_array_equal(out, crop[:, ::-1] if mirrored else crop)


def test_the_move_in_the_middle_is_none_at_all():
    still = torch.tensor([[2, 2, 0]]).expand(64, 3)
    assert torch.equal(move(BATCH, still), BATCH)


def test_augmentation_draws_are_a_function_of_seed_round_and_client():
    np.testing.assert_array_equal(drawn("crop_flip"), drawn("crop_flip"))
    assert not np.array_equal(drawn("crop_flip"), drawn("crop_flip", seed=1))
    assert not np.array_equal(drawn("crop_flip"), drawn("crop_flip", round=2))


@pytest.mark.parametrize("model", ["cnn4", "cnn3x3", "gn_cnn"])
def test_what_is_predicted_does_not_hang_on_how_many_images_are_left_for_the_last_batch(model):
    trainer = Trainer(model, (8, 8, 1), 4, MEAN, STD)
    start = trainer.flat.read()
    whole, features = trainer.outputs(start, IMAGES, 20, features=True)
    for count in (1, 2, 3, 21, 22, 23):
        logits, own = trainer.outputs(start, IMAGES[:count], 20, features=True)
        assert logits.tobytes() == whole[:count].tobytes()
        assert own.tobytes() == features[:count].tobytes()
