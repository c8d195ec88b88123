"""Tasks: grade registered models on the data at hand, and move the aliases that name them.

The aliases `candidate` and `champion` of `fedcoe`, its gate and its experts always move together.
"""

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from fedcoe.bundle import Bundle, load_bundle
from fedcoe.config import load_settings
from fedcoe.data.dataset import load_dataset
from fedcoe.data.partition import load_partition
from fedcoe.engine.clients import ClientData
from fedcoe.engine.devices import hardware
from fedcoe.engine.pool import Engine, Site
from fedcoe.errors import FedCoEError
from fedcoe.locks import Lock
from fedcoe.release import CONFIDENCE, Difference, Graded, grade_clients
from tasks.delivery import MIXTURE, point

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

ALIASES = ("champion", "candidate")
HISTORY = "champion_history"
"""Tag of the registered model: versions that were champion, oldest first."""


def aliased(alias: str) -> str | None:
    """The version of the mixture that an alias names."""
    from mlflow import MlflowClient

    return _aliased(MlflowClient(), alias)


def _aliased(client: "MlflowClient", alias: str) -> str | None:
    found = client.search_registered_models(f"name='{MIXTURE}'")
    version = found[0].aliases.get(alias) if found else None
    return None if version is None else str(version)


def registered(version: str) -> "ModelVersion":
    """A version of the mixture.

    Raises:
        FedCoEError: there is none of that number.
    """
    from mlflow import MlflowClient

    versions = {
        str(found.version): found
        for found in MlflowClient().search_model_versions(f"name='{MIXTURE}'")
    }
    if version not in versions:
        there = ", ".join(sorted(versions, key=int)) or "none; train one: `fedcoe train`"
        raise FedCoEError(f"no version {version} of {MIXTURE} is registered; there are: {there}")
    return versions[version]


@contextmanager
def load_version(
    version: str, precision: Literal["auto", "fp32", "bf16"] | None = None
) -> Iterator[Bundle]:
    """Open a registered mixture from its files alone: no code that lies with it is run."""
    from mlflow.artifacts import download_artifacts

    uri = f"models:/{MIXTURE}/{registered(version).version}"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(download_artifacts(uri, dst_path=scratch)) / "artifacts"
        if not folder.is_dir():
            source = registered(version).source
            raise FedCoEError(
                f"version {version}: its files are not at {source} any more; where a project has "
                "moved, move it back, or train there anew"
            )
        yield load_bundle(folder, precision)


@task(name="grade model", task_run_name="grade version {version}", cache_policy=NO_CACHE)
def grade_model(root: Path, version: str) -> list[Graded]:
    """Grade a version on all clients of data/ and partitions/.

    Raises:
        FedCoEError: it takes other images or knows other classes than the data has.
    """
    settings = load_settings(root / "params.yaml")
    data = ClientData(load_dataset(root / "data"), load_partition(root / "partitions"))
    info, partition = data.dataset.info, data.partition
    with load_version(version) as bundle:
        f = bundle.method.federation
        bundle.check_whole()
        if (f.shape, f.class_names) != (tuple(info.shape), tuple(info.classes)):
            raise FedCoEError(
                f"version {version} takes images of {list(f.shape)} in {f.classes} classes, data/ "
                f"has {info.shape} in {len(info.classes)}: there is nothing to compare; "
                "move aliases by hand: `fedcoe promote`"
            )
        vectorized, devices = hardware(settings.runtime)
        site = Site(
            root / "data",
            root / "partitions",
            root / ".fedcoe" / "none",  # personal experts stay with their clients
            f.settings.model.name,
            settings.runtime.precision,
            vectorized=vectorized,
            devices=devices,
            build=bundle.method.build,
            normalisation=(f.mean, f.std),
        )
        with Engine(site, settings.runtime.workers) as engine:
            sizes = [int((partition.client == k).sum()) for k in range(partition.clients)]
            shards = engine.shards(range(partition.clients), sizes)
            done = engine.map(grade_clients, bundle.method, bundle.state, over=shards)
    return [graded for shard in done for graded in shard]


@contextmanager
def _alone() -> Iterator[None]:
    """One process at a time moves aliases of a store that this machine holds."""
    import mlflow

    uri = mlflow.get_tracking_uri()
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///")).with_suffix(".release-lock")
    else:
        # A store elsewhere: this excludes one's other processes here, not other machines. The
        # folder is one's own: nobody else can hold the lock.
        folder = Path(tempfile.gettempdir()) / f"fedcoe-{os.getuid()}"
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode):
            raise FedCoEError(f"{folder}: is no folder of yours; remove it, or set TMPDIR")
        path = folder / f"{hashlib.sha256(uri.encode()).hexdigest()[:16]}.release-lock"
    with Lock(path):
        yield


