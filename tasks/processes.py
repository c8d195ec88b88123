"""Processes that outlive the command that starts them: found again later, and stopped for sure.

Each stands in `.fedcoe/services.json` with its process id and start time, so that a stranger who
got the id later is not taken for it. All carry a mark in their environment, which children inherit:
what outlives a killed parent is found by it.
"""

import ctypes
import json
import os
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from fedcoe.durable import write_atomic
from fedcoe.errors import FedCoEError

HOST = "127.0.0.1"
PR_SET_PDEATHSIG = 1
"""Of Linux: what a process is sent when the thread that started it ends."""
MARK = "FEDCOE_SERVICES_OF"
PATIENCE = 120.0
"""Seconds a service has to answer: on a busy machine Prefect's server took 40."""
GRACE = 5.0
"""Seconds from asking a process to end to killing it."""


class Dependent(subprocess.Popen[Any]):
    """A process that ends with the one that starts it, however that ends, and not before.

    In a group of its own: Ctrl-C in a terminal, or SIGTERM of a batch system, is for the starter.
    """

    def __init__(self, args: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        library = ctypes.CDLL(None) if sys.platform == "linux" else None

        def depend() -> None:
            if library is not None:
                library.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

        super().__init__(args, env=env, process_group=0, preexec_fn=depend)


class Unready(FedCoEError):
    """A service that did not come up; `tail` is the end of its log."""

    def __init__(self, message: str, log: Path) -> None:
        super().__init__(f"{message}; see {log}; `fedcoe down` stops what did start")
        text = log.read_text(errors="replace") if log.exists() else ""
        self.tail = "\n".join(text.splitlines()[-15:])


@dataclass(frozen=True)
class Service:
    """A process that was started; `url` is empty where it serves none."""

    name: str
    pid: int
    started: float
    """Seconds since 1970, as the kernel tells it."""
    url: str
    log: str

    @property
    def process(self) -> psutil.Process | None:
        """None once it has ended."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < 1.0
        except psutil.NoSuchProcess:
            return None
        return process if same and _alive(process) else None


def recorded(root: Path) -> dict[str, Service]:
    """What was started in this project and still runs, by name."""
    try:
        rows = json.loads(_book(root).read_text())
        services = [Service(**row) for row in rows]
    except (FileNotFoundError, ValueError, TypeError):
        return {}
    return {service.name: service for service in services if service.process}


def start(
    root: Path, name: str, command: Sequence[str], environment: Mapping[str, str], url: str = ""
) -> Service:
    """Start a process in a session of its own and record it; its output goes to a log."""
    log = root / ".fedcoe" / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        pid = subprocess.Popen(
            command,
            cwd=root,
            env={**environment, MARK: str(root)},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ).pid
    service = Service(name, pid, psutil.Process(pid).create_time(), url, str(log))
    running = recorded(root) | {name: service}
    _record(root, running.values())
    return service


def wait_until(service: Service, ready: Callable[[], bool]) -> None:
    """Wait for a started process to be of use.

    Raises:
        Unready: it ended, or took too long.
    """
    deadline = time.monotonic() + PATIENCE
    while not ready():
        if service.process is None:
            raise Unready(f"{service.name} ended at once", Path(service.log))
        if time.monotonic() > deadline:
            raise Unready(
                f"{service.name} did not answer within {PATIENCE:.0f} s", Path(service.log)
            )
        time.sleep(0.3)


def answers(url: str) -> bool:
    """Whether a server says it is well."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError) as error:
        # A certificate that Python does not trust is one's own settings' to judge.
        return isinstance(getattr(error, "reason", error), ssl.SSLError)


def check_free(name: str, port: int, choose: str) -> None:
    """Raises FedCoEError where someone listens on the port already."""
    holders = []
    with suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                holders.append(connection.pid)
    if not holders:
        return
    with suppress(psutil.Error):
        if holders[0]:
            holder = psutil.Process(holders[0])
            raise FedCoEError(
                f"port {port} for {name} is taken by {holder.name()} (process {holder.pid}); "
                f"stop that or choose another: {choose}"
            )
    raise FedCoEError(f"port {port} for {name} is taken; choose another: {choose}")


def marked(root: Path) -> list[psutil.Process]:
    """All processes that descend from what was started in this project, but for this one."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == str(root) and process.pid != os.getpid():
                found.append(process)
    return [process for process in found if _alive(process)]


def stop(processes: Iterable[psutil.Process]) -> None:
    """Ask processes to end; kill those that do not within `GRACE` seconds."""
    left = list(processes)
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for process in left:
            with suppress(psutil.Error):
                end(process)
        deadline = time.monotonic() + GRACE
        while left and time.monotonic() < deadline:
            left = [process for process in left if _alive(process)]
            time.sleep(0.1)


def with_children(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return [process, *process.children(recursive=True)]
    return []


def forget(root: Path) -> None:
    _book(root).unlink(missing_ok=True)


def _record(root: Path, services: Iterable[Service]) -> None:
    rows = [asdict(service) for service in services]
    write_atomic(_book(root), (json.dumps(rows, indent=2) + "\n").encode())


def _book(root: Path) -> Path:
    return root / ".fedcoe" / "services.json"


def _alive(process: psutil.Process) -> bool:
    """A zombie has ended; whoever started it has yet to notice."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
