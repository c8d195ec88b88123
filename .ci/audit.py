"""Ask osv.dev for known vulnerabilities of the pinned packages (`make lint`).

Exit code 1 and a line each where there are some; 0 where there are none, and also where the
service cannot be asked, which is then said. What is known and accepted stands in
`.ci/audit-accepted.txt`, an id and the reason a line.
"""

import argparse
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SERVICE = "https://api.osv.dev"
CANARY = ("jinja2", "2.4.1")
"""Known to be vulnerable: an answer that does not say so is no answer."""
TIMEOUT = 5.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints.txt")
    parser.add_argument("--accepted", type=Path, default=ROOT / ".ci" / "audit-accepted.txt")
    parser.add_argument("--service", default=SERVICE)
    given = parser.parse_args()
    pins = pinned(given.constraints.read_text(encoding="utf-8"))
    try:
        found = vulnerabilities(given.service, [CANARY, *pins])
        if not found.pop(CANARY):
            raise ValueError(f"it knows nothing of {'=='.join(CANARY)}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"dependency audit: NOT DONE, {given.service} did not answer as it should: {error}")
        return 0
    accepted = set()
    if given.accepted.exists():
        lines = given.accepted.read_text(encoding="utf-8").splitlines()
        accepted = {line.split()[0] for line in lines if line.strip() and line[0] != "#"}
    bad = 0
    for (name, version), ids in found.items():
        for id_ in ids:
            about = details(given.service, id_)
            if about.get("withdrawn") or accepted & {id_, *about.get("aliases", ())}:
                continue
            bad += 1
            print(f"{name}=={version}: {id_}: {about.get('summary', 'see osv.dev')}")
    print(f"dependency audit: {len(pins)} packages, {bad or 'no'} known vulnerabilities")
    return int(bad > 0)


def pinned(text: str) -> list[tuple[str, str]]:
    """(name, version) of every `name==version` line; a local version (+cpu) is left out."""
    lines = (line.split("#")[0].split(";")[0].strip() for line in text.splitlines())
    pairs = (line.split("==") for line in lines if "==" in line)
    return [(name.strip(), version.strip().split("+")[0]) for name, version in pairs]


def vulnerabilities(
    service: str, packages: list[tuple[str, str]]
) -> dict[tuple[str, str], list[str]]:
    """Ids of the known vulnerabilities of each package.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError: the service does not answer so.
    """
    found: dict[tuple[str, str], list[str]] = {package: [] for package in packages}
    asked: list[tuple[tuple[str, str], str]] = [(package, "") for package in packages]
    while asked:
        queries = [
            {"package": {"ecosystem": "PyPI", "name": name}, "version": version}
            | ({"page_token": page} if page else {})
            for (name, version), page in asked
        ]
        results = _ask(f"{service}/v1/querybatch", {"queries": queries})["results"]
        if len(results) != len(queries):
            raise ValueError(f"{len(results)} results for {len(queries)} queries")
        more = []
        for (package, _), result in zip(asked, results, strict=True):
            found[package] += [row["id"] for row in result.get("vulns", ())]
            if result.get("next_page_token"):
                more.append((package, result["next_page_token"]))
        asked = more
    return found


def details(service: str, id_: str) -> dict[str, Any]:
    """What is known about a vulnerability; nothing where the service does not say."""
    try:
        return dict(_ask(f"{service}/v1/vulns/{id_}"))
    except (OSError, ValueError, TypeError):
        return {}


def _ask(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        return json.load(answer)


if __name__ == "__main__":
    sys.exit(main())
