"""Task: make a finished round durable, so that a killed run resumes at it.

A checkpoint and the files it names hold everything: the server's state with its momenta, the
personal experts (and SCAFFOLD's corrections) of all clients that ever trained, what the method
counts, and all figures so far. Random streams have no state: each is opened anew by the name of
what it decides, the round and the client (`fedcoe.streams`). It also says what it was made from:
settings, data, partition, version and source of the library.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from prefect import task
from prefect.cache_policies import NO_CACHE

from fedcoe.cold_start import NewClient, summary
from fedcoe.durable import sweep
from fedcoe.errors import FedCoEError, disk_fault
from fedcoe.evaluate import Evaluation
from fedcoe.rounds import RoundRecord
from fedcoe.state import ServerState, load_state, save_state
from tasks.run import Run
from tasks.tracking import flat


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
    save_state(path, state, history=asdict(history), origin=run.origin)
    kept = _kept(run.scratch)
    for old in kept[2:]:
        old.unlink()
    named = _named(state)
    for before in kept[1:2]:
        # A damaged one is nothing to go back to.
        with suppress(FedCoEError):
            named |= _named(load_state(before)[0])
    run.personal.forget(named)
    return str(path)


def _kept(folder: Path) -> list[Path]:
    """Checkpoints in a run's folder, the newest first."""
    return sorted(folder.glob("round-*.safetensors"), reverse=True)


def _named(state: ServerState) -> set[tuple[int, int]]:
    """(client, round) of the personal experts that a state refers to."""
    return {(k, int(r)) for k, r in enumerate(state.personal_round) if r}


class Resumed(NamedTuple):
    """Where a run goes on, and what its user should know about that."""

    state: ServerState
    history: History
    said: list[str]


def resume(run: Run, demanded: bool = False, beside: bool = True) -> Resumed:
    """The last finished round of an unfinished run of the same settings, data and code, or the
    initial state. What cannot be continued is left out, and this is said.

    Args:
        demanded: starting anew is an error.
        beside: also say what differs in the newest unfinished run of other settings or data.

    Raises:
        FedCoEError: `demanded`, and there is nothing to continue; names what differs.
    """
    shutil.rmtree(_leaving(run), ignore_errors=True)
    sweep(run.scratch)
    sweep(run.personal.folder)
    said: list[str] = []
    for path in _kept(run.scratch):
        try:
            state, notes = load_state(path)
            changes = differences(notes.get("origin", {}), run.origin)
            if changes:
                said.append(f"{_said(run, path)} is not continued: {changes}")
                break
            for client, last in sorted(_named(state)):
                run.personal.load(client, last)
        except FedCoEError as error:
            said.append(f"{_said(run, path)} is damaged and left out: {error}")
            continue
        before = f"going on after round {state.round}"
        return Resumed(state, History(**notes["history"]), [f"{s}; {before}" for s in said])
    if not said and (demanded or beside):
        said = list(_unfinished(run, any_method=demanded))
    if demanded:
        reason = said[0] if said else "there is no unfinished run here"
        raise FedCoEError(f"--resume: {reason}; without --resume, training starts anew")
    if _kept(run.scratch):
        # What is of no use must not be counted among the checkpoints to come.
        discard(run)
    return Resumed(run.method.init(), History(), [f"{s}; starting anew" for s in said])


def _said(run: Run, path: Path) -> str:
    """What a checkpoint is called to users: by its round and folder under the project's."""
    return f"round {int(path.stem[6:])} of {path.parent.relative_to(run.root)}"


def _unfinished(run: Run, any_method: bool) -> Iterator[str]:
    """Why the newest unfinished run with other settings or data is not the one to continue."""
    method = "*" if any_method else run.settings.method.name
    others = run.scratch.parent.glob(f"{method}-*/round-*.safetensors")
    newest = max(others, key=lambda path: path.stat().st_mtime, default=None)
    if newest is not None:
        with suppress(FedCoEError):
            changes = differences(load_state(newest)[1].get("origin", {}), run.origin)
            yield f"{_said(run, newest)} is not continued: {changes}"


SHOWN = 4
"""Differences that are named; the rest are counted."""


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What two origins of checkpoints differ in, for people; empty if in nothing."""
    words = {
        "data": "data/ holds other images",
        "partition": "the data is dealt to clients otherwise",
        "code": "the source of fedcoe/ has changed",
        "computed": "it was computed on another device or by another engine",
    }
    old, new = flat(there.get("settings", {})), flat(here["settings"])
    found = [
        f"{key}: {old.get(key, 'absent')} there, {new.get(key, 'absent')} here"
        for key in sorted(old | new)
        if old.get(key) != new.get(key)
    ]
    if there.get("version") != here["version"]:
        found.append(f"version: {there.get('version', 'unknown')} there, {here['version']} here")
    found += [text for key, text in words.items() if there.get(key) != here[key]]
    more = len(found) - SHOWN
    return ", ".join(found[:SHOWN] + ([f"and {more} more"] if more > 0 else []))


def discard(run: Run) -> None:
    """Forget the checkpoints of a run whose results have been written: all at once, so that one
    killed meanwhile does not find half of them."""
    shutil.rmtree(_leaving(run), ignore_errors=True)
    with suppress(FileNotFoundError):
        run.scratch.rename(_leaving(run))
    shutil.rmtree(_leaving(run), ignore_errors=True)


def _leaving(run: Run) -> Path:
    return run.scratch.with_name(f".{run.scratch.name}.done")


def spend(run: Run, training: float, other: float = 0.0) -> None:
    """Note seconds of local training with aggregation, and of other work of the method; beside the
    checkpoints, whose bytes must not tell time."""
    path = run.scratch / "seconds"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(f"{training:.6f} {other:.6f}\n")
    except OSError as error:
        raise disk_fault(error, path) from None


def spent(run: Run) -> tuple[float, float]:
    """Seconds of training and of other work so far, those before an interruption included."""
    path = run.scratch / "seconds"
    training = other = 0.0
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):  # cut short by a full disk
            now, beside = map(float, line.split())
            training, other = training + now, other + beside
    return training, other
