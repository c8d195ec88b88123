"""(b) FedAvg on pfl-research's CIFAR-10 setup here, in pfl and in Flower's simulation.

IID, 1,000 users x 50 images, cohort 50, 1 epoch, batch 10, lr 0.1, the same CNN (1,626,442
parameters, dropout left out everywhere). Peers run in environments of their own, one program after
another, several times over.

    python benchmarks/against_peers.py --data DATA --arrays ARRAYS.npz \
        --pfl VENV/bin/python --flower VENV/bin/python [--rounds 20] [--repeats 2]
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench import ground, iid, keep

from fedcoe.data.dataset import load_dataset
from fedcoe.evaluate import score_global
from fedcoe.rounds import train_round

PEERS = Path(__file__).with_name("peers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="Dataset folder (fedcoe fetch)")
    parser.add_argument("--arrays", type=Path, required=True, help="The same data as one .npz")
    parser.add_argument("--pfl", help="Python with pfl[pytorch]")
    parser.add_argument("--flower", help="Python with flwr[simulation]")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    # Every peer in each configuration that may be its best on a few cores.
    runs: dict[str, Any] = {
        "fedcoe bf16": lambda: ours(args, "auto"),
        "fedcoe fp32": lambda: ours(args, "fp32"),
    }
    if args.pfl:
        for options in (["--precision", "fp32"], ["--precision", "bf16"]):
            runs[f"pfl 2x1 {options[1]}"] = lambda o=options: peer(args, args.pfl, "pfl_cifar", o)
    if args.flower:
        for options in (["--cpus", "2", "--threads", "1"], ["--cpus", "2", "--threads", "2"]):
            name = f"flower {options[1]} cpus, {options[3]} threads an actor"
            runs[name] = lambda o=options: peer(args, args.flower, "flwr_cifar", o)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, run in runs.items():
            result = run()
            found[name].append(result)
            seconds = statistics.median(result["round_seconds"][1:])
            print(f"{name}: {seconds:.2f} s a round, {result['accuracy']}", flush=True)
    medians = {
        name: statistics.median([s for result in results for s in result["round_seconds"][1:]])
        for name, results in found.items()
    }
    keep(
        "against_peers",
        {
            "setup": "CIFAR-10 (JPEG), IID, 1,000 users x 50, cohort 50, batch 10, lr 0.1",
            "rounds": args.rounds,
            "repeats": args.repeats,
            "median_round_seconds": medians,
            "images_per_second": {name: 2500 / s for name, s in medians.items()},
            "speedup_of_fedcoe_bf16": {n: s / medians["fedcoe bf16"] for n, s in medians.items()},
            "speedup_of_fedcoe_fp32": {n: s / medians["fedcoe fp32"] for n, s in medians.items()},
            "accuracy": {name: [r["accuracy"] for r in results] for name, results in found.items()},
            "versions": {
                name: results[0]["version"]
                for name, results in found.items()
                if "version" in results[0]
            },
        },
    )
    for name, seconds in medians.items():
        print(f"{name:42} {seconds:6.2f} s  x {seconds / medians['fedcoe bf16']:.2f}")


def ours(args: argparse.Namespace, precision: str) -> dict[str, Any]:
    dataset = load_dataset(args.data)
    labels = np.asarray(dataset.y_test)
    values = {
        "model": {"name": "cnn3x3"},
        "method": {"name": "fedavg"},
        "train": {
            "rounds": 1500,
            "cohort": 0.05,
            "batch_size": 10,
            "lr": 0.1,
            "lr_schedule": "constant",
            "momentum": 0.0,
            "clip_norm": 0.0,
        },
        "runtime": {"precision": precision},
    }
    seconds, accuracy = [], {}
    partition = iid(len(dataset.y_train), len(labels), 1000)
    with ground(args.data, values, partition) as g:
        state = g.method.init()
        for number in range(1, args.rounds + 1):
            started = time.perf_counter()
            state, _ = train_round(g.engine, g.method, state)
            seconds.append(time.perf_counter() - started)
            if number % 10 == 0 or number == args.rounds:
                scores = g.engine.run(score_global, g.method, state, np.arange(len(labels)))
                hit = g.method.predict_global(state, scores).argmax(1) == labels
                accuracy[number] = float(hit.mean())
    return {"round_seconds": seconds, "accuracy": accuracy}


def peer(args: argparse.Namespace, python: str, script: str, options: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.json"
        command = [python, "-W", "ignore", str(PEERS / f"{script}.py"), "--data", str(args.arrays)]
        command += ["--rounds", str(args.rounds), "--out", str(out), *options]
        subprocess.run(command, check=True, capture_output=True, cwd=scratch)
        return dict(json.loads(out.read_text()))


if __name__ == "__main__":
    main()
