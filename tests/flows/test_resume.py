"""Killed at any instant, run again: the same bytes as a run never killed."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedcoe.config import load_settings
from fedcoe.errors import FedCoEError
from fedcoe.state import load_state, save_state
from tasks.checkpoint import checkpoint, discard, resume, spent
from tasks.run import Run, open_run, run_key
from tasks.stop import Stopped

# Each is Python that makes the process kill itself at one instant.
DIE = "import os, signal\ndie = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
IN_ROUND_2 = (
    DIE
    + """
from fedcoe.state import PersonalStore
save = PersonalStore.save
def save_and_die(self, client, round_, vector):
    save(self, client, round_, vector)
    if round_ == 2: die()
PersonalStore.save = save_and_die
"""
)
IN_A_CHECKPOINT = (
    DIE
    + """
import pathlib
replace = pathlib.Path.replace
def die_before(self, target):
    if "round-000002" in str(target): die()
    return replace(self, target)
pathlib.Path.replace = die_before
"""
)
IN_THE_EXPORT = (
    DIE
    + """
import pathlib
rename = pathlib.Path.rename
def die_before(self, target):
    if pathlib.Path(target).name == "models": die()
    return rename(self, target)
pathlib.Path.rename = die_before
"""
)


@pytest.mark.slow
def test_a_run_killed_three_times_ends_with_the_bytes_of_a_run_never_killed(
    project: Path,
    new_project: Callable[..., Path],
    fedcoe_command: Callable[..., Any],
    run_training: Callable[..., dict[str, float]],
    contents: Callable[..., dict[str, bytes]],
    prefect_api: str,
) -> None:
    root = new_project()
    kept = []
    for code in (IN_ROUND_2, IN_A_CHECKPOINT, IN_THE_EXPORT):
        killed = fedcoe_command(root, "train", code=code, PREFECT_API_URL=prefect_api)
        assert killed.returncode == -9, killed.stderr
        [scratch] = (root / ".fedcoe/runs").iterdir()
        kept.append(sorted(file.name[:12] for file in scratch.glob("round-*.safetensors")))
    assert kept == [["round-000001"], ["round-000001"], ["round-000002", "round-000003"]]
    run_training(root)
    ours, theirs = (contents(folder, ("models",)) for folder in (root, project))
    assert [name for name in theirs if ours.get(name) != theirs[name]] == []
    assert ours.keys() == theirs.keys()
    for name in ("metrics/train.json", "plots/curves.csv"):
        assert (root / name).read_bytes() == (project / name).read_bytes(), name
    assert not list((root / ".fedcoe/runs").iterdir())


@pytest.fixture(scope="module")
def interrupted(
    new_project: Callable[..., Path], run_training: Callable[..., dict[str, float]]
) -> Path:
    """A project whose training was stopped after round 2 of 3. Copy it; do not touch."""
    root = new_project()
    interrupt(root, run_training, 2)
    return root


def interrupt(root: Path, run_training: Callable[..., Any], after: int) -> None:
    def stop(finished: int, rounds: int) -> None:
        if finished == after:
            raise Stopped(f"stopped after round {finished}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.federated_training.stop_if_asked", stop)
        with pytest.raises(Stopped):
            run_training(root, tracked=False)


@pytest.fixture
def root(interrupted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(interrupted, tmp_path / "project"))


@contextmanager
def opened(root: Path, *overrides: str) -> Iterator[Run]:
    settings = load_settings(root / "params.yaml", overrides)
    with open_run(settings, root, root / "partitions") as run:
        yield run


def checkpoint_of(root: Path, round_: int) -> Path:
    [path] = root.glob(f".fedcoe/runs/*/round-{round_:06d}.safetensors")
    return path


def personal_of(root: Path, round_: int) -> Path:
    return sorted(root.glob(f".fedcoe/runs/*/personal/*-{round_}.safetensors"))[0]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


NEWEST: dict[str, Callable[[Path], None]] = {
    "flipped": lambda root: flip(checkpoint_of(root, 2)),
    "cut": lambda root: cut(checkpoint_of(root, 2)),
    "empty": lambda root: checkpoint_of(root, 2).write_bytes(b""),
    "personal expert flipped": lambda root: flip(personal_of(root, 2)),
    "personal expert cut": lambda root: cut(personal_of(root, 2)),
    "personal expert gone": lambda root: personal_of(root, 2).unlink(),
}


@pytest.mark.parametrize("damage", NEWEST.values(), ids=NEWEST)
def test_where_the_last_checkpoint_is_damaged_the_one_before_is_used_and_this_is_said(
    root: Path, damage: Callable[[Path], None]
) -> None:
    damage(root)
    with opened(root) as run:
        state, history, said = resume(run)
    assert (state.round, len(history.rounds)) == (1, 1)
    [line] = said
    assert line.startswith("round 2 of .fedcoe/runs/fedcoe-") and "\n" not in line
    assert "damaged" in line and line.endswith("going on after round 1")


def test_where_both_are_damaged_training_starts_anew_and_this_is_said(root: Path) -> None:
    flip(checkpoint_of(root, 2))
    cut(checkpoint_of(root, 1))
    with opened(root) as run:
        with pytest.raises(FedCoEError, match=r"--resume: round 2 of .* is damaged"):
            resume(run, demanded=True)
        state, _, said = resume(run)
    assert state.round == 0
    assert [line[:7] for line in said] == ["round 2", "round 1"]
    assert all(line.endswith("starting anew") for line in said)
    assert not list((root / ".fedcoe/runs").iterdir())


@pytest.mark.parametrize("both", [False, True])
def test_a_run_with_damaged_checkpoints_ends_with_the_same_bytes_and_warns_once_for_each(
    root: Path,
    both: bool,
    project: Path,
    run_training: Callable[..., Any],
    contents: Callable[..., dict[str, bytes]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    flip(checkpoint_of(root, 2))
    if both:
        flip(personal_of(root, 1))
    with caplog.at_level("WARNING"):
        run_training(root, tracked=False)
    said = [r.getMessage() for r in caplog.records if "damaged" in r.getMessage()]
    assert len(said) == 1 + both
    assert contents(root, ("models",)) == contents(project, ("models",))
    for name in ("metrics/train.json", "plots/curves.csv"):
        assert (root / name).read_bytes() == (project / name).read_bytes(), name


def test_an_unfinished_run_of_the_same_settings_is_resumed_whatever_the_workers(
    root: Path,
) -> None:
    more = load_settings(root / "params.yaml", ["runtime.workers=7"])
    with opened(root) as run:
        state, history, said = resume(run, demanded=True)
        assert run_key(more, run.data) == run.key
        assert replace(run, settings=more).origin == run.origin
    assert (state.round, len(history.rounds), said) == (2, 2, [])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["train.lr=0.06"], "train.lr: 0.05 there, 0.06 here"),
        (["train.seed=1"], "train.seed: 0 there, 1 here"),
        (["runtime.precision=bf16"], "runtime.precision: fp32 there, bf16 here"),
        (
            ["train.lr=0.06", "method.experts=3"],
            "method.experts: 2 there, 3 here, train.lr: 0.05 there, 0.06 here",
        ),
        (
            [f"train.{name}" for name in ("rounds=9", "lr=0.1", "momentum=0.1", "seed=3", "lr=1")]
            + ["method.experts=3"],
            "and 1 more",
        ),
    ],
)
def test_a_checkpoint_of_other_settings_is_not_resumed_and_the_difference_is_named(
    root: Path, changes: list[str], named: str
) -> None:
    with opened(root, *changes) as run:
        state, _, [line] = resume(run)
        assert state.round == 0
        assert line.startswith("round 2 of .fedcoe/runs/fedcoe-") and "\n" not in line
        assert named in line and line.endswith("starting anew")
        assert resume(run, beside=False).said == []
        with pytest.raises(FedCoEError, match=r"^--resume: round 2 of ") as caught:
            resume(run, demanded=True)
        assert named in str(caught.value)
    with opened(root) as run:  # it stays for who goes back to its settings
        assert resume(run).state.round == 2


def test_a_checkpoint_of_other_data_partition_version_or_code_is_not_resumed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {"data": "other images", "partition": "dealt to clients otherwise"}
    words |= {"version": "version: another there, 0.", "code": "source of fedcoe/"}
    state, notes = load_state(checkpoint_of(root, 2))
    with opened(root) as run:
        run.scratch.rename(root / "kept")
        beside = run.scratch.with_name("fedcoe-0") / "round-000002.safetensors"
        for key, word in words.items():
            notes["origin"] = run.origin | {key: "another"}
            save_state(beside, state, **notes)
            [line] = resume(run).said
            assert [w for w in words.values() if w in line] == [word]
        shutil.rmtree(beside.parent)
        (root / "kept").rename(run.scratch)

    with monkeypatch.context() as patch:
        patch.setattr("tasks.run.code_hash", lambda: "0" * 64)
        with opened(root) as run:
            state, _, [line] = resume(run)
    assert (state.round, "source of fedcoe/ has changed" in line) == (0, True)


def test_the_code_hash_covers_every_source_file_of_the_library_by_name_and_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fedcoe
    from tasks.run import code_hash

    first = code_hash()
    copy = tmp_path / "fedcoe"
    shutil.copytree(
        Path(fedcoe.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__")
    )
    monkeypatch.setattr(fedcoe, "__file__", str(copy / "__init__.py"))
    assert code_hash() == first
    (copy / "methods" / "fedavg.py").write_text("changed")
    changed = code_hash()
    (copy / "methods" / "fedavg.py").rename(copy / "methods" / "other.py")
    assert len({first, changed, code_hash()}) == 3


def test_resume_where_nothing_was_begun_is_refused(tmp_path: Path, root: Path) -> None:
    shutil.rmtree(root / ".fedcoe/runs")
    with opened(root) as run, pytest.raises(FedCoEError, match="there is no unfinished run here"):
        resume(run, demanded=True)


def test_the_previous_checkpoint_and_what_it_names_stay(root: Path) -> None:
    with opened(root) as run:
        state, history, _ = resume(run)
        flip(checkpoint_of(root, 1))  # damaged meanwhile: nothing to go back to, and no error
        checkpoint.fn(run, 3, replace(state, round=3), history)
        assert [path.name[6:12] for path in sorted(run.scratch.glob("round-*"))] == [
            "000002", "000003",
        ]  # fmt: skip
        flip(checkpoint_of(root, 3))
        assert resume(run).state.round == 2


def test_results_that_are_written_are_forgotten_at_once_or_not_at_all(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(root) as run:
        monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed before it
        discard(run)
        assert not run.scratch.exists()
        monkeypatch.undo()
        resume(run)
        assert not list((root / ".fedcoe/runs").iterdir())


def test_a_time_that_a_full_disk_cut_short_does_not_end_a_run(root: Path) -> None:
    with opened(root) as run:
        (run.scratch / "seconds").write_text("1.5 0.5\n2. 1.\n0.2.5 1\n7\n")
        assert spent(run) == (3.5, 1.5)
