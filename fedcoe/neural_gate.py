"""The neural gate's local training and use; the server averages its parameters by n_k."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedcoe.engine.trainer import Trainer
from fedcoe.models.flat import FlatModel, Vector, initial_vector
from fedcoe.models.gate import GateNetwork
from fedcoe.streams import stream


@dataclass(frozen=True)
class Work:
    epochs: int
    lr: float
    load_balance: float


def initial(shape: tuple[int, int, int], experts: int, seed: int) -> Vector:
    """[P'] initial gate parameters."""
    draw = int(stream(seed, "gate init").integers(2**31))
    return initial_vector(GateNetwork(shape, experts, draw))


def _load(
    shape: tuple[int, int, int], experts: int, vector: Vector, device: torch.device
) -> FlatModel:
    flat = FlatModel(GateNetwork(shape, experts, 0), device)
    flat.load(vector)
    return flat


def fit(
    trainer: Trainer,
    start: Vector,
    images: NDArray[np.uint8],
    targets: NDArray[np.float64],
    work: Work,
    rng: np.random.Generator,
) -> Vector:
    """Train a gate on one client.

    Minimises cross-entropy to the targets plus load_balance * KL(uniform || mean gate), which
    keeps a client from closing the gate to experts it has not needed.

    Args:
        targets: [n, M] posteriors q.
    """
    experts = targets.shape[1]
    _, height, width, channels = images.shape
    flat = _load((height, width, channels), experts, start, trainer.device)
    x_all = torch.from_numpy(images)
    q_all = torch.from_numpy(targets.astype(np.float32)).to(trainer.device)
    for _ in range(work.epochs):
        order = torch.from_numpy(rng.permutation(len(targets)))
        for rows in order.split(64):
            log_g = torch.log_softmax(flat.module(trainer.prepare(x_all[rows])), dim=1)
            balance = -torch.log(log_g.exp().mean(dim=0).clamp_min(1e-8)).mean()
            loss = -(q_all[rows] * log_g).sum(dim=1).mean() + work.load_balance * balance
            flat.backward(loss)
            flat.vector.sub_(flat.gradient, alpha=work.lr)
    return flat.read()


@torch.inference_mode()
def scores(
    trainer: Trainer, vector: Vector, experts: int, images: NDArray[np.uint8], batch_size: int
) -> NDArray[np.float32]:
    """[n, M] gate scores; softmax of them is g(x)."""
    _, height, width, channels = images.shape
    module = _load((height, width, channels), experts, vector, trainer.device).module
    starts = range(0, len(images), batch_size)
    parts = [module(trainer.prepare(images[start : start + batch_size])) for start in starts]
    return np.asarray(torch.cat(parts).cpu().numpy())
