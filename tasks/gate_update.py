"""Tasks: clients describe themselves under the frozen experts; the server solves the gate."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from fedcoe.rounds import reasons
from fedcoe.state import ServerState
from tasks.retry import PASSING
from tasks.run import Run


@task(
    name="gate statistics",
    task_run_name="round {rnd} · gate statistics · shard {shard}",
    cache_policy=NO_CACHE,
    **PASSING,
)
def gate_statistics(
    run: Run, rnd: int, shard: str, state: ServerState, clients: Sequence[int]
) -> Any:
    """One shard's half of the gate update."""
    return run.engine.run(run.method.gate_message, state, clients)


@task(name="gate update", task_run_name="round {rnd} · gate update", cache_policy=NO_CACHE)
def gate_update(run: Run, rnd: int, state: ServerState, messages: Sequence[Any]) -> ServerState:
    """The server's half of the gate update. Says in the log which messages it left out."""
    dropped: Counter[str] = sum((message.dropped for message in messages), Counter())
    if dropped:
        get_run_logger().warning("round %d: left out gate messages: %s", rnd, reasons(dropped))
    return run.method.gate_update(state, messages)
