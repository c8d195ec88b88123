"""Who owns which training sample.

A partition deals every sample of the training set to exactly one client, marks some clients as
new (never trained), splits each client's samples into train / validation / test, and gives each
client a feature group. It is drawn from its own seed in named streams, so that one setting never
shifts what another one decided, and its fingerprint names the result.

Published partitions of the same name differ in silence; what is done here is written at
`_dirichlet` and `_pathological`, and whatever had to give way stands in `Partition.warnings`.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedcoe.config import PartitionSettings
from fedcoe.data.feature_skew import SKEW_GROUPS
from fedcoe.data.untrusted import one_line, open_npy, read_json
from fedcoe.errors import FedCoEError
from fedcoe.streams import stream

TRAIN, VALIDATION, TEST = 0, 1, 2
SPLITS = ("train", "validation", "test")

MAX_REDRAWS = 1000
"""Dirichlet draws that may be thrown away because a client had too few samples."""

NEAR_MIX = 0.2
"""Hellinger distance below which a held-out label mix counts as one that was trained."""

_ARRAYS = {"client": np.int32, "split": np.int8, "group": np.int8, "test_group": np.int8}
_FILES = {"manifest.json", *(f"{name}.npy" for name in _ARRAYS)}

Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Partition:
    """Every training sample dealt to exactly one client. Equal partitions: equal fingerprints.

    Attributes:
        client: int32 [N], the owner of each training sample.
        split: int8 [N], TRAIN, VALIDATION or TEST within its owner.
        group: int8 [clients], feature group of each client (zeros without feature skew).
        test_group: int8 [N_test], feature group in which each official test image is shown.
        seen: clients 0 .. seen-1 take part in training.
        new: clients seen .. seen+new-1 never do.
        skew: feature skew, a key of `fedcoe.data.feature_skew.SKEW_GROUPS`.
        names: one unique name a client.
        warnings: sentences on where the draw departs from what was asked for.
        fingerprint: 16 hex digits over all of the above but the warnings' wording.

    Raises:
        ValueError: the parts do not fit together.
    """

    client: NDArray[np.int32]
    split: NDArray[np.int8]
    group: NDArray[np.int8]
    test_group: NDArray[np.int8]
    seen: int
    new: int
    skew: str
    names: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256(json.dumps([self.seen, self.new, self.skew, self.names]).encode())
        for name, dtype in _ARRAYS.items():
            array = np.array(getattr(self, name), dtype)
            if array.ndim != 1:
                raise ValueError(f"{name} must have one axis, has shape {array.shape}")
            array.setflags(write=False)
            object.__setattr__(self, name, array)
            digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
        object.__setattr__(self, "fingerprint", digest.hexdigest()[:16])
        if len(self.client) != len(self.split):
            raise ValueError(f"{len(self.client)} owners for {len(self.split)} split marks")
        if self.seen < 1 or self.new < 0 or self.seen + self.new != self.clients:
            raise ValueError(f"{self.seen} seen + {self.new} new are not {self.clients} clients")
        if len(set(self.names)) != self.clients:
            raise ValueError(f"{len(set(self.names))} different names for {self.clients} clients")
        _check_range("client", self.client, self.clients)
        _check_range("split", self.split, len(SPLITS))
        if self.skew not in SKEW_GROUPS:
            raise ValueError(f"feature skew {self.skew!r} is none of {', '.join(SKEW_GROUPS)}")
        # Without skew nothing reads the groups.
        groups = SKEW_GROUPS[self.skew] if self.skew != "none" else 128
        _check_range("group", self.group, groups)
        _check_range("test_group", self.test_group, groups)

    @property
    def clients(self) -> int:
        """Seen and new clients together."""
        return len(self.group)

    def indices(self, client: int, split: int) -> NDArray[np.int64]:
        """Positions in the training set of a client's samples of one split, ascending."""
        if not (0 <= client < self.clients and 0 <= split < len(SPLITS)):
            raise IndexError(f"client {client}, split {split} of {self.clients} clients, 3 splits")
        order, bounds = self._by_owner
        cell = client * len(SPLITS) + split
        return order[bounds[cell] : bounds[cell + 1]].copy()

    def label_counts(self, y: ArrayLike, num_classes: int, split: int | None = None) -> Counts:
        """Samples of each class at each client, of one split or of all: int64 [clients, classes].

        Args:
            y: labels of the whole training set, [N], in 0 .. num_classes-1.

        Raises:
            ValueError: other labels, or another number of them.
        """
        y = np.asarray(y)
        if y.shape != self.client.shape:
            raise ValueError(f"labels of shape {y.shape} for {len(self.client)} samples")
        _check_range("labels", y, num_classes)
        chosen = slice(None) if split is None else self.split == split
        return _cross_table(self.client[chosen], y[chosen], self.clients, num_classes)

    @cached_property
    def _by_owner(self) -> tuple[NDArray[np.int64], Counts]:
        cell = self.client.astype(np.int64) * len(SPLITS) + self.split
        sizes = np.bincount(cell, minlength=self.clients * len(SPLITS))
        return np.argsort(cell, kind="stable"), np.concatenate([[0], np.cumsum(sizes)])


