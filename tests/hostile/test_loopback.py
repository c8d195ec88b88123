"""What is started listens on loopback; tests/flows/test_operations.py looks at the sockets."""

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def test_the_servers_of_up_are_told_to_listen_on_loopback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks import services

    started: dict[str, list[str]] = {}

    def note(root: Path, name: str, command: list[str], *_: Any) -> None:
        started[name] = command

    monkeypatch.setattr(services, "start", note)
    monkeypatch.setattr(services, "check_free", lambda *_: None)
    for variable in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    services._server(tmp_path, "prefect", "PREFECT_API_URL", 4200)
    services._server(tmp_path, "mlflow", "MLFLOW_TRACKING_URI", 5000)
    for name in ("prefect", "mlflow"):
        command = started[name]
        assert command[command.index("--host") + 1] == "127.0.0.1"


def test_the_tools_own_default_is_loopback_too() -> None:
    from mlflow.cli import server
    from mlflow.models.cli import serve
    from prefect.settings import PREFECT_SERVER_API_HOST

    for command in (server, serve):
        [host] = [option for option in command.params if option.name == "host"]
        assert host.default == "127.0.0.1"
    assert PREFECT_SERVER_API_HOST.default() == "127.0.0.1"


def test_nothing_here_tells_a_server_to_listen_everywhere() -> None:
    files = [ROOT / "Makefile", ROOT / "prefect.yaml", ROOT / "README.md"]
    for top in ("fedcoe", "tasks", "flows", "benchmarks"):
        files += sorted((ROOT / top).rglob("*.py"))
    files += sorted((ROOT / "docs").glob("*.md"))
    open_to_all = [
        file.name
        for file in files
        if re.search(r"0\.0\.0\.0|--host[= ]+(?!127\.0\.0\.1)[\d:\[]", file.read_text("utf-8"))
    ]
    assert open_to_all == []
