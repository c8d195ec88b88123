"""Which devices are found, with what torch would say of GPUs that this machine has not got."""

import socket
from types import SimpleNamespace

import pytest
import torch

from fedcoe.config import RuntimeSettings, validate_settings
from fedcoe.engine.devices import gpus, hardware, no_memory, set_up
from fedcoe.engine.trainer import native_bf16
from fedcoe.errors import FedCoEError
from tasks.doctor import examine
from tasks.services import devices
from tasks.trial import trial_settings

BUILT = ["sm_75", "sm_80", "sm_90a", "compute_120"]


@pytest.fixture
def machine(monkeypatch):
    """machine((8, 0), ...): GPUs of these compute capabilities; usable=False: an old driver."""

    def make(*capabilities, usable=True):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable and bool(capabilities))
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: BUILT if usable else [])
        monkeypatch.setattr(
            torch.cuda,
            "get_device_capability",
            lambda device: capabilities[int(str(device).removeprefix("cuda:"))],
        )
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device}")

    return make


@pytest.mark.parametrize(
    ("capability", "found"),
    [
        ((7, 0), False),
        ((7, 5), True),
        ((8, 6), True),
        ((9, 0), True),
        ((10, 0), False),
        ((12, 1), True),
        ((13, 0), True),
    ],
)
def test_a_gpu_is_taken_that_this_torch_has_kernels_for(machine, capability, found):
    machine(capability)
    assert gpus() == (("cuda:0",) if found else ())


def test_the_device_decides_what_auto_comes_to(machine):
    machine((8, 0), (7, 0), (9, 0))
    both = ("cuda:0", "cuda:2")
    assert hardware(RuntimeSettings(engine="auto", device="auto")) == (True, both)
    assert hardware(RuntimeSettings(engine="sequential", device="cuda")) == (False, both)
    assert hardware(RuntimeSettings(engine="auto", device="cpu")) == (False, ("cpu",))
    assert hardware(RuntimeSettings(engine="vectorized", device="cpu")) == (True, ("cpu",))


def test_trials_share_the_cores_but_not_where_a_gpu_does_the_work(machine, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))
    machine((8, 0))

    def workers(**runtime):
        settings = validate_settings({"runtime": runtime}, "test")
        plan = SimpleNamespace(settings=settings, tune=settings.tune)
        return trial_settings(plan, {}, processes=2).runtime.workers

    assert workers(device="cpu") == 4
    assert workers(engine="sequential") == workers() == 0  # one worker a GPU


@pytest.mark.parametrize("counted", [0, 1])
def test_a_gpu_with_an_old_driver_is_left_out_and_asking_for_it_is_an_error(machine, counted):
    machine(*[(9, 0)] * counted, usable=False)
    assert hardware(RuntimeSettings(engine="auto", device="auto")) == (False, ("cpu",))
    with pytest.raises(FedCoEError, match=r"runtime\.device: cuda: there is no GPU"):
        hardware(RuntimeSettings(engine="auto", device="cuda"))


def test_doctor_names_gpus_and_says_what_one_that_is_of_no_use_needs(machine, tmp_path):
    machine((8, 0), (6, 1))
    found = {row["what"]: row["found"] for row in examine(tmp_path)}
    assert found["cuda:0"] == "GPU cuda:0"
    assert found["cuda"].startswith("1 of 2 GPUs are of no use to this torch: driver for CUDA")
    assert "sm_75 sm_80" in found["cuda"]


def test_every_worker_sees_one_gpu_and_one_without_sees_none(machine, monkeypatch):
    host = socket.gethostname()
    machine()
    assert devices() == {f"{host}-cpu": ""}
    machine((8, 0), (8, 0))
    assert devices() == {f"{host}-gpu0": "0", f"{host}-gpu1": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert devices() == {f"{host}-gpu3": "3", f"{host}-gpu5": "5"}


def test_half_precision_is_asked_of_each_gpu(machine):
    machine((8, 0), (7, 5))
    assert native_bf16("cuda:0")
    assert not native_bf16("cuda:1")


def test_a_gpu_is_set_up_for_reproducible_sums_and_whole_fp32(monkeypatch):
    chosen, threads = [], torch.get_num_threads()
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    try:
        set_up("cuda:1", 2)
        assert chosen == ["cuda:1"]
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_a_full_machine_or_gpu_is_told_from_other_errors(error, full):
    assert no_memory(error) is full
