"""The flow: a search for good settings, judged by validation figures alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.runtime import flow_run

from fedcoe.config import load_settings
from fedcoe.data.dataset import load_dataset
from fedcoe.engine.devices import visible
from fedcoe.locks import Lock
from fedcoe.methods.settings import method_class
from fedcoe.search_space import search_space
from flows.pipeline import check_dataset, partition_once
from tasks.locks import reading_data
from tasks.study import Plan, Study
from tasks.tracking import Tracking, log_files, start_study
from tasks.trial import TrialProcess
from tasks.tuning import report_study, search, track, write_search


def plan_search(
    root: Path, overrides: Sequence[str] = (), method: str | None = None
) -> tuple[Plan, list[str]]:
    """Check the search and deal the data; also what the user should know.

    Raises:
        FedCoEError: what cannot be searched, before anything is trained.
    """
    check_dataset(root, overrides)
    own = [*overrides, *([f"method.name={method}"] if method else [])]
    path = root / "params.yaml"
    settings = load_settings(path, own)
    space, dropped = search_space(settings, str(path))
    name = settings.method.name
    notes = [f"{key} is left out: method {name} has no such setting" for key in dropped]
    objective: str = settings.tune.objective
    if objective.startswith("global") and not method_class(name).has_global:
        objective = objective.replace("global", "personalized")
        notes.append(f"method {name} has no global model: the objective is {objective}")
    info = load_dataset(root / "data").info
    partitions, warnings = partition_once(root, own)
    notes += warnings
    plan = Plan(
        root, (root / partitions).resolve(), settings, space, objective, info.hash, info.name
    )
    return plan, notes


def _name() -> str:
    given = flow_run.parameters
    return f"tune · {given.get('method') or 'params.yaml'}"


@flow(name="tune", flow_run_name=_name, validate_parameters=False)
def tune(
    root: str = ".",
    overrides: Sequence[str] = (),
    method: str | None = None,
    workers: int = 1,
) -> dict[str, Any]:
    """Search `tune.space` for the settings with the best validation figure.

    Args:
        root: folder of params.yaml and data/.
        overrides: `section.key=value` settings that win over params.yaml.
        method: search for this method instead.
        workers: trials at once; the cores are shared out among them.

    Returns:
        The best trial: number, value, parameters, commands to train with them; and the study's
        name, counts and folder.
    """
    with reading_data(Path(root)):
        plan, _ = plan_search(Path(root), overrides, method)
        return _tune(plan, workers)


def _tune(plan: Plan, workers: int) -> dict[str, Any]:
    with _opened(plan) as study:
        memo = plan.folder / "mlflow-run"
        with Lock(plan.folder / "mlflow.lock"):
            tracking = start_study(plan.root, memo, plan.name, *_described(plan))
        try:
            _search(study, tracking, workers)
            return _end(study, tracking)
        except BaseException:
            tracking.finish("FAILED")
            raise


def _search(study: Study, tracking: Tracking, workers: int) -> None:
    plan = study.plan
    report_study(study)
    # Several on one GPU if there are fewer GPUs than processes.
    gpus: Sequence[str | None] = [None]
    if plan.settings.runtime.device != "cpu":
        gpus = visible() or gpus
    processes = [TrialProcess(plan, workers, gpus[i % len(gpus)]) for i in range(workers)]
    try:
        running = [
            search.submit(study, tracking, process, f"{i + 1}/{workers}")
            for i, process in enumerate(processes)
        ]
        for one in running:
            one.result()
    finally:
        for process in processes:
            process.stop()
    track(study, tracking)


def _end(study: Study, tracking: Tracking) -> dict[str, Any]:
    plan = study.plan
    # Searches that share a study write the same files, and into one outbox.
    with Lock(plan.folder / "mlflow.lock"):
        best, found = write_search(study), study.progress()
        log_files(tracking, plan.results, {f"best_{plan.objective}": best.value})
        tracking.finish("FINISHED")
    if found.finished < plan.tune.trials:
        get_run_logger().warning(
            "stopped after %d failed trials; %d finished", found.failed, found.finished
        )
    return asdict(best) | {
        "study": plan.name,
        "objective": plan.objective,
        "finished": found.finished,
        "pruned": found.pruned,
        "failed": found.failed,
        "folder": str(plan.results),
    }


@contextmanager
def _opened(plan: Plan) -> Iterator[Study]:
    study = Study(plan)
    try:
        yield study
    finally:
        study.close()


def _described(plan: Plan) -> tuple[dict[str, Any], dict[str, str]]:
    params = {"tune": plan.tune.model_dump(mode="json")} | plan.settings.model_dump(mode="json")
    tags = {
        "role": "study",
        "method": plan.settings.method.name,
        "dataset": plan.dataset,
        "data_hash": plan.data_hash,
        "study_key": plan.key,
    }
    return params, tags
