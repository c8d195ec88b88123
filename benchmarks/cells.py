"""Trainings of one grid of settings, a JSON file each under `results/`, and a table from them."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcoe.data.dataset import load_dataset
from fedcoe.durable import write_atomic
from flows.compare import Cell
from flows.federated_training import federated_training
from flows.pipeline import partition_once
from tasks.comparison import shown

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Grid:
    """One benchmark's folder under `results/`, and the accuracies its table shows.

    Args:
        measures: path into a cell's JSON of every column.
    """

    name: str
    measures: Mapping[str, Sequence[str]]

    @property
    def folder(self) -> Path:
        return Path("results") / self.name

    def train(
        self,
        name: str,
        cell: Cell,
        method: dict[str, Any] | None = None,
        **notes: str,
    ) -> None:
        """Make one cell, unless its file is there with the same settings and data.

        Args:
            name: of the file.
            method: its settings, where no overrides say them.
            notes: what else the file is to say.

        Raises:
            SystemExit: the file is of other settings or data; it may have taken hours.
        """
        key = cell.key(load_dataset(ROOT / "data").info.hash)
        file = self.folder / "cells" / f"{name}-seed{cell.seed}.json"
        if (ROOT / file).exists():
            if json.loads((ROOT / file).read_text())["key"] != key:
                raise SystemExit(f"{file} is of other settings or data; move or delete it first")
            return
        said = {"method": cell.method, "row": cell.row, "seed": cell.seed, "key": key, **notes}
        said["command"] = f"python benchmarks/{self.name}.py"
        partitions, _ = partition_once(ROOT, cell.overrides)
        federated_training(str(ROOT), cell.overrides, method, str(file), partitions, said)

    def found(self) -> list[dict[str, Any]]:
        files = sorted((ROOT / self.folder / "cells").glob("*.json"))
        return [json.loads(file.read_text()) for file in files]

    def write_table(
        self, head: Sequence[str], rows: Sequence[tuple[Sequence[str], Sequence[dict[str, Any]]]]
    ) -> None:
        """Markdown: one line a row that has cells; mean ± standard deviation over seeds, %.

        Args:
            rows: words and cells of each.
        """
        head = [*head, "seeds", *self.measures]
        lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for words, cells in rows:
            if cells:
                figures = [self._spread(cells, path) for path in self.measures.values()]
                lines.append(f"| {' | '.join([*words, str(len(cells)), *figures])} |")
        write_atomic(ROOT / self.folder / "table.md", ("\n".join(lines) + "\n").encode())

    @staticmethod
    def _spread(cells: Sequence[Any], path: Sequence[str]) -> str:
        values = []
        for value in cells:
            for name in path:
                value = value[name]
            values.append(100 * float(value))
        mean = statistics.mean(values)
        return shown(mean, statistics.stdev(values)) if len(values) > 1 else shown(mean)
