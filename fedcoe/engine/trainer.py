"""The sequential trainer: the reference that every other engine must reproduce.

One model after another, each on one client's training split, with SGD on a flat parameter buffer.
Batches are cut, augmented and normalised whole; no Python runs per sample.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, cast

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fedcoe.engine.clients import ClientData
from fedcoe.models import Expert, build_expert
from fedcoe.models.experts import Shape
from fedcoe.models.flat import FlatModel, Vector
from fedcoe.streams import stream

Images = NDArray[np.uint8]
CACHED = 100
"""Images a processor runs at once when it does not train: activations of 1,000 leave the cache,
which costs a third of the speed when every core does it."""

FEWEST = 4
"""Images a batch is filled up to when nothing is trained: products of fewer rows take other
kernels, so the last bits would depend on how clients are dealt to workers."""

Build = Callable[[str, Shape, int, int], Expert]


@dataclass(frozen=True)
class LocalWork:
    """What every client does in a round. `lr` is this round's, after the schedule."""

    round: int
    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    clip_norm: float
    augment: Literal["none", "crop", "crop_flip"]
    seed: int

    def steps(self, samples: int) -> int:
        """SGD steps on a client with that many samples."""
        return self.epochs * -(-samples // self.batch_size)


@dataclass(frozen=True)
class Phase:
    """Some epochs in which one part of a model is trained and the rest stays as it is.

    The optimizer starts afresh. Heads are linear layers at the end of the flat vector.
    """

    epochs: int
    part: Literal["all", "body", "head"] = "all"


@dataclass(frozen=True)
class Fit:
    """One model to train on one client's training split of n samples.

    Args:
        client: whose data.
        name: what is trained, e.g. the expert's index; returned with the result.
        start: [P] initial parameters.
        logit_shift: [C] added to the logits inside the loss (balanced softmax: log prior).
        sample_weights: [n] responsibilities; the loss is their weighted mean in each batch.
        anchor: [P] parameters that `pull` / 2 * ||v - anchor||^2 draws the model to.
        correction: [P] added to every batch's gradient (control variates).
        phases: what is trained when; empty: all of it, for the epochs of the round's work.
    """

    client: int
    name: int
    start: Vector
    logit_shift: NDArray[np.float32] | None = None
    sample_weights: NDArray[np.float32] | None = None
    anchor: Vector | None = None
    pull: float = 0.0
    correction: Vector | None = None
    phases: tuple[Phase, ...] = ()

    def plan(self, work: LocalWork) -> tuple[Phase, ...]:
        """The phases, spelt out."""
        return self.phases or (Phase(work.epochs),)

    def epochs(self, work: LocalWork) -> int:
        return sum(phase.epochs for phase in self.plan(work))


@dataclass(frozen=True)
class FitResult:
    """A trained model: [P] parameters, mean loss over its last epoch, samples processed."""

    vector: Vector
    loss: float
    images: int


def native_bf16(device: str = "cpu") -> bool:
    """Whether the device multiplies bfloat16 natively (processors: AVX512-BF16 or AMX)."""
    if torch.device(device).type == "cuda":
        # Of this device: torch's own question is about the current one.
        return bool(torch.version.hip) or torch.cuda.get_device_capability(device)[0] >= 8
    return bool(
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ) and any(
        getattr(torch.cpu, name, lambda: False)()
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


def computes_in(precision: Literal["auto", "fp32", "bf16"], device: str = "cpu") -> torch.dtype:
    """What experts are multiplied in: bfloat16 if asked for or, with `auto`, native."""
    half = precision == "bf16" or (precision == "auto" and native_bf16(device))
    return torch.bfloat16 if half else torch.float32


class Trainer:
    """Trains and runs experts of one architecture on this process's device.

    Args:
        model: architecture name.
        shape: height, width, channels.
        classes: number of classes.
        mean, std: per channel, in units of [0, 1].
        precision: fp32, bf16, or auto (bf16 where it is native).
        device: cpu, or a CUDA device.
        build: makes the module from name, shape, classes and seed. It has `features` and `head`;
            called, it returns [B, C] logits, or several: the first are those that a fit's
            `logit_shift` is for, the others are trained on plain cross-entropy, all losses added.
    """

    def __init__(
        self,
        model: str,
        shape: tuple[int, int, int],
        classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        precision: Literal["auto", "fp32", "bf16"] = "fp32",
        device: str = "cpu",
        build: Build = build_expert,
    ) -> None:
        self.device = torch.device(device)
        dtype = computes_in(precision, device)
        self.flat = FlatModel(build(model, shape, classes, 0), self.device, dtype)
        # Of a whole line of pixels: over the few channels of one alone, loops are slow.
        m, s = (torch.tensor(v, device=device).repeat(shape[1]) for v in (mean, std))
        self._scale, self._shift = 1.0 / (255.0 * s), -m / s

    @property
    def head_parameters(self) -> int:
        """Parameters of the linear head; they stand last in the flat vector."""
        head = cast(Expert, self.flat.module).head
        return sum(p.numel() for p in head.parameters())

    def prepare(self, images: Images | Tensor) -> Tensor:
        """uint8 [B, H, W, C] to normalised float [B, C, H, W] in channels-last memory."""
        x = torch.tensor(images) if isinstance(images, np.ndarray) else images
        lines = x.to(self.device).flatten(2)
        return torch.addcmul(self._shift, lines, self._scale).view(x.shape).permute(0, 3, 1, 2)

    def fit(
        self, fits: Iterable[Fit], work: LocalWork, data: ClientData
    ) -> Iterator[tuple[Fit, FitResult]]:
        """Train models one after another; results come in the order of `fits`."""
        for fit in fits:
            yield fit, self._fit(fit, work, *data.train(fit.client))

    def _fit(
        self, fit: Fit, work: LocalWork, images: Images, labels: NDArray[np.int64]
    ) -> FitResult:
        flat, model = self.flat, cast(Expert, self.flat.module)
        flat.load(fit.start)
        velocity = torch.zeros_like(flat.vector)
        anchor, correction, shift, weights, x_all, y_all = (
            None if array is None else torch.from_numpy(array).to(self.device)
            for array in (
                fit.anchor,
                fit.correction,
                fit.logit_shift,
                fit.sample_weights,
                images,
                labels,
            )
        )
        assert x_all is not None
        assert y_all is not None
        count, total = len(labels), 0.0
        epochs = batches(work, fit.epochs(work), fit.client, count, images.shape[1])
        for phase in fit.plan(work):
            velocity.zero_()
            frozen = self._frozen(phase)
            for epoch in islice(epochs, phase.epochs):
                total = 0.0
                for drawn in epoch:
                    rows = torch.from_numpy(drawn.rows).to(self.device)
                    batch = x_all[rows]
                    if drawn.moves is not None:
                        batch = move(batch, torch.from_numpy(drawn.moves).to(self.device))
                    r = None if weights is None else weights[rows]
                    x = self.prepare(batch).to(flat.dtype)
                    if phase.part == "head" and type(model).forward is Expert.forward:
                        # Nothing below the head is trained, so nothing is kept for its gradient.
                        with torch.no_grad():
                            hidden = model.features(x)
                        outputs = model.head(hidden)
                    else:
                        outputs = model(x)
                    loss = mean_loss(outputs, y_all[rows], shift, r)
                    flat.backward(loss)
                    gradient = flat.gradient
                    if correction is not None:
                        gradient.add_(correction)
                    if work.weight_decay:
                        gradient.add_(flat.vector, alpha=work.weight_decay)
                    if anchor is not None and fit.pull:
                        gradient.add_(flat.vector - anchor, alpha=fit.pull)
                    gradient[frozen] = 0.0
                    if work.clip_norm:
                        norm = float(torch.linalg.vector_norm(gradient))
                        if norm > work.clip_norm:
                            gradient.mul_(work.clip_norm / norm)
                    if work.momentum:
                        gradient = velocity.mul_(work.momentum).add_(gradient)
                    flat.vector.add_(gradient, alpha=-work.lr)
                    flat.changed()
                    total += float(loss.detach()) * len(rows)
        return FitResult(flat.read(), total / count, count * fit.epochs(work))

    def _frozen(self, phase: Phase) -> slice:
        """The part of the flat vector that a phase leaves alone."""
        border = len(self.flat.vector) - self.head_parameters
        return {"all": slice(0), "body": slice(border, None), "head": slice(border)}[phase.part]

    @torch.inference_mode()
    def outputs(
        self,
        vector: Vector,
        images: Images,
        batch_size: int,
        features: bool = False,
        head: str = "head",
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Run one model over n images; `head` names what the module does with its features.

        Returns:
            [n, C] logits and, if asked for, [n, D] penultimate features.
        """
        self.flat.load(vector)
        expert = cast(Expert, self.flat.module)
        logits, penultimate = [], []
        if self.device.type == "cpu":
            batch_size = min(batch_size, CACHED)
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            count = len(batch)
            if count < FEWEST:
                batch = np.concatenate([batch, np.repeat(batch[-1:], FEWEST - count, axis=0)])
            hidden = expert.features(self.prepare(batch).to(self.flat.dtype))
            logits.append(getattr(expert, head)(hidden)[:count].float())
            if features:
                penultimate.append(hidden[:count].float())
        hidden_all = torch.cat(penultimate).cpu().numpy() if features else None
        return torch.cat(logits).cpu().numpy(), hidden_all


def mean_loss(
    outputs: Tensor | tuple[Tensor, ...],
    labels: Tensor,
    shift: Tensor | None,
    weights: Tensor | None,
) -> Tensor:
    """Weighted mean over [B] samples of a batch, summed over a module's outputs [B, C]."""
    first, *others = (outputs,) if isinstance(outputs, Tensor) else outputs
    first = first.float() if shift is None else first.float() + shift
    total: Tensor | None = None
    for logits in (first, *(other.float() for other in others)):
        if weights is None:
            loss = F.cross_entropy(logits, labels)
        else:
            each = F.cross_entropy(logits, labels, reduction="none")
            loss = (weights * each).sum() / weights.sum().clamp_min(1e-6)
        total = loss if total is None else total + loss
    assert total is not None
    return total


@dataclass(frozen=True)
class Batch:
    """Rows of a client's training split, and how each image is moved (None: not at all)."""

    rows: NDArray[np.int64]
    moves: NDArray[np.int64] | None
    """[b, 3] shift down, shift right (0 to twice the padding), mirrored (0 or 1)."""


def batches(
    work: LocalWork, epochs: int, client: int, count: int, height: int
) -> Iterator[list[Batch]]:
    """One client's batches, epoch by epoch; the same for every model and every engine."""
    rng = stream(work.seed, "batches", work.round, client)
    pad = padding(height)
    for _ in range(epochs):
        order = rng.permutation(count)
        epoch = []
        for rows in np.split(order, range(work.batch_size, count, work.batch_size)):
            moves = None
            if work.augment != "none":
                moves = np.zeros((len(rows), 3), np.int64)
                moves[:, :2] = rng.integers(0, 2 * pad + 1, (len(rows), 2))
                if work.augment == "crop_flip":
                    moves[:, 2] = rng.integers(0, 2, len(rows))
            epoch.append(Batch(rows, moves))
        yield epoch


def padding(height: int) -> int:
    """Pixels an image can be shifted by: 1/8 of the side."""
    return max(1, height // 8)


def move(images: Tensor, moves: Tensor) -> Tensor:
    """Shift (after padding with black) and mirror a whole uint8 batch.

    Args:
        images: [B, H, W, C].
        moves: [B, 3], see `Batch`.
    """
    count, height, width, _ = images.shape
    pad, device = padding(height), images.device
    padded = F.pad(images, (0, 0, pad, pad, pad, pad))
    if device.type == "cpu":  # NumPy copies windows, torch would gather byte by byte
        windows = sliding_window_view(padded.numpy(), (height, width), (1, 2))
        down, right, mirrored = moves.numpy().T
        found = windows.transpose(0, 1, 2, 4, 5, 3)[np.arange(count), down, right]
        flipped = np.flatnonzero(mirrored)
        found[flipped] = found[flipped, :, ::-1]
        return torch.from_numpy(found)
    rows = moves[:, :1] + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(count, width)
    columns = torch.where(moves[:, 2:] == 1, columns.flip(1), columns) + moves[:, 1:2]
    sample = torch.arange(count, device=device)[:, None, None]
    return padded[sample, rows[:, :, None], columns[:, None, :]]
