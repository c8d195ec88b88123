"""Task: make a finished round durable, so that a killed run resumes at it."""

import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from fedcoe.cold_start import NewClient, summary
from fedcoe.evaluate import Evaluation
from fedcoe.rounds import RoundRecord
from fedcoe.state import ServerState, load_state, save_state
from tasks.run import Run


@dataclass
class History:
    """What a run has seen so far, in JSON-able form; part of every checkpoint."""

    rounds: list[dict[str, Any]] = field(default_factory=list)
    """One `RoundRecord` a round, with the bytes of its gate update added."""
    curves: list[dict[str, Any]] = field(default_factory=list)
    """One row an evaluation."""

    def add_round(self, record: RoundRecord, gate_bytes: tuple[int, int]) -> dict[str, Any]:
        row = asdict(record)
        row["bytes_up"] += gate_bytes[0]
        row["bytes_down"] += gate_bytes[1]
        self.rounds.append(row)
        return dict(row)  # the caller adds to it what is no part of the history

    def add_evaluation(
        self, evaluation: Evaluation, new: list[NewClient], diagnostics: dict[str, float]
    ) -> dict[str, Any]:
        row: dict[str, Any] = {
            "round": evaluation.round,
            "train_loss": self.rounds[-1]["train_loss"],
            "images": self.total("images"),
            "bytes": self.total("bytes_up") + self.total("bytes_down"),
            "global_accuracy": evaluation.overall["accuracy"],
            "global_nll": evaluation.overall["nll"],
            "personalized_accuracy": evaluation.personalized["accuracy"],
        }
        row |= {f"cold_{mode}": figures["accuracy"] for mode, figures in summary(new).items()}
        row |= {f"validation_{name}": value for name, value in evaluation.validation.items()}
        row |= diagnostics
        self.curves.append(row)
        return row

    def total(self, name: str) -> int:
        return sum(int(row[name]) for row in self.rounds)

    @property
    def best_round(self) -> int:
        """Evaluated round with the best mean of global and personalized validation accuracy;
        the later of equals."""
        score = {
            row["round"]: row["validation_global_accuracy"]
            + row["validation_personalized_accuracy"]
            for row in self.curves
        }
        return int(max(score, key=lambda r: (score[r], r)))


def _path(run: Run, round_: int) -> Path:
    return run.scratch / f"round-{round_:06d}.safetensors"


@task(name="checkpoint", task_run_name="round {rnd} · checkpoint", cache_policy=NO_CACHE)
def checkpoint(run: Run, rnd: int, state: ServerState, history: History) -> str:
    """Write the state after a round; keep the last two, and the personal experts they name."""
    path = _path(run, rnd)
    save_state(path, state, history=asdict(history))
    kept = sorted(run.scratch.glob("round-*.safetensors"))
    for old in kept[:-2]:
        old.unlink()
    named = {(k, int(r)) for k, r in enumerate(state.personal_round) if r}
    if len(kept) > 1:
        before, _ = load_state(kept[-2])
        named |= {(k, int(r)) for k, r in enumerate(before.personal_round) if r}
    run.personal.forget(named)
    return str(path)


def resume(run: Run) -> tuple[ServerState, History]:
    """The last finished round of an interrupted run with the same key, or the initial state."""
    kept = sorted(run.scratch.glob("round-*.safetensors"))
    if not kept:
        return run.method.init(), History()
    state, notes = load_state(kept[-1])
    return state, History(**notes["history"])


def discard(run: Run) -> None:
    """Forget the checkpoints of a run whose results have been written."""
    shutil.rmtree(run.scratch, ignore_errors=True)


def spend(run: Run, seconds: float) -> None:
    """Note time spent on training; beside the checkpoints, whose bytes must not tell time."""
    run.scratch.mkdir(parents=True, exist_ok=True)
    with (run.scratch / "seconds").open("a") as file:
        file.write(f"{seconds:.6f}\n")


def spent(run: Run) -> float:
    """Seconds of training so far, those before an interruption included."""
    path = run.scratch / "seconds"
    return sum(map(float, path.read_text().split())) if path.exists() else 0.0
