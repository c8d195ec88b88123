"""Models as flat vectors: what travels between server and clients is one float32 array a model."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Vector = NDArray[np.float32]
Layout = Mapping[str, tuple[int, ...]]
"""Names and shapes of a model's parameters, in the order they stand in its vector."""


class FlatModel:
    """A model whose parameters are views of one flat buffer, and whose gradients fill another.

    An optimizer step is then a few operations on one long vector instead of several on each of
    many small tensors, and loading or reading a model is one copy.

    In half precision the model computes with a bfloat16 copy of the vector, and the vector, the
    gradient and the optimizer stay float32 (master weights, Micikevicius et al., ICLR 2018).

    Args:
        model: any module without buffers.
        dtype: of the computation.

    Raises:
        ValueError: the model has buffers (batch statistics). Averaging parameters while leaving
            buffers behind is a silent error, so such models are refused.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        buffers = [name for name, _ in model.named_buffers()]
        if buffers:
            raise ValueError(f"model has buffers that no server averages: {', '.join(buffers)}")
        self.layout = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.vector = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).to(device)
        self.gradient = torch.zeros_like(self.vector)
        self.dtype = dtype
        self.module = model.to(device=device, dtype=self.dtype)
        self._values = self.vector.to(self.dtype)
        self._parameters = list(self.module.parameters())
        sizes = [p.numel() for p in self._parameters]
        self._gradients = [
            part.view(p.shape)
            for p, part in zip(self._parameters, self.gradient.split(sizes), strict=True)
        ]
        for p, part in zip(self._parameters, self._values.split(sizes), strict=True):
            p.data = part.view(p.shape)

    def changed(self) -> None:
        """Let the model see what was written into `vector`."""
        if self._values is not self.vector:
            self._values.copy_(self.vector)

    def backward(self, loss: Tensor) -> None:
        """Put the gradient of a scalar loss into `gradient`."""
        found = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        for part, gradient in zip(self._gradients, found, strict=True):
            if gradient is None:
                part.zero_()
            else:
                part.copy_(gradient)

    def load(self, vector: Vector | Tensor) -> None:
        """Copy a [P] vector into the parameters."""
        self.vector.copy_(torch.as_tensor(vector))
        self.changed()

    def read(self) -> Vector:
        """A copy of the parameters as a [P] float32 array."""
        return self.vector.detach().cpu().numpy().copy()


def initial_vector(model: nn.Module) -> Vector:
    """The model's parameters as one [P] float32 array, in the order of `named_parameters`."""
    return np.concatenate([p.detach().numpy().reshape(-1) for p in model.parameters()])


def to_tensors(vector: Vector, layout: Layout) -> dict[str, Vector]:
    """Cut a [P] vector into named arrays."""
    sizes = [int(np.prod(shape)) for shape in layout.values()]
    parts = np.split(vector, np.cumsum(sizes)[:-1])
    return {
        name: part.reshape(shape) for (name, shape), part in zip(layout.items(), parts, strict=True)
    }


def from_tensors(tensors: Mapping[str, Vector], layout: Layout) -> Vector:
    """Join named arrays into one [P] vector.

    Raises:
        ValueError: a name is missing, unknown, or of another shape than the layout says.
    """
    if set(tensors) != set(layout):
        raise ValueError(f"tensors {sorted(set(tensors) ^ set(layout))} do not fit the model")
    for name, shape in layout.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{name} has shape {tensors[name].shape}, the model's is {shape}")
    return np.concatenate([tensors[name].reshape(-1) for name in layout]).astype(np.float32)