def make_partition(
    settings: PartitionSettings,
    y_train: ArrayLike,
    num_test: int,
    num_classes: int,
    client_train: ArrayLike | None = None,
    client_names: Sequence[str] = (),
) -> Partition:
    """Draw the partition that the settings describe.

    Schemes: `_dirichlet`, `_pathological`, iid (a random deal into sizes that differ by at most
    one) and natural (the data's own clients; `settings.clients` is not used then).

    Feature groups are dealt to clients at random in sizes that differ by at most one.
    round(clients * new_clients) clients are new: drawn at random; or the one feature group nearest
    to that size; or the client whose label mix lies farthest from the mean mix together with its
    nearest neighbours (Hellinger distance), so that this region of mixes was never trained.
    Numbers are then given anew, seen clients first.

    Each client's samples are split at random: round(share * n) samples for test and validation,
    at least one each, and at least one is left for training.

    Args:
        settings: the `partition` section.
        y_train: integer labels [N] in 0 .. num_classes-1.
        num_test: size of the official test set.
        num_classes: number of classes.
        client_train: the client of each training sample [N] (natural): positions in
            `client_names`, or without these any ids.
        client_names: names of the natural clients.

    Raises:
        FedCoEError: labels or client ids that do not fit; a partition that cannot be.
    """
    y = _integers(y_train, "labels", num_classes)
    warnings: list[str] = []
    if settings.scheme == "natural":
        client, names = _natural(settings, len(y), client_train, client_names)
    else:
        client, names = _deal(settings, y, num_classes, warnings), ()
    clients = len(names) or settings.clients

    group = np.zeros(clients, np.int64)
    if settings.feature_skew != "none":
        group = np.arange(clients) % settings.feature_groups
        stream(settings.seed, "partition/groups").shuffle(group)
    counts = _cross_table(client, y, clients, num_classes)
    new = _choose_new(settings, counts, group, warnings)
    seen = np.setdiff1d(np.arange(clients), new)

    order = np.concatenate([seen, new])
    client, group = np.argsort(order)[client], group[order]
    width = max(3, len(str(clients - 1)))
    names = tuple(names[k] if names else f"client-{i:0{width}d}" for i, k in enumerate(order))
    split = _split(settings, client)

    trained = np.unique(y[(client < len(seen)) & (split == TRAIN)])
    if len(missing := np.setdiff1d(y, trained)):
        warnings.append(f"no seen client trains on class {_listed(missing)}")
    if settings.feature_skew != "none":
        unseen = np.setdiff1d(np.arange(settings.feature_groups), group[: len(seen)])
        if len(unseen) and settings.new_clients_by != "feature_group":
            warnings.append(f"no seen client is in feature group {_listed(unseen)}")

    seen_groups = np.unique(group[: len(seen)])
    test_group = seen_groups[np.arange(num_test) % len(seen_groups)]
    stream(settings.seed, "partition/test-groups").shuffle(test_group)
    return Partition(
        client=client.astype(np.int32),
        split=split,
        group=group.astype(np.int8),
        test_group=test_group.astype(np.int8),
        seen=len(seen),
        new=len(new),
        skew=settings.feature_skew,
        names=names,
        warnings=tuple(warnings),
    )


