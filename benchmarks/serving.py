"""What serving costs: `mlflow models serve` and the pyfunc beside bare forward passes.

    python benchmarks/serving.py [--root .]      # a folder with a trained run: models/, .fedcoe/

Rows by batch: images per second of
    one_expert    one module's forward pass on prepared tensors: the least anyone can do
    experts       the same for all experts of the mixture
    bundle        `Bundle.predict`, mode none: experts, gate, head, pooling
    pyfunc        the registered model in this process
    http          the same behind the server, one client, requests one after another, JSON both ways
One process, the threads torch takes by itself (OMP_NUM_THREADS sets them).
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import keep

from fedcoe.bundle import Bundle, load_bundle
from tasks.registry import use_default_stores

BATCHES = (1, 64, 1024)
MODEL = "models:/fedcoe@candidate"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path())
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    args = parser.parse_args()
    use_default_stores(args.root)
    import mlflow.pyfunc

    bundle = load_bundle(args.root / "models")
    served = mlflow.pyfunc.load_model(MODEL)
    every = np.load(args.root / "data" / "x_test.npy")
    rows = []
    with server() as address:
        for batch in BATCHES:
            images = np.resize(every, (batch, *every.shape[1:]))
            body = json.dumps({"inputs": images.tolist()}).encode()
            kinds: dict[str, Callable[[], Any]] = {
                "one_expert": forward(bundle, images, 1),
                "experts": forward(bundle, images, len(bundle.state.experts)),
                "bundle": lambda images=images: bundle.predict(images),
                "pyfunc": lambda images=images: served.predict(images),
                "http": lambda body=body: post(address, body),
            }
            for kind, run in kinds.items():
                row = {"batch": batch, "kind": kind} | measure(run, batch, args.seconds)
                print(row, flush=True)
                rows.append(row)
    settings = bundle.method.federation.settings
    keep(
        "serving",
        {
            "model": settings.model.name,
            "experts": len(bundle.state.experts),
            "image": list(every.shape[1:]),
            "threads": torch.get_num_threads(),
            "load_average_at_end": round(os.getloadavg()[0], 2),
            "rows": rows,
        },
    )


def forward(bundle: Bundle, images: np.ndarray, experts: int) -> Callable[[], None]:
    """Forward passes of so many experts; loading weights and preparing images are not counted."""
    trainer = bundle.trainer
    trainer.flat.load(bundle.state.experts[0])
    x = trainer.prepare(images).to(trainer.flat.dtype)

    @torch.inference_mode()
    def run() -> None:
        for _ in range(experts):
            for start in range(0, len(x), 100):  # what the trainer runs at once on a processor
                trainer.flat.module(x[start : start + 100])

    return run


def measure(run: Callable[[], Any], batch: int, seconds: float) -> dict[str, float]:
    """Medians over repetitions for so many seconds, at least 5."""
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    median = statistics.median(times)
    return {"images_per_second": round(batch / median, 1), "ms": round(1000 * median, 3)}


def post(address: str, body: bytes) -> None:
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        json.load(answer)


@contextmanager
def server() -> Iterator[str]:
    """`mlflow models serve` on a free port of this machine, gone with its children at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "mlflow", "models", "serve", "-m", MODEL),
            *("--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)),
        ],
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5)
                break
            except OSError:
                time.sleep(0.25)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    main()
