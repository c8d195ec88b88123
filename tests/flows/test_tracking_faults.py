"""MLflow and Prefect out of reach: training goes on, nothing is lost, nothing arrives twice."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tasks.delivery import deliver
from tasks.outbox import Outbox
from tasks.tracking import Tracking

Command = Callable[..., subprocess.CompletedProcess[str]]
LONGER: Any = {"train": {"rounds": 8}, "evaluate": {"every": 4}}


class Server:
    """A real `mlflow server` that can be killed and started again over the same store."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        log = (self.folder / "server.log").open("a")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
                *("--host", "127.0.0.1", "--port", str(self.port)),
                *("--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"),
                *("--artifacts-destination", str(self.folder / "artifacts")),
            ],
            stdout=log, stderr=log, start_new_session=True,
            env={k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
            | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )  # fmt: skip
        for _ in range(1000):
            with suppress(OSError):
                urllib.request.urlopen(f"{self.url}/health", timeout=5)
                return
            assert self.process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
            time.sleep(0.25)
        pytest.fail((self.folder / "server.log").read_text()[-2000:])

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def server(tmp_path: Path, mlflow_database: Path, free_port: Callable[[], int]) -> Iterator[Server]:
    (tmp_path / "mlflow.db").write_bytes(mlflow_database.read_bytes())
    server = Server(tmp_path, free_port())
    yield server
    server.kill()


def logged(store: str) -> dict[str, Any]:
    """What the store knows of the one training in it, but for times and the machine's figures."""
    client = MlflowClient(store)
    [experiment] = [e for e in client.search_experiments() if e.name == "fedcoe"]
    [run] = client.search_runs([experiment.experiment_id])
    names = sorted(name for name in run.data.metrics if not name.startswith("system/"))
    rows = {name: client.get_metric_history(run.info.run_id, name) for name in names}
    models = client.search_registered_models("name LIKE 'fedcoe%'")
    return {
        "status": run.info.status,
        "params": run.data.params,
        "steps": {name: sorted(row.step for row in found) for name, found in rows.items()},
        "accuracy": {
            name: [(row.step, row.value) for row in found]
            for name, found in rows.items()
            if "accuracy" in name
        },
        "data": [found.dataset.name for found in run.inputs.dataset_inputs],
        "figures": sorted(f.path for f in client.list_artifacts(run.info.run_id, "figures")),
        "versions": {
            model.name: [
                (int(version.version), version.status, version.aliases)
                for version in client.search_model_versions(f"name='{model.name}'")
            ]
            for model in models
        },
    }


@pytest.fixture(scope="module")
def undisturbed(
    new_project: Callable[..., Path], run_training: Callable[..., dict[str, float]]
) -> Path:
    """A project trained for long enough that something can be killed in the middle."""
    root = new_project(**LONGER)
    run_training(root)
    return root


@pytest.mark.slow
def test_a_server_killed_in_the_middle_costs_no_record_and_doubles_none(
    new_project: Callable[..., Path],
    fedcoe_command: Command,
    fedcoe_here: Command,
    prefect_api: str,
    server: Server,
    undisturbed: Path,
    contents: Callable[..., dict[str, bytes]],
) -> None:
    root = new_project(**LONGER)
    server.start()

    def kill_in_the_middle() -> None:
        while not list((root / ".fedcoe").glob("runs/*/round-000002*")):
            time.sleep(0.01)
        server.kill()

    killer = threading.Thread(target=kill_in_the_middle, daemon=True)
    killer.start()
    at = {"MLFLOW_TRACKING_URI": server.url, "PREFECT_API_URL": prefect_api}
    trained = fedcoe_command(root, "train", **at)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    killer.join(10)
    assert not killer.is_alive()
    said = trained.stdout + trained.stderr
    assert "training goes on" in said and "Traceback" not in said
    assert contents(root, ("models",)) == contents(undisturbed, ("models",))

    down = fedcoe_here(root, "sync", **at)
    assert down.returncode == 1
    assert len(down.stdout.splitlines()) == 1 and "does not answer" in down.stdout
    assert "Traceback" not in down.stderr

    server.start()
    [experiment] = [e for e in MlflowClient(server.url).search_experiments() if e.name == "fedcoe"]
    assert len(MlflowClient(server.url).search_runs([experiment.experiment_id])) == 1
    up = fedcoe_here(root, "sync", **at)
    assert up.returncode == 0, up.stdout + up.stderr
    expected = logged(f"sqlite:///{undisturbed}/.fedcoe/mlflow.db")
    assert logged(server.url) == expected
    again = fedcoe_here(root, "sync", **at)
    assert again.returncode == 0 and "nothing waits" in again.stdout
    assert logged(server.url) == expected