def save_partition(
    partition: Partition,
    settings: PartitionSettings,
    y_train: ArrayLike,
    classes: Sequence[str],
    folder: str | Path,
) -> None:
    """Write the arrays (client, split, group, test_group: .npy) and manifest.json.

    The folder is replaced as a whole: it is written beside its place and then moved. The same
    partition gives the same bytes.

    Raises:
        FedCoEError: the folder holds other files than a partition's, or cannot be written.
    """
    folder = Path(folder).absolute()
    fresh, old = (folder.with_name(f".{folder.name}.{state}") for state in ("tmp", "old"))
    manifest = _manifest(partition, settings, y_train, classes)
    try:
        if folder.exists() and (foreign := {path.name for path in folder.iterdir()} - _FILES):
            raise FedCoEError(f"{folder}: holds {_listed(sorted(foreign))}; move it elsewhere")
        for leftover in (fresh, old):
            if leftover.exists():
                shutil.rmtree(leftover)
        fresh.mkdir(parents=True)
        for name in _ARRAYS:
            np.save(fresh / f"{name}.npy", getattr(partition, name), allow_pickle=False)
        (fresh / "manifest.json").write_text(manifest, encoding="ascii", newline="\n")
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise FedCoEError(f"{folder}: cannot be written: {error}") from None


