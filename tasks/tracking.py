"""Tracking: what flows tell MLflow.

It must never stop training: all of a run goes to its outbox on disk first, and from there to MLflow
at once, or, where that is out of reach, later (`tasks/delivery.py`). Whatever goes wrong here is
said once in the log and the run goes on. Stores are embedded under `.fedcoe/` unless
MLFLOW_TRACKING_URI names others.
"""

import json
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import MissingContextError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from fedcoe import __version__
from fedcoe.bundle import layout_of
from fedcoe.durable import write_atomic
from fedcoe.evaluate import Evaluation
from tasks.delivery import (
    EXPERIMENT,
    MIXTURE,
    RUN_ID,
    OutOfReachError,
    deliver,
    deliver_all,
    experiment_id,
    first_line,
    patience,
    probe,
    within,
)
from tasks.files import write_tables
from tasks.machine import Machine
from tasks.model_card import Lineage, card, expert_tags
from tasks.outbox import Outbox, outboxes
from tasks.registry import use_default_stores
from tasks.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODEL_CODE = Path(__file__).with_name("served_model.py")
LATER = "records wait in .fedcoe/outbox for the next training or `fedcoe sync`"
BUSY = 30.0
"""Seconds that the end of a run waits for another process that sends its records."""


class Tracking:
    """One MLflow run; without an outbox (not tracked) every call does nothing."""

    def __init__(self, box: Outbox | None = None, store: str = "") -> None:
        self.box, self.store = box, store
        self._machine: Machine | None = None

    @property
    def run_id(self) -> str | None:
        """MLflow's; None as long as it has not heard of the run."""
        return None if self.box is None else self.box.place(self.store).run_id

    @property
    def label(self) -> str | None:
        """What to call the run: its id, or that it waits to be sent; None if it is not tracked."""
        return None if self.box is None else self.run_id or f"waiting in outbox {self.box.name}"

    def watch_machine(self, every: float = 10.0) -> None:
        """Log processor, memory, disk, network and GPU use each so many seconds until `finish`.

        GPUs are seen if `nvidia-ml-py` is installed.
        """
        if self.box is None:
            return
        box = self.box
        with self._passing("machine"):
            logged = (record["values"] for record, _ in box.read() if record["kind"] == "metrics")
            first = sum(any(name.startswith("system/") for name in names) for names in logged)

            def tell(figures: dict[str, float]) -> None:
                nonlocal first
                box.put(_metrics(figures, first))
                first += 1

            self._machine = Machine(every, tell)

    def log_metrics(self, values: Mapping[str, Any], step: int) -> None:
        """Log all numbers among `values`, but those that this run logged at this step before."""
        if self.box is None:
            return
        with self._passing("metrics"):
            self._put_new(values, step)
            self.send()

    def log_missed(
        self, rounds: Sequence[Mapping[str, Any]], curves: Sequence[Mapping[str, Any]]
    ) -> None:
        """Log rounds of a run that was killed between keeping and logging them.

        Args:
            rounds, curves: of its `History`.
        """
        if self.box is None:
            return
        with self._passing("metrics"):
            evaluated = {row["round"]: row for row in curves}
            for row in rounds:
                self._put_new({**evaluated.get(row["round"], {}), **row}, row["round"])
            self.send()

    def _put_new(self, values: Mapping[str, Any], step: int) -> None:
        assert self.box is not None
        found = _numbers(values).items()
        new = {name: value for name, value in found if not self.box.has(f"{name}@{step}")}
        if new:
            self.box.put(_metrics(new, step))

    def log_figures(self, figures: Mapping[str, "Figure"]) -> None:
        """Keep figures with the run, as PNG."""

        def draw(folder: Path) -> None:
            folder.mkdir()
            for name, figure in figures.items():
                figure.savefig(folder / f"{name}.png")

        self._log_files("figures", draw, to="figures")

    def log_evaluation(self, evaluation: Evaluation) -> None:
        """Keep an evaluation's tables with the run: by client its correlation with the experts and
        their accuracies, by expert its load."""

        def write(folder: Path) -> None:
            folder.mkdir()
            write_tables(folder, evaluation)

        name = f"round-{evaluation.round:06d}"
        self._log_files(name, write, to=f"evaluations/{name}")

    def log_folder(self, folder: Path) -> None:
        """Keep the files of a folder, but not of folders in it, with the run."""

        def copy(target: Path) -> None:
            target.mkdir()
            for path in sorted(folder.iterdir()):
                if path.is_file():
                    shutil.copyfile(path, target / path.name)

        self._log_files("files", copy, to="")

    def _log_files(self, name: str, write: Callable[[Path], None], to: str) -> None:
        if self.box is None:
            return
        with self._passing(name):
            self.box.keep(name, write)
            self.box.put({"kind": "files", "name": name, "to": to})
            self.send()

    def finish(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED; what waits, of any run, is tried again."""
        if self.box is None:
            return
        with self._passing("end of run"):
            if self._machine is not None:
                self._machine.stop()
                self._machine = None
            end = self.box.put({"kind": "status", "status": status, "time": _now()})
            self.send(insist=True)
            waiting = self.box.waiting(self.store)
            # What another search of this study put since is not this one's to warn of.
            if waiting and self.box.place(self.store).offset < end:
                self._warn("MLflow: %d %s", waiting.total(), LATER)
            else:
                self.send_all()

    def tidy(self) -> None:
        """Forget what has been sent, once no run can come back to this one."""
        if self.box is not None:
            self.box.discard(self.store)

    def send(self, insist: bool = False) -> None:
        """Send what waits, unless the store failed a short while ago.

        Args:
            insist: try anyway, and wait for another process that is sending.
        """
        if self.box is None or not (insist or patience(self.store).due()):
            return
        with self._reaching():
            deliver(self.box, self.store, self._refused, wait=BUSY if insist else 0.0)

    def send_all(self) -> None:
        """Send what waits of all runs of the project, oldest first."""
        if self.box is not None and patience(self.store).due():
            with self._reaching():
                deliver_all(self.box.root, self.store, self._refused)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if patience(self.store).failed():
                self._warn("MLflow: %s; training goes on, %s", first_line(error), LATER)
        else:
            if patience(self.store).worked():
                self._warn("MLflow answers again")

    @contextmanager
    def _passing(self, what: str, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        try:
            yield
        except but:
            raise
        except Exception as error:
            self._refused(what, first_line(error))

    def _refused(self, what: str, why: str) -> None:
        self._warn("MLflow: %s not logged: %s", what, why)

    def _warn(self, text: str, *values: object) -> None:
        with suppress(MissingContextError):  # outside a flow nobody would read it
            get_run_logger().warning(text, *values)


def _now() -> int:
    return int(time.time() * 1000)


def _metrics(values: Mapping[str, float], step: int) -> dict[str, Any]:
    return {"kind": "metrics", "time": _now(), "step": step, "values": dict(values)}


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    found = flat(values).items()
    return {name: float(value) for name, value in found if isinstance(value, int | float)}


def _open(
    root: Path,
    memo: Path | None,
    name: str,
    tags: Mapping[str, str],
    params: Mapping[str, Any],
    data: Mapping[str, Any] | None = None,
) -> Tracking:
    """The run that the memo names, to be continued, or a new one.

    Args:
        memo: file that remembers the outbox's name for a run that is started again; None: none is.
        data: of `mlflow.entities.Dataset`, with the input's `tags`.
    """
    import mlflow

    use_default_stores(root)
    store = mlflow.get_tracking_uri()
    if memo is not None and memo.exists():
        box = Outbox(root, memo.read_text())
        if box.first().get("store") == store:
            # Whoever goes on with a run finds it by its own flow run.
            mine = {name: value for name, value in tags.items() if name == "flow_run"}
            box.put({"kind": "status", "status": "RUNNING", "tags": mine})
            return Tracking(box, store)
    box = Outbox(root, Outbox.new_name())
    if memo is not None:
        write_atomic(memo, box.name.encode())
    record = {
        "kind": "run",
        "name": name,
        "store": store,
        "memo": memo and os.path.relpath(memo, root),
        "time": _now(),
        "tags": dict(tags),
        "params": {key: str(value)[:6000] for key, value in flat(params).items()},
    }
    box.put(record | ({"data": data} if data else {}))
    return Tracking(box, store)


def start_tracking(run: Run, tags: Mapping[str, str]) -> Tracking:
    """Open the MLflow run of this training run; a resumed run continues its own."""
    tracking = Tracking()
    with tracking._passing("run"):
        settings, info, partition = run.settings, run.data.dataset.info, run.data.partition
        words = (settings.method.name, tags.get("row"), info.name)
        name = f"{' · '.join(word for word in words if word)} · seed {settings.train.seed}"
        dvc_version = data_version(run.root)
        described = dict(tags) | {
            "method": settings.method.name,
            "dataset": info.name,
            "data_hash": info.hash,
            "data_version": dvc_version,
            "partition_fingerprint": partition.fingerprint,
            "scheme": settings.partition.scheme,
            "seed": str(settings.train.seed),
            "run_key": run.key,
            "fedcoe_version": __version__,
            "git_commit": git_commit(run.root),
            "machine": f"{platform.machine()}, {run.engine.workers} workers",
        }
        if settings.partition.scheme == "dirichlet":
            described["alpha"] = f"{settings.partition.alpha:g}"
        memo, params = run.scratch / "mlflow-run", settings.model_dump(mode="json")
        tracking = _open(run.root, memo, name, described, params, _input(run, dvc_version))
        try:
            tracking.send_all()
            tracking.watch_machine()
        except BaseException as error:
            if not isinstance(error, Exception):  # stopped before the first round
                tracking.finish("KILLED")
            raise
    return tracking


def _input(run: Run, dvc_version: str) -> dict[str, Any]:
    """The data as MLflow's pages know it; its digest names images, labels and their order."""
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
    return {
        "name": info.name,
        "digest": info.hash[:16],  # MLflow's digests have at most 36 characters
        "source_type": "dvc",
        "source": json.dumps({"uri": "data.dvc"}),
        "profile": json.dumps(profile),
        "tags": {"mlflow.data.context": "training"},
    }


def data_version(root: Path) -> str:
    """What data.dvc calls the data; `unknown` without one."""
    try:
        described = YAML(typ="safe", pure=True).load((root / "data.dvc").read_text())
        return str(described["outs"][0]["md5"])
    except (OSError, YAMLError, KeyError, IndexError, TypeError):
        return "unknown"


def git_commit(root: Path) -> str:
    """The commit that is checked out, with `+changes` if files that decide anything differ from
    it (data has a hash of its own); or `unknown`."""
    aside = (":!results", ":!data.dvc", ":!dvc.lock", ":!docs")
    try:
        head, changes = (
            subprocess.run(
                ["git", *command], cwd=root, capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for command in (
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "-uno", "--", ".", *aside],
            )
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
    box = tracking.box
    if box is None:
        return []
    registered: list[str] = []
    # A full disk ends the run: its checkpoint stays, and started again it registers them.
    with tracking._passing("registered models", but=(OSError,)):
        info, partition = run.data.dataset.info, run.data.partition
        shared = {
            "method": run.settings.method.name,
            "dataset": info.name,
            "data_hash": info.hash[:16],
            "data_version": data_version(run.root),
            "partition_fingerprint": partition.fingerprint,
            "accuracy_global": f"{evaluation.overall['accuracy']:.4f}",
            "accuracy_personalized": f"{evaluation.personalized['accuracy']:.4f}",
            "git_commit": git_commit(run.root),
            "trained": datetime.now(UTC).isoformat(timespec="milliseconds"),
        } | {f"accuracy_cold_{mode}": f"{v['accuracy']:.4f}" for mode, v in cold_start.items()}
        parameters = sum(math.prod(shape) for shape in layout_of(run.method).values())
        lineage = Lineage(
            run.settings,
            info,
            partition.fingerprint,
            partition.seen,
            partition.new,
            shared["git_commit"],
            RUN_ID,
        )
        parts: list[tuple[str, dict[str, Any], dict[str, str]]] = []
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
        # The mixture last: whoever finds its version finds those of its parts.
        parts.append((MIXTURE, {"part": "mixture"}, shared))
        new = [part for part in parts if not box.has(f"model {part[0]}")]
        if new:
            # The next run writes its own models there, maybe before these are sent.
            box.keep("models", lambda target: _copy_models(models, target))
        for name, config, tags in new:
            rows = [r for r in evaluation.experts if r["expert"] == config.get("expert")]
            text = card(name, lineage, tags, rows[0] if rows else None)
            box.put(_model(run, box, name, config, tags, text))
        tracking.send()
        registered += [name for name, _, _ in parts]
    return registered


def _copy_models(models: Path, target: Path) -> None:
    """What versions are made of, and the code that serves them; no client's personal expert."""
    (target / "experts").mkdir(parents=True)
    for path in sorted((models / "experts").iterdir()):  # copytree's error would not say of what
        shutil.copyfile(path, target / "experts" / path.name)
    for path in (models / "state.json", models / "gate.safetensors", MODEL_CODE):
        if path.exists():
            shutil.copyfile(path, target / path.name)


def _model(
    run: Run,
    box: Outbox,
    name: str,
    config: Mapping[str, Any],
    tags: Mapping[str, str],
    text: str,
) -> dict[str, Any]:
    files = {"state": "models/state.json"}
    if config["part"] == "expert":
        files["expert"] = f"models/experts/expert-{config['expert']}.safetensors"
    else:
        files["experts"] = "models/experts"
        if (box.files / "models" / "gate.safetensors").exists():
            files["gate"] = "models/gate.safetensors"
    asked: list[tuple[Any, ...]] = [
        ("mode", "string", "none"),
        ("inputs", "string", ""),
        ("labels", "long", [], (-1,)),
        ("label_counts", "long", [], (-1,)),
    ]
    federation = run.method.federation
    return {
        "kind": "model",
        "name": name,
        "config": dict(config),
        "tags": dict(tags),
        "card": text,
        "files": files,
        "code": f"models/{MODEL_CODE.name}",
        "requires": f"fedcoe=={__version__}",
        "shape": list(federation.shape),
        "outputs": run.method.experts if config["part"] == "gate" else federation.classes,
        "asked": asked if config["part"] == "mixture" else [],
    }


def start_study(
    root: Path, memo: Path, name: str, params: Mapping[str, Any], tags: Mapping[str, str]
) -> Tracking:
    """Open the MLflow run of a search, the parent of its trials' runs; `memo` remembers it."""
    tracking = Tracking()
    with tracking._passing("search"):
        tracking = _open(root, memo, name, tags, params)
        tracking.send_all()
    return tracking


def log_trials(study: Tracking, root: Path, trials: Sequence[Mapping[str, Any]]) -> None:
    """One run a trial under the study's; those that ended there are left alone.

    They go to MLflow directly: where it is out of reach, a later call logs them.

    Args:
        trials: `number`, `state`, `value`, `params`, `curve` (figures by round), `error` of each.
    """
    study.send()
    parent = study.run_id
    if parent is None or not patience(study.store).due():
        return
    with study._reaching(), within(10):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param, RunTag

        probe(study.store)
        client = MlflowClient(study.store)
        experiment = experiment_id(client, root)
        # A study of more than 50,000 trials would log some of them twice.
        found = client.search_runs(
            [experiment], f"tags.mlflow.parentRunId = '{parent}'", max_results=50_000
        )
        children = {run.data.tags.get("trial"): run.info for run in found}
        for trial in trials:
            child = children.get(str(trial["number"]))
            if child is None:
                tags = {"mlflow.parentRunId": parent, "role": "trial"}
                tags |= {"trial": str(trial["number"])}
                child = client.create_run(
                    experiment, run_name=f"trial {trial['number']}", tags=tags
                ).info
            elif child.status in ("FINISHED", "FAILED"):
                continue
            # Of the run, so that what is sent a second time is the same to MLflow.
            run_id, now = child.run_id, child.start_time
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
        said = {"role": "cell", "method": cell["method"], "dataset": cell["dataset"]} | dict(tags)
        said |= {name: cell[name] for name in ("data_hash", "partition_fingerprint")}
        name = f"{cell['method']} · {tags['row']} · {cell['dataset']} · seed {cell['seed']}"
        row = _open(root, None, name, said, cell["settings"])
        row._put_new({"final": final}, cell["train"]["rounds"])  # sent with the end
        row.finish("FINISHED")


def log_tables(parent: Tracking, folder: Path) -> None:
    """Keep a comparison's tables, figures and page with its run."""
    parent.log_folder(folder)


def log_files(tracking: Tracking, folder: Path, figures: Mapping[str, float]) -> None:
    """Keep a folder's files with a run, and its headline figures, new ones beside older."""
    if tracking.box is None:
        return
    with tracking._passing("figures"):
        tracking.box.put(_metrics(_numbers(figures), 0))
    tracking.log_folder(folder)


def sync(root: Path, to: str | None = None) -> list[dict[str, Any]]:
    """Send what waits of all runs of a project, each to the store it is meant for.

    Args:
        to: send all to this store instead.

    Returns:
        A row a run with records that waited: name, store, sent (records by kind), waiting (how
        many are left) and why.
    """
    import mlflow

    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for box in outboxes(root):
        first = box.first()
        store = to or first.get("store", "")
        before = box.waiting(store)
        if not first or not before:
            continue
        told: list[str] = []
        if store in failed:
            told.append(failed[store])
        else:
            mlflow.set_tracking_uri(store)  # logging a model asks for the store in force
            try:
                deliver(
                    box,
                    store,
                    lambda what, why: told.append(f"{what} refused: {why}"),  # noqa: B023
                    hurried=False,
                    wait=BUSY,
                )
            except Exception as error:
                told.append(first_line(error))
                if isinstance(error, OutOfReachError):
                    failed[store] = told[-1]
        left = box.waiting(store)
        if left and not told:
            told.append("another process is sending it")
        row = {"run": first["name"], "store": store, "sent": dict(before - left)}
        rows.append(row | {"waiting": left.total(), "why": "; ".join(told)})
    return rows


def version_of(tags: Mapping[str, str]) -> str | None:
    """The version of the mixture that the run with these tags registered; None if MLflow knows of
    none, or is out of reach."""
    import mlflow
    from mlflow import MlflowClient

    try:
        probe(mlflow.get_tracking_uri())
    except OutOfReachError:
        return None
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
