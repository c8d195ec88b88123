"""`make lint`'s audit of the pinned packages, against a service of the test's own."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
CONSTRAINTS = "torch==2.13.0+cpu\nold==1.0  # why\nfine==2.0\n"


class Service(BaseHTTPRequestHandler):
    """Answers as osv.dev does (https://google.github.io/osv.dev/post-v1-querybatch/)."""

    known: dict[str, list[str]]
    details: dict[str, Any]

    def do_POST(self) -> None:
        assert self.path == "/v1/querybatch"
        queries = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"]
        self.answer({"results": [self.result(query) for query in queries]})

    def result(self, query: Any) -> dict[str, Any]:
        assert query["package"]["ecosystem"] == "PyPI"
        ids = self.known.get(f"{query['package']['name']}=={query['version']}", [])
        page = int(query.get("page_token", 0))
        row: dict[str, Any] = {"vulns": [{"id": ids[page], "modified": "x"}]} if ids else {}
        return row | ({"next_page_token": str(page + 1)} if page + 1 < len(ids) else {})

    def do_GET(self) -> None:
        self.answer(self.details[self.path.rsplit("/", 1)[1]])

    def answer(self, value: Any) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[str]:
    Service.known = {"jinja2==2.4.1": ["C-1"]}
    Service.details = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def audit(service: str, folder: Path) -> tuple[int, list[str]]:
    (folder / "constraints.txt").write_text(CONSTRAINTS)
    command = [sys.executable, str(ROOT / ".ci" / "audit.py"), "--service", service]
    command += ["--constraints", str(folder / "constraints.txt")]
    command += ["--accepted", str(folder / "accepted.txt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.returncode, done.stdout.splitlines()


def test_pins_without_known_vulnerabilities_pass(service: str, tmp_path: Path) -> None:
    said = ["dependency audit: 3 packages, no known vulnerabilities"]
    assert audit(service, tmp_path) == (0, said)


def test_every_vulnerability_is_a_line_and_fails_unless_withdrawn_or_accepted(
    service: str, tmp_path: Path
) -> None:
    Service.known |= {"old==1.0": ["V-1", "V-2", "V-3"], "torch==2.13.0": ["V-4"]}
    Service.details = {
        "V-1": {"summary": "runs code"},
        "V-2": {"summary": "was none", "withdrawn": "2026-01-01"},
        "V-3": {"summary": "leaks", "aliases": ["CVE-3"]},
        "V-4": {},
    }
    expected = ["torch==2.13.0: V-4: see osv.dev", "old==1.0: V-1: runs code"]
    last = "dependency audit: 3 packages, 3 known vulnerabilities"
    assert audit(service, tmp_path) == (1, [*expected, "old==1.0: V-3: leaks", last])
    (tmp_path / "accepted.txt").write_text("# why\nCVE-3 not reached\nV-4 no fix yet\nV-1 x\n")
    assert audit(service, tmp_path)[0] == 0


@pytest.mark.parametrize("broken", ["nobody listens", "it knows nothing", "it answers nonsense"])
def test_a_service_that_cannot_be_asked_is_said_and_does_not_fail(
    service: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    if broken == "it knows nothing":
        Service.known = {}
    elif broken == "it answers nonsense":
        monkeypatch.setattr(Service, "do_POST", lambda self: self.answer([1]))
    address = "http://127.0.0.1:1" if broken == "nobody listens" else service
    code, lines = audit(address, tmp_path)
    assert code == 0 and len(lines) == 1
    assert "NOT DONE" in lines[0] and "no known" not in lines[0]
