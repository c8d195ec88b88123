"""One page that says what a run did and how well: reports/index.html; and one a comparison.

Self-contained (no request leaves the page) and a pure function of the files it reads, so that DVC
can hash it: no time, no path of the machine.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pydantic import BaseModel

from fedcoe.config import PartitionSettings, Settings, validate_settings
from fedcoe.data.sources import sources
from fedcoe.errors import FedCoEError
from fedcoe.methods.settings import SWITCHES
from tasks import figures
from tasks.comparison import (
    Comparison,
    comparison_figures,
    difference_rows,
    differences,
    results,
    summary,
    table_rows,
)

MAX_TABLE_ROWS = 500  # the page must open on a phone; the tables are whole in plots/
MAX_CLASS_COLUMNS = 20

_NAMES = {"fedcoe": "FedCoE", "fedavg": "FedAvg", "fedprox": "FedProx", "local": "Local"}
_MODES = {
    "none": "reads nothing",
    "unlabelled": "reads unlabelled inputs",
    "labels": "reads labels, forward only",
    "few_shot": "fine-tunes (reference)",
}
_MEASURES = {
    "accuracy": "accuracy",
    "mean": "mean over clients",
    "std": "standard deviation over clients",
    "worst10": "worst 10 % of clients",
    "nll": "negative log-likelihood",
    "ece": "expected calibration error",
}
_IN_PERCENT = {"accuracy", "mean", "std", "worst10"}
_NEXT = "run `dvc repro`"

Values = dict[str, Any]


def build_report(root: Path) -> Path:
    """Write root/reports/index.html from what the pipeline left under `root`.

    Reads models/state.json, partitions/manifest.json, metrics/{train,evaluate,cold_start}.json and
    plots/{curves,clients,new_clients,experts}.csv; and data/dataset.json, metrics/baseline.json
    and plots/baseline_curves.csv where they are.

    Returns:
        The page's path.

    Raises:
        FedCoEError: a file is missing or damaged: which, and what to run.
    """
    return _write_page(root / "reports" / "index.html", "report.html.j2", _content(root))


def build_comparison_page(folder: Path, comparison: Comparison) -> Path:
    """Write folder/index.html: tables, figures and provenance of a comparison's cells.

    Returns:
        The page's path.
    """
    cells, lines = comparison.cells, results(comparison)
    gaps = differences(lines, comparison.reference)
    svgs = {
        name: Markup(figures.to_svg(figure))
        for name, figure in comparison_figures(comparison, lines).items()
    }
    common = cells[0]["settings"]
    content = {
        "name": comparison.name,
        "ablation": comparison.is_ablation,
        "reference": " · ".join(comparison.reference),
        "dataset": cells[0]["dataset"],
        "rounds": sorted({cell["train"]["rounds"] for cell in cells}),
        "seeds": sorted({cell["seed"] for cell in cells}),
        "methods": list(dict.fromkeys(cell["method"] for cell in cells)),
        "partition_words": _partition_words(PartitionSettings(**common["partition"])),
        "clients": len(cells[0]["clients"]),
        "new_clients": len(cells[0]["new_clients"]),
        "table": _sortable(table_rows(summary(lines)), 3 - comparison.is_ablation),
        "gaps": _sortable(difference_rows(gaps), 2) if len(gaps) else None,
        "figures": svgs,
        "told": _told(cells),
        "settings": _common(cells),
    }
    return _write_page(folder / "index.html", "comparison.html.j2", content)


def _sortable(table: tuple[list[str], list[list[str]]], words: int) -> Values:
    """Cells as (text, number to sort by, bold); the first `words` columns hold no numbers."""
    head, lines = table

    def cell(column: int, text: str) -> tuple[str, str | float, bool]:
        bare = text.strip("*")
        number = bare.split()[0].replace(",", "")
        return (
            bare,
            bare if column < words else -1e9 if number == "-" else float(number),
            (bare != text),
        )

    return {"head": head, "rows": [[cell(*item) for item in enumerate(row)] for row in lines]}


def _told(cells: Sequence[Values]) -> Values:
    """Where the numbers come from: every machine, commit, partition that any cell names."""
    timing = [cell["timing"] for cell in cells]
    return {
        "Data": sorted({cell["data_hash"][:16] for cell in cells}),
        "Partition, by seed": [
            f"{seed}: {fingerprint}"
            for seed, fingerprint in sorted(
                {(cell["seed"], cell["partition_fingerprint"]) for cell in cells}
            )
        ],
        "Commit": sorted({_commit(cell["commit"]) for cell in cells}),
        "Machine": sorted(
            {
                f"{t['gpu'] or t['processor']}, {t['workers']} workers on {t['cores']} cores, "
                f"torch {t['torch']}" + (f", {t['dtype']}" if "dtype" in t else "")
                for t in timing
            }
        ),
    }


def _commit(commit: str) -> str:
    """Shortened; what is in no commit stays marked."""
    name, plus, changes = commit.partition("+")
    return name[:12] + plus + changes


def _common(cells: Sequence[Values]) -> list[tuple[str, str]]:
    """Settings that all cells share, and `differs` for those they do not."""
    found: dict[str, set[str]] = {}
    for cell in cells:
        for section, values in cell["settings"].items():
            if section not in ("method", "data"):
                for key, value in values.items():
                    found.setdefault(f"{section}.{key}", set()).add(json.dumps(value))
    return [(key, min(values) if len(values) == 1 else "differs") for key, values in found.items()]


def _write_page(page: Path, template: str, content: Values) -> Path:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names of clients and classes are whatever the user's data says
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "points": _points, "number": _number}
    html = environment.get_template(template).render(content)
    page.parent.mkdir(parents=True, exist_ok=True)
    fresh = page.with_suffix(".tmp")
    fresh.write_text(html, encoding="utf-8", errors="replace", newline="\n")
    fresh.replace(page)  # a reader sees the old page or the new one, never half of one
    return page


def _content(root: Path) -> Values:
    trained = _json(root, "models/state.json", "settings")
    settings = validate_settings(trained["settings"], "models/state.json")
    manifest = _json(root, "partitions/manifest.json", "fingerprint", "clients", "classes", "seen")
    train = _json(root, "metrics/train.json", "rounds", "best_round", "images_trained")
    evaluate = _json(root, "metrics/evaluate.json", "method", "seed", "global", "personalized")
    cold = _json(root, "metrics/cold_start.json")
    curves = _table(root, "plots/curves.csv", "round")
    named = ("client", "samples", "test_samples")
    clients = _table(root, "plots/clients.csv", *named, "accuracy", "correlation_0")
    new = _table(root, "plots/new_clients.csv", *named, *_MODES, optional=True)
    experts = _table(root, "plots/experts.csv", "expert", "load", "clients", "accuracy")
    theirs: Values = {}
    if (root / "metrics/baseline.json").exists():
        theirs = _json(root, "metrics/baseline.json")
        theirs = theirs.get("baseline", {"footing": None})  # of before it had a name of its own
    # `fedcoe train` may have been asked for something else than the pipeline was.
    apart = bool(theirs) and theirs["footing"] != evaluate.get("footing", "")
    theirs = {} if apart else theirs
    their_curves = None
    if theirs and (root / "plots/baseline_curves.csv").exists():
        their_curves = _table(root, "plots/baseline_curves.csv", "round")
    dataset: Values = {}
    if (root / "data/dataset.json").exists():
        dataset = _json(root, "data/dataset.json", "name")

    name = _NAMES.get(evaluate["method"], str(evaluate["method"]))
    baseline = theirs["evaluate"].get("method", "fedavg") if theirs else ""
    baseline = _NAMES.get(baseline, baseline)
    ours = evaluate | {"cold": cold}
    theirs = theirs and theirs["evaluate"] | {"cold": theirs["cold_start"], **theirs["train"]}
    counts = np.array(
        [
            np.sum([client[split] for split in ("train", "validation", "test")], axis=0)
            for client in manifest["clients"]
        ]
    )
    names = [client["name"] for client in manifest["clients"]]
    wide, narrow = (
        figures.to_svg(
            figures.learning_curves(
                curves,
                their_curves,
                method=name,
                baseline_name=baseline or "baseline",
                columns=columns,
            )
        )
        for columns in (3, 1)
    )
    partition = figures.clients_by_classes(
        counts, manifest["classes"], manifest["seen"], names=names
    )
    return {
        "name": name,
        "baseline": baseline,
        "apart": apart,
        "switches": _switches(settings),
        "own_data": dataset.get("name", settings.data.name) not in sources(),
        "ours": ours,
        "theirs": theirs,
        "train": train,
        "dataset": dataset,
        "data_name": dataset.get("name", settings.data.name),
        "manifest": manifest,
        "partition_words": _partition_words(settings.partition),
        "sizes": counts.sum(axis=1),
        "cards": _cards(ours, theirs, clients, new),
        "results": _results(ours, theirs),
        "curves_wide": Markup(wide),
        "curves_narrow": Markup(narrow),
        "partition": Markup(figures.to_svg(partition)),
        "correlation": Markup(figures.to_svg(figures.correlation_heatmap(clients))),
        "accuracy": Markup(figures.to_svg(figures.expert_client_accuracy(clients))),
        "experts": _experts(experts, manifest["classes"]),
        "classes": manifest["classes"] if len(manifest["classes"]) <= MAX_CLASS_COLUMNS else [],
        "clients": _clients(clients),
        "clients_total": len(clients),
        "new_clients": _clients(new),
        "new_total": len(new),
        "limit": MAX_TABLE_ROWS,
        "modes": _MODES,
        "parameters": _parameters(settings),
        "settings_fingerprint": settings.fingerprint(),
    }


def _switches(settings: Settings) -> str:
    """Those that are on, in words."""
    on = {name: getattr(settings.method, name) for name in SWITCHES}
    words = [
        name.replace("_", " ") + ("" if value is True else f" {value:g}")
        for name, value in on.items()
        if value
    ]
    return ", ".join(words) or "all off"


def _json(root: Path, path: str, *keys: str) -> Values:
    try:
        values = json.loads((root / path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FedCoEError(f"{path}: no such file; {_NEXT}") from None
    except (OSError, ValueError) as error:
        raise FedCoEError(f"{path}: damaged ({error}); {_NEXT}") from None
    if not isinstance(values, dict) or (missing := [key for key in keys if key not in values]):
        what = f"lacks {', '.join(missing)}" if isinstance(values, dict) else "is no mapping"
        raise FedCoEError(f"{path}: {what}; {_NEXT}")
    return values


def _table(root: Path, path: str, *columns: str, optional: bool = False) -> pd.DataFrame:
    """A CSV file; `optional`: columns that are not there are filled with NaN."""
    try:
        # As text first: a client may be called "NA", and group 1 must not become 1.0.
        table = pd.read_csv(root / path, dtype=str, keep_default_na=False)
    except FileNotFoundError:
        raise FedCoEError(f"{path}: no such file; {_NEXT}") from None
    except pd.errors.EmptyDataError:
        table = pd.DataFrame()
    except (OSError, ValueError) as error:
        raise FedCoEError(f"{path}: damaged ({error}); {_NEXT}") from None
    for column in table.columns.difference(["client", "kind", "feature_group", "expert"]):
        table[column] = pd.to_numeric(table[column], errors="coerce")
    missing = [column for column in columns if column not in table]
    if missing and not optional:
        raise FedCoEError(f"{path}: lacks the column {', '.join(missing)}; {_NEXT}")
    return table.reindex(columns=[*table.columns, *missing])


def _partition_words(partition: PartitionSettings) -> str:
    scheme = {
        "dirichlet": f"Dirichlet({partition.alpha:g}) label skew",
        "pathological": f"{partition.classes_per_client} classes a client",
        "iid": "an even random deal",
        "natural": "the data's own clients",
    }[partition.scheme]
    if partition.feature_skew == "none":
        return scheme
    return f"{scheme} and {partition.feature_skew} in {partition.feature_groups} feature groups"


def _cards(ours: Values, theirs: Values, seen: pd.DataFrame, new: pd.DataFrame) -> list[Values]:
    places = {
        "Global": ("global", "for everyone, official test set"),
        "Personalized": ("personalized", f"each seen client on its own test data{_of(seen)}"),
        "Cold start": (
            "unlabelled",
            f"new clients, no training step, unlabelled inputs only{_of(new)}",
        ),
    }
    cards = []
    for title, (key, words) in places.items():
        own = (ours if key != "unlabelled" else ours["cold"]).get(key, {}).get("accuracy")
        other = theirs and (theirs if key != "unlabelled" else theirs["cold"]).get(key, {})
        cards.append(
            {"title": title, "words": words, "ours": own, "theirs": (other or {}).get("accuracy")}
        )
    return cards


def _of(clients: pd.DataFrame) -> str:
    """How many images an accuracy is of: of few, a point is one image."""
    images = clients["test_samples"].sum()
    return f" ({_number(images)} images of {len(clients)} clients)" if images else ""


def _results(ours: Values, theirs: Values) -> list[Values]:
    """Every measured number: [{title, rows: [{measure, percent, ours, theirs}]}]."""
    groups = {"Global": "global", "Personalized": "personalized"} | {
        f"Cold start, {mode}: {words}": mode for mode, words in _MODES.items()
    }
    results = []
    for title, key in groups.items():
        own = ours["cold"].get(key) if key in _MODES else ours[key]
        other = (theirs and (theirs["cold"] if key in _MODES else theirs).get(key)) or {}
        rows = [
            {"measure": words, "percent": m in _IN_PERCENT, "ours": own[m], "theirs": other.get(m)}
            for m, words in _MEASURES.items()
            if own and m in own
        ]
        if rows:
            results.append({"title": title, "rows": rows})
    return results


def _experts(table: pd.DataFrame, classes: list[str]) -> list[Values]:
    rows = []
    for row in table.to_dict("records"):
        by_class = {name: row.get(f"accuracy_class_{name}", math.nan) for name in classes}
        known = sorted((name for name in classes if by_class[name] == by_class[name]),
                       key=lambda name: -by_class[name])  # fmt: skip
        rows.append(row | {"by_class": by_class, "best": known[:3]})
    return rows


def _clients(table: pd.DataFrame) -> list[Values]:
    correlation = table.filter(like="correlation_").to_numpy(dtype=np.float64)
    rows = table.head(MAX_TABLE_ROWS).to_dict("records")
    for row, shares in zip(rows, np.nan_to_num(correlation, nan=0.0), strict=False):
        row["expert"], row["belonging"] = int(shares.argmax()), float(shares.max())
    return [{str(key): value for key, value in row.items()} for row in rows]


def _parameters(settings: Settings) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """(section, [(key, value, what it means)]) of every setting."""
    sections: list[tuple[str, list[tuple[str, str, str]]]] = []
    # Without the search, which is no part of the run, nor what decides no figure.
    for name in settings.model_dump(exclude={"runtime"}):
        section = getattr(settings, name)
        assert isinstance(section, BaseModel)
        values = section.model_dump(mode="json").items()
        fields = type(section).model_fields
        sections.append(
            (name, [(k, json.dumps(v), fields[k].description or "") for k, v in values])
        )
    return sections


def _missing(value: float | None) -> bool:
    return value is None or not math.isfinite(value)


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if _missing(value) else f"{100 * float(value or 0):.{digits}f} %"


def _points(ours: float | None, theirs: float | None) -> str:
    """Difference of two shares in percentage points, signed."""
    if _missing(ours) or _missing(theirs):
        return ""
    difference = round(100 * (float(ours or 0) - float(theirs or 0)), 1) + 0.0
    return f"{difference:+.1f}".replace("-", "−")


def _number(value: float | None, digits: int = 0) -> str:
    """Thousands apart by a thin space that does not break."""
    return "–" if _missing(value) else f"{float(value or 0):,.{digits}f}".replace(",", "\u202f")
