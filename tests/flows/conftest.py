"""One small project, trained once a session; most tests here only look at its files."""

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedcoe.locks import Lock

PARAMS = """\
data: {name: digits}
partition: {scheme: dirichlet, alpha: 0.3, clients: 6, new_clients: 0.34, min_samples: 20, seed: 0}
model: {name: gn_cnn}
method: {name: fedcoe, experts: 2, experts_per_client: 1, balanced_softmax: true,
         server_momentum: 0.7, reweighting: true}
train: {rounds: 3, batch_size: 50, lr: 0.05, seed: 0}
evaluate: {every: 2}
cold_start: {em_steps: 10, few_shot_epochs: 1}
faults: {dropout: 0.0}
privacy: {epsilon: 0.0}
runtime: {workers: 1, precision: fp32}
"""
OUTPUTS = ("models", "metrics", "plots")


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`made_once(name, make)`: a folder that the first test process to want it makes for all."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def find(name: str, make: Callable[[Path], None]) -> Path:
        folder, made = base / name, base / f"{name}.made"
        with Lock(base / f"{name}.lock"):
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return find


@pytest.fixture(scope="session")
def mlflow_database(made_once: Callable[..., Path]) -> Path:
    """An empty MLflow database to copy: making one takes seconds."""

    def make(folder: Path) -> None:
        import mlflow

        path = folder / "mlflow.db"
        mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
        with sqlite3.connect(path) as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    return made_once("mlflow", make) / "mlflow.db"


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prefect server for the session, used by this process and, by its URL, by others."""
    os.environ |= {
        "DO_NOT_TRACK": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_LEVEL": "WARNING",
        "PREFECT_HOME": str(tmp_path_factory.mktemp("prefect")),
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": "1",
    }
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        temporary_settings,
    )
    from prefect.testing.utilities import prefect_test_harness

    no_heartbeat = temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None})
    with prefect_test_harness(server_startup_timeout=180), no_heartbeat:
        yield str(PREFECT_API_URL.value())


@pytest.fixture(scope="session")
def new_project(
    tmp_path_factory: pytest.TempPathFactory, made_once: Callable[..., Path], mlflow_database: Path
) -> Callable[..., Path]:
    """`new_project(root=None, **sections)`: params.yaml, data/, partitions/, an empty MLflow
    database, without `root` in a new folder.
    """
    from ruamel.yaml import YAML

    from fedcoe.data.fetch import fetch
    from flows.pipeline import partition_data

    first = made_once("digits", lambda folder: fetch("digits", target=folder / "data")) / "data"

    def make(root: Path | None = None, **sections: dict[str, Any]) -> Path:
        root = root or tmp_path_factory.mktemp("project")
        yaml = YAML()
        values = yaml.load(PARAMS)
        for section, changes in sections.items():
            values[section] |= changes
        yaml.dump(values, root / "params.yaml")
        shutil.copytree(first, root / "data")
        (root / ".fedcoe").mkdir()
        shutil.copy(mlflow_database, root / ".fedcoe" / "mlflow.db")
        partition_data(root)
        return root

    return make


@pytest.fixture(scope="session")
def run_training(prefect_api: str) -> Callable[..., dict[str, float]]:
    """`run_training(root, ...)`: the flow in this process, with the project's own MLflow."""
    from flows.federated_training import federated_training

    def run(root: Path, *args: Any, tracked: bool = True, **options: Any) -> dict[str, float]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/.fedcoe/mlflow.db")
            if not tracked:
                from tasks.tracking import Tracking

                patch.setattr("flows.federated_training.start_tracking", lambda *_: Tracking())
            return dict(federated_training(str(root), *args, **options))

    return run


@pytest.fixture(scope="session")
def project(
    made_once: Callable[..., Path],
    new_project: Callable[..., Path],
    run_training: Callable[..., dict[str, float]],
) -> Path:
    """The project after training, evaluation, cold start and report. Look, do not touch."""

    def make(root: Path) -> None:
        from flows.pipeline import evaluate_cold_start, evaluate_models
        from tasks.report import build_report

        new_project(root)
        run_training(root)
        evaluate_models(root)
        evaluate_cold_start(root)
        build_report(root)

    return made_once("project", make)


@pytest.fixture
def stores(project: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An MLflow client of the trained project."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{project}/.fedcoe/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return MlflowClient(uri)


@pytest.fixture(scope="session")
def contents() -> Callable[..., dict[str, bytes]]:
    """`contents(root, folders)`: bytes of every file below these folders, by path."""

    def read(root: Path, folders: tuple[str, ...] = OUTPUTS) -> dict[str, bytes]:
        files = (file for folder in folders for file in (root / folder).rglob("*"))
        return {str(f.relative_to(root)): f.read_bytes() for f in files if f.is_file()}

    return read


@pytest.fixture(scope="session")
def fedcoe_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`fedcoe_command(cwd, *args, code="", **environment)` in a process of its own.

    `code` runs before the command, to break something in it.
    """

    def run(
        cwd: Path, *args: str, code: str = "", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        inherited = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
        start = "import sys\nfrom flows.cli import main\nsys.argv[0] = 'fedcoe'\n"
        return subprocess.run(
            [sys.executable, "-c", f"{start}{code}\nmain()", *args],
            cwd=cwd,
            env=inherited | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"} | environment,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )

    return run


@pytest.fixture
def fedcoe_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`fedcoe_here(cwd, *args, **environment)`: as `fedcoe_command`, in this process, which saves
    its imports. For what trains nothing."""
    from flows.cli import main

    def run(cwd: Path, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
        own = {"MLFLOW_TRACKING_URI": f"sqlite:///{cwd}/.fedcoe/mlflow.db", "COLUMNS": "120"}
        with monkeypatch.context() as patch:
            patch.chdir(cwd)
            for name, value in (own | environment).items():
                patch.setenv(name, value)
            patch.setattr("sys.argv", ["fedcoe", *args])
            capsys.readouterr()
            with pytest.raises(SystemExit) as ended:
                main()
        return subprocess.CompletedProcess(args, int(ended.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """`free_port()`: of the loopback interface, nobody's at that moment."""

    def find() -> int:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return int(free.getsockname()[1])

    return find


@pytest.fixture(scope="session")
def model_server(free_port: Callable[[], int]) -> Callable[..., AbstractContextManager[str]]:
    """`model_server(store, alias, log)`: the address of a real `mlflow models serve`.

    Its whole process group ends with the context.
    """

    @contextmanager
    def serve(store: str, alias: str, log: Path) -> Iterator[str]:
        port = free_port()
        command = [
            *(sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/fedcoe@{alias}"),
            *("--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)),
        ]
        environment = os.environ | {
            "MLFLOW_TRACKING_URI": store,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
        with log.open("w") as file:
            process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=file, start_new_session=True
            )
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(1000):
                try:
                    urllib.request.urlopen(f"{address}/ping", timeout=5)
                    break
                except OSError:
                    assert process.poll() is None, log.read_text()[-2000:]
                    time.sleep(0.25)
            else:
                pytest.fail(log.read_text()[-2000:])
            yield address
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    return serve
