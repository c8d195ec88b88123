"""Task: one shard of the cohort trains its experts."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from fedcoe.methods.base import LocalResult, Order
from fedcoe.state import ServerState
from tasks.retry import PASSING
from tasks.run import Run


@task(
    name="local train",
    task_run_name="round {rnd} · local train · shard {shard}",
    cache_policy=NO_CACHE,
    **PASSING,
)
def local_train(
    run: Run, rnd: int, shard: str, state: ServerState, orders: list[Order]
) -> LocalResult:
    """Train the clients of one shard on this machine's engine."""
    return run.engine.run(run.method.local_train, state, orders)
