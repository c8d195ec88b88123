"""(item 6) What Prefect, MLflow and checkpoints cost: the flow against the same rounds alone.

Both run FedCoE with the same settings, evaluations included; start-up and the end of the flow
(registering models, figures) are reported apart.

    python benchmarks/overhead.py --data data [--rounds 20]
"""

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench import ground, keep
from ruamel.yaml import YAML

from fedcoe.cold_start import serve_clients
from fedcoe.evaluate import evaluate, join_scores, score_clients, score_global
from fedcoe.rounds import evaluation_due, train_round, update_gate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    values = {
        "train": {"rounds": args.rounds, "batch_size": 64, "augment": "crop_flip"},
        "evaluate": {"every": 10},
    }
    alone, alone_rounds = library(args.data, values)
    total, marks = flow(args.data, values)
    rounds = marks[-1] - marks[0]
    # The first round warms workers up in both.
    ratio = rounds / sum(alone_rounds[1:]) - 1
    figures = {
        "rounds": args.rounds,
        "library_seconds": alone,
        "flow_seconds": total,
        "library_rounds_2_to_end": sum(alone_rounds[1:]),
        "flow_rounds_2_to_end": rounds,
        "overhead_of_rounds": ratio,
        "overhead_of_whole_run": total / alone - 1,
    }
    keep("overhead", figures)
    print(figures)


def library(data: Path, values: dict[str, Any]) -> tuple[float, list[float]]:
    begun, seconds = time.perf_counter(), []
    with ground(data, values) as g:
        method, engine = g.method, g.engine
        state, labels = method.init(), np.asarray(g.data.dataset.y_test)
        everyone = list(range(method.federation.clients))
        counts = [int(n) for n in method.federation.train_counts]
        for _ in range(g.settings.train.rounds):
            started = time.perf_counter()
            state, _ = train_round(engine, method, state)
            if evaluation_due(method, state):
                state = update_gate(engine, method, state, everyone)
                sent = state.for_clients()
                own = engine.map(score_clients, method, sent, over=engine.shards(everyone, counts))
                rows = np.array_split(np.arange(len(labels)), engine.workers)
                overall = join_scores(engine.map(score_global, method, sent, over=rows))
                clients = [client for shard in own for client in shard]
                state, _ = evaluate(method, state, clients, overall, labels)
                new = range(g.data.partition.seen, g.data.partition.clients)
                engine.map(
                    serve_clients,
                    method,
                    state.for_clients(),
                    over=engine.shards(new, [1] * len(new)),
                )
            seconds.append(time.perf_counter() - started)
    return time.perf_counter() - begun, seconds


def flow(data: Path, values: dict[str, Any]) -> tuple[float, list[float]]:
    from flows.cli import _quiet

    _quiet()
    begun, marks = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        shutil.copytree(data, root / "data")
        YAML().dump(values, root / "params.yaml")
        os.environ["PREFECT_HOME"] = str(root / "prefect")
        from flows.federated_training import federated_training
        from flows.pipeline import partition_data
        from tasks.progress import LISTENER

        partition_data(root)
        LISTENER.set(
            lambda event, figures: marks.append(time.perf_counter()) if event == "round" else None
        )
        federated_training(str(root))
    return time.perf_counter() - begun, marks


if __name__ == "__main__":
    main()
