"""The figures of a run, drawn once for both MLflow and the report.

Pure functions from tables to matplotlib figures: no pyplot, no global state, so that they can be
called from any thread and give the same bytes every time. Every figure's `get_label()` says in
words what it shows; `to_svg` hands that to screen readers.
"""

import html
import re
from collections.abc import Mapping, Sequence
from io import BytesIO, StringIO
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

# Neutral colours and the two of the comparison. `to_svg` turns them into CSS variables, so that a
# page can restyle a figure for its dark theme. Blue and orange stay apart for every common kind of
# colour blindness, and the baseline is dashed besides.
INK, MUTED, GRID, PAPER = "#1f2a37", "#667282", "#e1e6ec", "#fffffe"
METHOD, BASELINE = "#0b69ad", "#b8560f"
_THEME = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    PAPER: "paper",
    METHOD: "method",
    BASELINE: "baseline",
}
# One hue a quantity: who has what (grey-violet), belonging (blue), accuracy (green).
COUNT = LinearSegmentedColormap.from_list("count", ["#f3f1f7", "#a99cc8", "#43316f"], N=32)
BELONGING = LinearSegmentedColormap.from_list("belonging", ["#eff4fa", "#7fb0d8", "#084b83"], N=32)
ACCURACY = LinearSegmentedColormap.from_list("accuracy", ["#f0f6f2", "#7cbb9d", "#0b5a41"], N=32)

# Many lines: hues apart for common colour blindness (after Okabe and Ito), then dashes.
_HUES = ("#b8560f", "#1b8a5a", "#a04f86", "#8a7a00", "#4b4f58", "#3aa0c8", "#c23b3b", "#7a5a3a")
_LOOKS = [(hue, dashes) for dashes in ("-", (0, (4, 1.5)), (0, (1, 1))) for hue in _HUES]

POOL = {"correlation": "Correlation", "gate": "Gate"}
"""What of a client is told for every expert: prefix of columns, and title."""

WIDTH = 4.4  # inches: at 8.5 pt still legible on a phone, where a figure is about as wide
MAX_ROWS = 40  # more clients than this share rows, as means of neighbours
MAX_COLUMNS = 40
MAX_VALUES = 13  # columns up to which cells also hold their numbers

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same layout on every machine
    "font.size": 8.5,
    "text.color": INK,
    "text.parse_math": False,  # a client may be called "$x$"
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "svg.fonttype": "none",
    "svg.image_inline": True,
}

Floats = npt.NDArray[np.float64]


