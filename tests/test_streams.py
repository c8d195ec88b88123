import subprocess
import sys

import numpy as np
import pytest

from fedcoe.streams import stream


def draw(*args):
    return stream(*args).integers(0, 2**63, 4).tolist()


def test_a_stream_opened_twice_gives_the_same_draws():
    assert draw(3, "batches", 2, 7) == draw(3, "batches", 2, 7)


@pytest.mark.parametrize(
    "other",
    [(4, "batches", 2, 7), (3, "cohort", 2, 7), (3, "batches", 7, 2), (3, "batches", 2, 8)],
)
def test_seed_name_and_keys_each_select_another_stream(other):
    assert draw(3, "batches", 2, 7) != draw(*other)


def test_streams_share_no_state():
    first = stream(0, "init")
    first.random(1000)
    assert draw(0, "cohort", 1) == draw(0, "cohort", 1)
    assert stream(0, "init").random() != first.random()


def test_streams_are_the_same_in_another_process():
    code = "from fedcoe.streams import stream; print(stream(1, 'init', 5).integers(2**31))"
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert int(said) == stream(1, "init", 5).integers(2**31)


def test_many_streams_of_clients_and_rounds_are_all_different():
    seen = {tuple(draw(0, "batches", r, k)) for r in range(1, 21) for k in range(20)}
    assert len(seen) == 400


def test_draws_of_neighbouring_clients_are_not_correlated():
    a, b = (stream(0, "batches", 1, k).standard_normal(5000) for k in (0, 1))
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.06
