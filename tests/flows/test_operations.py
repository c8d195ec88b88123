"""`fedcoe up` to `fedcoe down` with real servers, and what keeps runs apart."""

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from fedcoe.errors import FedCoEError

REPOSITORY = Path(__file__).parents[2]
SERVERS = {"PREFECT_API_URL", "PREFECT_HOME", "MLFLOW_TRACKING_URI"}


@pytest.fixture
def site(new_project: Callable[..., Path]) -> Iterator[Path]:
    """A tiny project with the repository's deployments; whatever happens, nothing stays behind."""
    from tasks.processes import marked, stop

    # A coordination head does well on features that were never trained.
    root = new_project(method={"coordination_head": False}).resolve()
    shutil.copy(REPOSITORY / "prefect.yaml", root)
    yield root
    stop(marked(root))


WORSE = ["train.rounds=1", "train.lr=1e-5", "method.experts=3"]


def fedcoe(root: Path, *words: str, **given: str) -> subprocess.CompletedProcess[str]:
    """The command as in a shell that knows of no server but those given."""
    environment = {k: v for k, v in os.environ.items() if k not in SERVERS}
    return subprocess.run(
        [sys.executable, "-c", "from flows.cli import main; main()", *words],
        cwd=root,
        env=environment
        | given
        | {
            "OMP_NUM_THREADS": "1",
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def until(found: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.5)
    return value


def test_passwords_in_addresses_are_not_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from tasks.delivery import OutOfReachError, masked, probe
    from tasks.doctor import examine

    for uri in ("postgresql+psycopg://me:s3cret@db/x", "http://me:s3@cret@db/x"):
        assert masked(uri) == uri.split(":")[0] + "://db/x"
    for uri in ("sqlite:///b@c.db", "http://127.0.0.1:9/a//b@c", "no server set"):
        assert masked(uri) == uri
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:s3cret@db/x")
    assert "s3cret" not in str(examine(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:s3cret@127.0.0.1:9")
    with pytest.raises(OutOfReachError, match=r"^http://127.0.0.1:9 does not answer \(.*refused"):
        probe("http://me:s3cret@127.0.0.1:9")
    assert "s3cret" not in str(examine(tmp_path))


@pytest.mark.slow
def test_from_nothing_to_runs_on_the_pool_releases_and_a_served_client_and_back_to_nothing(
    site: Path, model_server: Callable[..., Any], tmp_path: Path, free_port: Callable[[], int]
) -> None:
    from mlflow import MlflowClient
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.schedules import IntervalSchedule
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from tasks.processes import marked

    assert not marked(site)
    ports = [str(free_port()), str(free_port())]
    up = ("up", "--prefect-port", ports[0], "--mlflow-port", ports[1], "--json")
    done = fedcoe(site, *up)
    assert done.returncode == 0, done.stderr
    first = json.loads(done.stdout)
    processes = {process.pid for process in marked(site)}
    assert len(processes) >= 3
    book = (site / ".fedcoe/services.json").read_text()

    done = fedcoe(site, *up)
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)
    assert [row["state"] for row in again["services"]] == ["was up"] * 3 + ["unchanged"]
    assert again["environment"] == first["environment"]
    assert (site / ".fedcoe/services.json").read_text() == book
    for process in map(psutil.Process, processes):
        for connection in process.net_connections("tcp"):
            assert connection.laddr.ip == "127.0.0.1", connection

    address = f"http://127.0.0.1:{ports[1]}"
    store = MlflowClient(address)

    def champion() -> tuple[str, str]:
        """Its version, and the learning rate it was trained with."""
        version = store.get_model_version_by_alias("fedcoe", "champion")
        return str(version.version), store.get_run(version.run_id).data.params["train.lr"]

    api = f"http://127.0.0.1:{ports[0]}/api"
    # A page of somebody else's that is open in a browser here must not start commands.
    ask = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    for page, allowed in (("https://evil.example", False), (api.removesuffix("/api"), True)):
        answer = httpx.options(f"{api}/deployments/", headers=ask | {"Origin": page})
        assert answer.headers.get("access-control-allow-origin") == (page if allowed else None)
    assert httpx.post(f"{api}/flows/", json={"name": "x"}).status_code == 403
    with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:
        assert client.read_work_pool("gpu-pool").concurrency_limit == 1

        def start(name: str, **parameters: Any) -> Any:
            found = client.read_deployment_by_name(name)
            return client.create_flow_run_from_deployment(found.id, parameters=parameters)

        def ended(run: Any) -> Any:
            state = client.read_flow_run(run.id).state
            return state if state is not None and state.is_final() else None

        def completed(run: Any) -> None:
            state = until(lambda: ended(run), 120)
            assert state.is_completed(), state

        bad = start("train/train", overrides=["train.roundz=1"])
        good = start("train/train", train={"rounds": 1, "lr": 0.03}, overrides=["method.experts=1"])
        compared = start(
            "compare/compare",
            methods=["fedavg"],
            seeds=[0],
            rows=["plain"],
            overrides=["train.rounds=1"],
        )
        tuned = start(
            "tune/tune",
            overrides=[
                "tune.trials=2",
                "train.rounds=1",
                "tune.space={train.lr: {low: 0.01, high: 0.1}}",
            ],
        )
        state = until(lambda: ended(bad), 60)
        assert state.is_failed() and "train.roundz = 1: unknown key" in state.message
        assert "\n" not in state.message
        for run in (good, compared, tuned):
            completed(run)
        assert "| fedavg" in (site / "results/digits/table.md").read_text()
        assert list((site / "results/tune").glob("*/*"))

        # Released by hand, made worse on purpose: the first champion.
        completed(start("nightly/nightly", overrides=WORSE))
        assert champion() == ("2", "1e-05")

        # By its schedule, as params.yaml says: better.
        nightly = client.read_deployment_by_name("nightly/nightly")
        assert not any(schedule.active for schedule in nightly.schedules)
        soon = datetime.now(UTC) + timedelta(seconds=20)
        every_minute = IntervalSchedule(interval=timedelta(minutes=1), anchor_date=soon)
        [made] = client.create_deployment_schedules(nightly.id, [(every_minute, True)])

        def fired() -> Any:
            runs = client.read_flow_runs()
            return next((r for r in runs if r.auto_scheduled and ended(r)), None)

        run = until(fired, 150)
        client.delete_deployment_schedule(nightly.id, made.id)
        completed(run)
        assert champion()[1] == "0.05"

    # A client that arrives today is served by the champion, from the same registry.
    images = np.load(site / "data/x_test.npy")[:200]
    body = {
        "inputs": images.tolist(),
        "params": {"mode": "unlabelled", "inputs": base64.b64encode(images).decode()},
    }
    with model_server(address, "champion", tmp_path / "serve.log") as served:
        request = urllib.request.Request(
            f"{served}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            p = np.array(json.load(answer)["predictions"])
    np.savez(tmp_path / "client.npz", x=images)
    words = (str(tmp_path / "client.npz"), "--mode", "unlabelled", "--version", "champion")
    done = fedcoe(site, "predict", *words, "--json", MLFLOW_TRACKING_URI=address)
    assert done.returncode == 0, done.stderr
    predicted = json.loads(done.stdout)
    assert [row["p"] for row in predicted] == pytest.approx(p.max(axis=1).tolist(), abs=1e-6)

    runs = store.search_runs([store.get_experiment_by_name("fedcoe").experiment_id])
    assert str(good.id) in {of.data.tags.get("flow_run") for of in runs}
    assert not (site / "models").exists()  # what is in the project by hand stays its own

    done = fedcoe(site, "down")
    assert done.returncode == 0, done.stderr
    assert not marked(site)
    assert not [pid for pid in processes if psutil.pid_exists(pid) and _works(pid)]
    assert fedcoe(site, "down").stdout == "nothing was running\n"


def _works(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_port_in_use_is_an_error_of_one_line_that_names_it_and_the_option() -> None:
    from tasks.processes import check_free

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(FedCoEError, match=rf"port {port} for mlflow .*--mlflow-port"):
            check_free("mlflow", port, "--mlflow-port")
    check_free("mlflow", port, "--mlflow-port")


def test_a_server_that_ends_at_once_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    from tasks.processes import Unready, start, wait_until

    broken = [sys.executable, "-c", "raise SystemExit('no such database')"]
    service = start(tmp_path, "mlflow", broken, dict(os.environ))
    with pytest.raises(Unready, match=r"mlflow ended at once; see .*mlflow\.log") as stopped:
        wait_until(service, lambda: False)
    assert stopped.value.tail == "no such database"


def test_a_stranger_with_a_recorded_id_is_neither_taken_for_ours_nor_stopped(
    tmp_path: Path,
) -> None:
    from tasks.processes import Service, recorded
    from tasks.services import down

    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as stranger:
        row = vars(Service("mlflow", stranger.pid, 1.0, "", ""))
        (tmp_path / ".fedcoe").mkdir()
        (tmp_path / ".fedcoe/services.json").write_text(json.dumps([row]))
        assert recorded(tmp_path) == {}
        assert down(tmp_path) == 0
        assert stranger.poll() is None
        stranger.kill()


def test_down_ends_what_ignores_signals_and_what_outlived_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.processes import marked, start
    from tasks.services import down

    monkeypatch.setattr("tasks.processes.GRACE", 0.5)
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {stubborn!r}])"
    start(tmp_path, "worker", [sys.executable, "-c", parent], dict(os.environ))
    until(lambda: [p for p in marked(tmp_path) if "SIG_IGN" in p.cmdline()[-1]], 20)
    time.sleep(0.5)
    assert down(tmp_path) >= 1
    assert not marked(tmp_path)


def test_a_server_of_the_team_is_not_started_and_must_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_port: Callable[[], int]
) -> None:
    from tasks.services import up

    (tmp_path / "prefect.yaml").touch()
    nobody = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("PREFECT_API_URL", f"{nobody}/api")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", nobody)
    with pytest.raises(FedCoEError, match=f"PREFECT_API_URL={nobody}/api does not answer"):
        up(tmp_path, free_port(), free_port())
    assert not (tmp_path / ".fedcoe/services.json").exists()


def test_the_second_of_two_equal_runs_waits_and_a_killed_holder_lets_go(tmp_path: Path) -> None:
    from tasks.locks import locked

    hold = (
        "import sys, time; from pathlib import Path; from tasks.locks import locked\n"
        "with locked(Path(sys.argv[1]), 'run-x', ''):\n    print('held', flush=True)\n"
        "    time.sleep(60)"
    )
    command = [sys.executable, "-c", hold, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError), locked(tmp_path, "run-x", "", wait=False):
            pass
        entered = threading.Event()

        def second() -> None:
            with locked(tmp_path, "run-x", "it"):
                entered.set()

        waiting = threading.Thread(target=second)
        waiting.start()
        assert not entered.wait(0.3)
        holder.kill()
        assert entered.wait(10)
        waiting.join()


def test_what_went_down_with_its_worker_does_not_fill_the_pool_for_ever(
    prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.states import Running

    from tasks.services import _alive, _crash

    monkeypatch.setattr("tasks.services.POOL", "lost-pool")

    @flow
    def nothing() -> None: ...

    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="lost-pool", type="process"))
        of = client.create_flow(nothing)
        deployment = client.create_deployment(of, "lost", work_pool_name="lost-pool")
        lost = client.create_flow_run_from_deployment(deployment, state=Running())
        by_hand = client.create_flow_run(nothing, state=Running())
        _crash(client, "lost with the worker that ran it", "lost-pool")
        lost, by_hand = (client.read_flow_run(run.id) for run in (lost, by_hand))
        assert not _alive(client)
        beat = {"name": "another clone's", "heartbeat_interval_seconds": 30}
        answer = client._client.post("/work_pools/lost-pool/workers/heartbeat", json=beat)
        answer.raise_for_status()
        assert _alive(client)  # then nothing is taken for lost
    assert lost.state.is_crashed() and "lost with the worker" in lost.state.message
    assert by_hand.state.is_running()


def test_a_server_whose_certificate_only_mlflow_trusts_counts_as_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ssl
    import urllib.error

    from tasks.delivery import OutOfReachError, probe
    from tasks.processes import answers

    def refused(reason: Exception) -> None:
        def urlopen(*_: Any, **__: Any) -> None:
            raise urllib.error.URLError(reason)

        monkeypatch.setattr("urllib.request.urlopen", urlopen)

    refused(ssl.SSLCertVerificationError("self-signed certificate"))
    probe("https://mlflow.example")
    assert answers("https://mlflow.example")
    refused(ConnectionRefusedError())
    with pytest.raises(OutOfReachError):
        probe("https://mlflow.example")
    assert not answers("https://mlflow.example")


def test_data_is_not_replaced_under_a_training(
    new_project: Callable[..., Path], fedcoe_command: Callable[..., Any]
) -> None:
    from tasks.locks import reading_data

    root = new_project()
    with reading_data(root):
        refused = fedcoe_command(root, "fetch", "digits")
    assert refused.returncode == 2
    assert "data: a training reads it; fetch again when that has ended" in refused.stderr
    assert fedcoe_command(root, "fetch", "digits").returncode == 0


def test_runs_on_the_pool_have_folders_of_their_own_and_old_ones_go(
    new_project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedcoe.config import load_settings
    from tasks import workspace as module
    from tasks.tracking import data_version

    monkeypatch.setattr(module, "KEEP", 2)
    root, folders = new_project(), []
    (root / "data.dvc").write_text("outs: [{md5: abc.dir, path: data}]")
    for seed in range(3):
        settings = load_settings(root / "params.yaml", [f"train.seed={seed}"])
        with module.workspace(root, settings) as folder:
            assert load_settings(folder / "params.yaml") == settings
            assert data_version(folder) == "abc.dir"
            folders.append(folder)
        time.sleep(0.02)
    assert len(set(folders)) == 3
    assert [folder.exists() for folder in folders] == [False, True, True]
    assert (root / "data/dataset.json").exists() and (root / ".fedcoe/mlflow.db").exists()


def test_the_form_of_train_has_the_descriptions_and_ranges_of_the_settings() -> None:
    from prefect.utilities.callables import parameter_schema

    from fedcoe.config import TrainSettings
    from flows.operations import train

    schema = parameter_schema(train).model_dump()
    lr = schema["definitions"]["Train"]["properties"]["lr"]
    assert lr["description"] == TrainSettings.model_fields["lr"].description
    [number] = [kind for kind in lr["anyOf"] if kind["type"] == "number"]
    assert number == {"type": "number", "exclusiveMinimum": 0.0, "maximum": 10.0}
    assert lr["default"] is None
    forms = [schema, *(found for found in schema["definitions"].values() if "properties" in found)]
    fields = [(n, of) for form in forms for n, of in form["properties"].items()]
    assert {"experts", "epsilon", "dropout"} <= {name for name, _ in fields}
    assert [name for name, of in fields if not of.get("description")] == []


def test_a_field_of_another_method_is_refused_before_anything_is_trained(
    new_project: Callable[..., Path],
) -> None:
    from flows.operations import FedCoE, train

    root = new_project()
    with pytest.raises(FedCoEError, match=r"method\.experts: fedavg has no such setting"):
        train.fn(str(root), method="fedavg", fedcoe=FedCoE(experts=3))
    assert not (root / ".fedcoe" / "pool").exists()


def test_a_run_that_names_another_dataset_than_the_one_that_is_there_trains_nothing(
    new_project: Callable[..., Path],
) -> None:
    from flows.operations import train

    root = new_project()
    with pytest.raises(FedCoEError, match="data/ holds digits, not cifar10"):
        train.fn(str(root), overrides=["data.name=cifar10"])
    assert not (root / ".fedcoe" / "pool").exists()


@pytest.mark.slow
def test_data_is_checked_out_from_the_cache_and_a_failure_says_what_dvc_said(
    new_project: Callable[..., Path], prefect_api: str
) -> None:
    from fedcoe.data.dataset import load_dataset
    from tasks.data_version import fetch_data

    root = new_project()
    wanted = load_dataset(root / "data").info.hash
    for words in (("git", "init", "-q"), ("dvc", "init", "-q"), ("dvc", "add", "-q", "data")):
        tool = ["git"] if words[0] == "git" else [sys.executable, "-m", "dvc"]
        subprocess.run([*tool, *words[1:]], cwd=root, check=True, capture_output=True)
    shutil.rmtree(root / "data")
    assert fetch_data.fn(root) == wanted
    shutil.rmtree(root / "data")
    shutil.rmtree(root / ".dvc/cache")
    with pytest.raises(FedCoEError, match=r"`dvc checkout data.dvc` failed: .*ERROR") as stopped:
        fetch_data.fn(root)
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize("version", ["7", None])
def test_nightly_judges_the_version_it_trained_or_none(
    version: str | None,
    new_project: Callable[..., Path],
    prefect_api: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flows import operations

    judged: list[str] = []
    monkeypatch.setattr(operations, "federated_training", lambda *_, **__: {"global": 0.5})
    monkeypatch.setattr(operations, "deal", lambda _: None)
    monkeypatch.setattr(operations, "report", lambda _: None)
    # None: its model waits in the outbox. The alias `candidate` then names an older night's.
    monkeypatch.setattr(operations, "version_of", lambda _: version)
    monkeypatch.setattr(operations, "release_candidate", lambda _, found: judged.append(found))
    assert operations.nightly(str(new_project()), fetch=False) == {"global": 0.5}
    assert judged == ([version] if version else [])
