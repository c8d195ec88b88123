"""The devices that clients' side can compute on, and how torch is set up on one."""

import os

import torch
from threadpoolctl import threadpool_limits

from fedcoe.config import RuntimeSettings
from fedcoe.errors import FedCoEError


def gpus() -> tuple[str, ...]:
    """`cuda:<index>` of every GPU that this torch can compute on; one that it only sees, with an
    old driver or without kernels for its generation, is left out."""
    if not torch.cuda.is_available():
        return ()
    return tuple(f"cuda:{i}" for i in range(torch.cuda.device_count()) if _has_kernels(i))


def _has_kernels(index: int) -> bool:
    if torch.version.hip:
        return True
    here = torch.cuda.get_device_capability(index)
    for name in torch.cuda.get_arch_list():  # sm_80, sm_90a: machine code; compute_90: portable
        kind, _, number = name.partition("_")
        built = divmod(int("".join(filter(str.isdigit, number))), 10)
        if built <= here and (kind == "compute" or built[0] == here[0]):
            return True
    return False


def visible() -> tuple[str, ...]:
    """What CUDA_VISIBLE_DEVICES calls each of `gpus`; those that it hides stay hidden."""
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    found = [int(name.removeprefix("cuda:")) for name in gpus()]
    return tuple(named[i] if named != [""] else str(i) for i in found)


def hardware(runtime: RuntimeSettings) -> tuple[bool, tuple[str, ...]]:
    """Whether to train vectorized, and on which devices.

    Raises:
        FedCoEError: GPUs are asked for, and there is none to compute on.
    """
    found = () if runtime.device == "cpu" else gpus()
    if runtime.device == "cuda" and not found:
        raise FedCoEError(
            "runtime.device: cuda: there is no GPU that this torch can use; `fedcoe doctor` says "
            "what it sees"
        )
    vectorized = runtime.engine == "vectorized" or (runtime.engine == "auto" and bool(found))
    return vectorized, found or ("cpu",)


def set_up(device: str, devices: int) -> None:
    """Make this process compute on a device, one of so many that are computed on at once.

    On a processor with one thread: two OpenMP threads beside another busy process are several times
    slower than one, and results must not depend on the thread count. A GPU leaves what is solved in
    closed form to the processor, in a share of its cores.
    """
    threads = 1
    if torch.device(device).type == "cuda":
        threads = max(1, len(os.sched_getaffinity(0)) // devices)
        # cuBLAS reads this when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.cuda.set_device(device)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        # fp32 is fp32: TensorFloat-32, the default in convolutions, has 10 bits of mantissa.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_num_threads(threads)
    threadpool_limits(threads)


_FULL = (
    "out of memory",
    "can't allocate memory",
    "ALLOC_FAILED",
    # What cuDNN says when no kernel's workspace fits.
    "unable to find an engine to execute",
)


def no_memory(error: BaseException) -> bool:
    """Whether an error says that a machine or a GPU is full; torch has a class for one way only."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _FULL)
