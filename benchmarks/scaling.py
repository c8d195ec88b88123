"""(d, e) How a round's time and memory grow with clients, cohort, experts and workers.

Each row runs in a process of its own, so that its peak memory is its own.

    python benchmarks/scaling.py --data data [--only clients]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROWS: dict[str, list[dict[str, int]]] = {
    # Idle clients must cost nothing: the cohort and its images stay the same.
    "clients": [{"clients": n, "cohort": 10} for n in (10, 100, 500, 2000)],
    "cohort": [{"clients": 2000, "cohort": n} for n in (10, 20, 50, 100)],
    "experts": [{"clients": 100, "cohort": 20, "experts": m} for m in (1, 2, 4, 8, 16)],
    "workers": [{"clients": 100, "cohort": 20, "workers": w} for w in (1, 2)],
}
SAMPLES = 25
"""Training images a client."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--only", choices=ROWS)
    parser.add_argument("--row", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row is not None:
        print(json.dumps(measure(args.data, **args.row)))
        return
    from bench import keep

    table: dict[str, list[dict[str, Any]]] = {}
    for name, rows in ROWS.items():
        if args.only in (None, name):
            for row in rows:
                command = [sys.executable, __file__, "--data", args.data, "--row", json.dumps(row)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found = row | json.loads(done.stdout.splitlines()[-1])
                table.setdefault(name, []).append(found)
                print(name, found, flush=True)
    keep("scaling", table)


def measure(
    data: Path, clients: int, cohort: int, experts: int = 4, workers: int = 0, rounds: int = 4
) -> dict[str, float]:
    """Median round of FedCoE, personal experts included, and peak memory of all processes."""
    import numpy as np
    from bench import ground, resident_gib

    from fedcoe.data.dataset import load_dataset
    from fedcoe.data.partition import Partition
    from fedcoe.rounds import train_round

    dataset = load_dataset(data)
    total = len(dataset.y_train)
    assert clients * SAMPLES <= total, "too few images for so many clients"
    # The last client holds what is left over and never trains: it counts as the one new client.
    owner = np.full(total, clients, np.int32)
    owner[np.random.default_rng(0).permutation(total)[: clients * SAMPLES]] = np.repeat(
        np.arange(clients), SAMPLES
    )
    if clients * SAMPLES == total:
        clients -= 1
        owner[owner == clients + 1] = clients
    partition = Partition(
        client=owner,
        split=np.zeros(total, np.int8),
        group=np.zeros(clients + 1, np.int8),
        test_group=np.zeros(len(dataset.y_test), np.int8),
        seen=clients,
        new=1,
        skew="none",
        names=tuple(f"client-{k:04d}" for k in range(clients + 1)),
    )
    values = {
        "method": {"name": "fedcoe", "experts": experts},
        "train": {"rounds": 100, "batch_size": 25, "cohort": cohort / clients},
        "runtime": {"workers": workers},
    }
    seconds, images = [], 0
    with ground(data, values, partition) as g:
        state = g.method.init()
        for _ in range(rounds):
            started = time.perf_counter()
            state, record = train_round(g.engine, g.method, state)
            seconds.append(time.perf_counter() - started)
            images = record.images
        workers = g.engine.workers
    peak = resident_gib()
    return {
        "round_seconds": statistics.median(seconds[1:]),
        "images": images,
        # An upper bound: as if every worker were as large as the largest process.
        "peak_gib_all_processes": peak * (workers + 1 if workers > 1 else 1),
    }


if __name__ == "__main__":
    main()
