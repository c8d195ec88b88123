"""MLflow: the one module that talks to it.

Tracking must never stop training: whatever goes wrong here is said once in the log and the run
goes on. Stores are embedded under `.fedcoe/` unless MLFLOW_TRACKING_URI names others.
"""

import json
import math
import os
import platform
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from fedcoe import __version__
from fedcoe.bundle import layout_of
from fedcoe.evaluate import Evaluation
from tasks.model_card import Lineage, card, expert_tags
from tasks.run import Run

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

EXPERIMENT = "fedcoe"
MODEL_CODE = Path(__file__).with_name("served_model.py")


def use_default_stores(root: Path) -> None:
    """Point MLflow at SQLite and a folder under `.fedcoe/`, unless the environment says else."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # MLflow's own 7 retries keep a run waiting four minutes for a server that is not there.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    folder = (root / ".fedcoe").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")


def _experiment(root: Path) -> str:
    import mlflow

    found = mlflow.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return str(found.experiment_id)
    embedded = mlflow.get_tracking_uri().startswith("sqlite:")
    location = (root / ".fedcoe" / "artifacts").resolve().as_uri() if embedded else None
    return str(mlflow.create_experiment(EXPERIMENT, artifact_location=location))


@dataclass
class Tracking:
    """One MLflow run; without a `run_id` (store out of reach) every call does nothing."""

    run_id: str | None = None
    _machine: "SystemMetricsMonitor | None" = field(default=None, repr=False)

    def watch_machine(self, every: float = 10.0) -> None:
        """Log processor, memory, disk, network and GPU use each so many seconds until `finish`.

        GPUs are seen if `nvidia-ml-py` is installed.
        """
        if self.run_id is None:
            return
        with self._passing("machine"):
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._machine = SystemMetricsMonitor(self.run_id, every, resume_logging=True)
            self._machine.start()

    def log_metrics(self, values: Mapping[str, Any], step: int) -> None:
        """Log all numbers among `values` in one request."""
        if self.run_id is None:
            return
        with self._passing("metrics"):
            from mlflow import MlflowClient
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            metrics = [
                Metric(name, float(value), now, step)
                for name, value in flat(values).items()
                if isinstance(value, int | float)
            ]
            MlflowClient().log_batch(self.run_id, metrics=metrics)

    def log_figures(self, figures: Mapping[str, Figure]) -> None:
        if self.run_id is None:
            return
        with self._passing("figures"):
            from mlflow import MlflowClient

            for name, figure in figures.items():
                MlflowClient().log_figure(self.run_id, figure, f"figures/{name}.png")

    def finish(self, status: str) -> None:
        if self.run_id is None:
            return
        with self._passing("end of run"):
            from mlflow import MlflowClient

            if self._machine is not None:
                self._machine.finish()
            MlflowClient().set_terminated(self.run_id, status)

    @contextmanager
    def _passing(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else ""
            get_run_logger().warning("MLflow: %s not logged: %s", what, first or repr(error))


def start_tracking(run: Run, tags: Mapping[str, str]) -> Tracking:
    """Open the MLflow run of this training run; a resumed run continues its own."""
    memo = run.scratch / "mlflow-run"
    tracking = Tracking()
    with tracking._passing("run"):
        use_default_stores(run.root)
        from mlflow import MlflowClient

        client = MlflowClient()
        if memo.exists():
            tracking.run_id = client.get_run(memo.read_text()).info.run_id
            client.update_run(tracking.run_id, status="RUNNING")
            tracking.watch_machine()
            return tracking
        settings = run.settings
        words = (settings.method.name, tags.get("row"), run.data.dataset.info.name)
        name = f"{' · '.join(word for word in words if word)} · seed {settings.train.seed}"
        created = client.create_run(_experiment(run.root), run_name=name, tags=dict(tags))
        from mlflow.entities import Param, RunTag

        info, part = run.data.dataset.info, settings.partition
        dvc_version = data_version(run.root)
        described = {
            "method": settings.method.name,
            "dataset": info.name,
            "data_hash": info.hash,
            "data_version": dvc_version,
            "partition_fingerprint": run.data.partition.fingerprint,
            "scheme": part.scheme,
            "seed": str(settings.train.seed),
            "run_key": run.key,
            "fedcoe_version": __version__,
            "git_commit": git_commit(run.root),
            "machine": f"{platform.machine()}, {run.engine.workers} workers",
        }
        if part.scheme == "dirichlet":
            described["alpha"] = f"{part.alpha:g}"
        client.log_batch(
            created.info.run_id,
            params=[Param(k, str(v)) for k, v in flat(settings.model_dump(mode="json")).items()],
            tags=[RunTag(k, v) for k, v in described.items()],
        )
        client.log_inputs(created.info.run_id, [_input(run, dvc_version)])
        tracking.run_id = created.info.run_id
        tracking.watch_machine()
        memo.parent.mkdir(parents=True, exist_ok=True)
        memo.write_text(tracking.run_id)
    return tracking


def _input(run: Run, dvc_version: str) -> "DatasetInput":
    """The data as MLflow's pages know it; its digest names images, labels and their order."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    info, partition = run.data.dataset.info, run.data.partition
    profile = {
        "train": info.train,
        "test": info.test,
        "shape": list(info.shape),
        "classes": len(info.classes),
        "clients": partition.clients,
        "partition_fingerprint": partition.fingerprint,
        "data_version": dvc_version,
    }
    # MLflow's digests have at most 36 characters.
    dataset = Dataset(
        info.name,
        info.hash[:16],
        "dvc",
        json.dumps({"uri": "data.dvc"}),
        profile=json.dumps(profile),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


def data_version(root: Path) -> str:
    """What data.dvc calls the data; `unknown` without one."""
    try:
        described = YAML(typ="safe", pure=True).load((root / "data.dvc").read_text())
        return str(described["outs"][0]["md5"])
    except (OSError, YAMLError, KeyError, IndexError, TypeError):
        return "unknown"


def git_commit(root: Path) -> str:
    """The commit that is checked out, with `+changes` if files differ from it; or `unknown`."""
    try:
        head, changes = (
            subprocess.run(
                ["git", *command], cwd=root, capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head + ("+changes" if changes else "")


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists to one level, keys joined by dots."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            result |= flat(value, f"{name}.")
        elif isinstance(value, list | tuple):
            result |= flat({str(i): item for i, item in enumerate(value)}, f"{name}.")
        else:
            result[name] = value
    return result


@task(name="register models", cache_policy=NO_CACHE)
def register_models(
    run: Run,
    tracking: Tracking,
    models: Path,
    evaluation: Evaluation,
    cold_start: Mapping[str, Mapping[str, float]],
    drift: Sequence[float] = (),
) -> list[str]:
    """Register the mixture, the gate and each expert; the new versions become `candidate`.

    Version tags carry the figures a person picks by, descriptions are model cards.

    Args:
        drift: per expert, of the last round.
    """
    if tracking.run_id is None:
        return []
    registered: list[str] = []
    with tracking._passing("registered models"):
        import mlflow.pyfunc

        # Asked for although the signature is given. Set after the import, which resets filters.
        warnings.filterwarnings("ignore", message=".*An input example was not")

        shared = {
            "method": run.settings.method.name,
            "dataset": run.data.dataset.info.name,
            "data_hash": run.data.dataset.info.hash[:16],
            "data_version": data_version(run.root),
            "partition_fingerprint": run.data.partition.fingerprint,
            "accuracy_global": f"{evaluation.overall['accuracy']:.4f}",
            "accuracy_personalized": f"{evaluation.personalized['accuracy']:.4f}",
            "git_commit": git_commit(run.root),
        } | {f"accuracy_cold_{mode}": f"{v['accuracy']:.4f}" for mode, v in cold_start.items()}
        parameters = sum(math.prod(shape) for shape in layout_of(run.method).values())
        partition = run.data.partition
        lineage = Lineage(
            run.settings,
            run.data.dataset.info,
            partition.fingerprint,
            partition.seen,
            partition.new,
            shared["git_commit"],
            tracking.run_id,
        )
        parts: list[tuple[str, dict[str, Any], dict[str, str]]] = [
            ("fedcoe", {"part": "mixture"}, shared)
        ]
        if run.method.has_gate:
            parts.append(("fedcoe-gate", {"part": "gate"}, shared))
        for row in evaluation.experts:
            own = {"accuracy": f"{row['accuracy']:.4f}", "load": f"{row['load']:.4f}"}
            own |= {"clients": str(row["clients"])}
            moved = drift[row["expert"]] if drift else 0.0
            own |= expert_tags(row, evaluation.clients, parameters, moved)
            parts.append(
                (
                    f"fedcoe-expert-{row['expert']}",
                    {"part": "expert", "expert": row["expert"]},
                    shared | own,
                )
            )
        with (
            mlflow.start_run(run_id=tracking.run_id),
            tempfile.TemporaryDirectory() as scratch,
        ):
            for name, config, tags in parts:
                part = Path(scratch) / "part.json"
                part.write_text(json.dumps(config))
                rows = [r for r in evaluation.experts if r["expert"] == config.get("expert")]
                text = card(name, lineage, tags, rows[0] if rows else None)
                described = Path(scratch) / "model_card.md"
                described.write_text(text)
                files = {"part": part, "card": described}
                _register(name, config, files, tags, models, run, text)
                registered.append(name)
    return registered


def _register(
    name: str,
    config: Mapping[str, Any],
    artifacts: dict[str, Path],
    tags: Mapping[str, str],
    models: Path,
    run: Run,
    description: str,
) -> None:
    import mlflow
    import numpy as np
    from mlflow import MlflowClient
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    artifacts["state"] = models / "state.json"
    experts = models / "experts"
    if config["part"] == "expert":
        artifacts["expert"] = experts / f"expert-{config['expert']}.safetensors"
    else:
        artifacts["experts"] = experts
        if (models / "gate.safetensors").exists():
            artifacts["gate"] = models / "gate.safetensors"
    outputs = run.method.experts if config["part"] == "gate" else run.method.federation.classes
    params = ParamSchema([])
    if config["part"] == "mixture":
        params = ParamSchema(
            [
                ParamSpec("mode", "string", "none"),
                ParamSpec("inputs", "string", ""),
                ParamSpec("labels", "long", [], (-1,)),
                ParamSpec("label_counts", "long", [], (-1,)),
            ]
        )
    signature = ModelSignature(
        Schema([TensorSpec(np.dtype(np.uint8), (-1, *run.method.federation.shape))]),
        Schema([TensorSpec(np.dtype(np.float64), (-1, outputs))]),
        params,
    )
    info = mlflow.pyfunc.log_model(
        name=name,
        python_model=str(MODEL_CODE),
        artifacts={key: path.resolve().as_uri() for key, path in artifacts.items()},
        signature=signature,
        pip_requirements=[f"fedcoe=={__version__}"],
    )
    client = MlflowClient()
    if not client.search_registered_models(f"name='{name}'"):
        client.create_registered_model(name)
    version = client.create_model_version(
        name,
        info.model_uri,
        info.run_id,
        model_id=info.model_id,
        tags=dict(tags),
        description=description,
    )
    client.set_registered_model_alias(name, "candidate", version.version)


def registered_experts() -> Sequence[dict[str, str]]:
    """Every registered version as a flat row: name, version, aliases, figures; newest first."""
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
    return sorted(rows, key=lambda row: (row["name"], -int(row["version"])))


def start_study(
    root: Path, memo: Path, name: str, params: Mapping[str, Any], tags: Mapping[str, str]
) -> Tracking:
    """Open the MLflow run of a search, the parent of its trials' runs; `memo` remembers its id."""
    tracking = Tracking()
    with tracking._passing("search"):
        use_default_stores(root)
        from mlflow import MlflowClient, MlflowException
        from mlflow.entities import Param

        client = MlflowClient()
        if memo.exists():
            try:
                tracking.run_id = client.get_run(memo.read_text()).info.run_id
                client.update_run(tracking.run_id, status="RUNNING")
                return tracking
            except MlflowException:  # another store than last time
                pass
        created = client.create_run(_experiment(root), run_name=name, tags=dict(tags))
        shown = [Param(key, str(value)[:6000]) for key, value in flat(params).items()]
        client.log_batch(created.info.run_id, params=shown)
        memo.write_text(created.info.run_id)
        tracking.run_id = created.info.run_id
    return tracking


def log_trials(study: Tracking, root: Path, trials: Sequence[Mapping[str, Any]]) -> None:
    """One run a trial under the study's; those that are there already are left alone.

    Args:
        trials: `number`, `state`, `value`, `params`, `curve` (figures by round), `error` of each.
    """
    if study.run_id is None:
        return
    with study._passing("trials"):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param, RunTag

        client, experiment = MlflowClient(), _experiment(root)
        # A study of more than 50,000 trials would log some of them twice.
        found = client.search_runs(
            [experiment], f"tags.mlflow.parentRunId = '{study.run_id}'", max_results=50_000
        )
        children = {run.data.tags.get("trial") for run in found}
        for trial in trials:
            if str(trial["number"]) in children:
                continue
            tags = {"mlflow.parentRunId": study.run_id, "role": "trial"}
            tags |= {"trial": str(trial["number"])}
            run_id = client.create_run(
                experiment, run_name=f"trial {trial['number']}", tags=tags
            ).info.run_id
            now = int(time.time() * 1000)
            metrics = [
                Metric(f"validation_{name}", value, now, row["round"])
                for row in trial["curve"]
                for name, value in row.items()
                if name != "round"
            ]
            if trial["value"] is not None:
                metrics.append(Metric("objective", trial["value"], now, 0))
            said = [RunTag("state", trial["state"])]
            said += [RunTag("error", trial["error"][:5000])] if trial["error"] else []
            params = [Param(key, str(value)) for key, value in trial["params"].items()]
            client.log_batch(run_id, metrics=metrics, params=params, tags=said)
            client.set_terminated(run_id, "FAILED" if trial["state"] == "failed" else "FINISHED")


def log_row(
    parent: Tracking,
    root: Path,
    tags: Mapping[str, str],
    cell: Mapping[str, Any],
    final: Mapping[str, float],
) -> None:
    """A run under a comparison's for figures that took no training of their own."""
    if parent.run_id is None:
        return
    with parent._passing("row"):
        from mlflow import MlflowClient
        from mlflow.entities import Param

        said = {"role": "cell", "method": cell["method"], "dataset": cell["dataset"]} | dict(tags)
        said |= {name: cell[name] for name in ("data_hash", "partition_fingerprint")}
        name = f"{cell['method']} · {tags['row']} · {cell['dataset']} · seed {cell['seed']}"
        made = MlflowClient().create_run(_experiment(root), run_name=name, tags=said)
        params = [Param(key, str(value)) for key, value in flat(cell["settings"]).items()]
        MlflowClient().log_batch(made.info.run_id, params=params)
        row = Tracking(made.info.run_id)
        row.log_metrics({"final": final}, cell["train"]["rounds"])
        row.finish("FINISHED")


def log_tables(parent: Tracking, folder: Path) -> None:
    """Keep a comparison's tables, figures and page with its run."""
    if parent.run_id is None:
        return
    with parent._passing("tables"):
        from mlflow import MlflowClient

        for path in sorted(folder.iterdir()):
            if path.is_file():
                MlflowClient().log_artifact(parent.run_id, str(path))


def log_files(tracking: Tracking, folder: Path, figures: Mapping[str, float]) -> None:
    """Keep a folder's files with a run, and its headline figures."""
    if tracking.run_id is None:
        return
    tracking.log_metrics(figures, 0)
    with tracking._passing("files"):
        from mlflow import MlflowClient

        MlflowClient().log_artifacts(tracking.run_id, str(folder))


def version_of(tags: Mapping[str, str]) -> str | None:
    """The version of the mixture that the run with these tags registered; None if there is none."""
    from mlflow import MlflowClient

    client = MlflowClient()
    found = client.get_experiment_by_name(EXPERIMENT)
    asked = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    runs = client.search_runs([found.experiment_id], asked) if found else []
    versions = [
        int(version.version)
        for run in runs
        for version in client.search_model_versions(f"name='fedcoe' and run_id='{run.info.run_id}'")
    ]
    return str(max(versions)) if versions else None
