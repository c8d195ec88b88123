"""Find the registry and read it. Imports MLflow and no more: a person waits for the list."""

import os
from collections.abc import Sequence
from pathlib import Path

from fedcoe.errors import FedCoEError


def use_default_stores(root: Path) -> None:
    """Point MLflow at SQLite and a folder under `.fedcoe/`, unless the environment says else."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # MLflow's own 7 retries keep a command waiting four minutes for a server that is not there.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    folder = (root / ".fedcoe").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")


def registered_experts() -> Sequence[dict[str, str]]:
    """Every registered version as a flat row: name, version, that of the mixture it is part of,
    aliases, figures; newest first."""
    from mlflow import MlflowClient

    client = MlflowClient()
    rows = []
    for model in client.search_registered_models("name LIKE 'fedcoe%'"):
        aliases: dict[str, list[str]] = {}
        for alias, version in model.aliases.items():
            aliases.setdefault(str(version), []).append(alias)
        for version in client.search_model_versions(f"name='{model.name}'"):
            rows.append(
                {
                    "name": model.name,
                    "version": str(version.version),
                    "aliases": ", ".join(aliases.get(str(version.version), [])),
                    "run_id": version.run_id or "",
                }
                | dict(version.tags)
            )
    mixtures = {row["run_id"]: row["version"] for row in rows if row["name"] == "fedcoe"}
    rows = [row | {"mixture": mixtures.get(row["run_id"], "")} for row in rows]
    return sorted(rows, key=lambda row: (row["name"], -int(row["version"])))


def registered_card(name: str, version: str | None = None) -> str:
    """The card of a registered model: of a version, or of the newest.

    Raises:
        FedCoEError: there is no such model or version, or it has no card.
    """
    from mlflow import MlflowClient

    found = {
        str(v.version): v.description or ""
        for v in MlflowClient().search_model_versions(f"name='{name}'")
    }
    if not found:
        raise FedCoEError(f"no model {name!r} is registered; `fedcoe experts` lists them")
    version = version or max(found, key=int)
    if not found.get(version):
        there = ", ".join(v for v in sorted(found, key=int) if found[v]) or "none"
        raise FedCoEError(f"{name} version {version} has no card; versions with one: {there}")
    return found[version]
