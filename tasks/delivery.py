"""Sending outboxes to MLflow, nothing twice: what may have arrived before is looked up first.

A run is known by its tag `fedcoe_run`, a model version by its run and name; files, params and tags
of the same name replace each other; an equal metric (name, step, time, value) is one row to
MLflow's stores.
"""

import http.client
import json
import os
import re
import ssl
import tempfile
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcoe.locks import Lock
from tasks.outbox import Outbox, Place, Record, outboxes

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

EXPERIMENT = "fedcoe"
MIXTURE = "fedcoe"
"""Registered name of a whole run's models; its parts' names begin with it and a dash."""
RUN_TAG = "fedcoe_run"
RUN_ID = "{mlflow run}"
"""Stands in a model card for the id that MLflow gives its run."""
BATCH, FEW = 1000, 100
"""Most metrics, and most params or tags, that MLflow takes in a request."""
PROBE = 3.0
"""Seconds a server has to say that it is there."""
PAUSE, LONGEST_PAUSE = 30.0, 600.0
"""Seconds until a store that failed is tried again; doubled each time, up to the longest."""
LIMITS = {"run": 10, "metrics": 10, "status": 10, "files": 60, "model": 60}
"""Seconds a training waits for an answer, by kind of record. What takes longer is sent later."""
REFUSALS = {
    "BAD_REQUEST", "INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_ALREADY_EXISTS",
}  # fmt: skip
"""Answers that will be the same tomorrow."""

Refuse = Callable[[str, str], None]


class OutOfReachError(Exception):
    """The store does not answer."""


@dataclass
class Patience:
    """When a store is to be tried; one a process and store, so that an outage is met once."""

    until: float = 0.0
    pause: float = PAUSE
    failing: bool = False

    def due(self) -> bool:
        return time.monotonic() >= self.until

    def failed(self) -> bool:
        """Wait longer than last time. Returns whether it worked before."""
        first, self.failing = not self.failing, True
        self.until = time.monotonic() + self.pause
        self.pause = min(2 * self.pause, LONGEST_PAUSE)
        return first

    def worked(self) -> bool:
        """Returns whether it failed before."""
        before = self.failing
        self.until, self.pause, self.failing = 0.0, PAUSE, False
        return before


_patience: dict[str, Patience] = {}
_one_at_a_time = threading.Lock()


def patience(store: str) -> Patience:
    """Shared by all runs of this process."""
    return _patience.setdefault(store, Patience())


def masked(uri: str) -> str:
    """An address without a name and password in it, for logs and the terminal."""
    return re.sub(r"^(\w[\w+.-]*://)[^/]*@", r"\1", uri)


def probe(store: str) -> None:
    """Ask a server whether it is there; what is no server always is.

    Raises:
        OutOfReachError: it refuses, or hangs.
    """
    if not store.startswith(("http://", "https://")):
        return
    try:
        urllib.request.urlopen(f"{masked(store).rstrip('/')}/health", timeout=PROBE).close()
    except urllib.error.HTTPError:
        return  # it answers; what it wants, the request itself will say
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return  # it answers; MLflow has settings of its own for what to trust
        raise OutOfReachError(f"{masked(store)} does not answer ({reason})") from None


def deliver(
    box: Outbox, store: str, refuse: Refuse, hurried: bool = True, wait: float = 0.0
) -> None:
    """Send what has not arrived, unless another process is at it.

    Args:
        store: MLflow's tracking URI, the one in force.
        refuse: told what and why, where MLflow will never take a record; the rest is sent.
        hurried: give up soon; else wait as long as MLflow's own settings say.
        wait: seconds that another process has to be done with sending.

    Raises:
        Exception: the store is out of reach or in trouble; what was sent until then is noted.
    """
    if not box.waiting(store):
        box.discard(store)
        return
    with _one_at_a_time, box.sending(wait) as mine:
        if not mine:
            return
        probe(store)
        sender = _Sender(box, store, refuse, hurried)
        try:
            sender.send()
        except Exception as error:
            # The store was made anew since: then it gets everything.
            if getattr(error, "error_code", "") != "RESOURCE_DOES_NOT_EXIST":
                raise
            sender.place = Place(store)
            sender.send()
        box.discard(store)


def deliver_all(root: Path, store: str, refuse: Refuse) -> None:
    """Send every outbox that is meant for this store, oldest first."""
    for box in outboxes(root):
        if box.first().get("store") == store:
            deliver(box, store, refuse)


