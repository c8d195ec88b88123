"""pfl-research on its own CIFAR-10 benchmark (IID, plain FedAvg), timed round by round.

Runs in an environment of its own (`pfl[pytorch]`). With `--processes` above 1 the script starts
itself that often, as pfl's guide "Fast distributed simulations" describes (`PFL_WORKER_ADDRESSES`).
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time

STARTED = float(os.environ.setdefault("BENCHMARK_STARTED", repr(time.time())))
os.environ["PFL_PYTORCH_DEVICE"] = "cpu"
os.environ["GLOO_SOCKET_IFNAME"] = "lo"

NOTES = (
    "round_seconds: from the end of one round's callbacks to the start of the next one's "
    "(sampling, local training, all-reduce, server step), evaluation left out; round 1 also "
    "evaluates the cohort before and after training (pfl always does in iteration 0). Users are "
    "drawn with replacement (pfl's sampler 'random'); batches keep their order (pfl's Dataset). "
    "startup_seconds: from the script's first line to algorithm.run."
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--cohort", type=int, default=50)
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="torch threads a process")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    return parser.parse_args()


def launch(processes: int) -> int:
    """Start this script once a rank; the first to fail ends the others."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(processes)]
    addresses = ",".join(f"127.0.0.1:{s.getsockname()[1]}" for s in sockets)
    for s in sockets:
        s.close()
    ranks = [
        subprocess.Popen(
            [sys.executable, *sys.argv],
            env={**os.environ, "PFL_WORKER_ADDRESSES": addresses, "PFL_WORKER_RANK": str(rank)},
        )
        for rank in range(processes)
    ]
    try:
        while any(rank.poll() is None for rank in ranks):
            if any(rank.poll() for rank in ranks):
                return 1
            time.sleep(0.1)
        return max(abs(rank.wait()) for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def run(args: argparse.Namespace) -> None:
    import numpy as np
    import pfl
    import torch
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.central_evaluation import CentralEvaluationCallback
    from pfl.data import FederatedDataset
    from pfl.data.dataset import Dataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Metrics, Weighted
    from pfl.model.pytorch import PyTorchModel
    from torch import nn

    class CNN(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(
                *(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU()),
                *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12544, 128), nn.ReLU()),
                nn.Linear(128, 10),
            )

        def loss(self, x, y):
            return nn.functional.cross_entropy(self(x), y)

        @torch.no_grad()
        def metrics(self, x, y):
            logits = self(x)
            loss = nn.functional.cross_entropy(logits, y, reduction="sum").item()
            right = (logits.argmax(1) == y).sum().item()
            return {"loss": Weighted(loss, len(y)), "accuracy": Weighted(right, len(y))}

    class Timer(CentralEvaluationCallback):
        """pfl's central evaluation, after every tenth round and the last, and the time between."""

        def on_train_begin(self, *, model):
            self.startup, self.seconds = time.time() - STARTED, []
            self.loss, self.accuracy = {}, {}
            metrics = self.evaluate(model, 0)
            self.lap = time.perf_counter()
            return metrics

        def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
            self.seconds.append(time.perf_counter() - self.lap)
            done, metrics = central_iteration + 1, Metrics()
            if done % 10 == 0 or done == args.rounds:
                metrics = self.evaluate(model, done)
            self.lap = time.perf_counter()
            return False, metrics

        def evaluate(self, model, done):
            metrics = self._eval(model)[1]
            values = metrics.to_simple_dict()
            self.loss[done] = values["Central val | loss"]
            self.accuracy[done] = values["Central val | accuracy"]
            return metrics

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)

    with np.load(args.data) as arrays:
        x_train, y_train = arrays["x_train"], torch.from_numpy(arrays["y_train"])
        x_test, y_test = arrays["x_test"], torch.from_numpy(arrays["y_test"])
    mean, std = (f(x_train / np.float32(255), axis=(0, 1, 2)) for f in (np.mean, np.std))

    def images(x):
        x = (x / np.float32(255) - mean) / std
        return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))

    x_train, x_test = images(x_train), images(x_test)
    order = np.random.default_rng(args.seed).permutation(len(x_train)).reshape(args.users, -1)
    users = [(x_train[rows], y_train[rows]) for rows in order]
    training = FederatedDataset.from_slices(users, get_user_sampler("random", range(args.users)))

    net = CNN()
    assert sum(p.numel() for p in net.parameters()) == 1_626_442
    model = PyTorchModel(
        net,
        torch.optim.SGD,
        torch.optim.SGD(net.parameters(), lr=1.0),
        amp_dtype=torch.bfloat16 if args.precision == "bf16" else None,
    )
    eval_params = NNEvalHyperParams(local_batch_size=500)
    timer = Timer(Dataset((x_test, y_test)), eval_params)
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=args.rounds,
            evaluation_frequency=args.rounds,
            train_cohort_size=args.cohort,
            val_cohort_size=None,
        ),
        SimulatedBackend(training, training, [WeightByDatapoints()]),
        model,
        NNTrainHyperParams(
            local_learning_rate=args.lr, local_num_epochs=1, local_batch_size=args.batch
        ),
        eval_params,
        [timer],
        send_metrics_to_platform=False,
    )

    if os.environ.get("PFL_WORKER_RANK", "0") == "0":
        images_a_round = args.cohort * len(x_train) // args.users
        report = {
            "peer": "pfl",
            "version": pfl.__version__,
            "rounds": args.rounds,
            "round_seconds": timer.seconds,
            "startup_seconds": timer.startup,
            "total_seconds": time.time() - STARTED,
            "accuracy": timer.accuracy,
            "loss": timer.loss,
            "images_per_second": images_a_round / statistics.median(timer.seconds),
            "notes": NOTES,
            "torch": torch.__version__,
            "threads": args.threads,
            "processes": args.processes,
            "precision": args.precision,
        }
        with open(args.out, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    arguments = parse()
    if arguments.processes > 1 and "PFL_WORKER_RANK" not in os.environ:
        sys.exit(launch(arguments.processes))
    run(arguments)
