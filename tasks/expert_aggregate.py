"""Task: the server turns a round's sums into new experts."""

from collections.abc import Sequence

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from fedcoe.methods.base import LocalResult
from fedcoe.rounds import RoundPlan, RoundRecord, finish_round, left_out
from fedcoe.state import ServerState
from tasks.run import Run


@task(
    name="expert aggregate",
    task_run_name="round {rnd} · expert aggregate",
    cache_policy=NO_CACHE,
)
def expert_aggregate(
    run: Run, rnd: int, state: ServerState, plan: RoundPlan, results: Sequence[LocalResult]
) -> tuple[ServerState, RoundRecord]:
    """Aggregate one round; refuses below the quorum. Says in the log what it left out."""
    after, record = finish_round(run.method, state, plan, results)
    if said := left_out(plan, record):
        get_run_logger().warning(said)
    return after, record
