"""Random patch features: what the coordination head knows beside the experts' features.

Every 6 x 6 patch of an image is normalised, whitened and compared with random filters; what
exceeds a threshold is averaged over the image's quarters (Coates, Lee, Ng, AISTATS 2011; random
filters: Coates, Ng, ICML 2011). Nothing is trained and nothing is communicated: everyone draws the
same filters from the seed, and clients that differ in what they hold cannot pull them apart. Their
covariance is not asked for either: whitening is that of a stationary image.
"""

from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn import functional as F

from fedcoe.errors import FedCoEError
from fedcoe.models.experts import Shape
from fedcoe.streams import stream

PATCH = 6
THRESHOLD = 0.25
CONTRAST = 10.0
"""Added to a patch's variance, in squares of pixel values of 0 to 255."""
RANGE = 4.0
"""Pixels over which the assumed correlation of neighbours falls to 1 / e."""
CHANNELS = 0.9
"""Assumed correlation of two channels of one pixel."""
NOISE = 0.1
"""Added to the variances before whitening, so that what is all noise is not blown up."""
MOST_CHANNELS = 16
CACHED = 1
"""Images a processor treats at once: with more it takes one and a half times as long."""
SIGNS_AND_QUARTERS = 8


def patch_width(filters: int) -> int:
    """Features that so many filters give."""
    return SIGNS_AND_QUARTERS * filters


class Patches(nn.Module):
    """uint8 images [n, H, W, C] to [n, 8 filters] features of length one.

    Args:
        shape: H, W, C.
        filters: how many are drawn.
        seed: root of the draw.

    Raises:
        FedCoEError: more channels than images have.
    """

    weight: Tensor

    def __init__(self, shape: Shape, filters: int, seed: int) -> None:
        super().__init__()
        height, width, channels = shape
        if channels > MOST_CHANNELS:
            raise FedCoEError(
                f"method.patch_filters: images of at most {MOST_CHANNELS} channels, "
                f"not {channels}; set it to 0"
            )
        self.size = min(PATCH, height, width)
        # About 14 x 14 patches of any image.
        self.stride = max(1, round(min(height, width) / 16))
        weight = _filters(self.size, channels, filters, seed)
        self.register_buffer("weight", torch.tensor(weight, dtype=torch.float32), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2).float()
        patches = F.unfold(x, self.size, stride=self.stride)
        # The filters ignore a patch's mean, so that only its contrast is left to divide by.
        contrast = torch.sqrt(patches.var(dim=1, unbiased=False, keepdim=True) + CONTRAST)
        response = self.weight @ (patches / contrast)
        down, across = ((side - self.size) // self.stride + 1 for side in x.shape[-2:])
        response = response.unflatten(2, (down, across))
        both = torch.cat([response - THRESHOLD, -response - THRESHOLD], dim=1).clamp_min(0.0)
        pooled = F.adaptive_avg_pool2d(both, 2).flatten(1)
        norm = torch.linalg.vector_norm(pooled, dim=1, keepdim=True).clamp_min(1e-6)
        return cast(Tensor, pooled / norm)

    @torch.inference_mode()
    def run(self, images: NDArray[np.uint8], batch_size: int) -> NDArray[np.float32]:
        """`forward` over any number of images, on whatever device this module is."""
        device = self.weight.device
        step = CACHED if device.type == "cpu" else batch_size
        parts = [
            self(torch.tensor(images[start : start + step], device=device)).cpu()
            for start in range(0, len(images), step)
        ]
        return torch.cat(parts).numpy()


def _filters(size: int, channels: int, count: int, seed: int) -> NDArray[np.float64]:
    """[count, C size size] whitened filters of length one before whitening."""
    rows, columns = (axis.ravel() for axis in np.mgrid[:size, :size])
    distance = np.hypot(rows[:, None] - rows, columns[:, None] - columns)
    between = np.where(np.eye(channels) > 0, 1.0, CHANNELS)
    covariance = np.kron(between, np.exp(-distance / RANGE))
    values = len(covariance)
    centre = np.eye(values) - 1.0 / values
    drawn = stream(seed, "patches").standard_normal((count, values))
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    # The last digits depend on the number of threads, which the environment decides.
    with threadpool_limits(1):
        covariance = centre @ covariance @ centre
        variances, axes = np.linalg.eigh(covariance * values / np.trace(covariance))
        whiten = axes @ np.diag(1.0 / np.sqrt(np.maximum(variances, 0.0) + NOISE)) @ axes.T
        return np.asarray(drawn @ whiten @ centre)
