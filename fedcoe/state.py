"""State is data: frozen dataclasses of arrays, and their form on disk (safetensors + JSON).

Nothing that is loaded here can execute code.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from fedcoe.data.dataset import hash_arrays
from fedcoe.data.untrusted import one_line, open_regular
from fedcoe.durable import write_atomic
from fedcoe.errors import FedCoEError
from fedcoe.models.flat import Layout, Vector, from_tensors, to_tensors

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class ServerState:
    """Everything the server knows after `round` finished rounds.

    M experts of P parameters, S seen clients, C classes.
    """

    round: int
    experts: NDArray[np.float32]
    """[M, P] global experts."""
    momentum: NDArray[np.float32]
    """[M, P] server momentum."""
    correlation: NDArray[np.float64]
    """[S, M] how much a client belongs to an expert; rows sum to 1."""
    dispatched: NDArray[np.int64]
    """[S, M] how often a client has trained an expert."""
    personal_round: NDArray[np.int64]
    """[S] round in which a client's personal expert was last trained; 0 = never."""
    share: NDArray[np.float64]
    """[S] weight b_k of a client's personal expert, chosen on its validation split."""
    calibration: Mapping[str, float] = field(default_factory=dict)
    """Temperatures and weights fitted on validation."""
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    """Figures of the last gate update that decide nothing."""
    extra: Arrays = field(default_factory=dict)
    """What only some methods have, e.g. the gate; `server_...` never travels to clients."""

    def for_clients(self) -> "ServerState":
        """Without what only the server needs: this is what travels to workers."""
        extra = {k: v for k, v in self.extra.items() if not k.startswith("server_")}
        return replace(self, momentum=np.zeros((0, 0), np.float32), extra=extra)

    def with_extra(self, **arrays: NDArray[Any]) -> "ServerState":
        return replace(self, extra={**self.extra, **arrays})


DAMAGED = "its bytes are not those that were written"
_FIELDS = ("experts", "momentum", "correlation", "dispatched", "personal_round", "share")


def _digest(text: str, arrays: Arrays) -> str:
    return hashlib.sha256(f"{text}\n{hash_arrays(arrays)}".encode()).hexdigest()


def save_state(path: Path, state: ServerState, **notes: Any) -> None:
    """Write a server state and JSON-able notes into one safetensors file, atomically."""
    arrays = {name: getattr(state, name) for name in _FIELDS}
    arrays |= {f"extra.{name}": np.ascontiguousarray(a) for name, a in state.extra.items()}
    header = {
        "round": state.round,
        "calibration": dict(state.calibration),
        "diagnostics": dict(state.diagnostics),
        "notes": notes,
    }
    # Keys keep their order: the columns of tables come from it, also after a resume.
    text = json.dumps(header)
    # One entry: safetensors writes several in any order, and equal states are equal files.
    write_atomic(path, save(arrays, metadata={"fedcoe": f"{_digest(text, arrays)} {text}"}))


def load_state(path: Path) -> tuple[ServerState, dict[str, Any]]:
    """Read what `save_state` wrote: the state and the notes.

    Raises:
        FedCoEError: the file is missing, damaged, or not a state.
    """
    try:
        arrays = load_file(path)
        with safe_open(path, framework="np") as file:
            digest, _, text = (file.metadata() or {})["fedcoe"].partition(" ")
        if digest != _digest(text, arrays):
            raise ValueError(DAMAGED)
        header = json.loads(text)
        extra = {name[6:]: a for name, a in arrays.items() if name.startswith("extra.")}
        fields = {name: arrays[name] for name in _FIELDS}
        state = ServerState(
            round=header["round"],
            calibration=header["calibration"],
            diagnostics=header["diagnostics"],
            extra=extra,
            **fields,
        )
        return state, header["notes"]
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise FedCoEError(f"{path}: not a whole state file ({one_line(error)})") from None


@dataclass(frozen=True)
class PersonalStore:
    """Personal experts on disk.

    While training, one file a client and round trained: old rounds stay until `forget` is told
    what the last checkpoints refer to, so that a run killed between a client's training and the
    checkpoint resumes from the file the checkpoint names. With a `layout`, the store is the
    exported folder `models/personal/`: one file a client, parameters by name.

    Files carry a hash of what they hold, which `load` compares.
    """

    folder: Path
    layout: Layout | None = None

    def _path(self, client: int, round_: int) -> Path:
        name = f"{client}-{round_}" if self.layout is None else f"{client}"
        return self.folder / f"{name}.safetensors"

    def load(self, client: int, round_: int) -> Vector:
        """[P] parameters of a client's personal expert as trained in a round."""
        return load_model(self._path(client, round_), self.layout)

    def save(self, client: int, round_: int, vector: Vector) -> None:
        save_model(self._path(client, round_), vector, self.layout)

    def forget(self, keep: set[tuple[int, int]]) -> None:
        """Delete every file but those of the (client, round) pairs given."""
        names = {self._path(client, round_).name for client, round_ in keep}
        for path in self.folder.glob("*.safetensors"):
            if path.name not in names:
                path.unlink()


def save_model(path: Path, vector: Vector, layout: Layout | None) -> None:
    """Write one model's [P] parameters, by name if a layout is given, atomically."""
    save_arrays(path, {"vector": vector} if layout is None else to_tensors(vector, layout))


def load_model(path: Path, layout: Layout | None) -> Vector:
    """Read what `save_model` wrote: [P] parameters.

    Raises:
        FedCoEError: missing, damaged, or not of this layout.
    """
    try:
        arrays = load_arrays(path)
        if layout is None:
            return np.asarray(arrays["vector"], np.float32)
        return from_tensors(arrays, layout)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise FedCoEError(f"{path}: not a readable model ({one_line(error)})") from None


def save_arrays(path: Path, arrays: Arrays) -> None:
    """Write a safetensors file with a hash of what it holds, atomically."""
    content = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_atomic(path, save(content, metadata={"hash": hash_arrays(content)}))


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read what `save_arrays` wrote. Files without any metadata, of older versions, are trusted.

    Raises:
        OSError, SafetensorError, ValueError, TypeError: missing, of another kind, or damaged.
    """
    open_regular(path).close()  # never wait for a pipe
    arrays = load_file(path)
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    if metadata is not None and metadata.get("hash") != hash_arrays(arrays):
        raise ValueError(DAMAGED)
    return arrays
