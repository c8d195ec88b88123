"""Random patch features, and what the coordination head makes of them."""

from dataclasses import replace

import numpy as np
import pytest

from fedcoe.analytic import design_matrix, projections
from fedcoe.bundle import export_models, load_bundle
from fedcoe.errors import FedCoEError
from fedcoe.patches import CONTRAST, THRESHOLD, Patches, patch_width
from fedcoe.rounds import update_gate

ALL = list(range(6))


def images(count, *shape, low=0, high=256, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(low, high, (count, *shape)).astype(np.uint8)


def test_features_are_what_a_loop_over_patches_and_filters_gives():
    [image] = images(1, 32, 32, 3)
    patches = Patches((32, 32, 3), 5, seed=3)
    assert (patches.size, patches.stride) == (6, 2)
    weight = patches.weight.numpy().reshape(5, 3, 6, 6)
    positive, negative = np.zeros((2, 5, 14, 14))
    for row in range(14):
        for column in range(14):
            patch = image[2 * row : 2 * row + 6, 2 * column : 2 * column + 6].astype(float)
            contrast = np.sqrt(patch.var() + CONTRAST)
            response = (weight * patch.transpose(2, 0, 1)).sum(axis=(1, 2, 3)) / contrast
            positive[:, row, column] = np.maximum(response - THRESHOLD, 0.0)
            negative[:, row, column] = np.maximum(-response - THRESHOLD, 0.0)
    expected = [
        part[half, rows, columns].mean()
        for part in (positive, negative)
        for half in range(5)
        for rows in (slice(7), slice(7, None))
        for columns in (slice(7), slice(7, None))
    ]
    found = patches.run(image[None], 10)[0]
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected), rtol=1e-4, atol=1e-6)
    assert len(found) == patch_width(5)


def test_features_do_not_see_brightness_nor_who_else_is_in_the_batch():
    dark = images(7, 16, 16, 1, high=100)
    patches = Patches((16, 16, 1), 4, seed=0)
    found = patches.run(dark, 100)
    np.testing.assert_allclose(patches.run(dark + 60, 100), found, atol=1e-4)
    assert patches.run(dark[3:4], 1).tobytes() == found[3:4].tobytes()
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, rtol=1e-5)
    assert (found >= 0).all()


def test_the_seed_alone_decides_the_filters():
    one, two, other = (Patches((28, 28, 1), 4, seed) for seed in (1, 1, 2))
    assert one.weight.numpy().tobytes() == two.weight.numpy().tobytes()
    assert one.weight.numpy().tobytes() != other.weight.numpy().tobytes()


def test_whitened_filters_answer_alike_to_every_direction_of_a_smooth_image():
    """Of images whose covariance is the assumed one, responses are nearly uncorrelated."""
    rng = np.random.default_rng(0)
    distance = np.hypot(*(np.subtract.outer(a, a) for a in np.mgrid[:6, :6].reshape(2, -1)))
    smooth = np.linalg.cholesky(np.exp(-distance / 4.0)) @ rng.standard_normal((36, 40_000))
    smooth -= smooth.mean(axis=0)
    responses = Patches((16, 16, 1), 300, 0).weight.numpy() @ smooth
    raw = rng.standard_normal((300, 36)) @ smooth

    def spread(r):
        values = np.linalg.eigvalsh(np.cov(r))[-30:]
        return values[-1] / values[0]

    assert spread(responses) < spread(raw) / 5


@pytest.mark.parametrize("shape", [(8, 8, 1), (5, 7, 3), (64, 64, 3), (33, 47, 4)])
def test_images_of_any_size_have_as_many_features(shape):
    found = Patches(shape, 3, 0).run(images(2, *shape), 10)
    assert found.shape == (2, 24) and np.isfinite(found).all()


def test_a_flat_image_has_no_features_and_is_no_error():
    assert not Patches((32, 32, 3), 3, 0).run(np.full((1, 32, 32, 3), 9, np.uint8), 1).any()


def test_what_has_too_many_channels_for_an_image_is_refused():
    with pytest.raises(FedCoEError, match="at most 16 channels, not 17"):
        Patches((32, 32, 17), 3, 0)


# ------------------------------------------------------------- in the coordination head


@pytest.mark.parametrize("name", ["fedavg", "fedcoe"])
@pytest.mark.parametrize("workers", [1, 3])
def test_the_head_is_the_pooled_ridge_solution_with_patches_too(
    make_method, make_engine, name, workers
):
    method = make_method(name=name, coordination_head=True, patch_filters=3)
    engine = make_engine()
    side = engine.run(lambda side: side)
    engine.workers = workers
    after = update_gate(engine, method, method.init(), ALL)
    data = [side.data.train(k) for k in ALL]
    pooled, labels = (np.concatenate(parts) for parts in zip(*data, strict=True))
    hidden = [side.trainer.outputs(v, pooled, 64, features=True)[1] for v in after.experts]
    projection = projections(len(hidden), hidden[0].shape[1], method.gate_features, 0)
    design = design_matrix(hidden, projection, method.patches.run(pooled, 64))
    assert design.shape[1] == method.design_width
    gram = design.T @ design + method.settings.ridge * len(labels) * np.eye(design.shape[1])
    expected = design @ np.linalg.solve(gram, design.T @ np.eye(4)[labels])
    np.testing.assert_allclose(design @ after.extra["head"], expected, atol=1e-4)


def test_training_does_not_notice_patch_features(make_method, engine, train):
    plain, with_patches = (
        make_method(name="fedavg", coordination_head=True, patch_filters=filters)
        for filters in (0, 3)
    )
    first, second = train(engine, plain, 2), train(engine, with_patches, 2)
    assert first.experts.tobytes() == second.experts.tobytes()
    assert second.extra["head"].shape[0] == first.extra["head"].shape[0] + 24


def test_a_saved_mixture_predicts_the_same_with_patches(make_method, engine, train, tmp_path):
    method = make_method(patch_filters=3)
    state = replace(train(engine, method, 2), calibration={"global.head": 0.75})
    side = engine.run(lambda side: side)
    export_models(tmp_path / "models", method, state, side.personal)
    shown = np.array(side.data.dataset.x_test)
    bundle = load_bundle(tmp_path / "models", "fp32")
    direct = method.predict_global(state, method.score(side.trainer, state, shown))
    np.testing.assert_allclose(bundle.predict(shown), direct, atol=1e-6)


def test_it_is_said_where_nothing_sees_the_patches(make_method):
    for settings in ({"name": "fedavg"}, {"gate": "neural", "coordination_head": False}):
        said = make_method(patch_filters=3, **settings).inert()
        assert any(sentence.startswith("patch_filters:") for sentence in said)
    assert not make_method(patch_filters=3).inert()
