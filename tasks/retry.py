"""Which task failures may pass by themselves."""

from typing import Any

from fedcoe.errors import FedCoEError


def may_pass(task: Any, task_run: Any, state: Any) -> bool:
    """Prefect's retry condition: retry all but mistakes that would only be made again."""
    try:
        state.result()
    except FedCoEError:
        return False
    except Exception:
        return True
    return False


PASSING: dict[str, Any] = {
    "retries": 1,
    "retry_delay_seconds": 1,
    "retry_condition_fn": may_pass,
}
"""Options of tasks that run beside clients, where a worker may be lost."""
