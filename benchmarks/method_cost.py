"""(c) What a round of FedCoE costs over a round of FedAvg, for K = 1, 2, 3 experts a client.

Personal experts included. The gate update is timed apart and added in two ways: in every round,
and as often as the default settings do it (when evaluating).

    python benchmarks/method_cost.py --data data [--rounds 3]
"""

import argparse
import statistics
import time
from contextlib import ExitStack
from pathlib import Path

from bench import ground, keep

from fedcoe.rounds import train_round, update_gate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    common = {
        "partition": {"clients": 20, "new_clients": 0.0},
        "train": {"rounds": 100, "batch_size": 64},
    }
    methods = {"fedavg": {"name": "fedavg"}} | {
        f"fedcoe K={k}": {"name": "fedcoe", "experts_per_client": k} for k in (1, 2, 3)
    }
    rounds: dict[str, list[float]] = {name: [] for name in methods}
    gates: dict[str, list[float]] = {name: [] for name in methods}
    with ExitStack() as stack:
        grounds = {
            name: stack.enter_context(ground(args.data, common | {"method": method}))
            for name, method in methods.items()
        }
        states = {name: g.method.init() for name, g in grounds.items()}
        for _ in range(args.rounds + 1):
            for name, g in grounds.items():
                started = time.perf_counter()
                states[name], _ = train_round(g.engine, g.method, states[name])
                rounds[name].append(time.perf_counter() - started)
                started = time.perf_counter()
                if g.method.has_gate:
                    everyone = range(g.method.federation.clients)
                    states[name] = update_gate(g.engine, g.method, states[name], everyone)
                gates[name].append(time.perf_counter() - started)
        every = grounds["fedavg"].settings.evaluate.every
        info = grounds["fedavg"].data.dataset.info
    round_s = {name: statistics.median(seconds[1:]) for name, seconds in rounds.items()}
    gate_s = {name: statistics.median(seconds[1:]) for name, seconds in gates.items()}
    base = round_s["fedavg"]
    figures = {
        "dataset": info.name,
        "round_seconds": round_s,
        "gate_update_seconds": gate_s,
        "ratio_gate_every_round": {n: (s + gate_s[n]) / base for n, s in round_s.items()},
        f"ratio_gate_every_{every}_rounds": {
            n: (s + gate_s[n] / every) / base for n, s in round_s.items()
        },
    }
    keep("method_cost", figures)
    for name, seconds in round_s.items():
        print(
            f"{name}: round {seconds:.2f} s, gate {gate_s[name]:.2f} s; x "
            f"{(seconds + gate_s[name]) / base:.2f} of FedAvg's with a gate update every round, "
            f"x {(seconds + gate_s[name] / every) / base:.2f} every {every} rounds"
        )


if __name__ == "__main__":
    main()
