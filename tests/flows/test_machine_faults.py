"""Disks that are full or may not be written, two trainings in one folder: real ones, each time."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedcoe.errors import FedCoEError
from tasks.locks import sole

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(disk)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root may mount a file system")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError:
            pass


def on(disk: Path, new_project: Callable[..., Path]) -> Path:
    return Path(shutil.copytree(new_project(), disk / "project"))


def owner_of(name: str) -> Any:
    from fedcoe.state import PersonalStore
    from flows import federated_training
    from tasks import checkpoint, results

    modules = {"save": PersonalStore, "spend": federated_training, "save_state": checkpoint}
    return modules.get(name, results)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "call", "named"),
    [
        ("save", 1, r"\.fedcoe/runs/fedcoe-\w+/personal/\d-1\.safetensors"),
        ("save", 6, r"\.fedcoe/runs/fedcoe-\w+/personal/\d-2\.safetensors"),
        ("spend", 1, r"\.fedcoe/runs/fedcoe-\w+/seconds"),
        ("save_state", 3, r"round-000003\.safetensors"),
        ("export_models", 1, r"\.models\.new/\S+"),
        ("write_json", 1, r"metrics/train\.json"),
        ("write_csv", 1, r"plots/curves\.csv"),
    ],
    ids=lambda value: str(value).split("/")[0][-15:],
)
def test_a_disk_that_is_full_at_any_write_is_said_in_one_line_and_training_goes_on_later(
    write: str,
    call: int,
    named: str,
    small_disk: Path,
    project: Path,
    new_project: Callable[..., Path],
    run_training: Callable[..., Any],
    contents: Callable[..., dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root, owner = on(small_disk, new_project), owner_of(write)
    really, calls = getattr(owner, write), []

    def write_to_a_full_disk(*args: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            fill(small_disk)
        return really(*args, **named)

    monkeypatch.setattr(owner, write, write_to_a_full_disk)
    with pytest.raises(FedCoEError, match=rf"{named}: cannot be written: No space left") as caught:
        run_training(root, tracked=False)
    assert "\n" not in str(caught.value) and "(0.0 MB free); free some space" in str(caught.value)
    left = [str(p) for p in root.rglob("*") if p.name.endswith(".tmp") or p.name == ".models.new"]
    assert not left

    monkeypatch.undo()
    (small_disk / "filler").unlink()
    run_training(root, tracked=False)
    assert contents(root, ("models",)) == contents(project, ("models",))
    for name in ("metrics/train.json", "plots/curves.csv"):
        assert (root / name).read_bytes() == (project / name).read_bytes(), name


def test_a_disk_too_full_for_the_registrys_copy_ends_the_run_which_registers_when_started_again(
    new_project: Callable[..., Path],
    run_training: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlflow import MlflowClient

    root, really = new_project(), shutil.copyfile

    def copy(source: Path, target: Path) -> Path:
        if target.name == "expert-1.safetensors" and ".fedcoe" in target.parts:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        return Path(really(source, target))

    with monkeypatch.context() as full:
        full.setattr("tasks.tracking.shutil.copyfile", copy)
        with pytest.raises(FedCoEError, match=r"expert-1.safetensors: cannot be written: No space"):
            run_training(root)
    stores = MlflowClient(f"sqlite:///{root}/.fedcoe/mlflow.db")
    assert stores.search_registered_models() == []
    run_training(root)
    assert {m.name for m in stores.search_registered_models()} >= {"fedcoe", "fedcoe-expert-1"}


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("note")]


@pytest.mark.slow
def test_the_command_says_a_full_disk_and_one_that_is_read_only_in_one_line(
    small_disk: Path,
    new_project: Callable[..., Path],
    fedcoe_command: Command,
    fedcoe_here: Command,
    prefect_api: str,
) -> None:
    root = on(small_disk, new_project)
    (root / "models").mkdir()
    (root / "models" / "old").write_text("as it was")
    # MLflow's store may lie on the full disk too; what it says is another matter.
    environment = {"PREFECT_API_URL": prefect_api, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    environment["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    code = "import fedcoe.state as s, tasks.checkpoint as c\n" + FILL_AT_A_CHECKPOINT
    full = fedcoe_command(root, "train", code=code.format(disk=small_disk), **environment)
    assert full.returncode == 2, full.stderr
    said = [line for line in full.stderr.splitlines() if "MLflow" not in line]
    assert len(said) == 1 and said[0].startswith("error: ")
    assert "round-000002.safetensors: cannot be written: No space left on device for " in said[0]
    assert (root / "models" / "old").read_text() == "as it was"
    (small_disk / "filler").unlink()

    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for command in (["train"], ["stage", "train"], ["stage", "baseline"]):
        refused = fedcoe_here(root, *command, **environment)
        assert refused.returncode == 2, refused.stderr
        [line] = refused.stderr.splitlines()
        assert "Read-only file system; make it writable or work in another folder" in line


FILL_AT_A_CHECKPOINT = """
real = c.save_state
def save_state(path, *args, **notes):
    if "000002" in path.name:
        with open("{disk}/filler", "wb", buffering=0) as file:
            try:
                while True: file.write(bytes(4096))
            except OSError: pass
    return real(path, *args, **notes)
c.save_state = save_state
"""


def test_a_limit_on_the_size_of_files_is_said_in_one_line_and_leaves_the_old_file(
    tmp_path: Path,
) -> None:
    code = """
import resource, sys
from pathlib import Path
from fedcoe.durable import write_atomic
write_atomic(Path("file"), b"old")
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    write_atomic(Path("file"), bytes(2_000_000))
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == (
        "FedCoEError file: cannot be written: File too large for 2.0 MB; raise the limit on the "
        "size of files (`ulimit -f`), then run the same command again\n"
    )
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]


HOLD = """
import time
from pathlib import Path
from tasks.locks import sole
with sole(Path("."), "training", "another training"):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(root: Path) -> Iterator[Any]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], cwd=root, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_second_training_in_a_folder_is_refused_with_who_is_first_and_a_crash_frees_it(
    tmp_path: Path,
) -> None:
    with holder(tmp_path) as first:
        with pytest.raises(FedCoEError) as caught, sole(tmp_path, "training", "another training"):
            pass
        said = str(caught.value)
        assert f"(process {first.pid})" in said and f"`kill {first.pid}`" in said
        assert said.startswith(f"another training is at work in {tmp_path}") and "\n" not in said
        with sole(tmp_path, "baseline", "another baseline"):
            pass
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        with sole(tmp_path, "training", "another training"):
            pass
    assert (tmp_path / ".fedcoe/locks/training").read_text() == ""


@pytest.mark.slow
def test_the_commands_that_write_models_are_refused_while_another_does(
    new_project: Callable[..., Path],
    fedcoe_command: Command,
    fedcoe_here: Command,
    prefect_api: str,
) -> None:
    root = new_project(train={"rounds": 1})
    with holder(root) as first:
        for command in (["train"], ["stage", "train"]):
            refused = fedcoe_here(root, *command)
            assert refused.returncode == 2
            [line] = refused.stderr.splitlines()
            assert f"(process {first.pid})" in line
        assert not (root / "models").exists()
        # What writes other files is not.
        done = fedcoe_command(root, "stage", "baseline", PREFECT_API_URL=prefect_api)
        assert done.returncode == 0, done.stderr
