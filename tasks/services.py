"""Prefect's and MLflow's servers, the work pool and its workers: `fedcoe up`, `fedcoe down`.

Servers that PREFECT_API_URL or MLFLOW_TRACKING_URI name elsewhere are used and never started; what
else these tools read from the environment (databases, artifact stores, keys) reaches them as it is.
"""

import hashlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psutil

from fedcoe.errors import FedCoEError
from tasks.delivery import masked
from tasks.locks import locked
from tasks.processes import (
    HOST,
    Service,
    Unready,
    answers,
    check_free,
    forget,
    marked,
    recorded,
    start,
    stop,
    wait_until,
    with_children,
)

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

POOL = "gpu-pool"
SERVERS = ("prefect", "mlflow")
WAITING = "another `fedcoe up` or `fedcoe down`"


@dataclass(frozen=True)
class Server:
    """A server as clients see it; `service` is None where it is not ours."""

    name: str
    variable: str
    url: str
    state: str
    service: Service | None


def up(root: Path, prefect_port: int, mlflow_port: int) -> tuple[list[dict[str, str]], list[str]]:
    """Start what does not run yet and wait until all of it answers.

    Returns:
        Rows of name, address and state; the environment variables that lead there, as `NAME=URL`.

    Raises:
        FedCoEError: a port is taken, or something did not answer (`Unready`).
    """
    root = root.resolve()
    if not (root / "prefect.yaml").exists():
        raise FedCoEError(f"{root / 'prefect.yaml'}: no such file; the repository has one to copy")
    with locked(root, "services", WAITING):
        prefect = _server(root, "prefect", "PREFECT_API_URL", prefect_port)
        mlflow = _server(root, "mlflow", "MLFLOW_TRACKING_URI", mlflow_port)
        for server in (prefect, mlflow):
            _await(server)
        environment = _environment(root) | {s.variable: s.url for s in (prefect, mlflow)}
        rows = [
            {"name": s.name, "address": masked(s.url), "state": s.state} for s in (prefect, mlflow)
        ]
        with _client(prefect.url) as client:
            gpus = devices()
            ours = prefect.service is not None
            created = _pool(client, len(gpus), ours=ours)
            if ours and not _running(root)[1] and not _alive(client):
                # Of a machine or workers that went down: they would fill the pool for ever.
                _crash(client, "lost with the worker that ran it", POOL)
            workers = {name: _worker(root, name, gpus[name], environment) for name in gpus}
            changed = _deploy(root, client, prefect.url, environment, anyway=created)
            for name, (worker, state) in workers.items():
                wait_until(worker, lambda of=(name, worker): _online(client, *of))  # type: ignore[misc]
                rows.append({"name": f"worker {name}", "address": POOL, "state": state})
        rows.append({"name": "deployments", "address": "prefect.yaml", "state": changed})
    return rows, [f"{server.variable}={server.url}" for server in (prefect, mlflow)]


def down(root: Path) -> int:
    """Stop workers, what they run, and the servers `up` started. Returns how many processes.

    Flow runs that are cut off are marked as crashed, so that the UI does not show them as running.
    """
    root = root.resolve()
    with locked(root, "services", WAITING):
        services = recorded(root)
        serving, others = _running(root)
        stopped = serving | others
        stop(others)
        if "prefect" in services:
            with suppress(Exception), _client(services["prefect"].url) as client:
                _crash(client, "stopped by `fedcoe down`")
        stop(serving)
        for _ in range(3):  # a child may have been started meanwhile
            left = marked(root)
            stopped |= set(left)
            stop(left)
        if left := marked(root):
            named = ", ".join(str(process.pid) for process in left)
            raise FedCoEError(f"would not end: processes {named}; kill them by hand")
        forget(root)
    return len(stopped)


def devices() -> dict[str, str]:
    """This machine's worker names, and the GPU each is to see; without a GPU one that sees none."""
    from fedcoe.engine.devices import visible

    host = socket.gethostname()
    return {f"{host}-gpu{name}": name for name in visible()} or {f"{host}-cpu": ""}


def _environment(root: Path) -> dict[str, str]:
    home = root / ".fedcoe"
    environment = os.environ | {
        "DO_NOT_TRACK": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # The command makes both quiet for the terminal; here there are logs to be read.
        "PREFECT_LOGGING_LEVEL": "INFO",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    }
    environment.setdefault("PREFECT_HOME", str(home / "prefect"))
    environment.setdefault("MLFLOW_BACKEND_STORE_URI", f"sqlite:///{home}/mlflow.db")
    if "MLFLOW_ARTIFACTS_DESTINATION" not in environment:
        # Where runs without a server put theirs, so that each finds the other's.
        environment.setdefault("MLFLOW_DEFAULT_ARTIFACT_ROOT", (home / "artifacts").as_uri())
    return environment


def _server(root: Path, name: str, variable: str, port: int) -> Server:
    """Find a server or start ours, without waiting for it."""
    address = f"http://{HOST}:{port}"
    url = f"{address}/api" if name == "prefect" else address
    asked, running = os.environ.get(variable, "").rstrip("/"), recorded(root).get(name)
    if asked and asked != (running.url if running else url):
        return Server(name, variable, asked, f"not started: {variable} names it", None)
    if running and running.url != url:
        raise FedCoEError(
            f"{name} is up at {running.url}, not at port {port}; to move it, `fedcoe down` first"
        )
    if running:
        return Server(name, variable, url, "was up", running)
    if asked and answers(url):
        return Server(name, variable, url, f"not started: {variable} names it", None)
    own = {"prefect": "PREFECT_SERVER_API_PORT", "mlflow": "MLFLOW_PORT"}[name]
    check_free(name, port, f"--{name}-port or {own}")
    environment = _environment(root) | {"PREFECT_API_URL": url}
    words = [name, "server", *(["start"] if name == "prefect" else ["--workers", "1"])]
    if name == "prefect":
        # It answers every web page by default: one that is open in a browser here could start a
        # command on the pool.
        pages = f"{address},http://localhost:{port}"
        environment.setdefault("PREFECT_SERVER_CORS_ALLOWED_ORIGINS", pages)
        environment.setdefault("PREFECT_SERVER_CSRF_PROTECTION_ENABLED", "true")
    else:
        for variable_of_clients in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
            environment.pop(variable_of_clients, None)
    command = [sys.executable, "-m", *words, "--host", HOST, "--port", str(port)]
    return Server(name, variable, url, "started", start(root, name, command, environment, url))


