"""The client level of the gate: how much each client belongs to each expert.

S clients, M experts; `c` is always [clients, M] with rows that sum to 1.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_matrix, identity, kron, vstack

Matrix = NDArray[np.float64]


def normalise(c: Matrix, floor: float = 0.0) -> Matrix:
    """Rows to sum 1, then (1 - floor) c + floor / M: no expert is ever out of reach."""
    c = c / c.sum(axis=1, keepdims=True)
    return np.asarray((1.0 - floor) * c + floor / c.shape[1])


def from_losses(losses: Matrix, sharpness: float) -> Matrix:
    """Correlation from [clients, M] mean losses: softmax(-sharpness * loss)."""
    scaled = -sharpness * (losses - losses.min(axis=1, keepdims=True))
    return normalise(np.exp(scaled))


def hellinger(label_counts: NDArray[np.integer]) -> Matrix:
    """[clients, C] counts to points whose Euclidean distance is the Hellinger distance of the
    label mixes (times sqrt 2)."""
    counts = label_counts.astype(np.float64)
    return np.asarray(np.sqrt(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0)))


def feature_shift(means: Matrix, label_counts: NDArray[np.integer], class_means: Matrix) -> Matrix:
    """How clients' inputs differ where their labels do not: the mean of a client's features, less
    what the federation's class means give for its label mix; scaled to length one.

    Args:
        means: [S, D] of each client's features under one common model.
        label_counts: [S, C] of the samples they are means of.
        class_means: [C, D] of the features of all these samples, by class.

    Returns:
        [S, D] points for `from_similarity`.
    """
    mix = label_counts / label_counts.sum(axis=1, keepdims=True)
    shift = means - mix @ class_means
    return np.asarray(shift / np.maximum(np.linalg.norm(shift, axis=1, keepdims=True), 1e-12))


def from_similarity(
    points: Matrix, experts: int, sharpness: float, rng: np.random.Generator, rounds: int = 20
) -> Matrix:
    """Correlation before experts differ: clients near each other share an expert.

    Balanced k-means on the points (groups of equal size through `dispatch`; the best of several
    seeded starts), then softmax of the negative squared distance to the centres.

    Args:
        points: [S, D], one a client.
    """
    clients = len(points)
    best: tuple[float, NDArray[np.int64], Matrix] | None = None
    for _ in range(8):
        centres = points[rng.choice(clients, size=experts, replace=clients < experts)]
        for _ in range(rounds):
            squared = ((points[:, None, :] - centres[None, :, :]) ** 2).sum(axis=2)
            owner = dispatch(np.exp(-squared), 1, rng)[:, 0]
            moved = centres.copy()
            for m in np.unique(owner):
                moved[m] = points[owner == m].mean(axis=0)
            if np.array_equal(moved, centres):
                break
            centres = moved
        squared = ((points[:, None, :] - centres[None, :, :]) ** 2).sum(axis=2)
        cost = float(squared[np.arange(clients), owner].sum())
        if best is None or cost < best[0] - 1e-12:
            best = cost, owner, squared
    assert best is not None
    _, owner, squared = best
    # The group comes first, as only it has room; distances say how firmly, and what comes next.
    # 2 is the largest squared distance of label mixes; points of length one can be 4 apart, so
    # there a client far from its group's centre may go to another's.
    squared[np.arange(clients), owner] -= 2.0
    logits = -sharpness * squared
    return normalise(np.exp(logits - logits.max(axis=1, keepdims=True)))


def dispatch(c: Matrix, per_client: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Give every client K experts so that the sum of log c is maximal under equal capacity.

    Each expert gets between floor(nK/M) and ceil(nK/M) of the n clients: plain top-K can
    starve experts. The linear program is a transportation problem, so a vertex is integral; ties
    are broken by draws from `rng`.

    Args:
        c: [n, M] correlation of the cohort, positive.
        per_client: K <= M.

    Returns:
        [n, K] experts of each client, ascending.
    """
    clients, experts = c.shape
    if per_client >= experts:
        return np.tile(np.arange(experts), (clients, 1))
    score = np.log(c) + 1e-6 * rng.random(c.shape)
    each_client = kron(identity(clients), np.ones((1, experts)))
    each_expert = csr_matrix(kron(np.ones((1, clients)), identity(experts)))
    low, high = clients * per_client // experts, -(-clients * per_client // experts)
    solution = linprog(
        -score.reshape(-1),
        A_ub=vstack([each_expert, -each_expert]),
        b_ub=np.concatenate([np.full(experts, high), np.full(experts, -low)]),
        A_eq=each_client,
        b_eq=np.full(clients, per_client),
        bounds=(0, 1),
        method="highs-ds",
    )
    if solution.x is None:
        raise RuntimeError(f"dispatch has no solution: {solution.message}")
    taken = solution.x.reshape(clients, experts)
    return np.sort(np.argsort(-taken, axis=1, kind="stable")[:, :per_client], axis=1)
