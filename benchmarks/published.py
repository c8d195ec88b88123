"""Our baselines beside figures that others published: PFLlib's common setup (JMLR 2025).

Fashion-MNIST, 20 clients, all in every round, Dirichlet(0.1), 1 local epoch, batch 10, SGD with
learning rate 0.005, no momentum, 4-layer CNN; accuracy on the clients' own tests, weighted by
samples. Published are the best of up to 2,000 rounds; here methods take turns, a round each, for as
long as asked, and every evaluation is kept.

    fedcoe fetch fashion-mnist
    python benchmarks/published.py --data data [--minutes 30]
"""

import argparse
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from bench import Ground, ground, keep

from fedcoe.evaluate import evaluate, join_scores, score_clients, score_global
from fedcoe.rounds import train_round
from fedcoe.state import ServerState

PUBLISHED = {"fedavg": 85.85, "fedrep": 97.56, "ditto": 97.47}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=int, default=5)
    args = parser.parse_args()
    common = {
        # PFLlib splits 75/25; the little that validation takes here comes off training.
        "partition": {"clients": 20, "new_clients": 0.0, "test": 0.25, "validation": 0.02},
        "train": {
            "rounds": 2000,
            "batch_size": 10,
            "lr": 0.005,
            "lr_schedule": "constant",
            "momentum": 0.0,
        },
    }
    curves: dict[str, list[dict[str, float]]] = {name: [] for name in PUBLISHED}
    ends = time.monotonic() + 60 * args.minutes
    with ExitStack() as stack:
        grounds = {
            name: stack.enter_context(ground(args.data, common | {"method": {"name": name}}))
            for name in PUBLISHED
        }
        states = {name: g.method.init() for name, g in grounds.items()}
        while time.monotonic() < ends:
            for name, g in grounds.items():
                states[name], record = train_round(g.engine, g.method, states[name])
                if states[name].round % args.every == 0:
                    accuracy = on_clients(g, states[name])
                    row = {"round": record.round, "accuracy": accuracy, "loss": record.train_loss}
                    curves[name].append(row)
                    print(f"{name:8s} round {record.round}: {100 * accuracy:.2f} %", flush=True)
            if states["ditto"].round % args.every == 0:
                keep("published", {"published": PUBLISHED, "settings": common, "curves": curves})


def on_clients(g: Ground, state: ServerState) -> float:
    """Accuracy on all clients' test splits, weighted by samples."""
    clients = range(g.method.federation.clients)
    shards = g.engine.shards(clients, [int(n) for n in g.method.federation.train_counts])
    scored = g.engine.map(score_clients, g.method, state.for_clients(), over=shards)
    # The official test set has no part in this setup; one row of it fills the argument.
    overall = g.engine.run(score_global, g.method, state.for_clients(), np.arange(1))
    labels = np.asarray(g.data.dataset.y_test[:1])
    _, found = evaluate(
        g.method, state, [c for part in scored for c in part], join_scores([overall]), labels
    )
    return found.personalized["accuracy"]


if __name__ == "__main__":
    main()
