"""Rounds of a trunk on disk: what one cell of a comparison has walked, others do not walk again."""

import shutil
from contextlib import suppress
from pathlib import Path

import torch

from fedcoe.config import fingerprint_of
from fedcoe.durable import sweep
from fedcoe.errors import FedCoEError
from fedcoe.rounds import RoundRecord, gate_traffic
from fedcoe.state import ServerState, load_state, save_state
from fedcoe.trunk import cut, onward, trunk_settings
from tasks.checkpoint import History, spend, spent
from tasks.run import Run, code_hash

_CODE = code_hash()
"""Of what this process runs. After an edit, the next run's `code` is that of the disk."""


def _folder(run: Run) -> Path:
    key = {
        "settings": trunk_settings(run.settings),
        "origin": [run.origin[name] for name in ("data", "partition", "version")],
        # A trunk outlives its run, and with `auto` these decide too.
        "machine": [torch.__version__, *run.computed],
    }
    return run.root / ".fedcoe" / "trunks" / _CODE[:16] / fingerprint_of(key)


def keep_trunk(run: Run, state: ServerState, history: History) -> None:
    """Write down a round that other trainings could start from; nothing outside the trunk, and
    nothing of the last round, whose images may count fine-tuning."""
    method, folder = run.method, _folder(run)
    path = folder / f"{state.round:06d}.safetensors"
    if state.round > method.trunk_rounds or state.round == run.settings.train.rounds:
        return
    if run.code != _CODE or path.exists():
        return
    for other in folder.parent.parent.glob("*"):
        if other != folder.parent:  # of other code
            shutil.rmtree(other, ignore_errors=True)
    sweep(folder)
    records = []
    for row in history.rounds:
        up, down = gate_traffic(method, state, row["round"])
        bare = {"bytes_up": row["bytes_up"] - up, "bytes_down": row["bytes_down"] - down}
        records.append(row | bare)
    # Only time is lost without it.
    with suppress(FedCoEError):
        save_state(path, cut(state), records=records, seconds=spent(run)[0])


def next_of_trunk(run: Run, state: ServerState) -> tuple[ServerState, list[RoundRecord]] | None:
    """The state at the latest kept round up to the next evaluation, and the rounds until then;
    None where none is kept. The time their training took counts as the run's own."""
    method = run.method
    ahead = range(state.round + 1, method.trunk_rounds + 1)
    until = next((r for r in ahead if method.evaluation_due(r)), method.trunk_rounds)
    if run.code != _CODE or until <= state.round:
        return None
    kept = {int(path.stem): path for path in _folder(run).glob("*.safetensors")}
    for round_ in sorted((r for r in kept if state.round < r <= until), reverse=True):
        try:
            trunk, notes = load_state(kept[round_])
        except FedCoEError:  # damaged: trained and written again
            kept[round_].unlink(missing_ok=True)
            continue
        spend(run, max(0.0, notes["seconds"] - spent(run)[0]))
        records = [RoundRecord(**record) for record in notes["records"]]
        return onward(method, state, trunk, records)
    return None
