"""A pretend GPU: tensors that say they are on another device, and lie in this machine's memory.

What torch refuses between a processor and a GPU it refuses here: operations on tensors of both,
`.numpy()`, an index on the wrong side. So a forgotten `.to(device)` or `.cpu()` fails without the
hardware. The arithmetic is the processor's: nothing is learned of kernels, speed or memory, or of
what asks for `cuda` by name.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fedcoe.engine import pool

GPU = torch.device("lazy:0")
"""A device that torch knows and that nothing here uses; `cuda` itself asks for its driver."""
aten = torch.ops.aten
CROSSES_DEVICES = {aten._to_copy.default, aten.copy_.default}
MAY_HAVE_INDICES_ON_THE_PROCESSOR = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}


class GpuTensor(Tensor):
    """Shares memory with a tensor of the processor; only operations of this file may look."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "GpuTensor":
        made: GpuTensor = Tensor._make_subclass(
            cls, inner, False, dispatch_device=True, device_for_backend_keys=GPU
        )
        return made

    @classmethod
    def __torch_dispatch__(
        cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(operation, args, kwargs or {})


class _Gpu(TorchDispatchMode):
    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and operation.namespace == "aten":
            # Elsewhere autograd has taken these apart before they come here.
            with self:
                result = operation.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return _run(operation, args, kwargs)


def _inner(value: Any) -> Any:
    if not isinstance(value, GpuTensor):
        return value
    storage, offset = value.untyped_storage(), value.storage_offset()
    return torch.empty(0, dtype=value.dtype).set_(storage, offset, value.size(), value.stride())


def _run(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if operation is torch.ops.prim.device.default:
        return GPU
    given = tree_leaves((args, kwargs))
    on_gpu = [t for t in given if isinstance(t, GpuTensor)]
    elsewhere = [t for t in given if isinstance(t, Tensor) and not isinstance(t, GpuTensor)]
    indices = operation in MAY_HAVE_INDICES_ON_THE_PROCESSOR and isinstance(args[0], GpuTensor)
    mixed = on_gpu and any(t.dim() for t in elsewhere)
    if mixed and not indices and operation not in CROSSES_DEVICES:
        raise RuntimeError(f"{operation}: expected all tensors to be on the same device")
    asked = kwargs.get("device")
    if operation is aten.copy_.default:
        result_on_gpu = isinstance(args[0], GpuTensor)
    elif asked is not None:
        result_on_gpu = torch.device(asked).type == GPU.type
    else:
        result_on_gpu = bool(on_gpu)
    if asked is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    with torch._C._DisableTorchDispatch():
        inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
        result = operation(*inner_args, **inner_kwargs)
    # What is written into, or given back, stays the object that it was.
    same = {
        id(inner): outer
        for inner, outer in zip(tree_leaves((inner_args, inner_kwargs)), given, strict=True)
        if isinstance(outer, Tensor)
    }

    def outer(value: Any) -> Any:
        if not isinstance(value, Tensor) or id(value) in same:
            return same.get(id(value), value)
        return GpuTensor(value) if result_on_gpu else value

    return tree_map(outer, result)


@pytest.fixture
def inside() -> TorchDispatchMode:
    """with inside: this thread knows the device."""
    return _Gpu()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The device's name; engines with one worker may have it."""

    open_site, within_memory = pool.Site.open, pool._within_memory

    def opened(site: pool.Site, worker: int = 0) -> pool.ClientSide:
        with _Gpu() if str(GPU) in site.devices else nullcontext():
            return open_site(site, worker)

    def called(side: pool.ClientSide, *call: Any) -> Any:
        # Here, since modes hold for a thread and engines call clients' side from several.
        with _Gpu() if side.trainer.device == GPU else nullcontext():
            return within_memory(side, *call)

    monkeypatch.setattr(pool.Site, "open", opened)
    monkeypatch.setattr(pool, "_within_memory", called)
    # What torch does by itself when it knows the device: copy what `torch.tensor` read, and give
    # a module that moves new parameters.
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    yield str(GPU)
    torch._C._set_only_lift_cpu_tensors(False)
    torch.__future__.set_overwrite_module_params_on_conversion(False)
