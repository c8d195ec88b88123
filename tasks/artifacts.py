"""Task: what the Prefect UI shows at the end of a run."""

from collections.abc import Mapping
from typing import Any

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE

from fedcoe.evaluate import Evaluation
from tasks.run import Run

COLD_START = {
    "none": "cold start, nothing known",
    "unlabelled": "cold start, unlabelled images",
    "labels": "cold start, labels read forward-only",
    "few_shot": "reference: fine-tuned",
}


def key_table(evaluation: Evaluation, cold_start: Mapping[str, Mapping[str, float]]) -> Any:
    """Rows of the run's headline figures, in %."""
    figures = {
        "global": evaluation.overall["accuracy"],
        "personalized": evaluation.personalized["accuracy"],
        "personalized, worst tenth of clients": evaluation.personalized["worst10"],
    } | {COLD_START[mode]: values["accuracy"] for mode, values in cold_start.items()}
    return [{"figure": name, "accuracy %": f"{100 * v:.2f}"} for name, v in figures.items()]


@task(name="publish summary", cache_policy=NO_CACHE)
def publish_summary(
    run: Run,
    evaluation: Evaluation,
    cold_start: Mapping[str, Mapping[str, float]],
    mlflow_run: str | None,
) -> None:
    """A Markdown summary and the key table as artifacts of the flow run."""
    settings, partition = run.settings, run.data.partition
    name = settings.method.name.replace("_", "-")  # Prefect's keys take no underscores
    rows = key_table(evaluation, cold_start)
    lines = "\n".join(f"| {row['figure']} | {row['accuracy %']} |" for row in rows)
    try:
        create_markdown_artifact(
            key=f"{name}-summary",
            markdown=(
                f"# {settings.method.name} on {run.data.dataset.info.name}\n\n"
                f"{partition.seen} clients and {partition.new} new ones, "
                f"{settings.train.rounds} rounds, seed {settings.train.seed}, "
                f"partition `{partition.fingerprint}`.\n\n"
                f"| figure | accuracy % |\n|---|---|\n{lines}\n\n"
                f"MLflow run: `{mlflow_run or 'not tracked'}`\n"
            ),
            description="What was run and how well it did",
        )
        create_table_artifact(key=f"{name}-figures", table=rows)
    except Exception as error:  # what cannot be shown must not cost a training
        get_run_logger().warning("Prefect has no summary of this run: %s", error)