class _Sender:
    def __init__(self, box: Outbox, store: str, refuse: Refuse, hurried: bool) -> None:
        from mlflow import MlflowClient

        self.box, self.refuse, self.hurried = box, refuse, hurried
        # The first to open a new file makes its tables; two at once would trip over each other.
        with Lock(box.folder.parent) if store.startswith("sqlite:") else nullcontext():
            self.client: MlflowClient = MlflowClient(store)
        self.place = box.place(store)

    def send(self) -> None:
        if self.place.run_id is None:
            self.place = replace(self.place, offset=0)
        batch: list[tuple[Record, int]] = []
        for record, end in self.box.read(self.place.offset):
            # Metrics of many rounds travel together, anything else alone.
            together = record["kind"] == "metrics" and _size(batch) < BATCH
            if batch and not (together and batch[-1][0]["kind"] == "metrics"):
                self._send(batch)
                batch = []
            batch.append((record, end))
        if batch:
            self._send(batch)

    def _send(self, batch: list[tuple[Record, int]]) -> None:
        records = [record for record, _ in batch]
        kind = records[0]["kind"]
        try:
            with within(LIMITS[kind] if self.hurried else None):
                self._send_one(kind, records)
        except Exception as error:
            if kind == "run" or not _refused(error):
                raise
            if len(batch) > 1:
                for one in batch:
                    self._send([one])
                return
            self.refuse(str(records[0].get("name") or kind), first_line(error))
        self.place = replace(self.place, offset=batch[-1][1])
        self.box.note(self.place)

    def _send_one(self, kind: str, records: list[Record]) -> None:
        record, client = records[0], self.client
        if kind == "run":
            self.place = replace(self.place, run_id=self._run(record))
            return
        run_id = self.place.run_id
        if run_id is None:
            raise ValueError(f"{self.box.folder}: no record says what the run is")
        if kind == "metrics":
            self._metrics(run_id, records)
        elif kind == "files":
            folder = self.box.files / record["name"]
            if not folder.is_dir():  # MLflow would say nothing
                raise FileNotFoundError(f"{folder} is gone")
            client.log_artifacts(run_id, str(folder), record["to"] or None)
        elif kind == "model":
            self._model(run_id, record)
        elif record["status"] == "RUNNING":
            client.update_run(run_id, status="RUNNING")
            for tag, value in record.get("tags", {}).items():
                client.set_tag(run_id, tag, value)
        else:
            client.set_terminated(run_id, record["status"], record["time"])

    def _run(self, record: Record) -> str:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

        client = self.client
        experiment = experiment_id(client, self.box.root)
        found = client.search_runs([experiment], f"tags.{RUN_TAG} = '{self.box.name}'")
        if found:
            run_id = str(found[0].info.run_id)
        else:
            tags = {name: record["tags"][name] for name in _PARENT if name in record["tags"]}
            tags |= {RUN_TAG: self.box.name}
            made = client.create_run(
                experiment, start_time=record["time"], tags=tags, run_name=record["name"]
            )
            run_id = str(made.info.run_id)
        # A search that goes on may have other settings by now; MLflow keeps a run's first.
        there = found[0].data.params if found else {}
        new = {name: value for name, value in record["params"].items() if name not in there}
        params = [Param(name, value) for name, value in new.items()]
        tags_ = [RunTag(name, value) for name, value in record["tags"].items()]
        for start in range(0, max(len(params), len(tags_)), FEW):
            part = slice(start, start + FEW)
            client.log_batch(run_id, params=params[part], tags=tags_[part])
        if "data" in record:
            input_ = dict(record["data"])
            said = [InputTag(name, value) for name, value in input_.pop("tags").items()]
            client.log_inputs(run_id, [DatasetInput(Dataset(**input_), said)])
        return run_id

    def _metrics(self, run_id: str, records: list[Record]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, record["time"], record["step"])
            for record in records
            for name, value in record["values"].items()
        ]
        for start in range(0, len(metrics), BATCH):
            self.client.log_batch(run_id, metrics=metrics[start : start + BATCH])

    def _model(self, run_id: str, record: Record) -> None:
        from mlflow import MlflowException

        client, name = self.client, record["name"]
        card = record["card"].replace(RUN_ID, run_id)
        versions = client.search_model_versions(f"name='{name}' and run_id='{run_id}'")
        if versions:
            version = versions[0]
        else:
            model_id = self._logged_model(run_id, record, card)
            try:
                client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            version = client.create_model_version(
                name,
                f"models:/{model_id}",
                run_id,
                model_id=model_id,
                tags=record["tags"],
                description=card,
            )
        if name != MIXTURE:
            return
        now = client.get_registered_model(name).aliases.get("candidate")
        trained = "" if now is None else client.get_model_version(name, now).tags.get("trained", "")
        # What was trained during an outage may arrive after what was trained since.
        if now is None or trained < record["tags"]["trained"]:
            point(client, "candidate", version)

    def _logged_model(self, run_id: str, record: Record, card: str) -> str:
        """The files of a model, with MLflow. Those of a kill in between are replaced."""
        import mlflow.pyfunc
        import numpy as np
        from mlflow.models import Model, ModelSignature
        from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

        # Asked for although the signature is given. Set after the import, which resets filters.
        warnings.filterwarnings("ignore", message=".*An input example was not")
        client, name = self.client, record["name"]
        experiment = experiment_id(client, self.box.root)
        filter_ = f"source_run_id = '{run_id}' AND name = '{name}'"
        for found in client.search_logged_models([experiment], filter_):
            if found.status == "READY":
                return str(found.model_id)
            client.delete_logged_model(found.model_id)
        signature = ModelSignature(
            Schema([TensorSpec(np.dtype(np.uint8), (-1, *record["shape"]))]),
            Schema([TensorSpec(np.dtype(np.float64), (-1, record["outputs"]))]),
            ParamSchema(
                [ParamSpec(*of[:3], *(tuple(shape) for shape in of[3:])) for of in record["asked"]]
            ),
        )
        files = {key: self.box.files / path for key, path in record["files"].items()}
        with tempfile.TemporaryDirectory() as scratch:
            files |= {"part": Path(scratch) / "part.json", "card": Path(scratch) / "model_card.md"}
            files["part"].write_text(json.dumps(record["config"]))
            files["card"].write_text(card)
            # Made here: `Model.log` would put it into the experiment active in this process.
            params = client.get_run(run_id).data.params
            model = client.create_logged_model(experiment, name, run_id, params=params)
            Model.log(
                artifact_path=None,
                flavor=mlflow.pyfunc,
                run_id=run_id,
                model_id=model.model_id,
                python_model=str(self.box.files / record["code"]),
                artifacts={key: path.resolve().as_uri() for key, path in files.items()},
                signature=signature,
                pip_requirements=[record["requires"]],
                flavor_name="pyfunc.ModelFromCode",
            )
        return str(model.model_id)