@pytest.mark.slow
def test_a_server_that_takes_requests_and_never_answers_does_not_hold_up_training(
    new_project: Callable[..., Path], fedcoe_command: Command, prefect_api: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        root = new_project()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        trained = fedcoe_command(
            root, "train", MLFLOW_TRACKING_URI=url, PREFECT_API_URL=prefect_api
        )
    assert trained.returncode == 0, trained.stdout + trained.stderr
    said = trained.stdout + trained.stderr
    assert said.count("does not answer") == 1 and "training goes on" in said
    assert (root / "models").is_dir()


@pytest.mark.slow
def test_without_prefects_server_training_is_refused_in_one_line(
    new_project: Callable[..., Path], fedcoe_command: Command, free_port: Callable[[], int]
) -> None:
    url = f"http://127.0.0.1:{free_port()}/api"
    refused = fedcoe_command(new_project(), "train", PREFECT_API_URL=url)
    assert refused.returncode == 2
    assert url in refused.stderr and "Traceback" not in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1, refused.stderr


@pytest.mark.slow
def test_a_prefect_server_killed_in_the_middle_costs_no_work(
    new_project: Callable[..., Path],
    undisturbed: Path,
    tmp_path: Path,
    contents: Callable[..., dict[str, bytes]],
    free_port: Callable[[], int],
) -> None:
    root = new_project(**LONGER)
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    environment |= {"PREFECT_HOME": str(tmp_path), "PREFECT_API_URL": url, "OMP_NUM_THREADS": "1"}
    # Prefect's client tries for minutes, in which the server may come back; not here.
    environment |= {"PREFECT_CLIENT_MAX_RETRIES": "0"}
    command = [sys.executable, "-c", "from flows.cli import main; main()", "train"]
    serve = [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)]
    with (tmp_path / "server.log").open("w") as log:
        prefect = subprocess.Popen(
            serve, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        for _ in range(1000):
            with suppress(OSError):
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            assert prefect.poll() is None, (tmp_path / "server.log").read_text()[-2000:]
            time.sleep(0.25)
        training = subprocess.Popen(
            command, cwd=root, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        while training.poll() is None and not list(root.glob(".fedcoe/runs/*/round-000003*")):
            time.sleep(0.01)
        os.killpg(prefect.pid, signal.SIGKILL)
        out, err = training.communicate(timeout=300)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(prefect.pid, signal.SIGKILL)
        prefect.wait()
    assert training.returncode == 0, err
    assert "Traceback" not in err and "all results are written" in err
    assert "global" in out
    assert contents(root) == contents(undisturbed)
    logged_run = logged(f"sqlite:///{root}/.fedcoe/mlflow.db")
    assert logged_run == logged(f"sqlite:///{undisturbed}/.fedcoe/mlflow.db")
    assert logged_run["status"] == "FINISHED"


@pytest.fixture
def store(tmp_path: Path, mlflow_database: Path) -> str:
    (tmp_path / "mlflow.db").write_bytes(mlflow_database.read_bytes())
    return f"sqlite:///{tmp_path}/mlflow.db"


def small_box(root: Path, store: str) -> Outbox:
    """A run of two metrics whose outbox stays when it was sent."""
    box = Outbox(root, "box")
    run: dict[str, Any] = {"kind": "run", "name": "small", "store": store, "memo": "memo"}
    box.put(run | {"time": 1, "tags": {"seed": "0"}, "params": {"lr": "0.1"}})
    for step in (1, 2):
        box.put({"kind": "metrics", "time": step, "step": step, "values": {"loss": 1.0 / step}})
    box.put({"kind": "status", "status": "FINISHED", "time": 3})
    (root / "memo").write_text("box")
    return box


def never(what: str, why: str) -> None:
    raise AssertionError(f"{what} refused: {why}")


def test_what_arrived_before_a_lost_note_does_not_arrive_twice(tmp_path: Path, store: str) -> None:
    box = small_box(tmp_path, store)
    deliver(box, store, never)
    first = logged(store)
    assert first["steps"] == {"loss": [1, 2]} and first["status"] == "FINISHED"
    (box.folder / "sent").unlink()
    deliver(box, store, never)
    assert logged(store) == first


SENDER = """
import sys, time
from pathlib import Path
import mlflow.store.tracking.sqlalchemy_store
from tasks.delivery import deliver
from tasks.outbox import Outbox
root, name, store = sys.argv[1:]
(Path(root) / f"ready-{name}").touch()
while not (Path(root) / "go").exists():
    time.sleep(0.01)
deliver(Outbox(Path(root), name), store, print)
"""


def test_runs_that_open_a_new_store_together_all_arrive(tmp_path: Path) -> None:
    """MLflow makes the tables of a new SQLite file; of two at that, one failed."""
    store, names = f"sqlite:///{tmp_path}/new.db", ("a", "b", "c")
    for name in names:
        run = {"kind": "run", "name": name, "store": store, "memo": None, "time": 1}
        Outbox(tmp_path, name).put(run | {"tags": {}, "params": {}})
    senders = [
        subprocess.Popen(
            [sys.executable, "-c", SENDER, str(tmp_path), name, store],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for name in names
    ]  # fmt: skip
    try:
        while len(list(tmp_path.glob("ready-*"))) < len(names):
            assert all(sender.poll() is None for sender in senders)
            time.sleep(0.1)
        (tmp_path / "go").touch()
        for sender in senders:
            printed, said = sender.communicate(timeout=120)
            assert sender.returncode == 0 and printed == "", said
    finally:
        for sender in senders:
            sender.kill()
    client = MlflowClient(store)
    experiments = [e.experiment_id for e in client.search_experiments()]
    assert {run.info.run_name for run in client.search_runs(experiments)} == set(names)


def test_a_run_whose_end_has_arrived_says_nothing_of_what_another_search_put_since(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    box, told = small_box(tmp_path, store), []
    tracking = Tracking(box, store)
    monkeypatch.setattr(tracking, "_warn", lambda text, *values: told.append(text % values))
    more = {"kind": "metrics", "time": 4, "step": 3, "values": {"loss": 0.3}}

    def deliver_and_more(*args: Any, **kwargs: Any) -> None:
        deliver(*args, **kwargs)
        box.put(more)

    monkeypatch.setattr("tasks.tracking.deliver", deliver_and_more)
    tracking.finish("FINISHED")
    assert told == []

    monkeypatch.setattr("tasks.tracking.deliver", lambda *_, **__: None)
    tracking.finish("FINISHED")
    assert len(told) == 1 and told[0].startswith("MLflow: 1 records wait")


def test_a_record_that_mlflow_never_takes_is_said_and_the_rest_is_sent(
    tmp_path: Path, store: str
) -> None:
    box = small_box(tmp_path, store)
    bad = {"kind": "metrics", "time": 4, "step": 3, "values": {"a?b*": 1.0}}
    box.put(bad)
    box.put({"kind": "metrics", "time": 5, "step": 4, "values": {"loss": 0.25}})
    told: list[str] = []
    deliver(box, store, lambda what, why: told.append(why))
    assert len(told) == 1 and "a?b*" in told[0]
    assert logged(store)["steps"] == {"loss": [1, 2, 4]}
    assert not box.waiting(store)


def test_a_store_that_was_made_anew_gets_everything_again(
    tmp_path: Path, store: str, mlflow_database: Path
) -> None:
    box = small_box(tmp_path, store)
    deliver(box, store, never)
    first = logged(store)
    other = tmp_path / "other.db"
    other.write_bytes(mlflow_database.read_bytes())
    deliver(box, f"sqlite:///{other}", never)
    assert logged(f"sqlite:///{other}") == first


def test_an_embedded_prefect_that_does_not_start_in_time_is_told_in_one_line(
    new_project: Callable[..., Path], fedcoe_command: Callable[..., Any], tmp_path: Path
) -> None:
    answer = fedcoe_command(
        new_project(),
        "train",
        PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS="0",
        PREFECT_API_URL="",
        PREFECT_HOME=str(tmp_path),
    )
    assert answer.returncode == 2 and "Traceback" not in answer.stderr
    assert "did not start in time" in answer.stderr
