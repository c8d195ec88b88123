"""Task: serve the clients that never took part."""

from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

from fedcoe.cold_start import NewClient, serve_clients
from fedcoe.state import ServerState
from tasks.retry import PASSING
from tasks.run import Run


@task(
    name="cold-start evaluate",
    task_run_name="round {rnd} · cold-start evaluate · shard {shard}",
    cache_policy=NO_CACHE,
    **PASSING,
)
def cold_start_evaluate(
    run: Run, rnd: int, shard: str, state: ServerState, clients: Sequence[int]
) -> list[NewClient]:
    """Serve one shard of new clients in every mode."""
    return run.engine.run(serve_clients, run.method, state, clients)
