"""What is installed, reachable and missing here, and what to do about it."""

import http.client
import importlib.metadata
import os
import platform
import shutil
import urllib.request
from pathlib import Path

from fedcoe.config import load_settings
from fedcoe.data.dataset import verify_dataset
from fedcoe.data.partition import load_partition
from fedcoe.errors import FedCoEError
from tasks.delivery import masked

PACKAGES = ("torch", "torchvision", "prefect", "mlflow", "dvc", "optuna")
Finding = dict[str, str]


def examine(root: Path) -> list[Finding]:
    """One finding a line: status (`ok`, `note`, `bad`), what was looked at, what was found."""
    return [
        _finding("ok", "python", f"{platform.python_version()} on {platform.machine()}"),
        *(_package(name) for name in PACKAGES),
        _pins(),
        *_devices(),
        _settings(root),
        _folder(root, "data", "fedcoe fetch"),
        _folder(root, "partitions", "dvc repro partition"),
        _dvc(root),
        _disk(root),
        _server("Prefect", os.environ.get("PREFECT_API_URL"), "/health"),
        _server("MLflow", os.environ.get("MLFLOW_TRACKING_URI"), "/health"),
    ]


def _finding(status: str, what: str, found: str) -> Finding:
    return {"status": status, "what": what, "found": found}


def _package(name: str) -> Finding:
    try:
        return _finding("ok", name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return _finding("bad", name, "not installed: `pip install -c constraints.txt -e .`")


def _pins() -> Finding:
    """The two versions that break Prefect without any package saying so."""
    version = {name: importlib.metadata.version(name) for name in ("fastapi", "sqlalchemy")}
    fastapi, alchemy = (tuple(int(part) for part in v.split(".")[:2]) for v in version.values())
    found = ", ".join(f"{name} {v}" for name, v in version.items())
    if fastapi >= (0, 151) or alchemy >= (2, 1):
        advice = "breaks Prefect: `pip install -c constraints.txt -e .`"
        return _finding("bad", "pins", f"{found}: {advice}")
    return _finding("ok", "pins", found)


def _devices() -> list[Finding]:
    import torch

    from fedcoe.engine.devices import gpus
    from fedcoe.engine.trainer import native_bf16

    cores = len(os.sched_getaffinity(0))
    precision = "bf16 natively" if native_bf16() else "fp32 (no native bf16)"
    findings = [_finding("ok", "processor", f"{cores} cores, {precision}")]
    usable, seen = gpus(), torch.cuda.device_count()
    findings += [_finding("ok", name, torch.cuda.get_device_name(name)) for name in usable]
    if not seen:
        findings.append(_finding("note", "cuda", "no GPU here; training runs on the processor"))
    elif len(usable) < seen:
        built = " ".join(torch.cuda.get_arch_list()) or "none"
        advice = f"driver for CUDA {torch.version.cuda} or newer; kernels here: {built}"
        left = f"{seen - len(usable)} of {seen} GPUs are of no use to this torch: {advice}"
        findings.append(_finding("note", "cuda", left))
    return findings


def _settings(root: Path) -> Finding:
    try:
        settings = load_settings(root / "params.yaml")
    except FedCoEError as error:
        return _finding("bad", "params.yaml", str(error))
    return _finding("ok", "params.yaml", f"{settings.method.name}, {settings.train.rounds} rounds")


def _folder(root: Path, name: str, mend: str) -> Finding:
    try:
        if name == "data":
            info = verify_dataset(root / name).info
            found = f"{info.name}, {info.train:,} + {info.test:,} images"
        else:
            partition = load_partition(root / name)
            found = f"{partition.seen} clients + {partition.new} new, {partition.fingerprint}"
    except FedCoEError as error:
        return _finding("note", f"{name}/", f"{error}; `{mend}`")
    return _finding("ok", f"{name}/", found)


def _dvc(root: Path) -> Finding:
    if (root / ".dvc").is_dir():
        return _finding("ok", "DVC project", "initialised")
    return _finding("note", "DVC project", "none here: `git init && dvc init`")


def _disk(root: Path) -> Finding:
    free = shutil.disk_usage(root).free / 2**30
    status = "ok" if free > 2 else "bad"
    return _finding(status, "disk", f"{free:.0f} GiB free" + ("" if free > 2 else ", too little"))


def _server(name: str, url: str | None, health: str) -> Finding:
    url = masked(url or "no server set")
    if not url.startswith("http"):
        return _finding("ok", name, f"embedded ({url})")
    try:
        with urllib.request.urlopen(url.rstrip("/") + health, timeout=3) as answer:
            return _finding("ok", name, f"{url} answers {answer.status}")
    except (OSError, ValueError, http.client.HTTPException) as error:
        return _finding("bad", name, f"{url} does not answer ({error}); start it or unset it")
