"""Sums whose result does not depend on the order of their terms.

Floating-point addition is not associative: the same clients, in another order or dealt to another
number of workers, give another last bit, and after some rounds another model. Here every term is
rounded once to a fixed grid and added as a 64-bit integer, which is exact in any order. It also
lets a worker add up its own clients and send one total (streaming), and is the form that secure
aggregation works on.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

_BLOCK = 2**15
_LARGEST = 2.0**12


def addable(change: NDArray[np.floating]) -> bool:
    """Whether a change is finite and small enough for an exact mean over any number of clients."""
    return bool(np.abs(change).max() < _LARGEST)  # False for NaN


@dataclass
class ExactSum:
    """A running sum of arrays on a grid of 2**-bits.

    The sum must stay below 2**(63 - bits) in magnitude. `bits` = 40 holds sums up to 8 million
    at a resolution of 1e-12, far finer than float32's on weights and features of order one.
    """

    total: NDArray[np.int64]
    bits: int = 40

    @classmethod
    def zeros(cls, shape: int | tuple[int, ...], bits: int = 40) -> "ExactSum":
        return cls(np.zeros(shape, np.int64), bits)

    def add(self, term: NDArray[np.floating], weight: float = 1.0) -> None:
        """Add `weight * term`.

        Raises:
            OverflowError: a value is not finite or too large for the grid.
        """
        # In torch, whose kernels are faster here than numpy's, and block by block, so that the
        # wider copies stay in the cache.
        scale = weight * 2.0**self.bits
        given = torch.from_numpy(np.ascontiguousarray(term)).reshape(-1)
        low, high = (float(end) for end in torch.aminmax(given))
        # 2**9 such terms still fit beside each other. False for NaN.
        if not max(-low, high) * abs(scale) < 2.0**54:
            raise OverflowError("a term is not finite or too large to be added exactly")
        total = torch.from_numpy(self.total).view(-1)
        for part, into in zip(given.split(_BLOCK), total.split(_BLOCK), strict=True):
            into.add_(part.to(torch.float64, copy=True).mul_(scale).round_().to(torch.int64))

    def merge(self, other: "ExactSum") -> None:
        """Add another running sum."""
        self.total += other.total

    def value(self) -> NDArray[np.float64]:
        return self.total.astype(np.float64) * 2.0**-self.bits