def _await(server: Server) -> None:
    if server.service:
        wait_until(server.service, lambda: answers(server.url))
    elif server.url.startswith("http") and not answers(server.url):
        raise FedCoEError(
            f"{server.variable}={masked(server.url)} does not answer; start that server or unset it"
        )


@contextmanager
def _client(url: str) -> Iterator["SyncPrefectClient"]:
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        yield client


def _pool(client: "SyncPrefectClient", slots: int, ours: bool) -> bool:
    """Make the work pool; on a team's server, one that exists stays as it is. Returns if made."""
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectNotFound
    from prefect.workers.process import ProcessWorker

    try:
        found = client.read_work_pool(POOL)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        wanted = WorkPoolCreate(
            name=POOL, type="process", base_job_template=template, concurrency_limit=slots
        )
        client.create_work_pool(wanted)
        return True
    if ours and found.concurrency_limit != slots:
        client.update_work_pool(POOL, WorkPoolUpdate(concurrency_limit=slots))
    return False


def _running(root: Path) -> tuple[set[psutil.Process], set[psutil.Process]]:
    """The servers that `up` started, with their children; and workers, with what they run."""
    services, found = recorded(root), set(marked(root))
    servers = [services[name].process for name in SERVERS if name in services]
    serving = {p for server in servers if server for p in with_children(server)}
    return serving, ({s.process for s in services.values() if s.process} | found) - serving


def _worker(root: Path, name: str, gpu: str, environment: Mapping[str, str]) -> tuple[Service, str]:
    if running := recorded(root).get(name):
        return running, "was up"
    words = ["worker", "start", "--pool", POOL, "--type", "process", "--name", name]
    words += ["--limit", "1", "--no-create-pool-if-not-found"]
    command = [sys.executable, "-m", "prefect", *words]
    return start(root, name, command, {**environment, "CUDA_VISIBLE_DEVICES": gpu}), "started"


def _alive(client: "SyncPrefectClient") -> bool:
    """Whether any worker of the pool, of another clone too, was heard of in the last minute."""
    return _heard(client) > time.time() - 60


def _online(client: "SyncPrefectClient", name: str, worker: Service) -> bool:
    """Whether it was heard of since it started: one that was killed stays `online` for a while."""
    return _heard(client, name) >= worker.started - 1


def _heard(client: "SyncPrefectClient", name: str | None = None) -> float:
    """When this worker of the pool, or any, was last heard of; 0 for never."""
    workers = client.read_workers_for_work_pool(POOL)
    beats = [w.last_heartbeat_time for w in workers if name in (None, w.name)]
    return max((beat.timestamp() for beat in beats if beat is not None), default=0.0)


def _deploy(
    root: Path, client: "SyncPrefectClient", url: str, environment: Mapping[str, str], anyway: bool
) -> str:
    """Apply prefect.yaml where it, the flows or the settings changed, which make the forms;
    switches of schedules stay as they are."""
    here = Path(__file__).parents[1]
    forms = (*here.glob("flows/*.py"), here / "fedcoe/config.py", *here.glob("fedcoe/methods/*.py"))
    code = [root / "prefect.yaml", *sorted(forms)]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in code)).hexdigest()
    memo, now = root / ".fedcoe" / "deployed", f"{url} {digest}"
    if not anyway and memo.exists() and memo.read_text() == now:
        return "unchanged"
    switches = _switches(client)
    log = root / ".fedcoe" / "logs" / "deploy.log"
    with log.open("wb") as file:
        code_of = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
            cwd=root,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    if code_of:
        raise Unready("`prefect deploy --all` failed", log)
    for key, (deployment, schedule, active) in _switches(client).items():
        if key in switches and switches[key][2] != active:
            client.update_deployment_schedule(deployment, schedule, active=switches[key][2])
    memo.write_text(now)
    return "applied"


def _switches(client: "SyncPrefectClient") -> dict[tuple[str, str], tuple[UUID, UUID, bool]]:
    """Which schedules are on, by names of deployment and schedule."""
    return {
        (deployment.name, str(schedule.slug)): (deployment.id, schedule.id, schedule.active)
        for deployment in client.read_deployments()
        for schedule in deployment.schedules
    }


def _crash(client: "SyncPrefectClient", why: str, pool: str | None = None) -> None:
    """Mark what is at work, or only what the pool runs, as crashed."""
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
        WorkPoolFilter,
        WorkPoolFilterName,
    )
    from prefect.client.schemas.objects import State, StateType
    from prefect.states import Crashed

    kinds = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
    cut = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=kinds)))
    of = None if pool is None else WorkPoolFilter(name=WorkPoolFilterName(any_=[pool]))
    for run in client.read_flow_runs(flow_run_filter=cut, work_pool_filter=of):
        state: State[Any] = Crashed(message=f"{why}; a new run goes on from the last round")
        client.set_flow_run_state(run.id, state, force=True)
