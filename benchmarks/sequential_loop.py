"""(a) FedAvg rounds here against the plain loop that most research code is: clients one by one,
fp32, default layout, one DataLoader a client, PyTorch's threads on all cores.

Same clients, model, batch size, steps and learning rate; rounds of both alternate.

    python benchmarks/sequential_loop.py --data data [--rounds 3] [--model cnn4] [--batch 64]
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from bench import ground, keep
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fedcoe.engine.clients import TRAIN
from fedcoe.models import build_expert
from fedcoe.rounds import train_round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="cnn4")
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    values = {
        "partition": {"clients": 20, "new_clients": 0.0, "alpha": 0.1},
        "model": {"name": args.model},
        "method": {"name": "fedavg"},
        "train": {"rounds": 100, "batch_size": args.batch, "lr": 0.02, "lr_schedule": "constant"},
    }
    bf16, fp32, loop = [], [], []
    with (
        ground(args.data, values) as fast,
        ground(args.data, values | {"runtime": {"precision": "fp32"}}) as exact,
    ):
        peer = Loop(fast, args)
        states = [g.method.init() for g in (fast, exact)]
        images = 0
        for number in range(args.rounds + 1):
            for i, (g, seconds) in enumerate(((fast, bf16), (exact, fp32))):
                torch.set_num_threads(1)
                started = time.perf_counter()
                states[i], record = train_round(g.engine, g.method, states[i])
                seconds.append(time.perf_counter() - started)
                images = record.images
            torch.set_num_threads(fast.engine.workers)
            started = time.perf_counter()
            peer.round()
            loop.append(time.perf_counter() - started)
            print(f"round {number}: {bf16[-1]:.2f} s, fp32 {fp32[-1]:.2f} s, loop {loop[-1]:.2f} s")
    # The first round starts workers and warms caches up.
    medians = {
        name: statistics.median(seconds[1:])
        for name, seconds in (("engine", bf16), ("engine_fp32", fp32), ("loop", loop))
    }
    figures = {
        "model": args.model,
        "dataset": fast.data.dataset.info.name,
        "images_a_round": images,
        "round_seconds": medians,
        "images_per_second": {name: images / s for name, s in medians.items()},
        "speedup": medians["loop"] / medians["engine"],
        "speedup_fp32": medians["loop"] / medians["engine_fp32"],
    }
    keep("sequential_loop", figures)
    print(f"x {figures['speedup']:.2f} of the loop's speed ({figures['speedup_fp32']:.2f} in fp32)")


class Loop:
    """The peer: textbook FedAvg."""

    def __init__(self, ground_, args: argparse.Namespace) -> None:
        info, data = ground_.data.dataset.info, ground_.data
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (info.mean, info.std))
        self.loaders = []
        for client in range(data.partition.seen):
            x = torch.from_numpy(data.images(client, TRAIN)).permute(0, 3, 1, 2) / 255
            y = torch.from_numpy(data.labels(client, TRAIN))
            dataset = TensorDataset(((x - mean) / std).contiguous(), y)
            self.loaders.append(DataLoader(dataset, args.batch, shuffle=True))
        self.server = build_expert(
            args.model, ground_.method.federation.shape, len(info.classes), 0
        )
        self.local = build_expert(args.model, ground_.method.federation.shape, len(info.classes), 0)

    def round(self) -> None:
        start = {name: value.clone() for name, value in self.server.state_dict().items()}
        total = {name: torch.zeros_like(value) for name, value in start.items()}
        count = sum(len(loader.dataset) for loader in self.loaders)
        loss_of = nn.CrossEntropyLoss()
        for loader in self.loaders:
            self.local.load_state_dict(start)
            optimizer = torch.optim.SGD(self.local.parameters(), lr=0.02, momentum=0.9)
            for x, y in loader:
                optimizer.zero_grad()
                loss_of(self.local(x), y).backward()
                optimizer.step()
            for name, value in self.local.state_dict().items():
                total[name] += value * (len(loader.dataset) / count)
        self.server.load_state_dict(total)


if __name__ == "__main__":
    main()
