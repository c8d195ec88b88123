"""Expert architectures: a feature extractor and a linear head, for any image shape.

All are free of batch statistics (GroupNorm or no normalisation at all), so nothing about them is
left unaveraged when weights are.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Shape = tuple[int, int, int]
"""Height, width, channels of one image."""


class Expert(nn.Module):
    """A classifier in two parts: `head(body(x))`.

    Args:
        body: [B, C, H, W] images to [B, D] penultimate features.
        width: D.
        classes: number of classes.
    """

    def __init__(self, body: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, classes)

    def features(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.body(x))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.body(x)))


class MaxPool(nn.Module):
    """Maximum of each 2 x 2 square; odd last rows and columns are left out."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.is_cuda:
            return F.max_pool2d(x, 2)
        # The same numbers without the indices that only a backward pass needs: the whole forward
        # pass of cnn4 is twice as fast on a processor.
        height, width = (side // 2 * 2 for side in x.shape[-2:])
        rows = torch.maximum(x[..., 0:height:2, :], x[..., 1:height:2, :])
        return torch.maximum(rows[..., 0:width:2], rows[..., 1:width:2])


def _cnn4(shape: Shape) -> tuple[nn.Module, int]:
    """The 4-layer CNN of PFLlib (JMLR 2025): two 5x5 convolutions, two linear layers."""
    height, width, channels = shape
    # Unpadded 5x5 kernels leave nothing of images below 16 pixels (digits).
    pad = 0 if min(height, width) >= 16 else 2

    def after(side: int) -> int:
        return ((side - 4 + 2 * pad) // 2 - 4 + 2 * pad) // 2

    body = nn.Sequential(
        # Pooling first: the same function, and a quarter of the rectifier's work.
        nn.Conv2d(channels, 32, 5, padding=pad),
        MaxPool(),
        nn.ReLU(),
        nn.Conv2d(32, 64, 5, padding=pad),
        MaxPool(),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * after(height) * after(width), 512),
        nn.ReLU(),
    )
    return body, 512


def _cnn3x3(shape: Shape) -> tuple[nn.Module, int]:
    """The CNN of pfl-research's CIFAR-10 benchmark (2024), its dropout left out."""
    height, width, channels = shape
    body = nn.Sequential(
        nn.Conv2d(channels, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        MaxPool(),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * ((height - 4) // 2) * ((width - 4) // 2), 128),
        nn.ReLU(),
    )
    return body, 128


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(8, channels), channels)


def _gn_cnn(shape: Shape) -> tuple[nn.Module, int]:
    """Three 3x3 convolutions with GroupNorm and global pooling: fewer operations than `cnn4`."""
    channels = shape[2]
    layers: list[nn.Module] = []
    for width in (32, 64, 128):
        layers += [
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            _norm(width),
            MaxPool(),
            nn.ReLU(),
        ]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten()), 512


class _Residual(nn.Module):
    """Basic block of He et al. 2016 with GroupNorm (Hsieh et al. 2020: batch statistics fail
    under label skew)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = _norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = _norm(outputs)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), _norm(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(out)) + self.skip(x))


def _resnet(shape: Shape, widths: list[int], blocks: int) -> tuple[nn.Module, int]:
    layers: list[nn.Module] = [
        nn.Conv2d(shape[2], widths[0], 3, 1, 1, bias=False),
        _norm(widths[0]),
        nn.ReLU(),
    ]
    inputs = widths[0]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            layers.append(_Residual(inputs, width, 2 if stage and not block else 1))
            inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), inputs


def _resnet8(shape: Shape) -> tuple[nn.Module, int]:
    return _resnet(shape, [32, 64, 128], 1)


def _resnet18(shape: Shape) -> tuple[nn.Module, int]:
    return _resnet(shape, [64, 128, 256, 512], 2)


EXPERTS: dict[str, Callable[[Shape], tuple[nn.Module, int]]] = {
    "cnn4": _cnn4,
    "cnn3x3": _cnn3x3,
    "gn_cnn": _gn_cnn,
    "resnet8": _resnet8,
    "resnet18": _resnet18,
}


def build_expert(name: str, shape: Shape, classes: int, seed: int) -> Expert:
    """Build an expert with initial weights that depend on nothing but the arguments.

    Raises:
        ValueError: unknown name.
    """
    if name not in EXPERTS:
        raise ValueError(f"no model {name!r}; there are: {', '.join(EXPERTS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body, width = EXPERTS[name](shape)
        return Expert(body, width, classes)
