"""The `fedcoe` command: help, one-line errors, exit codes, JSON."""

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fedcoe import __version__
from fedcoe.errors import FedCoEError

Command = Callable[..., subprocess.CompletedProcess[str]]


def invoke(*args: str) -> Any:
    from flows.cli import app

    result = CliRunner().invoke(app, list(args), env={"COLUMNS": "160"})
    if isinstance(result.exception, Exception) and not isinstance(result.exception, FedCoEError):
        raise result.exception
    return result


def commands() -> list[str]:
    import typer

    from flows.cli import app

    return sorted(set(typer.main.get_command(app).commands) - {"stage"})  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", commands())
def test_help_of_every_command_has_an_example(name: str) -> None:
    result = invoke(name, "--help")
    assert result.exit_code == 0
    assert re.search(rf"Examples?:\s+fedcoe {name}", result.output), result.output


def test_the_version_is_said() -> None:
    assert invoke("--version").stdout == f"fedcoe {__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom flows.cli import main\nsys.argv = ['fedcoe', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'mlflow', 'prefect', 'scipy', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.fixture
def bare(tmp_path: Path, project: Path) -> Path:
    """A folder with params.yaml and nothing else."""
    (tmp_path / "params.yaml").write_text((project / "params.yaml").read_text())
    return tmp_path


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("train", "-S", "train.roundz=3"), ("train.roundz", "unknown key")),
        (("train", "-S", "train.rounds=0"), ("-S train.rounds = 0", "1")),
        (("train", "-S", "method.mu=5"), ("method.mu", "fedcoe has no such", "-S method.name")),
        (("compare", "--methods", "fedprox", "-S", "method.mu=5"), ("fedcoe has no such",)),
        (("tune", "--method", "fedavg", "-S", "method.mu=5"), ("fedavg has no such",)),
        (("train", "-S", "nonsense"), ("nonsense", "section.key=value")),
        (("train", "-S", "model.name=nosuch"), ("model.name", "nosuch", "cnn4")),
        (("train", "-S", "method.name=nosuch"), ("nosuch", "fedavg")),
        (("train",), ("data/dataset.json", "fedcoe fetch")),
        (("fetch", "nosuch"), ("nosuch", "mnist5k")),
        (("predict", "nowhere"), ("models",)),
        (("predict", "x", "--mode", "magic"), ("magic", "unlabelled")),
        (("stage", "evaluate"), ("models", "dvc repro")),
        (("report",), ("models/state.json", "dvc repro")),
    ],
)
def test_mistakes_are_one_line_that_says_what_where_and_what_to_do(
    bare: Path,
    args: tuple[str, ...],
    said: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import flows.cli

    monkeypatch.chdir(bare)
    monkeypatch.setattr(sys, "argv", ["fedcoe", *args])
    with pytest.raises(SystemExit) as stopped:
        flows.cli.main()
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    for words in said:
        assert words in lines[0]


def test_brackets_in_an_error_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import flows.cli

    def app() -> None:
        raise FedCoEError("takes uint8 [n, 8, 8, 1] and [/odd]")

    monkeypatch.setattr(flows.cli, "app", app)
    with pytest.raises(SystemExit):
        flows.cli.main()
    assert capsys.readouterr().err == "error: takes uint8 [n, 8, 8, 1] and [/odd]\n"


def test_a_folder_without_params_says_so(tmp_path: Path) -> None:
    result = invoke("train", "--root", str(tmp_path))
    assert isinstance(result.exception, FedCoEError)
    assert "params.yaml" in str(result.exception)


def test_missing_partitions_in_a_stage_are_one_line_without_traceback(
    new_project: Callable[..., Path], fedcoe_command: Command, prefect_api: str
) -> None:
    root = new_project()
    for file in (root / "partitions").iterdir():
        file.unlink()
    done = fedcoe_command(root, "stage", "train", PREFECT_API_URL=prefect_api)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "partitions" in done.stderr and "dvc repro partition" in done.stderr


def test_json_outputs_parse(
    project: Path, stores: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = json.loads(invoke("experts", "--root", str(project), "--json").stdout)
    assert {row["name"] for row in rows} >= {"fedcoe", "fedcoe-gate", "fedcoe-expert-0"}
    findings = json.loads(invoke("doctor", "--root", str(project), "--json").stdout)
    assert {finding["status"] for finding in findings} <= {"ok", "note", "bad"}
    images = np.load(project / "data/x_test.npy")[:5]
    np.savez(tmp_path / "images.npz", x=images)
    for mode in ("none", "unlabelled"):
        result = invoke(
            "predict", str(tmp_path / "images.npz"), "--mode", mode, "--json",
            "--models", str(project / "models"),
        )  # fmt: skip
        assert result.exception is None, result.exception
        rows = json.loads(result.stdout)
        assert [row["image"] for row in rows] == ["0", "1", "2", "3", "4"]
        assert all(row["class"] in "0123456789" and 0 < row["p"] <= 1 for row in rows)


def test_predict_reads_image_files_as_it_reads_arrays(project: Path, tmp_path: Path) -> None:
    from PIL import Image

    images = np.load(project / "data/x_test.npy")[:3]
    np.savez(tmp_path / "images.npz", x=images)
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(tmp_path / "folder" / f"{'[red]' * (i == 2)}{i}.png")
    (tmp_path / "folder" / "notes.txt").write_text("of a scanner")
    models = ("--json", "--models", str(project / "models"))
    files, arrays = (
        json.loads(invoke("predict", str(tmp_path / name), *models).stdout)
        for name in ("folder", "images.npz")
    )
    assert [row["image"] for row in files] == ["0.png", "1.png", "[red]2.png"]
    assert "[red]2.png" in invoke("predict", str(tmp_path / "folder"), *models[1:]).stdout
    invoke("predict", str(tmp_path / "folder"), *models, "--out", str(tmp_path / "kept.csv"))
    assert (tmp_path / "kept.csv").read_text().startswith("image,class,p\n0.png,")
    assert [(r["class"], r["p"]) for r in files] == [(r["class"], r["p"]) for r in arrays]


def test_doctor_finds_what_is_there_and_what_is_missing(project: Path, tmp_path: Path) -> None:
    from tasks.doctor import examine

    there = {f["what"]: f for f in examine(project)}
    assert there["data/"]["status"] == there["partitions/"]["status"] == "ok"
    assert "digits" in there["data/"]["found"]
    missing = {f["what"]: f for f in examine(tmp_path)}
    assert missing["params.yaml"]["status"] == "bad"
    assert "fedcoe fetch" in missing["data/"]["found"]


def test_doctor_says_that_a_server_does_not_answer(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    result = invoke("doctor", "--root", str(project), "--json")
    [mlflow] = [f for f in json.loads(result.stdout) if f["what"] == "MLflow"]
    assert mlflow["status"] == "bad" and "http://127.0.0.1:9" in mlflow["found"]
    assert result.exit_code == 1


@pytest.mark.slow
def test_own_images_by_client_train_end_to_end(
    tmp_path: Path, fedcoe_command: Command, prefect_api: str, mlflow_database: Path
) -> None:
    import shutil

    from PIL import Image

    rng = np.random.default_rng(0)
    for client in ("ada", "ben", "cleo", "dan"):
        for label, level in (("dark", 40), ("light", 200)):
            folder = tmp_path / "photos" / client / label
            folder.mkdir(parents=True)
            for i in range(20):
                pixels = np.clip(level + rng.normal(0, 20, (8, 8)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    (tmp_path / "params.yaml").write_text(
        "partition: {scheme: natural, new_clients: 0.25, min_samples: 10}\n"
        "model: {name: gn_cnn}\nmethod: {experts: 2}\n"
        "train: {rounds: 2, batch_size: 10}\nruntime: {workers: 1}\n"
    )
    (tmp_path / ".fedcoe").mkdir()
    shutil.copy(mlflow_database, tmp_path / ".fedcoe/mlflow.db")
    fetched = fedcoe_command(tmp_path, "fetch", "--from", "photos")
    assert fetched.returncode == 0, fetched.stderr
    done = fedcoe_command(tmp_path, "train", "--json", PREFECT_API_URL=prefect_api)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["global"] > 0.6
    clients = (tmp_path / "plots/curves.csv").read_text()
    assert clients.startswith("round,")
    manifest = json.loads((tmp_path / "partitions/manifest.json").read_text())
    assert {c["name"] for c in manifest["clients"]} == {"ada", "ben", "cleo", "dan"}


def test_a_profile_names_the_folder_of_its_comparison_and_gives_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import flows.compare

    seen: list[Any] = []
    monkeypatch.setattr(flows.compare, "compare_methods", lambda *given: seen.append(given) or "")
    for name in ("profiles.yaml", "params.yaml"):
        shutil.copy(Path(__file__).parents[2] / name, tmp_path)
    args = ("compare", "--profile", "cifar10-dir05", "-S", "train.rounds=2", "--root")
    assert invoke(*args, str(tmp_path)).exit_code == 0
    [(_, overrides, _, _, name, *_)] = seen
    assert name == "cifar10-dir05"
    assert overrides.index("train.rounds=240") < overrides.index("train.rounds=2")
    assert "partition.alpha=0.5" in overrides
    result = invoke("train", "--profile", "nosuch", "--root", str(tmp_path))
    assert "no profile 'nosuch'" in str(result.exception)


@pytest.mark.parametrize("command", ["train", "compare", "tune"])
def test_what_names_another_dataset_than_the_one_that_is_there_trains_nothing(
    new_project: Callable[..., Path], command: str
) -> None:
    root = new_project()
    args = (command, "-S", "data.name=cifar10", "--root", str(root))
    said = str(invoke(*args).exception)
    assert said.startswith("data/ holds digits, not cifar10; run `fedcoe fetch cifar10`, or say")
    assert not (root / "results").exists() and not (root / ".fedcoe" / "runs").exists()


def test_a_method_by_name_says_which_switches_it_takes_from_params_yaml(bare: Path) -> None:
    from flows.pipeline import check_method

    [said] = check_method(bare, ["method.name=fedavg", "method.reweighting=false"])
    assert said.startswith("fedavg takes ") and "from params.yaml" in said
    assert "server_momentum=0.7" in said and "reweighting" not in said
    assert check_method(bare, ["method.experts=2"]) == []
    off = [f"method.{name}=false" for name in ("balanced_softmax", "coordination_head")]
    off += ["method.server_momentum=0.0", "method.reweighting=false"]
    assert check_method(bare, ["method.name=fedavg", *off]) == []
    # A profile is written for FedCoE; what another method does not have is left out.
    assert check_method(bare, ["method.name=fedavg", *off], ["method.branch_after=5"]) == []


def test_a_bug_in_a_worker_is_one_traceback_and_prefects_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import logging
    from concurrent.futures.process import _RemoteTraceback

    from flows import cli

    error = ZeroDivisionError("division by zero")
    there = 'File "mine.py", line 3, in fits\nZeroDivisionError: division by zero'
    error.__cause__ = _RemoteTraceback(f'\n"""\n{there}\n"""')
    logger, logged = logging.getLogger("prefect.task_runs"), io.StringIO()

    def train() -> None:
        with cli._short_errors():
            logger.error("it failed", exc_info=error)
            logger.warning("it will be tried again", exc_info=error)
        raise error

    monkeypatch.setattr(cli, "app", train)
    handler = logging.StreamHandler(logged)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logging.getLogger("prefect"), "propagate", True)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 1
    assert capsys.readouterr().err.endswith(f"{there}\n")
    assert "it failed" not in logged.getvalue() and "tried again" in logged.getvalue()


def test_data_that_params_yaml_does_not_name_is_trained_on_and_named(
    new_project: Callable[..., Path],
) -> None:
    from flows.pipeline import check_dataset

    root = new_project()
    assert check_dataset(root, []) == []
    text = (root / "params.yaml").read_text().replace("name: digits", "name: cifar10")
    (root / "params.yaml").write_text(text)
    assert check_dataset(root, []) == [
        "data/ holds digits, which is trained on; params.yaml names cifar10"
    ]
    about = json.loads((root / "data/dataset.json").read_text()) | {"name": "photos"}
    (root / "data/dataset.json").write_text(json.dumps(about))
    assert check_dataset(root, []) == []  # of one's own: put there on purpose


def test_the_baseline_is_fedavg_with_the_switches_of_the_run(bare: Path) -> None:
    from fedcoe.config import load_settings
    from flows.pipeline import baseline_method

    ours, theirs = load_settings(bare / "params.yaml").method, baseline_method(bare)
    assert theirs["name"] == "fedavg" and theirs["coordination_head"] is True
    for name, value in theirs.items():
        assert name == "name" or value == getattr(ours, name)
