"""Closed-form gate and coordination head over the experts' features.

With F the M experts' penultimate features side by side (each normalised to length one, and a
constant), every client sends the sums F'F, F'Q and F'Y; the server adds them up and solves one
ridge regression. The solution is that of the pooled data, whatever the partition. The idea is
Fed3R's (Fani et al., ICML 2024) and AFL's (He et al., CVPR 2025), applied here to several experts'
features and to the gate's targets.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve
from scipy.linalg.blas import dsyrk
from threadpoolctl import threadpool_limits

from fedcoe.exact_sum import ExactSum
from fedcoe.streams import stream


def projections(experts: int, width: int, features: int, seed: int) -> NDArray[np.float32] | None:
    """[M, D, d] random projections that everyone can redraw from the seed; None = keep all D.

    Johnson-Lindenstrauss: inner products survive d << D up to 1 / sqrt(d).
    """
    if features == 0 or features >= width:
        return None
    draws = stream(seed, "projection").standard_normal((experts, width, features))
    return np.asarray(draws / np.sqrt(features), np.float32)


def design_matrix(
    features: list[NDArray[np.float32]],
    projection: NDArray[np.float32] | None,
    patches: NDArray[np.float32] | None = None,
) -> NDArray[np.float64]:
    """M arrays [n, D], and patch features [n, P] where there are any, to F [n, M d + P + 1].

    Each expert's part has length 1/sqrt(M), so that more experts do not change the ridge's scale;
    that of the patches is one as well.
    """
    parts = []
    for m, part in enumerate(features):
        part = part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-6)
        parts.append(part if projection is None else part @ projection[m])
    joined = np.concatenate(parts, axis=1).astype(np.float64) / np.sqrt(len(features))
    fixed = [] if patches is None else [patches]
    return np.concatenate([joined, *fixed, np.ones((len(joined), 1))], axis=1)


@dataclass
class Statistics:
    """Sums a client sends; adding those of several clients is exact in any order."""

    gram: ExactSum
    """Upper triangle of F'F [D, D]."""
    targets: ExactSum
    """F'[Q | Y] [D, M + C]."""
    count: int = 0

    @classmethod
    def zeros(cls, width: int, targets: int) -> "Statistics":
        # Features are at most 1: 2**36 leaves room for 2**26 samples.
        return cls(ExactSum.zeros((width, width), 36), ExactSum.zeros((width, targets), 36))

    def add(self, design: NDArray[np.float64], targets: NDArray[np.float64]) -> None:
        """Add n samples: F [n, D] and [Q | Y] [n, M + C]."""
        # One triangle, at half the cost; `solve` mirrors it.
        self.gram.add(dsyrk(1.0, design.T))
        self.targets.add(design.T @ targets)
        self.count += len(design)

    def merge(self, other: "Statistics") -> None:
        self.gram.merge(other.gram)
        self.targets.merge(other.targets)
        self.count += other.count

    def solve(self, ridge: float) -> NDArray[np.float64]:
        """Ridge regression [D, M + C]: (F'F + ridge n I) W = F'[Q | Y]."""
        gram = self.gram.value()
        gram[np.diag_indices_from(gram)] += ridge * self.count
        # The last digits depend on the number of threads, which the environment decides.
        with threadpool_limits(1):
            return np.asarray(solve(gram, self.targets.value(), assume_a="pos", lower=False))


def ridge(
    design: NDArray[np.float64], targets: NDArray[np.float64], strength: float
) -> NDArray[np.float64]:
    """Ridge regression [D, T] of few samples, through their [n, n] kernel matrix."""
    kernel = design @ design.T
    kernel[np.diag_indices_from(kernel)] += strength * len(design)
    return np.asarray(design.T @ solve(kernel, targets, assume_a="pos"))


def message_bytes(width: int, targets: int) -> int:
    """Size of one client's message in float32, the symmetric half of F'F left out.

    Args:
        width: D, columns of the design matrix.
        targets: columns of F'[Q | Y].
    """
    return 4 * (width * (width + 1) // 2 + width * targets)
