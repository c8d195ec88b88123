"""What a person picks a registered model by: tags and a Markdown card with every version."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedcoe import __version__
from fedcoe.config import Settings
from fedcoe.data.dataset import DatasetInfo

LISTED = 10
"""Most clients and classes a card lists; descriptions end at 5,000 characters in some stores."""
MODES = {
    "none": "new clients, nothing read",
    "unlabelled": "new clients, unlabelled images read",
    "labels": "new clients, labels read forward-only",
}


@dataclass(frozen=True)
class Lineage:
    """Where a version comes from."""

    settings: Settings
    info: DatasetInfo
    partition_fingerprint: str
    seen: int
    new: int
    commit: str
    run_id: str


def expert_tags(
    row: Mapping[str, Any], clients: Sequence[Mapping[str, Any]], parameters: int, drift: float
) -> dict[str, str]:
    """Figures of one expert.

    Args:
        row, clients: of `Evaluation.experts` and `Evaluation.clients`.
        parameters: how many numbers it is made of.
        drift: spread of its last updates, see `methods.base.drift`.
    """
    by_class = _by_class(row)
    served = _served_best(int(row["expert"]), clients)
    more = f" and {len(served) - LISTED} more" * (len(served) > LISTED)
    tags = {
        "drift": f"{drift:.3f}",
        "parameters": str(parameters),
        "bytes": str(4 * parameters),
        "serves_best": ", ".join(f"{name} ({v:.2f})" for name, v in served[:LISTED]) + more,
    }
    text = json.dumps({name: round(value, 4) for name, value in by_class.items()})
    # Longer tags are refused by some stores; the card names the best and worst classes.
    return tags | ({"accuracy_by_class": text} if len(text) <= 5000 else {})


def _by_class(row: Mapping[str, Any]) -> dict[str, float]:
    """Class to accuracy on the official test set; classes it does not have are left out."""
    found = {
        name.removeprefix("accuracy_class_"): float(value)
        for name, value in row.items()
        if name.startswith("accuracy_class_")
    }
    return {name: value for name, value in found.items() if value == value}


def _served_best(expert: int, clients: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """Seen clients on whose test images no other expert alone is more accurate, best first."""
    served = []
    for client in clients:
        own = float(client[f"expert_accuracy_{expert}"])
        others = [float(v) for k, v in client.items() if k.startswith("expert_accuracy_")]
        if own == max(others) and own > 0:
            served.append((str(client["client"]), own))
    return sorted(served, key=lambda item: (-item[1], item[0]))


def card(
    name: str,
    lineage: Lineage,
    tags: Mapping[str, str],
    row: Mapping[str, Any] | None = None,
) -> str:
    """The model card of one registered version, in Markdown.

    Args:
        name: of the registered model.
        tags: of the version: its figures.
        row: of `Evaluation.experts`, for an expert.
    """
    sections = {
        "Intended use": _use(name, lineage, row is not None),
        "Data": _data(lineage),
        "Figures": _figures(tags, row),
        "Limits": _limits(name, lineage, tags, row),
        "Lineage": _lineage(lineage, tags),
    }
    return f"# {name}\n\n" + "\n\n".join(f"## {k}\n\n{v}" for k, v in sections.items()) + "\n"


def _use(name: str, lineage: Lineage, expert: bool) -> str:
    height, width, channels = lineage.info.shape
    takes = f"uint8 images [n, {height}, {width}, {channels}], pixels 0 to 255"
    classes = len(lineage.info.classes)
    if expert:
        return (
            f"One expert of a federated mixture, alone: {takes} in, probabilities of {classes} "
            "classes out. For a device that serves clients like those it serves best; for "
            "all others take the mixture, `fedcoe`."
        )
    if name.endswith("-gate"):
        return f"The mixture's gate: {takes} in, the probability of each expert out."
    return (
        f"The whole mixture: {takes} in, probabilities of {classes} classes out, for clients that "
        "never took part. Param `mode` says what it may read of them (none, unlabelled, labels). "
        "Nothing is trained when serving."
    )


def _data(lineage: Lineage) -> str:
    info, p = lineage.info, lineage.settings.partition
    skew = f", alpha {p.alpha}" if p.scheme == "dirichlet" else ""
    return (
        f"{_plain(info.name)} ({_plain(info.source)}; licence: {_plain(info.licence)}): "
        f"{info.train:,} images dealt to {lineage.seen} clients that trained and {lineage.new} "
        f"that did not ({p.scheme}{skew}); "
        f"{info.test:,} test images. Classes: {_listed(info.classes)}."
    )


def _figures(tags: Mapping[str, str], row: Mapping[str, Any] | None) -> str:
    figures: list[tuple[str, str]] = []
    if row is not None:
        figures += [
            ("this expert alone, accuracy on the test set", _percent(tags["accuracy"])),
            ("share of the training it was given", _percent(tags["load"])),
            ("clients whose correlation is highest with it", tags["clients"]),
            ("clients it serves best, of all experts alone", _plain(tags["serves_best"]) or "none"),
            ("drift of its last updates", tags["drift"]),
            ("parameters", f"{int(tags['parameters']):,}"),
        ]
    figures += [
        ("mixture, accuracy on the test set", _percent(tags["accuracy_global"])),
        ("mixture with personal experts, seen clients", _percent(tags["accuracy_personalized"])),
    ]
    figures += [
        (f"mixture, {words}", _percent(tags[f"accuracy_cold_{mode}"]))
        for mode, words in MODES.items()
        if f"accuracy_cold_{mode}" in tags
    ]
    table = _table(("figure", ""), figures)
    if row is None:
        return table
    ranked = sorted(_by_class(row).items(), key=lambda item: (-item[1], item[0]))
    note = ""
    if len(ranked) > 2 * LISTED:
        note = f"\n\nThe best and the worst {LISTED} of {len(ranked)} classes."
        ranked = ranked[:LISTED] + ranked[-LISTED:]
    rows = [(_plain(name), f"{100 * value:.1f} %") for name, value in ranked]
    return f"{table}\n\n{_table(('class', 'accuracy alone'), rows)}{note}"


def _limits(
    name: str, lineage: Lineage, tags: Mapping[str, str], row: Mapping[str, Any] | None
) -> str:
    points = [
        f"One seed, one partition; new clients' figures come from {lineage.new} clients.",
        "Images of other sources, sizes or classes were never tested; it always answers with one "
        "of its classes.",
        _privacy(lineage),
    ]
    if row is not None:
        weak = [name for name, value in _by_class(row).items() if value < 0.5]
        if weak:
            points.append(f"Alone it gets most images of these classes wrong: {_listed(weak)}.")
        points.append(
            "Its probabilities are as trained, not fitted to how often it is right (the mixture's "
            "are)."
        )
    elif name == "fedcoe":
        points.append("Clients' personal experts are not in it: they stay with their clients.")
    return "\n".join(f"- {point}" for point in points)


def _privacy(lineage: Lineage) -> str:
    p = lineage.settings.privacy
    if not p.epsilon:
        return (
            "Federated training keeps images with clients but proves no privacy: there is no "
            "differential privacy in it."
        )
    seeded = ", from a seed that undoes it: an experiment, no protection" * (p.noise == "seeded")
    return (
        f"Client-level differential privacy: epsilon {p.epsilon:g}, delta {p.delta:g} (one "
        f"client's data replaced by nothing; clip {p.clip:g}; noise {p.noise}{seeded}). It covers "
        "experts, gate and head, not the figures on this card (docs/privacy.md)."
    )


def _lineage(lineage: Lineage, tags: Mapping[str, str]) -> str:
    s = lineage.settings
    rows = [
        ("data", f"`{lineage.info.hash[:16]}`"),
        ("partition", f"`{lineage.partition_fingerprint}`"),
        ("commit", f"`{lineage.commit}`"),
        ("MLflow run", f"`{lineage.run_id}`"),
        ("method", f"{s.method.name}, model {s.model.name}, {s.train.rounds} rounds"),
        ("seeds", f"partition {s.partition.seed}, training {s.train.seed}"),
        ("fedcoe", __version__),
    ]
    return _table(("what", ""), rows)


def _table(head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    lines = [f"| {a} | {b} |" for a, b in rows]
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *lines])


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 2 * LISTED} more" * (len(names) > 2 * LISTED)
    return ", ".join(map(_plain, names[: 2 * LISTED])) + more


def _plain(name: str) -> str:
    """A name that data brought along, as text: no image, link or heading comes out of it. By
    entities, as MLflow's pages and others differ in what a backslash takes back."""
    return re.sub(r"[\\`*_\[\]<>!#~&@/|]|(?<=www)\.", lambda c: f"&#{ord(c[0])};", name)


def _percent(value: str) -> str:
    return f"{100 * float(value):.2f} %"