@style.context(_STYLE, after_reset=True)
def learning_curves(
    curves: pd.DataFrame,
    baseline: pd.DataFrame | None = None,
    *,
    method: str = "FedCoE",
    baseline_name: str = "FedAvg",
    columns: int = 3,
) -> Figure:
    """Accuracy over rounds: global, personalized and cold start, one panel each.

    Args:
        curves: one row a round; columns round, global_accuracy, personalized_accuracy, cold_none,
            cold_unlabelled, cold_labels in [0, 1]. NaN: not evaluated in that round.
        baseline: the same columns for the method to compare with.
        method, baseline_name: how the legend calls them.
        columns: panels side by side; 1 stacks them for narrow pages.
    """
    panels = {
        "Global": "global_accuracy",
        "Personalized": "personalized_accuracy",
        "Cold start": "cold_unlabelled",
    }
    rows = -(-len(panels) // columns)
    size = (WIDTH if columns == 1 else 3.1 * columns, 2.0 * rows + (0.6 if columns > 1 else 0.2))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    said = []
    for axes, (title, column) in zip(grid, panels.items(), strict=False):
        cold = column == "cold_unlabelled"
        if cold:
            _line(axes, curves, "cold_labels", "with labels", METHOD, lw=1.1, ls=(0, (1, 1)))
            _line(axes, curves, "cold_none", "reads nothing", METHOD, lw=1.1, ls=(0, (4, 1.5)))
        theirs = f"{baseline_name}, unlabelled" if cold else baseline_name
        if baseline is not None:
            _line(axes, baseline, column, theirs, BASELINE, ls=(0, (5, 2)), zorder=2.2)
        last = _line(
            axes, curves, column, "from unlabelled inputs" if cold else method, METHOD, zorder=2.5
        )
        if last:
            said.append(f"{title.lower()} {last[1]:.1%} in round {last[0]:.0f}")
            _note(axes, f"{last[1]:.1%}", last, color=METHOD, weight="bold")
        axes.set_title(title, color=INK)
        axes.set_xlabel("round")
        axes.grid(True, color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.tick_params(colors=MUTED, labelsize=8, length=0, labelleft=True)
        if axes.lines:
            axes.legend(loc="best", labelcolor=INK, reverse=True)
    return _settled(
        figure, f"Learning curves of {method}. At the end: {', '.join(said) or 'no data'}."
    )


@style.context(_STYLE, after_reset=True)
def correlation_heatmap(clients: pd.DataFrame) -> Figure:
    """Correlation c[k, m]: how much client k belongs to expert m.

    Args:
        clients: one row a client; columns client and correlation_0..M-1 (rows sum to 1). Clients
            are ordered by the expert they belong to most.
    """
    values = _matrix(clients, "correlation_")
    rows = _gather(_by_largest(values))
    figure = Figure(figsize=(WIDTH, _height(len(rows))), layout="constrained")
    names = [str(m) for m in range(values.shape[1])]
    axes = figure.subplots()
    mesh = _heatmap(
        axes, _means(values, rows), BELONGING, _row_names(list(clients["client"]), rows), names
    )
    axes.set_title("Correlation, %", color=INK)
    axes.set_xlabel("expert")
    _say_rows(axes, rows)
    if values.shape[1] > MAX_VALUES:
        _scale(figure, mesh, [axes], "correlation")
    share = np.bincount(values.argmax(axis=1), minlength=values.shape[1])
    return _settled(
        figure,
        f"Correlation of {len(values)} clients with {values.shape[1]} experts. Clients that belong "
        f"most to each expert: {', '.join(f'{m}: {n}' for m, n in enumerate(share))}.",
    )


@style.context(_STYLE, after_reset=True)
def pool_heatmaps(clients: pd.DataFrame) -> Figure:
    """Correlation c[k, m] beside the gate's mean over the client's test images.

    Args:
        clients: one row a client; columns client, correlation_0..M-1 and gate_0..M-1 (both sum to
            1). Clients are ordered by the expert they belong to most.
    """
    panels = {title: _matrix(clients, f"{what}_") for what, title in POOL.items()}
    rows = _gather(_by_largest(panels[POOL["correlation"]]))
    figure = Figure(figsize=(WIDTH, _height(len(rows))))
    figure.set_layout_engine("constrained", wspace=0.02)
    left, right = figure.subplots(1, 2)
    names = {left: _row_names(list(clients["client"]), rows), right: []}
    for axes, (title, values) in zip(names, panels.items(), strict=True):
        experts = [str(m) for m in range(values.shape[1])]
        mesh = _heatmap(axes, _means(values, rows), BELONGING, names[axes], experts)
        axes.set_title(f"{title}, %", color=INK)
        axes.set_xlabel("expert")
        if len(experts) > MAX_VALUES:
            _scale(figure, mesh, [axes], title.lower())
    _say_rows(left, rows)
    said = [
        f"{title}: {', '.join(f'{v:.0%}' for v in values.mean(axis=0))}"
        for title, values in panels.items()
    ]
    return _settled(
        figure,
        f"Correlation of {len(clients)} clients with the experts, and the gate's mean on their "
        f"test images. Means over clients, expert by expert: {'; '.join(said)}.",
    )


@style.context(_STYLE, after_reset=True)
def expert_client_accuracy(clients: pd.DataFrame) -> Figure:
    """Accuracy of every single expert on every client, beside the mixtures' (where given).

    Args:
        clients: one row a client; columns client, expert_accuracy_0..M-1 and, if at hand,
            accuracy_global, accuracy (personalized), all in [0, 1], and correlation_0..M-1, which
            orders clients as `correlation_heatmap` does.
    """
    single = _matrix(clients, "expert_accuracy_")
    extra = {"accuracy_global": "global", "accuracy": "personal"}
    mixtures = [column for column in extra if column in clients]
    mixed = clients[mixtures].to_numpy(dtype=np.float64)
    order = _matrix(clients, "correlation_") if "correlation_0" in clients else single
    rows = _gather(_by_largest(order))
    figure = Figure(figsize=(WIDTH, _height(len(rows))))
    figure.set_layout_engine("constrained", wspace=0.02)
    # Two words need the width of about two cells where cells are many.
    widths = [single.shape[1], max(1, len(mixtures)) * max(1.0, single.shape[1] / 5)]
    left, right = figure.subplots(1, 2, width_ratios=widths)
    names = [str(m) for m in range(single.shape[1])]
    mesh = _heatmap(
        left, _means(single, rows), ACCURACY, _row_names(list(clients["client"]), rows), names
    )
    left.set_title("Accuracy, %", color=INK)
    left.set_xlabel("single expert")
    _say_rows(left, rows)
    if single.shape[1] > MAX_VALUES:
        _scale(figure, mesh, [left, right], "accuracy")
    if mixtures:
        _heatmap(right, _means(mixed, rows), ACCURACY, [], [extra[name] for name in mixtures])
        right.set_xlabel("mixture")
    else:
        right.remove()
    mean = _means(single, [np.arange(len(single))])[0]
    return _settled(
        figure,
        f"Accuracy of {single.shape[1]} single experts on {len(single)} clients' test data. Means: "
        f"{', '.join(f'expert {m}: {a:.1%}' for m, a in enumerate(mean))}.",
    )


@style.context(_STYLE, after_reset=True)
def clients_by_classes(
    counts: npt.ArrayLike,
    classes: Sequence[str],
    seen: int,
    *,
    names: Sequence[str] | None = None,
) -> Figure:
    """The partition: which client holds how many samples of which class.

    Colour is the share of the client's own samples, so that small clients are as visible as large
    ones; the bars show how many samples a client has.

    Args:
        counts: [clients, classes] numbers of samples.
        classes: name of every class.
        seen: the first so many clients take part in training, the others are new.
        names: name of every client (default: its row number).
    """
    table = np.asarray(counts, dtype=np.float64)
    every = np.arange(len(table))
    names = [str(row) for row in every] if names is None else names
    parts = {
        "Seen clients": (every[:seen], MAX_ROWS),
        "New clients": (every[seen:], MAX_ROWS // 3),
    }
    panels = {
        f"{title} ({len(rows)})": _gather(rows[_by_largest(table[rows])], limit)
        for title, (rows, limit) in parts.items()
        if len(rows)
    }
    heights = [len(groups) for groups in panels.values()]
    figure = Figure(figsize=(WIDTH, 0.3 * len(panels) + _height(sum(heights))))
    figure.set_layout_engine("constrained", wspace=0.02)
    grid = figure.subplots(
        len(panels), 2, squeeze=False, height_ratios=heights, width_ratios=[5, 1], sharey="row"
    )
    columns = _gather(np.arange(len(classes)), MAX_COLUMNS)
    shares = {}
    for title, rows in panels.items():
        held = _means(table, rows)
        held = np.stack([held[:, group].sum(axis=1) for group in columns], axis=1)
        shares[title] = held, held / np.maximum(held.sum(axis=1), 1e-9)[:, None]
    widest = max((held.sum(axis=1).max() for held, _ in shares.values()), default=1)
    full = max((share.max() for _, share in shares.values()), default=1)
    for (cells, bars), (title, rows) in zip(grid, panels.items(), strict=True):
        held, share = shares[title]
        total = held.sum(axis=1)
        shown = np.where(held > 0, held, np.nan)
        last = cells is grid[-1, 0]
        labels = _row_names(classes, columns) if last else []
        row_names = _row_names(names, rows)
        mesh = _heatmap(cells, share, COUNT, row_names, labels, shown, full)
        cells.set_title(title, color=INK)
        _say_rows(cells, rows)
        if last and len(columns) < len(classes):
            cells.set_xlabel(f"{len(classes)} classes, neighbours added up")
        if last and len(columns) > MAX_VALUES:
            _scale(figure, mesh, list(grid[:, 0]), "share of the client's samples")
        bars.barh(np.arange(len(rows)) + 0.5, total, height=0.6, color=MUTED, alpha=0.7)
        bars.set_xlim(0, 1.6 * max(widest, 1))  # one scale for both panels, and room for numbers
        bars.set_axis_off()
        for row, value in enumerate(total):
            _note(bars, f"{value:.0f}", (value, row + 0.5), color=MUTED, fontsize=7)
    sizes = table.sum(axis=1)
    return _settled(
        figure,
        f"Partition: {', '.join(panels).lower()}, {len(classes)} classes"
        + (f", {sizes.min():.0f} to {sizes.max():.0f} samples a client." if len(sizes) else "."),
    )


@style.context(_STYLE, after_reset=True)
def comparison_curves(
    curves: Mapping[tuple[str, str], pd.DataFrame],
    reference: tuple[str, str],
    *,
    axis: Literal["rounds", "bytes"] = "rounds",
) -> Figure:
    """Global and personalized accuracy of many methods, one panel a measure and row of switches.

    The reference is drawn in every panel, thick and in its own colour; the others share colours
    and line styles with their legend entry.

    Args:
        curves: (method, row) to columns round, bytes, global_accuracy, personalized_accuracy.
        reference: the (method, row) to stand out.
        axis: what accuracies are drawn over; bytes are those of all clients so far, up and down.
    """
    rows = list(dict.fromkeys(row for _, row in curves))
    # Rows of one method (an ablation) are its variants and share a panel.
    variants = len({method for method, _ in curves}) == 1 and len(rows) > 2
    panels = [rows] if variants else [[row] for row in rows]
    names = list(dict.fromkeys(_curve_name(key, variants) for key in curves if key != reference))
    looks = {name: _LOOKS[i % len(_LOOKS)] for i, name in enumerate(names)}
    measures = {"Global": "global_accuracy", "Personalized": "personalized_accuracy"}
    entries = len(names) + 1
    legend = 0.16 * -(-entries // 5) + 0.1
    figure = Figure(figsize=(9.3, 2.7 * len(panels) + legend), layout="constrained")
    grid = figure.subplots(len(panels), 2, squeeze=False, sharey="col", sharex=True)
    handles: dict[str, Any] = {}
    for cells, shown in zip(grid, panels, strict=True):
        for axes, (title, column) in zip(cells, measures.items(), strict=True):
            for key, table in curves.items():
                if key != reference and key[1] not in shown:
                    continue
                moved = table.assign(round=table["bytes"] / 1e6) if axis == "bytes" else table
                if axis == "bytes":  # what sends nothing has no place on a logarithm
                    moved = moved[moved["round"] > 0]
                name = " · ".join(key) if key == reference else _curve_name(key, variants)
                look: dict[str, Any] = {"color": METHOD, "lw": 2.4, "zorder": 3}
                if key != reference:
                    color, dashes = looks[name]
                    look = {"color": color, "ls": dashes, "lw": 1.1}
                points = moved[["round", column]].dropna().to_numpy(dtype=np.float64)
                [line] = axes.plot(*points.T, marker="o", markersize=2, label=name, **look)
                handles.setdefault(name, line)
            axes.set_title(title if variants else f"{title}, {shown[0]}", color=INK)
            if shown is panels[-1]:
                axes.set_xlabel("round" if axis == "rounds" else "MB up and down, all clients")
            axes.grid(True, color=GRID, linewidth=0.7)
            axes.set_axisbelow(True)
            if axis == "bytes":
                axes.set_xscale("log")
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.xaxis.set_major_formatter("{x:,g}")
                axes.xaxis.set_minor_locator(NullLocator())
            else:
                axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.tick_params(colors=MUTED, labelsize=8, length=0, labelleft=True)
    first = " · ".join(reference)
    order = sorted(handles, key=lambda name: name != first)
    figure.legend(
        [handles[name] for name in order],
        order,
        loc="outside lower center",
        ncols=5,
        labelcolor=INK,
    )
    over = {"rounds": "rounds", "bytes": "bytes moved"}[axis]
    return _settled(
        figure, f"Accuracy of {len(curves)} rows over {over}, means over seeds: {', '.join(order)}."
    )


def _curve_name(key: tuple[str, str], variants: bool) -> str:
    return key[1] if variants else key[0]


@style.context(_STYLE, after_reset=True)
def comparison_differences(
    table: pd.DataFrame, measures: Sequence[str], reference: tuple[str, str]
) -> Figure:
    """Paired differences to the reference with their 95 % intervals, one panel a measure.

    Args:
        table: columns method, row, measure, difference, low, high, in points.
        measures: those to draw.
        reference: what was subtracted.
    """
    keys = list(dict.fromkeys(zip(table["method"], table["row"], strict=True)))
    figure = Figure(figsize=(9.3, 0.8 + 0.17 * len(keys)), layout="constrained")
    for axes, measure in zip(
        figure.subplots(1, len(measures), sharey=True, squeeze=False)[0], measures, strict=True
    ):
        own = table[table["measure"] == measure].set_index(["method", "row"]).reindex(keys)
        middle, low, high = (
            own[c].to_numpy(dtype=np.float64) for c in ("difference", "low", "high")
        )
        places = np.arange(len(keys))
        worse = np.nan_to_num(middle) < 0
        for chosen, color in ((worse, METHOD), (~worse, BASELINE)):
            spread = np.stack([middle - low, high - middle])[:, chosen]
            known = np.isfinite(spread).all(axis=0)
            axes.plot(middle[chosen], places[chosen], "o", ms=3, color=color)
            axes.hlines(
                places[chosen][known], low[chosen][known], high[chosen][known], color=color, lw=1.1
            )
        axes.axvline(0, color=MUTED, lw=0.8)
        # Wide intervals of two seeds must not squeeze everything else to a dot.
        reach = 1.6 * float(np.nanmax(np.abs(middle), initial=1.0))
        axes.set_xlim(-reach, reach)
        axes.set_ylim(len(keys) - 0.5, -0.5)
        axes.set_yticks(places, [" · ".join(key) for key in keys])
        axes.tick_params(colors=INK, labelsize=7, length=0)
        axes.grid(True, axis="x", color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.set_title(measure[:1].upper() + measure[1:], color=INK)
        axes.set_xlabel("points")
    return _settled(
        figure,
        f"Differences to {' · '.join(reference)} with 95 % intervals, paired by seed, of "
        f"{len(keys)} rows in {', '.join(measures)}.",
    )


def to_png(figure: Figure) -> bytes:
    """Draw a figure as a PNG image; the same figure gives the same bytes."""
    drawn = BytesIO()
    with style.context(_STYLE, after_reset=True):
        figure.savefig(drawn, format="png", dpi=150, metadata={"Software": None})
    return drawn.getvalue()


def to_svg(figure: Figure) -> str:
    """Draw a figure as an inline `<svg>` for an HTML page.

    The same figure gives the same bytes: no date, no version, fixed ids. Text stays text, the
    width follows the page, and colours are CSS variables (`--figure-ink`, `-muted`, `-grid`,
    `-paper`, `-method`, `-baseline`) that fall back to the light theme.
    """
    label = str(figure.get_label())
    drawn = StringIO()
    # Ids are hashes of what they name; salting with the label keeps them apart on one page.
    with style.context(_STYLE | {"svg.hashsalt": f"fedcoe {label}"}, after_reset=True):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(drawn, format="svg", transparent=True, metadata=nothing)
    text = drawn.getvalue()
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box is not None
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<[^>]+>", lambda tag: _tidy(tag[0]), body)  # tags only: names stay as they are
    return (
        f'<svg viewBox="{box[1]}" width="100%" role="img" aria-label="{html.escape(label)}" '
        f'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
        f"{body.strip()}\n"
    )


def _tidy(tag: str) -> str:
    tag = re.sub(r"\s+", " ", tag)
    tag = re.sub(r"(\.\d\d)\d+", r"\1", tag)  # a hundredth of a point is enough
    tag = re.sub(r'^<g id="[^"]*"', "<g", tag)  # nothing refers to groups, and ids would repeat
    tag = tag.replace("'DejaVu Sans'", "system-ui, sans-serif")
    return re.sub(
        "(?<=: )(" + "|".join(_THEME) + r')(?=[;"])',
        lambda colour: f"var(--figure-{_THEME[colour[0]]}, {colour[0]})",
        tag,
    )


def _settled(figure: Figure, label: str) -> Figure:
    """Name the figure and lay it out once: constrained layout shifts a little at every drawing."""
    figure.set_label(label)
    if engine := figure.get_layout_engine():
        engine.execute(figure)
    figure.set_layout_engine("none")
    return figure


def _line(
    axes: Axes, curves: pd.DataFrame, column: str, label: str, color: str, **line: Any
) -> tuple[float, float] | None:
    """Draw the rounds in which `column` was evaluated; its last point, if there is any."""
    if column not in curves:
        return None
    points = curves[["round", column]].dropna().to_numpy(dtype=np.float64)
    if not len(points):
        return None
    # A point without a neighbour draws no line: show few points as points.
    dots: dict[str, Any] = {"marker": "o", "markersize": 3} if len(points) < 15 else {}
    axes.plot(*points.T, label=label, color=color, **dots, **line)
    return float(points[-1, 0]), float(points[-1, 1])


def _note(axes: Axes, text: str, at: tuple[float, float], **font: Any) -> None:
    axes.annotate(text, at, (3, 0), textcoords="offset points", va="center", **font)


def _matrix(table: pd.DataFrame, prefix: str) -> Floats:
    """Columns prefix0, prefix1, ... as [rows, M]."""
    columns = [f"{prefix}{m}" for m in range(sum(str(c).startswith(prefix) for c in table))]
    return np.asarray(table[columns], dtype=np.float64)


def _by_largest(values: Floats) -> npt.NDArray[np.intp]:
    """Row order that puts rows with the same largest column together, most decided first."""
    known = np.nan_to_num(values, nan=-1.0)
    if not known.size:
        return np.arange(len(known))
    share = known.max(axis=1) / np.maximum(known.sum(axis=1), 1e-9)
    return np.lexsort((-share, known.argmax(axis=1)))


def _gather(order: npt.NDArray[np.intp], limit: int = MAX_ROWS) -> list[npt.NDArray[np.intp]]:
    """Groups of neighbours, at most `limit`; one each where they fit."""
    return np.array_split(order, max(1, min(len(order), limit)))


def _means(values: Floats, groups: Sequence[npt.NDArray[np.intp]]) -> Floats:
    """[groups, columns] mean over each group's rows, NaN left out (NaN where all are)."""
    known = np.isfinite(values)
    kept = np.where(known, values, 0.0)
    sums = np.stack([kept[group].sum(axis=0) for group in groups])
    numbers = np.stack([known[group].sum(axis=0) for group in groups])
    return np.where(numbers > 0, sums / np.maximum(numbers, 1), np.nan)


def _row_names(names: Sequence[str], groups: Sequence[npt.NDArray[np.intp]]) -> list[str]:
    """Short labels; none where a row stands for several."""
    if any(len(group) > 1 for group in groups):
        return []
    texts = [
        "".join(c for c in str(list(names)[g[0]]) if c.isprintable()) for g in groups if len(g)
    ]
    return [text if len(text) <= 14 else f"{text[:13]}…" for text in texts]


def _say_rows(axes: Axes, groups: Sequence[npt.NDArray[np.intp]]) -> None:
    clients = sum(map(len, groups))
    if clients > len(groups):
        axes.set_ylabel(f"{clients} clients, {clients / len(groups):.1f} to a row (means)")


def _height(rows: int) -> float:
    return 0.75 + 0.19 * max(rows, 2)


def _heatmap(
    axes: Axes,
    values: Floats,
    colours: Colormap,
    rows: Sequence[str],
    columns: Sequence[str],
    shown: Floats | None = None,
    full: float = 1.0,
) -> QuadMesh:
    """Cells of `values` in [0, full], with the numbers `shown` in them (default: values in %)."""
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(values),
        cmap=colours,
        vmin=0,
        vmax=full,
        edgecolors=PAPER,
        linewidth=0.8,
        clip_on=False,
    )
    axes.set_ylim(len(values), 0)
    axes.spines[:].set_visible(False)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    tilt: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    tilted = max(map(len, columns), default=0) * len(columns) > 45
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns, **(tilt if tilted else {}))
    axes.tick_params(colors=INK, labelsize=7.5, length=0)
    if values.shape[1] <= MAX_VALUES:
        shown = 100 * values if shown is None else shown
        for (row, column), number in np.ndenumerate(shown):
            if np.isfinite(number):
                # Cells keep their colours in a dark theme, so their text must not follow it.
                ink = "#ffffff" if values[row, column] > 0.55 * full else "#101820"
                where = (column + 0.5, row + 0.5)
                axes.text(*where, f"{number:.0f}", ha="center", va="center", size=7, color=ink)
    return mesh


def _scale(figure: Figure, mesh: QuadMesh, axes: list[Axes], label: str) -> None:
    """The colour scale, for heatmaps whose cells are too many to hold numbers."""
    bar = figure.colorbar(mesh, ax=axes, location="bottom", aspect=40, pad=0.02, format="{x:.0%}")
    bar.outline.set_visible(False)
    bar.set_label(label, color=MUTED)
    bar.ax.tick_params(colors=MUTED, labelsize=7.5, length=0)
