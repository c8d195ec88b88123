import json
import os
import subprocess
from dataclasses import fields, replace

import numpy as np
import pytest
from safetensors.numpy import save

from fedcoe import durable as module
from fedcoe.durable import sweep, write_atomic
from fedcoe.errors import FedCoEError
from fedcoe.models.flat import FlatModel
from fedcoe.state import (
    PersonalStore,
    ServerState,
    load_model,
    load_state,
    save_model,
    save_state,
)


@pytest.fixture
def state():
    rng = np.random.default_rng(0)
    return ServerState(
        round=7,
        experts=rng.standard_normal((2, 5)).astype(np.float32),
        momentum=rng.standard_normal((2, 5)).astype(np.float32),
        correlation=rng.dirichlet([1, 1], 3),
        dispatched=rng.integers(0, 9, (3, 2)),
        personal_round=np.array([7, 0, 3]),
        share=rng.random(3),
        calibration={"global.head": 0.1 + 0.2},
        diagnostics={"gating_inconsistency": 1 / 3},
        extra={"gate": rng.standard_normal((4, 2)).astype(np.float32).T},
    )


def test_a_state_survives_the_disk_bit_for_bit_with_its_notes(state, tmp_path):
    path = tmp_path / "run" / "state.safetensors"
    save_state(path, state, history={"rounds": [1, 2]}, seed=3)
    found, notes = load_state(path)
    assert notes == {"history": {"rounds": [1, 2]}, "seed": 3}
    for field in fields(ServerState):
        a, b = getattr(state, field.name), getattr(found, field.name)
        if isinstance(a, np.ndarray):
            assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    assert (found.round, found.calibration, found.diagnostics) == (
        7, {"global.head": 0.1 + 0.2}, {"gating_inconsistency": 1 / 3},
    )  # fmt: skip
    np.testing.assert_array_equal(found.extra["gate"], state.extra["gate"])


