from itertools import combinations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from fedcoe.data.feature_skew import SKEW_GROUPS, apply_skew
from fedcoe.errors import FedCoEError


def pictures(n=3, height=20, width=20, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("skew", SKEW_GROUPS)
def test_group_zero_sees_the_images_as_they_are(skew):
    images = pictures()
    assert np.array_equal(apply_skew(images, skew, 0), images)


def test_no_skew_changes_nothing_whatever_the_group():
    images = pictures()
    assert np.array_equal(apply_skew(images, "none", 3), images)


@pytest.mark.parametrize(
    ("group", "expected"),
    [(1, [[2, 4], [1, 3]]), (2, [[4, 3], [2, 1]]), (3, [[3, 1], [4, 2]])],
)
def test_rotation_turns_each_image_counter_clockwise_by_quarters(group, expected):
    image = np.array([[1, 2], [3, 4]], np.uint8)[None, :, :, None]
    assert apply_skew(image, "rotation", group)[0, :, :, 0].tolist() == expected


def test_four_quarter_turns_give_the_images_back():
    images = turned = pictures()
    for _ in range(4):
        turned = apply_skew(turned, "rotation", 1)
    assert np.array_equal(turned, images)


def test_a_quarter_turn_of_oblong_images_is_refused_and_a_half_turn_is_not():
    images = pictures(height=4, width=6)
    for group in (1, 3):
        with pytest.raises(FedCoEError, match="square images, these are 4 x 6"):
            apply_skew(images, "rotation", group)
    assert np.array_equal(apply_skew(images, "rotation", 2), images[:, ::-1, ::-1])


def test_inversion_turns_black_into_white():
    image = np.array([0, 1, 100, 255], np.uint8).reshape(1, 2, 2, 1)
    assert apply_skew(image, "inversion", 1).ravel().tolist() == [255, 254, 155, 0]


@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("side", [32, 64])
def test_blur_is_a_gaussian_that_grows_with_group_and_side(group, side):
    image = np.zeros((1, side, side, 1), np.uint8)
    image[0, side // 2, side // 2] = 255
    x = np.arange(side) - side // 2
    kernel = np.exp(-(x**2) / (2 * (0.5 * group * side / 32) ** 2))
    kernel /= kernel.sum()
    expected = 255 * np.outer(kernel, kernel)
    assert abs(apply_skew(image, "blur", group)[0, :, :, 0] - expected).max() <= 0.6


def test_blur_leaves_a_flat_image_flat_up_to_its_edges():
    image = np.full((1, 24, 24, 3), 200, np.uint8)
    assert np.array_equal(apply_skew(image, "blur", 3), image)


def test_blur_rounds_to_the_nearest_grey_and_mixes_neither_images_nor_channels():
    images = pictures(n=4, height=32, width=24)
    blurred = apply_skew(images, "blur", 2)
    for n in range(4):
        for c in range(3):
            plane = images[n, :, :, c].astype(np.float64)
            expected = gaussian_filter(plane, 1.0 * 24 / 32, mode="nearest")
            assert abs(blurred[n, :, :, c] - expected).max() <= 0.501


def test_blur_in_chunks_is_blur_of_each_image():
    images = pictures(n=1030, channels=1)
    blurred = apply_skew(images, "blur", 3)
    for n in (0, 1023, 1024, 1029):
        assert np.array_equal(blurred[n : n + 1], apply_skew(images[n : n + 1], "blur", 3))


@pytest.mark.parametrize(("skew", "groups"), SKEW_GROUPS.items())
def test_every_group_returns_contiguous_bytes_and_leaves_its_input_alone(skew, groups):
    images = pictures()
    before = images.copy()
    for group in range(groups):
        shown = apply_skew(images[::-1], skew, group)
        assert shown.dtype == np.uint8 and shown.shape == images.shape
        assert shown.flags.c_contiguous
        assert np.array_equal(images, before)


def test_blur_of_images_too_small_to_show_it_is_refused_not_silently_inert():
    with pytest.raises(FedCoEError, match="would change nothing on images 8 pixels wide"):
        apply_skew(pictures(height=30, width=8), "blur", 1)


def test_groups_of_a_skew_differ_visibly_from_one_another():
    images = pictures()
    for skew, groups in SKEW_GROUPS.items():
        shown = [apply_skew(images, skew, group).astype(int) for group in range(groups)]
        for a, b in combinations(shown, 2):
            assert abs(a - b).mean() > 0.5


@pytest.mark.parametrize(
    ("skew", "group", "message"),
    [
        ("shear", 1, "choose from none, rotation, inversion, blur"),
        ("inversion", 2, "groups are 0 to 1"),
        ("rotation", 4, "groups are 0 to 3"),
        ("blur", -1, "groups are 0 to 3"),
    ],
)
def test_an_unknown_skew_or_group_is_refused(skew, group, message):
    with pytest.raises(FedCoEError, match=message):
        apply_skew(pictures(), skew, group)


@pytest.mark.parametrize("images", [pictures().astype(np.float32), pictures()[0]])
def test_other_types_and_shapes_than_image_bytes_are_refused(images):
    with pytest.raises(FedCoEError, match="must be uint8"):
        apply_skew(images, "rotation", 1)
