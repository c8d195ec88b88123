"""What the machine is doing while a run trains: MLflow's own monitors, in a thread.

MLflow's `SystemMetricsMonitor` would talk to the store from its thread, and end, or wait, where
that is out of reach.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any


class Machine:
    """Use of processor, memory, disk and network, and of GPUs if `nvidia-ml-py` is installed.

    Args:
        every: seconds between two samples.
        tell: called with `system/...` figures, from the thread and, at the end, from `stop`.
    """

    def __init__(self, every: float, tell: Callable[[dict[str, float]], None]) -> None:
        import psutil
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self.every, self.tell = every, tell
        self._monitors: list[Any] = []
        for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
            with suppress(Exception):  # no such device, no library for it, no right to look
                self._monitors.append(kind())
        psutil.cpu_percent()  # what the next call counts from
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="machine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take a last sample: even the shortest run has one."""
        self._over.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._over.wait(self.every):
            self._sample()

    def _sample(self) -> None:
        # A full disk, or a device that went away, is no reason to stop a run.
        with suppress(Exception):
            figures: dict[str, float] = {}
            for monitor in self._monitors:
                monitor.collect_metrics()
                figures |= monitor.aggregate_metrics()
                monitor.clear_metrics()
            self.tell({f"system/{name}": float(value) for name, value in figures.items()})