def point(client: "MlflowClient", alias: str, target: "ModelVersion") -> None:
    """Let an alias name a version of the mixture, and of its gate and experts; no other's."""
    # The mixture last: whoever sees it under the alias finds its parts there too, and after a
    # kill in between the same command completes the move.
    parts: dict[str, str] = {}
    for found in client.search_model_versions(f"run_id='{target.run_id}'"):
        if found.name.startswith(f"{MIXTURE}-"):
            parts[found.name] = max(parts.get(found.name, "0"), str(found.version), key=int)
    for model in client.search_registered_models(f"name LIKE '{MIXTURE}-%'"):
        if model.name in parts:
            client.set_registered_model_alias(model.name, alias, parts[model.name])
        elif alias in model.aliases:
            client.delete_registered_model_alias(model.name, alias)
    client.set_registered_model_alias(MIXTURE, alias, target.version)


_PARENT = ("mlflow.parentRunId",)


def experiment_id(client: "MlflowClient", root: Path) -> str:
    """Our experiment, made if need be; without a server its artifacts lie under `.fedcoe/`."""
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return str(found.experiment_id)
    embedded = str(client.tracking_uri).startswith("sqlite:")
    location = (root / ".fedcoe" / "artifacts").resolve().as_uri() if embedded else None
    try:
        return str(client.create_experiment(EXPERIMENT, artifact_location=location))
    except Exception as error:
        if getattr(error, "error_code", "") != "RESOURCE_ALREADY_EXISTS":
            raise
        found = client.get_experiment_by_name(EXPERIMENT)  # made by another process just now
        if found is None:
            raise
        return str(found.experiment_id)


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else repr(error)


def _refused(error: Exception) -> bool:
    lost = isinstance(error, FileNotFoundError)  # of the files it names
    return lost or getattr(error, "error_code", "") in REFUSALS


def _size(batch: list[tuple[Record, int]]) -> int:
    return sum(len(record.get("values", ())) for record, _ in batch)


@contextmanager
def within(seconds: int | None) -> Iterator[None]:
    """One attempt of so many seconds; None: as the environment says."""
    wanted: Mapping[str, Any] = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": seconds,
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": 0,
    }
    before = {name: os.environ.get(name) for name in wanted}
    if seconds is not None:
        os.environ.update({name: str(value) for name, value in wanted.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
