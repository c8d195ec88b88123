"""Task: clients fine-tune the global model before an evaluation, where the method does that."""

from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

from fedcoe.state import ServerState
from tasks.retry import PASSING
from tasks.run import Run


@task(
    name="personalize",
    task_run_name="round {rnd} · personalize · shard {shard}",
    cache_policy=NO_CACHE,
    **PASSING,
)
def personalize(
    run: Run, rnd: int, shard: str, state: ServerState, clients: Sequence[int]
) -> tuple[list[int], int]:
    """One shard's clients: which of them now have a personal model, and images trained on."""
    return run.engine.run(run.method.personalize, state, clients)
