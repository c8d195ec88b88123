"""How a running flow tells whoever watches, e.g. the progress bar of `fedcoe train`."""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

Listener = Callable[[str, Mapping[str, Any]], None]
"""Called with an event (`start`, `round`, `end`) and its figures."""

LISTENER: ContextVar[Listener] = ContextVar("listener", default=lambda event, figures: None)


def report_progress(event: str, **figures: Any) -> None:
    LISTENER.get()(event, figures)
