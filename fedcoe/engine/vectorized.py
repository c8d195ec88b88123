"""The vectorized trainer: many models trained together on one device, usually a GPU.

One small model leaves a GPU idle; a hundred of them fill it. Parameters of a chunk of fits are
stacked to [B, P] and the forward pass runs under `torch.func.vmap`; gradients of the summed losses
are each model's own. All training images lie on the device. Clients of unequal size are padded and
masked, so that results equal those of the sequential trainer to rounding.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn import functional as F

from fedcoe.engine.clients import ClientData
from fedcoe.engine.devices import no_memory
from fedcoe.engine.trainer import (
    Batch,
    Build,
    Fit,
    FitResult,
    LocalWork,
    Phase,
    Trainer,
    batches,
    move,
)
from fedcoe.models import build_expert


class VectorizedTrainer(Trainer):
    """Same contract as `Trainer`; `chunk` models are trained at once, fewer if memory runs out."""

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
        chunk: int = 128,
    ) -> None:
        super().__init__(model, shape, classes, mean, std, precision, device, build)
        self.chunk = chunk
        self._sizes = [int(np.prod(s)) for s in self.flat.layout.values()]
        self._resident: tuple[Tensor, Tensor] | None = None

    def fit(
        self, fits: Iterable[Fit], work: LocalWork, data: ClientData
    ) -> Iterator[tuple[Fit, FitResult]]:
        """Train chunk by chunk; results come in the order of `fits`."""
        source = iter(fits)
        while chunk := list(islice(source, self.chunk)):
            yield from zip(chunk, self._fit_within_memory(chunk, work, data), strict=True)

    def _fit_within_memory(
        self, fits: list[Fit], work: LocalWork, data: ClientData
    ) -> list[FitResult]:
        try:
            return self._fit_together(fits, work, data)
        except RuntimeError as error:
            if len(fits) == 1 or not no_memory(error):
                raise
        # Outside the handler, whose traceback would keep the tensors alive.
        torch.cuda.empty_cache()
        self.chunk = half = len(fits) // 2
        return self._fit_within_memory(fits[:half], work, data) + self._fit_within_memory(
            fits[half:], work, data
        )

    def _images(self, data: ClientData) -> tuple[Tensor, Tensor]:
        """All training images, each under its client's feature skew, and labels; loaded once."""
        if self._resident is None:
            images = np.array(data.dataset.x_train)
            if data.partition.skew != "none":
                for client in range(data.partition.clients):
                    for split in range(3):
                        rows = data.partition.indices(client, split)
                        images[rows] = data.images(client, split)
            labels = np.array(data.dataset.y_train)
            self._resident = (
                torch.from_numpy(images).to(self.device),
                torch.from_numpy(labels).to(self.device),
            )
        return self._resident

    def _fit_together(
        self, fits: Sequence[Fit], work: LocalWork, data: ClientData
    ) -> list[FitResult]:
        # Longest first: at each step those still training are a prefix of the stack.
        plans = [self._plan(fit, work, data) for fit in fits]
        order = sorted(range(len(fits)), key=lambda i: -plans[i].steps)
        stack = _Stack([fits[i] for i in order], [plans[i] for i in order], self.device)
        images, labels = self._images(data)
        vector = stack.start
        velocity = torch.zeros_like(vector)
        loss_sum = torch.zeros(len(fits), device=self.device)
        border = vector.shape[1] - self.head_parameters
        for step, active in enumerate(stack.active):
            part = slice(active)
            rows, mask = stack.rows[step, part], stack.mask[step, part]
            batch = images[rows.reshape(-1)]
            if stack.moves is not None:
                batch = move(batch, stack.moves[step, part].reshape(-1, 3))
            # Of those still training alone, and written in place: `w` lies in `vector`.
            w = vector[part].detach().requires_grad_()
            x = self.prepare(batch).unflatten(0, rows.shape).to(self.flat.dtype)
            # Under vmap GroupNorm does not take channels-last images of several channels.
            first, *others = self._forward(w.to(self.flat.dtype), x.contiguous())
            truth = labels[rows.reshape(-1)]
            each = torch.zeros(rows.shape, device=self.device)
            for logits in (first.float() + stack.shift[part, None, :], *others):
                each = each + F.cross_entropy(
                    logits.float().flatten(0, 1), truth, reduction="none"
                ).view(rows.shape)
            weight = mask if stack.weights is None else mask * stack.weights[step, part]
            loss = (weight * each).sum(1) / weight.sum(1).clamp_min(1e-6)
            [g] = torch.autograd.grad(loss.sum(), w)
            with torch.no_grad():
                v = velocity[part]
                if stack.correction is not None:
                    g.add_(stack.correction[part])
                if work.weight_decay:
                    g.add_(w, alpha=work.weight_decay)
                if stack.anchor is not None:
                    g.add_(stack.pull[part] * (w - stack.anchor[part]))
                if stack.trained is not None:
                    # A new phase starts a new optimizer; what it freezes has no gradient.
                    v.mul_(stack.goes_on[step, part, None])
                    g[:, :border].mul_(stack.trained[step, part, :1])
                    g[:, border:].mul_(stack.trained[step, part, 1:])
                if work.clip_norm:
                    norm = torch.linalg.vector_norm(g, dim=1, keepdim=True)
                    g.mul_((work.clip_norm / norm.clamp_min(1e-12)).clamp_max(1.0))
                v.mul_(work.momentum).add_(g)
                w.add_(v, alpha=-work.lr)
                loss_sum[part] += loss * stack.last_epoch[step, part]
        vectors = vector.cpu().numpy()
        losses = loss_sum.cpu().numpy()
        results: list[FitResult | None] = [None] * len(fits)
        for place, i in enumerate(order):
            count = plans[i].count
            results[i] = FitResult(
                vectors[place].copy(), float(losses[place]) / count, count * fits[i].epochs(work)
            )
        return [result for result in results if result is not None]

    def _forward(self, vectors: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """[a, P] parameters and [a, b, C, H, W] images to [a, b, classes] logits, one or more."""
        names, shapes = self.flat.layout.keys(), self.flat.layout.values()
        # One split, so that its backward is one concatenation.
        parts = vectors.split(self._sizes, dim=1)
        parameters = {
            name: part.view(-1, *shape)
            for name, shape, part in zip(names, shapes, parts, strict=True)
        }

        def one(parameters: dict[str, Tensor], images: Tensor) -> Any:
            return functional_call(self.flat.module, parameters, (images,))

        logits = vmap(one)(parameters, x)
        return logits if isinstance(logits, tuple) else (logits,)

    def _plan(self, fit: Fit, work: LocalWork, data: ClientData) -> "_Plan":
        rows = data.train_rows(fit.client)
        height = data.dataset.x_train.shape[1]
        epochs = list(batches(work, fit.epochs(work), fit.client, len(rows), height))
        return _Plan(rows, epochs, fit.plan(work))


class _Plan:
    """One fit's batches and where its samples lie among all."""

    def __init__(
        self, rows: NDArray[np.int64], epochs: list[list[Batch]], phases: tuple[Phase, ...]
    ) -> None:
        self.rows, self.count = rows, len(rows)
        self.batches = [batch for epoch in epochs for batch in epoch]
        self.steps = len(self.batches)
        self.last_epoch = self.steps - len(epochs[-1])
        self.parts = [p.part for p in phases for _ in range(p.epochs * len(epochs[-1]))]
        """What each step trains."""
        ends = np.cumsum([p.epochs * len(epochs[-1]) for p in phases])
        self.starts = {0, *map(int, ends[:-1])}
        """Steps that begin a phase."""


class _Stack:
    """A chunk's fits as padded tensors on the device: T steps, B fits, batches of b."""

    def __init__(self, fits: list[Fit], plans: list[_Plan], device: torch.device) -> None:
        steps = plans[0].steps
        width = max(len(batch.rows) for plan in plans for batch in plan.batches)
        shape = (steps, len(fits), width)
        rows, mask = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        moved = any(batch.moves is not None for plan in plans for batch in plan.batches)
        moves = np.zeros((*shape, 3), np.int64) if moved else None
        weighted = any(fit.sample_weights is not None for fit in fits)
        weights = np.ones(shape, np.float32) if weighted else None
        last_epoch = np.zeros(shape[:2], np.float32)
        trained, goes_on = np.ones((*shape[:2], 2), np.float32), np.ones(shape[:2], np.float32)
        for i, (fit, plan) in enumerate(zip(fits, plans, strict=True)):
            for t, batch in enumerate(plan.batches):
                b = len(batch.rows)
                rows[t, i, :b], mask[t, i, :b] = plan.rows[batch.rows], 1.0
                if moves is not None and batch.moves is not None:
                    moves[t, i, :b] = batch.moves
                if weights is not None and fit.sample_weights is not None:
                    weights[t, i, :b] = fit.sample_weights[batch.rows]
                if t >= plan.last_epoch:
                    last_epoch[t, i] = b
                trained[t, i] = {"all": (1, 1), "body": (1, 0), "head": (0, 1)}[plan.parts[t]]
                goes_on[t, i] = t not in plan.starts
        self.active = [sum(plan.steps > t for plan in plans) for t in range(steps)]

        def put(array: NDArray[Any]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        self.rows, self.mask, self.last_epoch = put(rows), put(mask), put(last_epoch)
        self.moves = None if moves is None else put(moves)
        self.weights = None if weights is None else put(weights)
        self.start = put(np.stack([fit.start for fit in fits]))
        phased = any(fit.phases for fit in fits)
        self.trained, self.goes_on = (put(trained) if phased else None), put(goes_on)
        """[T, B, 2] whether a step trains body and head; [T, B] 0 where a phase begins."""
        self.correction = None
        if any(fit.correction is not None for fit in fits):
            zero = np.zeros_like(fits[0].start)
            corrections = [zero if fit.correction is None else fit.correction for fit in fits]
            self.correction = put(np.stack(corrections))
        shifts = [0.0 if fit.logit_shift is None else fit.logit_shift for fit in fits]
        classes = max((s.size for s in shifts if isinstance(s, np.ndarray)), default=1)
        self.shift = put(np.stack([np.broadcast_to(np.float32(s), classes) for s in shifts]))
        # A fit without an anchor is not pulled, so any vector serves.
        pulls = [[0.0 if fit.anchor is None else fit.pull] for fit in fits]
        self.anchor, self.pull = None, put(np.array(pulls, np.float32))
        if any(map(any, pulls)):
            anchors = [fit.start if fit.anchor is None else fit.anchor for fit in fits]
            self.anchor = put(np.stack(anchors))
