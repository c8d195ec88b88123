"""Killed at any instant, run again: the same bytes as a run never killed."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
    done = fedcoe_command(root, "train", PREFECT_API_URL=prefect_api)
    assert done.returncode == 0, done.stderr
    ours, theirs = (contents(folder, ("models",)) for folder in (root, project))
    assert [name for name in theirs if ours.get(name) != theirs[name]] == []
    assert ours.keys() == theirs.keys()
    for name in ("metrics/train.json", "plots/curves.csv"):
        assert (root / name).read_bytes() == (project / name).read_bytes(), name
    assert not list((root / ".fedcoe/runs").iterdir())


def test_a_checkpoint_of_other_settings_is_not_resumed(new_project: Callable[..., Path]) -> None:
    from fedcoe.config import load_settings
    from tasks.checkpoint import History, resume
    from tasks.run import open_run

    root = new_project()
    with open_run(load_settings(root / "params.yaml"), root, root / "partitions") as run:
        from fedcoe.state import save_state

        state = run.method.init()
        trained = type(state)(**{**vars(state), "round": 2})
        save_state(run.scratch / "round-000002.safetensors", trained, history=vars(History()))
        assert resume(run)[0].round == 2
    for change in ("train.lr=0.06", "train.seed=1", "runtime.precision=bf16"):
        settings = load_settings(root / "params.yaml", [change])
        with open_run(settings, root, root / "partitions") as run:
            assert resume(run)[0].round == 0, change
    settings = load_settings(root / "params.yaml", ["runtime.workers=2"])
    from tasks.run import run_key

    with open_run(load_settings(root / "params.yaml"), root, root / "partitions") as run:
        assert run_key(settings, run.data) == run.key
    shutil.rmtree(root)