def load_partition(folder: str | Path) -> Partition:
    """Read what `save_partition` wrote; nothing in the files can execute code.

    Raises:
        FedCoEError: a file is missing, damaged, or not of this partition.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    try:
        manifest = read_json(path)
        if not isinstance(manifest, dict):
            raise ValueError("is no JSON object")
        values: dict[str, Any] = {name: manifest[name] for name in ("seen", "new", "skew")}
        if not all(type(values[name]) is int for name in ("seen", "new")):
            raise ValueError("seen and new must be whole numbers")
        for name in ("names", "warnings"):
            values[name] = tuple(manifest[name])
            if not all(isinstance(item, str) for item in values[name]):
                raise ValueError(f"{name} must be a list of strings")
        fingerprint = manifest["fingerprint"]
        for name, dtype in _ARRAYS.items():
            path = folder / f"{name}.npy"
            values[name] = open_npy(path)
            if values[name].dtype != dtype:
                raise ValueError(f"holds {values[name].dtype}, not {np.dtype(dtype)}")
        path = folder
        partition = Partition(**values)
        if partition.fingerprint != fingerprint:
            raise ValueError(f"fingerprint is {partition.fingerprint}, manifest: {fingerprint}")
    except FileNotFoundError:
        raise FedCoEError(f"{path}: no such file; run `dvc repro partition`") from None
    except Exception as error:  # damaged bytes make numpy's and json's readers raise anything
        why = one_line(f"{type(error).__name__}: {error}")
        raise FedCoEError(f"{path}: damaged ({why}); run `dvc repro partition`") from None
    return partition


def _manifest(
    partition: Partition, settings: PartitionSettings, y_train: ArrayLike, classes: Sequence[str]
) -> str:
    counts = [partition.label_counts(y_train, len(classes), split) for split in range(len(SPLITS))]
    clients = [
        {"name": name, "seen": k < partition.seen, "group": int(partition.group[k])}
        | {split: table[k].tolist() for split, table in zip(SPLITS, counts, strict=True)}
        for k, name in enumerate(partition.names)
    ]
    totals = {split: int(table.sum()) for split, table in zip(SPLITS, counts, strict=True)}
    values = {
        "fingerprint": partition.fingerprint,
        "settings": settings.model_dump(mode="json"),
        "seen": partition.seen,
        "new": partition.new,
        "skew": partition.skew,
        "names": partition.names,
        "warnings": partition.warnings,
        "classes": list(classes),
        "totals": totals | {"samples": len(partition.client)},
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()]
    rows = ",\n".join(f"  {json.dumps(row)}" for row in clients)  # one client a line, for diffs
    return "{\n" + ",\n".join([*lines, f'"clients": [\n{rows}\n]']) + "\n}\n"


def _deal(
    settings: PartitionSettings, y: NDArray[np.int64], num_classes: int, warnings: list[str]
) -> NDArray[np.int64]:
    if settings.clients * settings.min_samples > len(y):
        raise FedCoEError(
            f"partition.clients = {settings.clients}: {settings.min_samples} samples each "
            f"(partition.min_samples) are more than the {len(y)} training samples"
        )
    shuffled = stream(settings.seed, "partition/samples").permutation(len(y))
    client = np.empty(len(y), np.int64)
    if settings.scheme == "iid":
        client[shuffled] = np.arange(len(y)) % settings.clients
        return client
    sizes = np.bincount(y, minlength=num_classes)
    if settings.scheme == "dirichlet":
        counts = _dirichlet(settings, sizes, warnings)
    else:
        counts = _pathological(settings, sizes)
    by_class = shuffled[np.argsort(y[shuffled], kind="stable")]
    owners = np.tile(np.arange(settings.clients), num_classes)
    client[by_class] = np.repeat(owners, counts.T.ravel())
    return client


def _dirichlet(settings: PartitionSettings, sizes: Counts, warnings: list[str]) -> Counts:
    """For every class c, shares p_c ~ Dir(alpha, ..., alpha) over ALL clients; client k gets the
    fraction p_c[k] of the class, rounded up or down at random so that its mean is exact (cumulative
    shares plus one uniform offset a class, rounded down).

    Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural Networks", ICML 2019.
    Hsu et al. (arXiv 1909.06335, 2019) draw the other way round, a class mix for every client,
    all clients of one size: their alpha is not this alpha. Client sizes vary freely here: nothing
    stops a client from growing past N / clients, as common copies of this scheme do. Only when a
    client has fewer than min_samples is the whole draw thrown away and repeated, with a warning.

    Args:
        sizes: samples of each class, [classes].

    Returns:
        Samples of each class at each client, [clients, classes].
    """
    alpha = np.full(settings.clients, settings.alpha)
    fewest = 0
    for redraw in range(MAX_REDRAWS + 1):
        rng = stream(settings.seed, "partition/labels", redraw)
        cumulative = np.cumsum(rng.dirichlet(alpha, len(sizes)), axis=1)
        if not np.allclose(cumulative[:, -1], 1):
            raise FedCoEError(f"partition.alpha = {settings.alpha}: beyond what can be drawn")
        # The offset differs by class: without it, where a client's share is below one sample, the
        # same few clients are rounded up in every class and the others get nothing.
        offset = rng.random((len(sizes), 1))
        cuts = np.floor(cumulative * sizes[:, None] + offset).astype(np.int64)
        cuts = np.minimum(cuts, sizes[:, None])
        cuts[:, -1] = sizes
        counts: Counts = np.diff(cuts, axis=1, prepend=0).T
        smallest = int(counts.sum(axis=1).min())
        if smallest >= settings.min_samples:
            if redraw:
                warnings.append(
                    f"dirichlet: {redraw} redraws until every client had {settings.min_samples} "
                    f"samples (partition.min_samples); the partition is Dir({settings.alpha}) "
                    f"given that"
                )
            return counts
        fewest = max(fewest, smallest)
    raise FedCoEError(
        f"partition.alpha = {settings.alpha}: in {MAX_REDRAWS + 1} draws for {settings.clients} "
        f"clients the smallest client never had more than {fewest} samples, wanted "
        f"{settings.min_samples}; raise alpha, or lower partition.clients or partition.min_samples"
    )


def _pathological(settings: PartitionSettings, sizes: Counts) -> Counts:
    """Every client gets shards of exactly `classes_per_client` different classes.

    After McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized
    Data", AISTATS 2017: sort by label, cut into clients * classes_per_client shards, deal them at
    random. There, equal shards cross class borders and a client may draw one class twice. Here
    every shard has one class (a class has shards in proportion to its size, cut evenly) and no
    client gets a class twice; for equal classes and whole shares the shards are the original's.

    Args:
        sizes: samples of each class, [classes].

    Returns:
        Samples of each class at each client, [clients, classes].
    """
    clients, per_client = settings.clients, settings.classes_per_client
    rng = stream(settings.seed, "partition/labels")
    room = np.minimum(clients, sizes)
    shards = np.minimum(1, sizes)
    key = f"partition.classes_per_client = {per_client}"
    if per_client > shards.sum():
        raise FedCoEError(f"{key}: the training set has {shards.sum()} classes")
    if clients * per_client < shards.sum():
        raise FedCoEError(
            f"{key}: {clients} clients (partition.clients) cannot cover {shards.sum()} classes; "
            f"at least {-(-shards.sum() // clients)} classes per client can"
        )
    if clients * per_client > room.sum():
        raise FedCoEError(
            f"{key}: too few samples to give {clients} clients (partition.clients) one of each of "
            f"their classes; lower either"
        )
    order = rng.permutation(len(sizes))  # who gets a last odd shard, among classes of one size
    while shards.sum() < clients * per_client:
        largest = np.where(shards < room, sizes / np.maximum(shards, 1), -1.0)
        shards[order[np.argmax(largest[order])]] += 1

    left = shards.copy()
    owned = np.zeros((clients, len(sizes)), bool)
    for k in range(clients):
        # Weighted draw without replacement (Efraimidis and Spirakis 2006); a class with as many
        # shards left as there are clients left must be taken now, or it could not be dealt.
        wait = rng.exponential(size=len(left)) / np.where(left > 0, left, np.nan)
        wait[left == clients - k] = 0
        owned[k, np.argsort(wait)[:per_client]] = True  # nan, no shard left, sorts last
        left -= owned[k]

    counts = np.zeros(owned.shape, np.int64)
    for c in np.flatnonzero(shards):
        counts[owned[:, c], c] = np.diff(np.arange(shards[c] + 1) * sizes[c] // shards[c])
    smallest = counts.sum(axis=1).min()
    if smallest < settings.min_samples:
        raise FedCoEError(
            f"{key}: the smallest of {clients} clients has {smallest} samples, wanted "
            f"{settings.min_samples}; lower partition.clients or partition.min_samples"
        )
    return counts


def _natural(
    settings: PartitionSettings,
    samples: int,
    client_train: ArrayLike | None,
    client_names: Sequence[str],
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    if client_train is None:
        raise FedCoEError(
            "partition.scheme = 'natural': the data names no clients; fetch it from folders "
            "client/class or from an .npz with client_train, or choose another scheme"
        )
    if client_names:
        names = tuple(map(str, client_names))
        client = _integers(client_train, "client_train", len(names))
    else:
        ids, client = np.unique(np.asarray(client_train), return_inverse=True)
        names = tuple(map(str, ids))
    if client.shape != (samples,):
        raise FedCoEError(f"client_train has shape {client.shape} for {samples} training samples")
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise FedCoEError(f"client_names: {_listed(twice)} stands for more than one client")
    sizes = np.bincount(client, minlength=len(names))
    small = np.flatnonzero(sizes < settings.min_samples)
    if len(small):
        listed = _listed([f"{names[k]} ({sizes[k]})" for k in small])
        lower = f"set it to {sizes.min()}, or " if sizes.min() >= 4 else ""
        raise FedCoEError(
            f"partition.min_samples = {settings.min_samples}: natural clients with fewer training "
            f"images: {listed}; {lower}merge or remove them in the data"
        )
    return client.astype(np.int64), names


def _choose_new(
    settings: PartitionSettings, counts: Counts, group: NDArray[np.int64], warnings: list[str]
) -> NDArray[np.int64]:
    clients = len(group)
    wanted = round(clients * settings.new_clients)
    key = f"partition.new_clients = {settings.new_clients}"
    if wanted == 0:
        if settings.new_clients > 0:
            warnings.append(f"{key} of {clients} clients rounds to none")
        return np.empty(0, np.int64)
    if wanted >= clients:
        raise FedCoEError(f"{key}: leaves none of {clients} clients to train on; lower it")
    rng = stream(settings.seed, "partition/new-clients")
    if settings.new_clients_by == "random":
        return np.sort(rng.permutation(clients)[:wanted])
    if settings.new_clients_by == "label_mix":
        return _label_region(counts, wanted, warnings)

    sizes = np.bincount(group)
    if len(sizes) < 2:
        raise FedCoEError(f"{key}: {clients} clients make one feature group; none could train")
    gap = abs(sizes - wanted)
    held_out = int(rng.choice(np.flatnonzero(gap == gap.min())))
    if gap[held_out]:
        warnings.append(
            f"{key} asks for {wanted} of {clients} clients; "
            f"feature group {held_out}, held out whole, has {sizes[held_out]}"
        )
    return np.flatnonzero(group == held_out)


def _label_region(counts: Counts, size: int, warnings: list[str]) -> NDArray[np.int64]:
    mix = counts / counts.sum(axis=1, keepdims=True)
    centre = int(np.argmax(_hellinger(mix, mix.mean(axis=0))))
    distance = _hellinger(mix, mix[centre])
    distance[centre] = -1.0  # comes first, even before clients of the very same mix
    order = np.argsort(distance, kind="stable")
    nearest = distance[order[size]]
    if nearest < NEAR_MIX:
        warnings.append(
            f"label_mix: a seen client's label mix is {nearest:.3f} (Hellinger) from the centre "
            f"of the held-out ones; new clients are hardly different"
        )
    return np.sort(order[:size])


def _hellinger(mixes: NDArray[np.float64], mix: NDArray[np.float64]) -> NDArray[np.float64]:
    distance: NDArray[np.float64] = np.sqrt(((np.sqrt(mixes) - np.sqrt(mix)) ** 2).sum(axis=1) / 2)
    return distance.round(9)  # ties stay ties whatever the order of summation


def _split(settings: PartitionSettings, client: NDArray[np.int64]) -> NDArray[np.int8]:
    # Test from one end of a client's shuffled samples, validation from the other: changing one
    # share leaves the other's samples in place.
    shuffled = stream(settings.seed, "partition/split").permutation(len(client))
    order = shuffled[np.argsort(client[shuffled], kind="stable")]
    size = np.bincount(client)
    validation = np.maximum(1, np.rint(size * settings.validation).astype(np.int64))
    test = np.maximum(1, np.rint(size * settings.test).astype(np.int64))
    excess = np.maximum(0, validation + test + 1 - size)
    cut_test = test >= validation
    validation, test = validation - excess * ~cut_test, test - excess * cut_test

    place = np.arange(len(client)) - np.repeat(np.cumsum(size) - size, size)
    split = np.full(len(client), TRAIN, np.int8)
    split[order[place < np.repeat(test, size)]] = TEST
    split[order[place >= np.repeat(size - validation, size)]] = VALIDATION
    return split


def _cross_table(rows: ArrayLike, columns: ArrayLike, height: int, width: int) -> Counts:
    cell = np.asarray(rows, np.int64) * width + np.asarray(columns, np.int64)
    return np.bincount(cell, minlength=height * width).reshape(height, width)


def _integers(values: ArrayLike, name: str, below: int) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iu" or not array.size:
        raise FedCoEError(f"{name} must be integers [N], got {array.dtype} {array.shape}")
    try:
        _check_range(name, array, below)
    except ValueError as error:
        raise FedCoEError(str(error)) from None
    return array.astype(np.int64)


def _check_range(name: str, values: NDArray[Any], below: int) -> None:
    if values.size and not (values.min() >= 0 and values.max() < below):
        raise ValueError(
            f"{name} must lie in 0 to {below - 1}, found {values.min()} to {values.max()}"
        )


def _listed(items: Sequence[object] | NDArray[Any], most: int = 8) -> str:
    shown = ", ".join(str(item) for item in items[:most])
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"