def test_equal_states_are_equal_files_and_no_temporary_is_left(state, tmp_path):
    for name in ("a", "b"):
        save_state(tmp_path / name, state, note=1)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def unreadable(path):
    with pytest.raises(FedCoEError) as caught:
        load_state(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: not a whole state file")
    assert "\n" not in message


def test_a_state_cut_short_anywhere_is_refused_by_name(state, tmp_path):
    path = tmp_path / "state"
    save_state(path, state)
    whole = path.read_bytes()
    for length in (0, 1, 8, 50, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        unreadable(path)


def test_a_state_with_any_byte_flipped_is_refused_by_name(state, tmp_path):
    path = tmp_path / "state"
    save_state(path, state, note="some")
    whole = path.read_bytes()
    body = 8 + int.from_bytes(whole[:8], "little")
    assert b'"note": "some"' in whole.replace(b"\\", b"")
    for position in (0, 3, *range(9, len(whole), 7), len(whole) - 1):
        if position < body and whole[position : position + 1] == b" ":
            continue  # padding
        flipped = bytearray(whole)
        flipped[position] ^= 0x40
        path.write_bytes(flipped)
        unreadable(path)


def test_other_safetensors_and_missing_files_are_refused_by_name(tmp_path):
    unreadable(tmp_path / "none")
    unreadable(tmp_path)
    path = tmp_path / "other"
    path.write_bytes(save({"experts": np.zeros(3)}))
    unreadable(path)
    path.write_bytes(save({"experts": np.zeros(3)}, metadata={"fedcoe": json.dumps({"round": 1})}))
    unreadable(path)


def test_a_write_that_fails_leaves_the_old_file(state, tmp_path, monkeypatch):
    path = tmp_path / "state"
    write_atomic(path, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(FedCoEError, match="state: cannot be written: No space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state"]


def test_what_killed_processes_left_is_swept_and_what_live_ones_write_is_not(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    for name in (f".a.{dead.pid}.tmp", f".b.{dead.pid}.tmp", f".a.{os.getpid()}.tmp", "a.1.tmp"):
        (tmp_path / name).touch()
    sweep(tmp_path, "a")
    assert sorted(os.listdir(tmp_path)) == sorted(
        [f".b.{dead.pid}.tmp", f".a.{os.getpid()}.tmp", "a.1.tmp"]
    )
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([f".a.{os.getpid()}.tmp", "a.1.tmp"])
    sweep(tmp_path / "none")


def test_what_travels_to_workers_has_no_momentum_and_leaves_the_state_alone(state):
    sent = state.for_clients()
    assert sent.momentum.size == 0
    assert state.momentum.size == 10
    assert sent.experts is state.experts


def test_extra_arrays_are_added_without_losing_others(state):
    more = state.with_extra(head=np.ones(2))
    assert set(more.extra) == {"gate", "head"}
    assert set(state.extra) == {"gate"}


@pytest.fixture
def store(tmp_path):
    return PersonalStore(tmp_path / "personal")


def test_personal_experts_are_kept_by_client_and_round(store):
    a, b = np.arange(3, dtype=np.float32), np.ones(3, np.float32)
    store.save(4, 1, a)
    store.save(4, 2, b)
    np.testing.assert_array_equal(store.load(4, 1), a)
    np.testing.assert_array_equal(store.load(4, 2), b)
    assert store.load(4, 1).dtype == np.float32
    with pytest.raises(FedCoEError, match=r"4-3\.safetensors"):
        store.load(4, 3)


def test_forgetting_keeps_what_is_named_and_nothing_else(store):
    for client, rnd in ((1, 1), (1, 2), (11, 1), (2, 1)):
        store.save(client, rnd, np.zeros(1, np.float32))
    store.forget({(1, 2), (11, 1), (9, 9)})
    assert sorted(p.name for p in store.folder.iterdir()) == ["1-2.safetensors", "11-1.safetensors"]
    store.forget(set())
    assert not list(store.folder.iterdir())


def test_forgetting_before_anything_was_stored_is_no_error(store):
    store.forget({(0, 1)})


def test_models_by_name_are_checked_against_the_layout(tmp_path):
    from fedcoe.models import build_expert

    flat = FlatModel(build_expert("gn_cnn", (8, 8, 1), 4, 0))
    path = tmp_path / "expert.safetensors"
    save_model(path, flat.read(), flat.layout)
    np.testing.assert_array_equal(load_model(path, flat.layout), flat.read())
    other = FlatModel(build_expert("gn_cnn", (8, 8, 1), 5, 0)).layout
    for damage in (
        lambda: load_model(path, other),
        lambda: load_model(path, None),
        lambda: load_model(path.with_name("none"), flat.layout),
    ):
        with pytest.raises(FedCoEError, match="not a readable model"):
            damage()
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(FedCoEError, match=r"expert\.safetensors: not a readable model"):
        load_model(path, flat.layout)


def test_a_model_with_any_byte_of_its_parameters_flipped_is_refused_by_name(tmp_path):
    from fedcoe.models import build_expert

    flat = FlatModel(build_expert("gn_cnn", (8, 8, 1), 4, 0))
    for layout in (None, flat.layout):
        path = tmp_path / f"{layout is None}.safetensors"
        save_model(path, flat.read(), layout)
        whole = path.read_bytes()
        body = 8 + int.from_bytes(whole[:8], "little")
        for position in (*range(body, len(whole), 4001), len(whole) - 1):
            flipped = bytearray(whole)
            flipped[position] ^= 0x01
            path.write_bytes(flipped)
            with pytest.raises(FedCoEError, match="not those that were written"):
                load_model(path, layout)


def test_models_of_versions_that_wrote_no_hash_are_still_read(tmp_path):
    path = tmp_path / "old.safetensors"
    path.write_bytes(save({"vector": np.ones(3, np.float32)}))
    assert load_model(path, None).tolist() == [1, 1, 1]


def test_a_state_is_replaced_not_changed(state):
    with pytest.raises(AttributeError):
        state.round = 3
    assert replace(state, round=8).round == 8
