"""Rounds of a trunk on disk: what one cell of a comparison has walked, others do not walk again."""

import shutil
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

from fedcoe.config import fingerprint_of
from fedcoe.errors import FedCoEError
from fedcoe.rounds import RoundRecord, gate_clients
from fedcoe.state import ServerState, load_state, save_state
from fedcoe.trunk import cut, onward, trunk_settings
from tasks.checkpoint import History, spend, spent
from tasks.run import Run

_NAMES = [field.name for field in fields(RoundRecord)]


def _folder(run: Run) -> Path:
    origin = {name: run.origin[name] for name in ("data", "partition", "version")}
    key = fingerprint_of(origin | {"settings": trunk_settings(run.settings)})
    return run.root / ".fedcoe" / "trunks" / run.code[:16] / key


def keep_trunk(run: Run, state: ServerState, history: History) -> None:
    """Write down a round that other trainings could start from; nothing outside the trunk, and
    nothing of the last round, whose images may count fine-tuning."""
    method, folder = run.method, _folder(run)
    path = folder / f"{state.round:06d}.safetensors"
    if state.round > method.trunk_rounds or state.round == run.settings.train.rounds:
        return
    for other in folder.parent.parent.glob("*"):
        if other != folder.parent:  # of other code
            shutil.rmtree(other, ignore_errors=True)
    records = []
    for row in history.rounds:
        up, down = method.gate_bytes(state, len(gate_clients(method, row["round"])))
        bare = {name: row[name] for name in _NAMES}
        bare |= {"bytes_up": row["bytes_up"] - up, "bytes_down": row["bytes_down"] - down}
        records.append(bare)
    if not path.exists():
        save_state(path, cut(state), records=records, seconds=spent(run))


def next_of_trunk(run: Run, state: ServerState) -> tuple[ServerState, list[RoundRecord]] | None:
    """The state at the latest kept round up to the next evaluation, and the rounds until then;
    None where none is kept. The time it took counts as the run's own."""
    method = run.method
    ahead = range(state.round + 1, method.trunk_rounds + 1)
    until = next((r for r in ahead if method.evaluation_due(r)), method.trunk_rounds)
    for round_ in range(until, state.round, -1):
        # A damaged file is as good as none.
        with suppress(FedCoEError):
            kept, notes = load_state(_folder(run) / f"{round_:06d}.safetensors")
            records = [RoundRecord(**record) for record in notes["records"]]
            spend(run, max(0.0, notes["seconds"] - spent(run)))
            return onward(method, state, kept, records)
    return None
