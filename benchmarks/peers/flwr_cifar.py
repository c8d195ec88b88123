"""Flower's simulation runtime on pfl-research's CIFAR-10 benchmark (IID, plain FedAvg), timed.

Runs in an environment of its own (`flwr[simulation]`): 1 SuperNode a user, ClientApps in Ray
actors, one a core. `run_simulation` starts the runtime that `flwr run` starts.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time

STARTED = time.time()
os.environ.update(FLWR_TELEMETRY_ENABLED="0", RAY_USAGE_STATS_ENABLED="0")

from functools import cache  # noqa: E402
from pathlib import Path  # noqa: E402

import flwr  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.serverapp import ServerApp  # noqa: E402
from flwr.serverapp.strategy import FedAvg  # noqa: E402
from flwr.simulation import run_simulation  # noqa: E402
from torch import nn  # noqa: E402

NOTES = (
    "round_seconds: from FedAvg.configure_train to the end of FedAvg.aggregate_train (sampling, "
    "messages, local training, mean), evaluation left out. Cohort without replacement, not "
    "reproducible (Flower's node ids are random); batches keep their order. startup_seconds: from "
    "the script's first line, imports included, until the Ray actors have answered 4 queries a "
    "core that load data and model (that each actor got one is likely, not checked)."
)
app = ClientApp()


def network() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(12544, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


def autocast(precision: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


@cache
def actor_state(folder: str, threads: int):
    """What one Ray actor holds for all its clients: a model, and the users' data, mapped."""
    torch.set_num_threads(threads)
    x, y = (np.load(f"{folder}/{name}.npy", mmap_mode="c") for name in ("x", "y"))
    return network(), torch.from_numpy(x), torch.from_numpy(y)


@app.query()
def ready(message: Message, context) -> Message:
    config = message.content["config"]
    actor_state(config["folder"], config["threads"])
    return Message(RecordDict(), reply_to=message)


@app.train()
def train(message: Message, context) -> Message:
    config = message.content["config"]
    net, xs, ys = actor_state(config["folder"], config["threads"])
    user = context.node_config["partition-id"]
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(net.parameters(), lr=config["lr"])
    for x, y in zip(xs[user].split(config["batch"]), ys[user].split(config["batch"]), strict=True):
        optimizer.zero_grad()
        with autocast(config["precision"]):
            loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
    content = {
        "arrays": ArrayRecord(net.state_dict()),
        "metrics": MetricRecord({"num-examples": len(ys[user])}),
    }
    return Message(RecordDict(content), reply_to=message)


class TimedFedAvg(FedAvg):
    seconds: list[float]

    def configure_train(self, *args, **kwargs):
        self.began = time.perf_counter()
        return super().configure_train(*args, **kwargs)

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        result = super().aggregate_train(server_round, replies)
        self.seconds.append(time.perf_counter() - self.began)
        failed = [reply.error for reply in replies if reply.has_error()]
        assert not failed, failed
        assert len(replies) == self.min_train_nodes
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--cohort", type=int, default=50)
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    parser.add_argument("--cpus", type=int, default=2, help="cores given to Ray")
    parser.add_argument("--threads", type=int, default=1, help="cores and torch threads an actor")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    random.seed(args.seed)
    with np.load(args.data) as arrays:
        x_train, y_train = arrays["x_train"], arrays["y_train"]
        x_test, y_test = arrays["x_test"], torch.from_numpy(arrays["y_test"])
    mean, std = (f(x_train / np.float32(255), axis=(0, 1, 2)) for f in (np.mean, np.std))

    def images(x):
        x = (x / np.float32(255) - mean) / std
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2))

    x_test = torch.from_numpy(images(x_test))
    order = np.random.default_rng(args.seed).permutation(len(x_train)).reshape(args.users, -1)
    strategy = TimedFedAvg(
        fraction_train=args.cohort / args.users,
        fraction_evaluate=0.0,
        min_train_nodes=args.cohort,
        min_available_nodes=args.users,
    )
    strategy.seconds = []
    startup, losses, accuracy = 0.0, {}, {}
    net = network()
    assert sum(p.numel() for p in net.parameters()) == 1_626_442

    @torch.no_grad()
    def evaluate(done: int, arrays: ArrayRecord) -> MetricRecord | None:
        if done % 10 and done != args.rounds:
            return None
        net.load_state_dict(arrays.to_torch_state_dict())
        with autocast(args.precision):
            logits = torch.cat([net(x) for x in x_test.split(500)]).float()
        losses[done] = nn.functional.cross_entropy(logits, y_test).item()
        accuracy[done] = (logits.argmax(1) == y_test).float().mean().item()
        return MetricRecord({"loss": losses[done], "accuracy": accuracy[done]})

    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder, "x.npy"), images(x_train)[order])
        np.save(Path(folder, "y.npy"), y_train[order])
        config = {"folder": folder, "lr": args.lr, "batch": args.batch}
        config |= {"threads": args.threads, "precision": args.precision}
        server = ServerApp()

        @server.main()
        def serve(grid, context) -> None:
            nonlocal startup
            while len(nodes := list(grid.get_node_ids())) < args.users:
                time.sleep(0.1)
            content = RecordDict({"config": ConfigRecord(config)})
            queries = [Message(content, node, "query") for node in nodes[: 4 * args.cpus]]
            replies = list(grid.send_and_receive(queries, timeout=300))
            assert len(replies) == len(queries)
            assert not any(reply.has_error() for reply in replies)
            startup = time.time() - STARTED
            strategy.start(
                grid,
                ArrayRecord(net.state_dict()),
                args.rounds,
                train_config=ConfigRecord(config),
                evaluate_fn=evaluate,
            )

        run_simulation(
            server,
            app,
            args.users,
            backend_config={
                "client_resources": {"num_cpus": args.threads, "num_gpus": 0.0},
                "init_args": {"num_cpus": args.cpus, "_node_ip_address": "127.0.0.1"},
            },
        )

    assert len(strategy.seconds) == args.rounds
    report = {
        "peer": "flwr",
        "version": flwr.__version__,
        "rounds": args.rounds,
        "round_seconds": strategy.seconds,
        "startup_seconds": startup,
        "total_seconds": time.time() - STARTED,
        "accuracy": accuracy,
        "loss": losses,
        "images_per_second": args.cohort * order.shape[1] / statistics.median(strategy.seconds),
        "notes": NOTES,
        "torch": torch.__version__,
        "threads": args.threads,
        "processes": args.cpus // args.threads,
        "precision": args.precision,
    }
    Path(args.out).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    # Under its own name the module is pickled by reference, so that actors keep what they cache.
    from flwr_cifar import main as main_by_name

    main_by_name()
