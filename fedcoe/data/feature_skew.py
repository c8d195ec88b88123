"""Feature skew: the same classes look different to different groups of clients.

A fixed transform a group, on top of any label partition. Rotation by multiples of 90 degrees is
the benchmark of IFCA (Ghosh et al., "An Efficient Framework for Clustered Federated Learning",
NeurIPS 2020); inversion and blur stand for other sensors. Group 0 always sees the images as they
are. The transforms draw nothing at random: a group number says everything.
"""

import numpy as np
from numpy.typing import NDArray

from fedcoe.errors import FedCoEError

SKEW_GROUPS = {"none": 1, "rotation": 4, "inversion": 2, "blur": 4}
"""Every skew, and how many groups it can tell apart."""

BLUR_STEP = 0.5
"""Gaussian sigma added by each blur group, in pixels of an image 32 pixels wide."""

BLUR_LEAST_SIDE = 20
"""On smaller images the sampled Gaussian of group 1 would round to no blur at all."""

_CHUNK = 1024  # images blurred at once: bounds the float32 copies


def apply_skew(images: NDArray[np.uint8], skew: str, group: int) -> NDArray[np.uint8]:
    """Show images as a feature group sees them.

    * none: unchanged, whatever the group.
    * rotation: 90 * group degrees counter-clockwise.
    * inversion: 255 - x for group 1.
    * blur: Gaussian of sigma 0.5 * group * (shorter side / 32) pixels, edges repeated.

    Args:
        images: uint8 [N, H, W, C].
        skew: a key of `SKEW_GROUPS`.
        group: 0 .. SKEW_GROUPS[skew] - 1.

    Returns:
        uint8 [N, H, W, C], C-contiguous. Where nothing changes it may be `images` itself.

    Raises:
        FedCoEError: unknown skew or group; images of another type or shape; a quarter turn of
            images that are not square; blur of images smaller than `BLUR_LEAST_SIDE`.
    """
    if skew not in SKEW_GROUPS:
        raise FedCoEError(
            f"partition.feature_skew = {skew!r}: choose from {', '.join(SKEW_GROUPS)}"
        )
    if images.dtype != np.uint8 or images.ndim != 4:
        raise FedCoEError(f"images must be uint8 [N, H, W, C], got {images.dtype} {images.shape}")
    if skew == "none" or group == 0:
        return np.ascontiguousarray(images)
    if not 0 <= group < SKEW_GROUPS[skew]:
        allowed = f"0 to {SKEW_GROUPS[skew] - 1}"
        raise FedCoEError(f"feature group {group} of {skew}: groups are {allowed}")
    if skew == "rotation":
        return _rotate(images, group)
    if skew == "inversion":
        return np.ascontiguousarray(255 - images)
    return _blur(images, group)


def _rotate(images: NDArray[np.uint8], quarters: int) -> NDArray[np.uint8]:
    height, width = images.shape[1:3]
    if quarters % 2 and height != width:
        raise FedCoEError(
            f"partition.feature_skew = 'rotation': a quarter turn needs square images, these are "
            f"{height} x {width}; choose inversion or blur, or fetch the data as squares"
        )
    return np.ascontiguousarray(np.rot90(images, k=quarters, axes=(1, 2)))


def _blur(images: NDArray[np.uint8], group: int) -> NDArray[np.uint8]:
    side = min(images.shape[1:3])
    if side < BLUR_LEAST_SIDE:
        raise FedCoEError(
            f"partition.feature_skew = 'blur': would change nothing on images {side} pixels wide "
            f"(at least {BLUR_LEAST_SIDE}); choose rotation or inversion"
        )
    from scipy.ndimage import gaussian_filter  # slow to import, and few partitions blur

    sigma = BLUR_STEP * group * side / 32
    blurred = np.empty(images.shape, np.uint8)
    for start in range(0, len(images), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        smooth = gaussian_filter(
            images[chunk], (0, sigma, sigma, 0), output=np.float32, mode="nearest"
        )
        blurred[chunk] = np.clip(np.rint(smooth), 0, 255)
    return blurred