def move_alias(alias: str, version: str, compared_with: str | None) -> None:
    """Compare and set: let an alias name `version`, if it still names `compared_with`.

    Raises:
        FedCoEError: another release moved it in the meantime.
    """
    from mlflow import MlflowClient

    target, client = registered(version), MlflowClient()
    with _alone():
        now = _aliased(client, alias)
        if now != compared_with:
            raise FedCoEError(
                f"{alias} moved from version {compared_with or 'none'} to {now or 'none'} while "
                f"version {version} was judged; nothing was changed: run it again"
            )
        if alias == "champion" and now != version:
            _remember(client, [*_history(client, now), version])
        point(client, alias, target)


def rollback_champion() -> tuple[str, str]:
    """Let `champion` name the version it named before.

    Returns:
        The version it named until now, and the one it names from now on.

    Raises:
        FedCoEError: there is none to go back to.
    """
    from mlflow import MlflowClient

    client = MlflowClient()
    with _alone():
        now = _aliased(client, "champion")
        if now is None:
            raise FedCoEError(
                "there is no champion; `fedcoe release` or `fedcoe promote` makes one"
            )
        there = {str(v.version) for v in client.search_model_versions(f"name='{MIXTURE}'")}
        before = [v for v in _history(client, now)[:-1] if v in there and v != now]
        if not before:
            raise FedCoEError(f"version {now} is the first champion: nothing to go back to")
        # Noted after the move: a kill in between leaves a history that still ends in what it was.
        point(client, "champion", registered(before[-1]))
        _remember(client, before)
    return now, before[-1]


def _history(client: "MlflowClient", now: str | None) -> list[str]:
    """Champions up to the present one; what was noted but never came to be is left out."""
    if now is None:
        return []
    noted = json.loads(client.get_registered_model(MIXTURE).tags.get(HISTORY, "[]"))
    # Whoever moved the alias in MLflow's own UI noted nothing.
    if now not in noted:
        return [*noted, now]
    while noted[-1] != now:
        noted.pop()
    return list(noted)


def _remember(client: "MlflowClient", versions: Sequence[str]) -> None:
    client.set_registered_model_tag(MIXTURE, HISTORY, json.dumps(versions[-20:]))


@task(name="publish verdict", cache_policy=NO_CACHE)
def publish_verdict(
    version: str, champion: str | None, verdict: str, differences: Sequence[Difference]
) -> None:
    """The verdict and its table: a Prefect artifact, and tags of the version and its run."""
    from mlflow import MlflowClient

    rows = [difference.row() for difference in differences]
    create_markdown_artifact(
        key="release-verdict",
        markdown=verdict_page(version, champion, verdict, rows),
        description=f"version {version}: {verdict}",
    )
    client, run_id = MlflowClient(), registered(version).run_id
    tags = {
        "release_verdict": verdict,
        "release_champion": champion or "none",
        "release_table": json.dumps(rows),
    }
    for name, value in tags.items():
        client.set_model_version_tag(MIXTURE, version, name, value)
        if run_id:
            client.set_tag(run_id, name, value)


def verdict_page(
    version: str, champion: str | None, verdict: str, rows: Sequence[Mapping[str, Any]]
) -> str:
    """Markdown: what was compared with what, figure by figure, and what came of it."""
    if champion is None:
        return f"# Version {version}: {verdict}\n\nThere was no champion to compare it with.\n"
    lines = "\n".join(
        f"| {row['figure']} | {row['images']} | {100 * row['champion']:.2f} | "
        f"{100 * row['candidate']:.2f} | {100 * row['low']:+.2f} to {100 * row['high']:+.2f} | "
        f"{row['verdict']} |"
        for row in rows
    )
    return (
        f"# Version {version}: {verdict}\n\nCompared with champion {champion} on the same images; "
        f"accuracy in %.\n\n| figure | images | champion | candidate | "
        f"change, {CONFIDENCE:.0%} interval | |\n|---|---|---|---|---|---|\n{lines}\n\n"
        "Promoted if no figure falls beyond its interval (paired bootstrap over images, clients "
        "fixed) and at least one rises beyond it.\n"
    )
