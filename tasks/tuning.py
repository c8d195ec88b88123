"""Tasks of `fedcoe tune`: run trials until there are enough, and write down what came out."""

import io
import shlex
import typing
import warnings
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import optuna
from prefect import task
from prefect.cache_policies import NO_CACHE
from ruamel.yaml import YAML

from fedcoe.config import TuneSettings
from fedcoe.durable import write_atomic
from fedcoe.errors import FedCoEError
from fedcoe.locks import Lock
from fedcoe.search_space import overlay, with_values
from tasks.files import write_csv
from tasks.progress import report_progress
from tasks.study import Plan, Study
from tasks.tracking import Tracking, log_trials
from tasks.trial import TrialProcess

STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
OBJECTIVES = typing.get_args(TuneSettings.model_fields["objective"].annotation)


@dataclass(frozen=True)
class Best:
    """The best trial of a study, and how to train with its settings."""

    trial: int
    value: float
    params: dict[str, Any]
    overlay: dict[str, Any]
    """`section.key` to value, wherever params.yaml says otherwise."""
    dvc: str
    train: str


@task(name="trial", task_run_name="trial · process {index}", cache_policy=NO_CACHE)
def run_next_trial(process: TrialProcess, index: str) -> str | None:
    """One trial in its process: the state it ended in, or None if there are enough."""
    return process.next_trial()


@task(name="search", task_run_name="search · process {index}", cache_policy=NO_CACHE)
def search(study: Study, tracking: Tracking, process: TrialProcess, index: str) -> None:
    """Run trials one after another until the study has as many as were asked for."""
    while run_next_trial(process, index) is not None:
        track(study, tracking)
        report_study(study)


def report_study(study: Study) -> None:
    """Tell whoever watches how far the study is."""
    found = study.progress()
    report_progress(
        "study",
        name=study.plan.name,
        trials=study.plan.tune.trials,
        finished=found.finished,
        pruned=found.pruned,
        failed=found.failed,
        objective=study.plan.objective,
        best=found.best and found.best.value,
    )


def track(study: Study, tracking: Tracking) -> None:
    """Log trials that are not in MLflow yet, also those of an earlier, interrupted search."""
    with Lock(study.plan.folder / "mlflow.lock"):
        trials = [
            {
                "number": t.number,
                "state": STATES[t.state.name],
                "value": t.value,
                "params": t.params,
                "curve": t.user_attrs.get("curve", []),
                "error": t.user_attrs.get("error", ""),
            }
            for t in study.ended()
        ]
        log_trials(tracking, study.plan.root, trials)


@task(name="write search", cache_policy=NO_CACHE)
def write_search(study: Study) -> Best:
    """Write `best.yaml`, `trials.csv`, `history.png` and `slices.png`.

    Raises:
        FedCoEError: no trial came to its end.
    """
    plan, trials = study.plan, study.ended()
    best = study.progress().best
    write_csv(plan.results / "trials.csv", [_row(plan, t) for t in trials])
    if best is None or best.value is None:
        reason = next((t.user_attrs["error"] for t in trials if "error" in t.user_attrs), "")
        raise FedCoEError(
            f"{plan.name}: all {len(trials)} trials failed, so there is nothing to choose from; "
            f"change tune.space. The first: {reason}"
        )
    settings = with_values(plan.settings, best.params)
    changes = overlay(settings, plan.root / "params.yaml")
    found = Best(best.number, best.value, dict(best.params), changes, *_commands(plan, changes))
    _write_best(plan, found)
    _write_plots(study)
    return found


def _row(plan: Plan, trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    curve = trial.user_attrs.get("curve", [])
    last = curve[-1] if curve else {}
    return (
        {"trial": trial.number, "state": STATES[trial.state.name], "round": last.get("round", 0)}
        | {key: trial.params.get(key) for key in plan.space}
        | {f"validation_{name}": last.get(name) for name in OBJECTIVES}
        | {"error": trial.user_attrs.get("error", "")}
    )


def _commands(plan: Plan, changes: dict[str, Any]) -> tuple[str, str]:
    """`dvc exp run` and `fedcoe train` with these settings."""
    text = (plan.root / "params.yaml").read_text(encoding="utf-8")
    given = YAML(typ="safe", pure=True).load(text) or {}
    dvc, train = ["dvc exp run"], ["fedcoe train"]
    for key, value in changes.items():
        section, _, name = key.partition(".")
        shown = _plain(value)
        # DVC changes what the file has; what it has not must be added with a plus.
        plus = "" if name in (given.get(section) or {}) else "+"
        dvc.append(shlex.join(["-S", f"{plus}{key}={shown}"]))
        train.append(shlex.join(["-S", f"{key}={shown}"]))
    return " ".join(dvc), " ".join(train)


def _plain(value: Any) -> str:
    """As both YAML and Hydra read it."""
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _write_best(plan: Plan, best: Best) -> None:
    sections: dict[str, dict[str, Any]] = {}
    for key, value in best.overlay.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    text = io.StringIO()
    YAML().dump(sections, text)
    head = (
        f"# Trial {best.trial} of {plan.name}: validation {plan.objective} {best.value:.6g}.\n"
        f"# {best.dvc}\n# {best.train}\n"
    )
    write_atomic(plan.results / "best.yaml", (head + text.getvalue()).encode())


def _write_plots(study: Study) -> None:
    from optuna.visualization.matplotlib import plot_optimization_history, plot_slice

    plan = study.plan
    with warnings.catch_warnings(), plt.rc_context():
        # Experimental since years, and a warning when all trials took the same choice.
        warnings.simplefilter("ignore")
        for name, plot in (("history", plot_optimization_history), ("slices", plot_slice)):
            plot(study.optuna, target_name=f"validation {plan.objective}")
            picture, figure = io.BytesIO(), plt.gcf()
            if name == "slices":  # labels of neighbours and of a log axis would overlap
                figure.set_size_inches(max(7.0, 4.0 * len(plan.space)), 4.5)
                for axes in figure.axes:
                    axes.tick_params(axis="x", which="both", rotation=60, labelsize=7)
            figure.savefig(picture, dpi=110, bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)
            write_atomic(plan.results / f"{name}.png", picture.getvalue())
