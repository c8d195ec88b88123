"""The real dvc.yaml in a git repository of its own, with small settings."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
Run = Callable[..., str]


@pytest.fixture(scope="module")
def repository(
    project: Path,
    prefect_api: str,
    mlflow_database: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Run]:
    """A repository like this one, and `run(*command)` in it, which must succeed."""
    root = tmp_path_factory.mktemp("repository")
    for folder in ("fedcoe", "tasks", "flows"):
        shutil.copytree(
            REPOSITORY / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for file in ("dvc.yaml", ".gitignore", ".dvcignore"):
        shutil.copy(REPOSITORY / file, root / file)
    shutil.copy(project / "params.yaml", root)
    (root / ".fedcoe").mkdir()
    shutil.copy(mlflow_database, root / ".fedcoe" / "mlflow.db")
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(root),  # the copied sources, as DVC hashes them
        "PREFECT_API_URL": prefect_api,
        "DVC_NO_ANALYTICS": "1",
        "GIT_CONFIG_COUNT": "2",
        "GIT_CONFIG_KEY_0": "user.name",
        "GIT_CONFIG_VALUE_0": "test",
        "GIT_CONFIG_KEY_1": "user.email",
        "GIT_CONFIG_VALUE_1": "test@example.org",
    }

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-2000:]} {done.stderr[-3000:]}"
        return done.stdout

    run("git", "init", "--quiet")
    run("dvc", "init", "--quiet")
    run("fedcoe", "fetch")
    run("git", "add", "--all")
    run("git", "commit", "--quiet", "-m", "start")
    return root, run


@pytest.mark.slow
def test_the_pipeline_reproduces_in_dvc_from_fetch_to_experiments(
    repository: tuple[Path, Run], contents: Callable[..., dict[str, bytes]]
) -> None:
    root, run = repository
    run("dvc", "repro")
    assert (root / "reports/index.html").exists()
    run("git", "add", "--all")
    run("git", "commit", "--quiet", "-m", "reproduced")
    assert run("git", "status", "--porcelain") == ""

    lock, files = (root / "dvc.lock").read_bytes(), contents(root)
    assert "Running stage" not in run("dvc", "repro")
    # That training again gives the same bytes, other tests say; DVC's kill loop among them.
    stages = ("partition", "evaluate", "cold_start", "report")
    run("dvc", "repro", "--force", "--single-item", *stages)
    after = contents(root)
    assert [name for name in files if after.get(name) != files[name]] == []
    assert (root / "dvc.lock").read_bytes() == lock
    assert run("git", "status", "--porcelain") == ""

    shown = json.loads(run("dvc", "metrics", "show", "--json"))
    assert "metrics/evaluate.json" in json.dumps(shown)
    run("dvc", "plots", "show")
    assert (root / "dvc_plots/index.html").exists()

    run("dvc", "exp", "run", "train", "-S", "method.experts=3", "--name", "three")
    assert (root / "models/experts/expert-2.safetensors").exists()
    table = run("dvc", "exp", "show", "--json")
    assert "three" in table and '"experts": 3' in table and '"experts": 2' in table


@pytest.mark.slow
def test_fetching_the_committed_default_leaves_data_dvc_as_it_is(tmp_path: Path) -> None:
    environment = os.environ | {"DVC_NO_ANALYTICS": "1"}
    for file in ("data.dvc", ".gitignore", ".dvcignore", "params.yaml"):
        shutil.copy(REPOSITORY / file, tmp_path / file)
    committed = (tmp_path / "data.dvc").read_bytes()
    python = [sys.executable, "-m"]
    for command in (
        ["git", "init", "--quiet"],
        [*python, "dvc", "init", "--quiet"],
        [sys.executable, "-c", "from flows.cli import main; main()", "fetch"],
    ):
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert (tmp_path / "data.dvc").read_bytes() == committed
    status = subprocess.run(
        [*python, "dvc", "status", "data.dvc", "--json"],
        cwd=tmp_path, env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert json.loads(status.stdout) == {}
