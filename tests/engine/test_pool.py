import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fedcoe.engine.pool import Engine, Site
from fedcoe.errors import FedCoEError
from fedcoe.rounds import plan_round


def train_with_little_memory(side, method, state, orders, more):
    """Train on what the process has and `more` bytes; then it may have what it likes again."""
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (has + more, before[1]))
    try:
        return method.local_train(side, state, orders).valid
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def more_than_there_is(side, how):
    return how(2**50)


def add(side, a, b):
    return a + b


def whoami(side):
    return os.getpid()


def group(side):
    return os.getpid(), os.getpgrp(), signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def die(side):
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(side, flag):
    if not flag.exists():
        flag.touch()
        os._exit(1)
    return "alive"


def test_one_worker_is_this_process_and_results_keep_their_order(make_engine):
    engine = make_engine()
    assert engine.run(whoami) == os.getpid()
    assert engine.map(add, 10, over=[3, 1, 2]) == [13, 11, 12]
    assert engine.map(add, 10, over=[]) == []


def test_calls_into_one_process_never_overlap(engine):
    inside, overlaps = [], []

    def work(side, item):
        inside.append(item)
        if len(inside) > 1:
            overlaps.append(item)
        threading.Event().wait(0.002)
        inside.remove(item)

    engine.map(work, over=range(8))
    assert not overlaps


def test_an_error_in_a_worker_reaches_the_caller(engine):
    with pytest.raises(TypeError):
        engine.map(add, 1, over=["x"])


def shards(workers, clients, sizes):
    return Engine(Site(*"abcd"), workers).shards(clients, sizes)  # type: ignore[arg-type]


def test_shards_hold_every_client_once_and_are_nearly_equal():
    clients, sizes = [3, 5, 7, 8, 9, 11], [10, 60, 30, 20, 50, 10]
    found = shards(3, clients, sizes)
    assert sorted(k for shard in found for k in shard) == clients
    size = dict(zip(clients, sizes, strict=True))
    assert sorted(sum(size[k] for k in shard) for shard in found) == [60, 60, 60]


def test_shards_depend_on_nothing_but_clients_and_sizes():
    assert shards(2, [1, 2, 3], [5, 5, 5]) == shards(2, [3, 2, 1], [5, 5, 5]) == [[1, 3], [2]]


def test_there_are_no_empty_shards():
    assert shards(8, [4, 2], [1, 1]) == [[2], [4]]
    assert shards(8, [], []) == []


def test_zero_workers_means_one_a_core():
    assert Engine(Site(*"abcd")).workers == len(os.sched_getaffinity(0))  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_worker_that_dies_once_is_replaced_and_one_that_dies_twice_is_an_error(
    make_engine, tmp_path
):
    engine = make_engine(workers=2)
    assert engine.run(whoami) != os.getpid()
    assert engine.run(die_once, tmp_path / "flag") == "alive"
    with pytest.raises(
        FedCoEError, match=r"died twice at the same work; .* lower runtime\.workers"
    ):
        engine.run(die)
    assert engine.map(add, 1, over=[1, 2, 3]) == [2, 3, 4]


def test_workers_hear_no_signal_to_the_group_and_still_end_by_one_of_their_own(make_engine):
    pid, own, ends = make_engine(workers=2).run(group)
    assert own == pid != os.getpgrp() and ends


@pytest.mark.slow
def test_training_that_gets_no_memory_is_tried_once_more_and_then_said_in_one_line(
    make_engine, make_method
):
    method = make_method()
    engine = make_engine(workers=2)
    state = method.init()
    [orders, *_] = plan_round(method, state, engine).shards
    given = (method, state.for_clients(), orders)
    with pytest.raises(FedCoEError, match="memory ran out twice at the same work") as caught:
        engine.run(train_with_little_memory, *given, 100_000)
    assert "lower runtime.workers, train.batch_size or evaluate.batch_size" in str(caught.value)
    assert "\n" not in str(caught.value)
    # The worker lives, and with enough it does the work.
    assert engine.run(train_with_little_memory, *given, 2**33) > 0


def zeros(count):
    return np.zeros(count, np.uint8)


@pytest.mark.parametrize("how", [zeros, torch.empty], ids=["NumPy", "torch"])
def test_without_workers_a_lack_of_memory_is_said_at_once(engine, how):
    with pytest.raises(FedCoEError, match=r"memory ran out .*: lower runtime\.workers") as caught:
        engine.run(more_than_there_is, how)
    assert "\n" not in str(caught.value)


def test_other_errors_in_a_training_stay_what_they_are(engine):
    with pytest.raises(RuntimeError, match="size"):
        engine.run(lambda side: torch.ones(2) @ torch.ones(3))


def test_work_on_an_engine_that_is_not_open_is_an_error():
    with pytest.raises(FedCoEError, match="not open"):
        Engine(Site(*"abcd"), 2).run(add, 1, 2)  # type: ignore[arg-type]


ORPHANED = """
import os, sys, time
from pathlib import Path
from fedcoe.engine.pool import Engine, Site

if __name__ == "__main__":
    data, partitions, personal = map(Path, sys.argv[1:])
    with Engine(Site(data, partitions, personal, "gn_cnn"), 2) as engine:
        print(*engine.map(worker, over=[2.0, 2.0]), flush=True)
        time.sleep(60)
"""
WORKER = """
import os, time

def worker(side, seconds):
    time.sleep(seconds)
    return os.getpid()
"""


def test_workers_end_when_their_parent_is_killed(world, tmp_path):
    (tmp_path / "work.py").write_text(WORKER)
    script = tmp_path / "main.py"
    script.write_text("from work import worker\n" + ORPHANED)
    arguments = [world.folder / "data", world.folder / "partitions", tmp_path / "own"]
    with subprocess.Popen(
        [sys.executable, script, *arguments], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(set(workers)) == 2
        parent.kill()
    ends = time.monotonic() + 100
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < ends:
        time.sleep(0.1)
    assert [pid for pid in workers if Path(f"/proc/{pid}").exists()] == []
