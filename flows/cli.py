"""The `fedcoe` command. Heavy packages are imported inside the commands that need them, so that
`fedcoe --help` answers at once."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from fedcoe import __version__
from fedcoe.errors import FedCoEError, said_of_disks

if TYPE_CHECKING:
    from fedcoe.bundle import Bundle

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Federated mixtures of experts: train, evaluate, track and serve.",
)
stage = typer.Typer(no_args_is_help=True, help="The stages of dvc.yaml; `dvc repro` calls them.")
app.add_typer(stage, name="stage")

out = Console()
err = Console(stderr=True)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedcoe {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which this is.")
    ] = False,
) -> None:
    pass


Root = Annotated[
    Path, typer.Option("--root", help="Folder of params.yaml.", file_okay=False, exists=True)
]
Overrides = Annotated[
    list[str],
    typer.Option("--set", "-S", help="A setting that wins over params.yaml, as section.key=value."),
]
NO_OVERRIDES: list[str] = []
Profile = Annotated[
    str | None,
    typer.Option(
        "--profile", "-P", help="Settings of profiles.yaml that win over params.yaml; -S wins."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2, never a traceback."""
    _quiet()
    code: Any = 0
    try:
        with said_of_disks():
            app()
    except FedCoEError as error:
        code = _say(str(error))
    except SystemExit as exit_:
        code = exit_.code
    except Exception as error:
        if "ephemeral Prefect API server" in str(error):
            code = _say(
                "Prefect's embedded server did not start in time: run the same command again when "
                "the machine is less busy, or set PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"
            )
        elif _of_prefect(error):
            PREFECT_GONE.set()
            url = os.environ.get("PREFECT_API_URL", "the address in Prefect's settings")
            code = _say(
                f"Prefect's server does not answer at {url}: finished rounds are kept; start it, "
                "or unset PREFECT_API_URL, and run the same command again"
            )
        elif type(error.__cause__).__name__ == "_RemoteTraceback":
            # A bug, in a worker process: of the way there nothing is of interest.
            typer.echo(str(error.__cause__).strip('"\n'), err=True)
            code = 1
        else:
            raise
    if PREFECT_GONE.is_set():
        # A normal exit would try for 7 s an event to tell it what happened.
        sys.stdout.flush()
        _leave(code or 0)
    sys.exit(code)


PREFECT_GONE = threading.Event()


def _say(error: str) -> int:
    # Escaped: shapes and paths in brackets are no markup.
    err.print(f"[red]error:[/red] {escape(error)}", highlight=False, soft_wrap=True)
    return 2


def _of_prefect(error: object) -> bool:
    """Whether it says that Prefect's server cannot be reached."""
    from httpx import TransportError

    return isinstance(error, TransportError) or str(error).startswith("Failed to reach API at")


@app.command(
    epilog="Examples:  fedcoe fetch   |   fedcoe fetch fashion-mnist   |   "
    "fedcoe fetch --from photos/"
)
def fetch(
    name: Annotated[
        str | None, typer.Argument(help="Dataset to build; default: data.name of params.yaml.")
    ] = None,
    from_path: Annotated[
        Path | None,
        typer.Option("--from", help="Own data: a folder (class/ or client/class/) or an .npz."),
    ] = None,
    root: Root = Path("."),
) -> None:
    """Build a dataset into data/ and hand it to DVC."""
    from fedcoe.config import load_settings
    from fedcoe.data.fetch import fetch as build
    from tasks.locks import replacing_data

    if name is None and from_path is None:
        name = load_settings(root / "params.yaml").data.name
    with err.status(f"building {name or from_path}"), replacing_data(root):
        result = build(name, from_path, root / "data", root / ".fedcoe" / "downloads")
    for note in result.notes:
        err.print(f"note: {escape(note)}", highlight=False)
    height, width, channels = result.info.shape
    if clients := result.info.clients:
        err.print("note: partition.scheme: natural deals by its own clients", highlight=False)
    out.print(
        f"{escape(result.info.name)}: {result.info.train:,} training and {result.info.test:,} test "
        f"images of {height}x{width}x{channels}, {len(result.info.classes)} classes"
        + (f", {len(clients)} clients of its own" if clients else "")
        + ("" if result.changed else " (already there)"),
        highlight=False,
    )
    _dvc_add(root)


def _dvc_add(root: Path) -> None:
    """Let DVC record which data is there; without a DVC project there is nothing to record."""
    if not (root / ".dvc").is_dir():
        err.print("note: no DVC project here, so the data is not versioned (`dvc init`)")
        return
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "add", "--quiet", "data"],
        cwd=root,
        env=os.environ | {"DVC_NO_ANALYTICS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise FedCoEError(f"`dvc add data` failed: {' '.join(done.stderr.split())}")


@app.command(
    epilog="Examples:  fedcoe train   |   fedcoe train -S method.experts=2 -S train.rounds=50   "
    "|   fedcoe train --profile fashion-dir01"
)
def train(
    root: Root = Path("."),
    profile: Profile = None,
    overrides: Overrides = NO_OVERRIDES,
    resume: Annotated[
        bool, typer.Option("--resume", help="Refuse to start anew; say what differs.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train once, without DVC: partition, rounds, models, figures. Goes on where it was stopped."""
    overrides = _settings(root, profile, overrides)
    with _training(root):
        from flows.pipeline import partition_data

        _warn(partition_data(root, overrides))
        figures = _train(root=str(root), overrides=overrides, resume=resume)
    _show(figures, as_json)


def _settings(
    root: Path, profile: str | None, overrides: list[str], method: str | None = None
) -> list[str]:
    """The overrides of a profile, if there is one, and after them those of the command.

    Raises:
        FedCoEError: they name another dataset than data/ holds, or settings of another method;
            said here, before Prefect starts.
    """
    from fedcoe.config import load_profile
    from flows.pipeline import check_dataset, check_method

    before = [] if profile is None else load_profile(root / "profiles.yaml", profile)
    own = [f"method.name={method}"] if method else []
    _warn(check_method(root, [*own, *overrides], before))
    _warn(check_dataset(root, [*before, *overrides]))
    return [*before, *overrides]


def _train(**parameters: Any) -> dict[str, float]:
    from flows.federated_training import federated_training

    with _progress(nullcontext()) as ended:
        try:
            return dict(federated_training(**parameters))
        except Exception as error:
            if not (ended and _of_prefect(error)):
                raise
        PREFECT_GONE.set()
        _warn(["Prefect's server does not answer; all results are written, it will not show them"])
        return ended


@contextmanager
def _training(root: Path, name: str = "training") -> Iterator[None]:
    """One process at a time; a first Ctrl-C or SIGTERM ends it after its round, a second at once.

    Args:
        name: of what is written: trainings that write other files may run beside it.
    """
    from tasks.stop import SIGNALS, Stopped, exit_code, stoppable

    def first(number: int) -> None:
        err.print("stopping after this round; a second Ctrl-C ends at once")

    def leave(number: int, *_: object) -> None:
        _leave(128 + number)

    try:
        with stoppable(first, leave):
            from tasks.locks import sole

            with sole(root, name, f"another {name}"):
                yield
    except Stopped as stopped:
        err.print(str(stopped), highlight=False)
        for number in SIGNALS:  # to the end: Prefect takes a second to leave
            signal.signal(number, leave)
        raise typer.Exit(exit_code()) from None
    except BaseException as error:
        from prefect.exceptions import TerminationSignal

        # SIGTERM while Prefect begins or ends a flow run is Prefect's.
        if not isinstance(error, TerminationSignal):
            raise
        err.print("stopped; run the same command to go on")
        raise typer.Exit(128 + signal.SIGTERM) from None


def _start_prefect() -> None:
    """Start Prefect's embedded server, where there is none to use, as a dependent of ours."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    if PREFECT_API_URL.value():
        return
    from prefect.server.api import server

    from tasks.processes import Dependent

    # Prefect offers no say in how it starts it.
    own: Any = vars(server)
    own["subprocess"] = SimpleNamespace(**vars(subprocess) | {"Popen": Dependent})
    try:
        get_client(sync_client=True)
    finally:
        own["subprocess"] = subprocess


Seeds = Annotated[str, typer.Option(help="Seeds of partition and training, by comma.")]


@app.command(
    epilog="Examples:  fedcoe compare   |   fedcoe compare --methods fedcoe,fedavg --seeds 0,1,2   "
    "|   fedcoe compare --profile cifar10-dir01   |   fedcoe compare --render mnist5k"
)
def compare(
    root: Root = Path("."),
    profile: Profile = None,
    overrides: Overrides = NO_OVERRIDES,
    methods: Annotated[str | None, typer.Option(help="Methods, by comma; default: all.")] = None,
    seeds: Seeds = "0,1,2",
    rows: Annotated[
        str, typer.Option(help="plain (with it: reweighting) and all switches on, by comma.")
    ] = "plain,all",
    name: Annotated[
        str | None,
        typer.Option(help="Folder under results/; default: the profile's or dataset's name."),
    ] = None,
    cell_only: Annotated[
        bool, typer.Option("--cell-only", help="Train, and leave tables to --render.")
    ] = False,
    render: Annotated[
        str | None, typer.Option(help="Train nothing: draw results/NAME again from its cells.")
    ] = None,
) -> None:
    """Train methods x rows x seeds on the same footing; finished cells are not trained again."""
    from flows.compare import compare_methods
    from flows.compare import render as draw

    if render:
        table = draw(root, render)
    else:
        chosen = _listed(methods) if methods else None
        overrides = _settings(root, profile, overrides)
        with _progress():
            table = compare_methods(
                str(root),
                overrides,
                chosen,
                _numbers(seeds),
                name or profile,
                _listed(rows),
                cell_only,
            )
    if table:
        out.print(table, markup=False, highlight=False, soft_wrap=True)


@app.command(
    epilog="Examples:  fedcoe ablate --list   |   fedcoe ablate experts --seeds 0,1   |   "
    "fedcoe ablate all"
)
def ablate(
    ablation: Annotated[
        str | None, typer.Argument(metavar="SET", help="A set of ablations.yaml, or `all`.")
    ] = None,
    root: Root = Path("."),
    profile: Profile = None,
    overrides: Overrides = NO_OVERRIDES,
    seeds: Seeds = "0,1,2",
    show: Annotated[bool, typer.Option("--list", help="Show the sets and train nothing.")] = False,
) -> None:
    """Train FedCoE and changes of it; differences go to results/ablation-SET/."""
    from flows.compare import ablate as run
    from flows.compare import ablation_sets

    sets = ablation_sets(root)
    if show or ablation is None:
        table = Table("set", "label", "changes", box=None)
        for name, items in sets.items():
            if name != "all":
                for label, changes in items:
                    said = ", ".join(f"{key}={json.dumps(v)}" for key, v in changes.items())
                    table.add_row(name, label, said)
        out.print(table)
        return
    overrides = _settings(root, profile, overrides)
    with _progress():
        text = run(ablation, str(root), overrides, _numbers(seeds))
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def _listed(text: str) -> list[str]:
    return [item.strip() for item in text.split(",")]


def _numbers(text: str) -> list[int]:
    if not all(item.isdigit() for item in _listed(text)):
        raise FedCoEError(f"--seeds {text}: whole numbers by comma, e.g. 0,1,2")
    return [int(item) for item in _listed(text)]


@app.command(
    epilog="Examples:  fedcoe tune   |   fedcoe tune --method fedavg --workers 2   |   "
    "fedcoe tune -S tune.trials=50 -S tune.objective=personalized_nll"
)
def tune(
    root: Root = Path("."),
    profile: Profile = None,
    overrides: Overrides = NO_OVERRIDES,
    method: Annotated[
        str | None, typer.Option(help="Search for this method; default: that of params.yaml.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Trials at once; they share the cores.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Search tune.space for good settings by validation figures. Resumes if interrupted."""
    from flows.tune import plan_search
    from flows.tune import tune as search

    overrides = _settings(root, profile, overrides, method)
    _, notes = plan_search(root, overrides, method)
    _warn(notes)
    with _progress():
        best = search(str(root), overrides, method, workers)
    if as_json:
        typer.echo(json.dumps(best))
        return
    lines = [
        f"{best['study']}: {best['finished']} trials finished, {best['pruned']} of them pruned; "
        f"{best['failed']} failed",
        f"best: trial {best['trial']}, validation {best['objective']} {best['value']:.4f}",
        *(f"  {key} = {value}" for key, value in best["params"].items()),
        f"written: {best['folder']}",
        best["dvc"],
    ]
    out.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _quiet() -> None:
    """Progress is shown by rich; Prefect speaks up from warnings on. All can be overridden.

    Read when Prefect is imported, so this comes first.
    """
    for name, value in {
        "DO_NOT_TRACK": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_LEVEL": "WARNING",
        # Its own 20 s are too few where other jobs are at work.
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
        "MPLBACKEND": "Agg",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
    }.items():
        os.environ.setdefault(name, value)


@contextmanager
def _progress(
    answer: AbstractContextManager[None] | None = None,
) -> Iterator[dict[str, float]]:
    """Rounds, accuracies, speed and time left, on a terminal; nothing elsewhere.

    Args:
        answer: to signals; default: Ctrl-C ends at once.

    Yields:
        The headline of a training, once all it writes is written.
    """
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    from tasks.progress import LISTENER

    _start_prefect()
    figures: dict[str, str] = {}
    ended: dict[str, float] = {}
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeLeft(compact=True),
        console=err,
        disable=not err.is_terminal,
    ) as bar:
        line = bar.add_task("starting", total=None, figures="")

        def listen(event: str, values: Mapping[str, Any]) -> None:
            if event == "study":
                best = "" if values["best"] is None else f"best {values['best']:.4g}"
                figures["study"] = f"{best}  {values['pruned']} pruned, {values['failed']} failed"
                bar.update(
                    line,
                    description=values["name"],
                    total=values["trials"],
                    completed=values["finished"],
                    figures=figures["study"],
                )
                return
            if event == "end":
                ended.update(values["headline"])
                return
            if event == "start":
                run = values["run"]
                data = escape(run.data.dataset.info.name)
                bar.update(
                    line,
                    description=f"{run.settings.method.name} · {data}",
                    total=values["rounds"],
                    completed=values["round"],
                )
                return
            if "global_accuracy" in values:
                figures["global"] = f"global {values['global_accuracy']:.1%}"
                figures["own"] = f"personalized {values['personalized_accuracy']:.1%}"
            if "images_per_second" in values:  # not for rounds that another cell has trained
                figures["speed"] = f"{values['images_per_second']:,.0f} images/s"
            bar.update(line, completed=values["round"], figures="  ".join(figures.values()))

        token = LISTENER.set(listen)
        try:
            # Joining the heartbeat thread costs a second at the end of every flow.
            quiet = temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None})
            with quiet, _short_errors(), answer or _interruptible():
                yield ended
        except KeyboardInterrupt:
            _leave()
        finally:
            LISTENER.reset(token)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Answer Ctrl-C at once and leave within seconds.

    Ctrl-C reaches Prefect's embedded server too, and a normal exit would then try for 7 s an
    event to tell it what happened. All that matters is on disk after every round.
    """

    def interrupted(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        err.print("interrupted; run the same command again: it goes on from the last round")
        patience = threading.Timer(3, _leave)
        patience.daemon = True
        patience.start()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(code: int = 130) -> None:
    """End now, and with it all that this process started, Prefect's embedded server too."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(code)


ENGINES = ("prefect.flow_runs", "prefect.task_runs")


@contextmanager
def _short_errors() -> Iterator[None]:
    """Keep Prefect from printing tracebacks of what `main` says, in one line or, a bug, in full.

    And from saying for each event, for minutes, that its server is gone.
    """

    def keep(record: logging.LogRecord) -> bool:
        error = record.exc_info and record.exc_info[1]
        said = record.getMessage()
        return not (
            isinstance(error, FedCoEError)
            or (
                isinstance(error, Exception)
                and record.name in ENGINES
                and record.levelno >= logging.ERROR
            )
            or _of_prefect(error)
            or any(word in said for word in ("FedCoEError", "exception: Stopped:", "EventsWorker"))
            or (record.name == "prefect.events.clients" and "Unable to connect" in said)
        )

    loggers = [logging.getLogger(name) for name in (None, "prefect", "prefect._internal")]
    handlers = [handler for logger in loggers for handler in logger.handlers]
    for handler in handlers:
        handler.addFilter(keep)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(keep)


def _warn(warnings: list[str]) -> None:
    for warning in warnings:
        err.print(f"[yellow]warning:[/yellow] {escape(warning)}", highlight=False)


def _show(figures: Mapping[str, float], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(figures))
        return
    table = Table("accuracy", "%", box=None)
    for name, value in figures.items():
        name = name.replace("few_shot", "few-shot (fine-tunes; a reference)")
        table.add_row(name, f"{100 * value:.2f}")
    out.print(table)


@stage.command("partition")
def stage_partition() -> None:
    """Deal data/ to clients: partitions/."""
    from flows.pipeline import partition_data

    _warn(partition_data(Path(".")))


@stage.command("train")
def stage_train() -> None:
    """Train: models/, metrics/train.json, plots/curves.csv."""
    from flows.pipeline import check_dataset

    _warn(check_dataset(Path("."), ()))
    with _training(Path(".")):
        figures = _train()
    _show(figures, False)


@stage.command("baseline")
def stage_baseline() -> None:
    """Train FedAvg with the same switches: metrics/baseline.json, plots/baseline_curves.csv."""
    from flows.pipeline import BASELINE, baseline_method, write_baseline

    with _training(Path("."), "baseline"):
        figures = _train(method=baseline_method(Path(".")), figures=BASELINE)
        write_baseline(Path("."))
    _show(figures, False)


@stage.command("evaluate")
def stage_evaluate() -> None:
    """Score models/: metrics/evaluate.json, plots/clients.csv, plots/experts.csv."""
    from flows.pipeline import evaluate_models

    evaluate_models(Path("."))


@stage.command("cold-start")
def stage_cold_start() -> None:
    """Serve the new clients: metrics/cold_start.json, plots/new_clients.csv."""
    from flows.pipeline import evaluate_cold_start

    evaluate_cold_start(Path("."))


@app.command(
    epilog="Examples:  fedcoe sync   |   fedcoe sync --to http://127.0.0.1:5000   |   "
    "fedcoe sync --json"
)
def sync(
    root: Root = Path("."),
    to: Annotated[
        str | None, typer.Option(help="Send to this store; default: where each run belongs.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Send MLflow what it missed while it was out of reach. Exit code 1: something is left."""
    from tasks.delivery import masked
    from tasks.registry import use_default_stores
    from tasks.tracking import sync as send

    use_default_stores(root)
    rows = send(root, to)
    if as_json:
        typer.echo(json.dumps(rows))
    else:
        for row in rows:
            sent = ", ".join(f"{count} {kind}" for kind, count in row["sent"].items()) or "nothing"
            left = f"; {row['waiting']} records wait" * (row["waiting"] > 0)
            why = f" ({row['why']})" * bool(row["why"])
            said = f"{row['run']} -> {masked(row['store'])}: {sent} sent{left}{why}"
            out.print(said, markup=False, highlight=False, soft_wrap=True)
        if not rows:
            out.print("nothing waits to be sent")
    if any(row["waiting"] for row in rows):
        raise typer.Exit(1)


@app.command(epilog="Example:  fedcoe report && xdg-open reports/index.html")
def report(root: Root = Path(".")) -> None:
    """Write reports/index.html from the figures on disk."""
    from tasks.report import build_report

    out.print(str(build_report(root)), highlight=False)


@app.command(
    epilog="Examples:  fedcoe experts   |   fedcoe experts fedcoe-expert-1   |   "
    "fedcoe experts --json"
)
def experts(
    name: Annotated[
        str | None, typer.Argument(help="Show this model's card; default: list all models.")
    ] = None,
    version: Annotated[int | None, typer.Option(help="Of the card; default: the newest.")] = None,
    root: Root = Path("."),
    as_json: AsJson = False,
) -> None:
    """List registered models and experts with the figures to pick by, or show one's card."""
    from tasks.registry import registered_card, registered_experts, use_default_stores

    use_default_stores(root)
    if name is not None:
        from rich.markdown import Markdown

        text = registered_card(name, None if version is None else str(version))
        # As a file where it is piped into one.
        out.print(Markdown(text) if out.is_terminal else text, markup=False, soft_wrap=True)
        return
    rows = registered_experts()
    if as_json:
        typer.echo(json.dumps(rows))
        return
    if not rows:
        raise FedCoEError("no model is registered yet; train one: `dvc repro` or `fedcoe train`")
    mixtures = {
        "accuracy_global": "global",
        "accuracy_personalized": "personalized",
        "accuracy_cold_none": "none",
        "accuracy_cold_unlabelled": "unlabelled",
        "dataset": "data",
    }
    alone = {
        "accuracy": "alone",
        "load": "load",
        "clients": "clients",
        "drift": "drift",
        "serves_best": "serves best",
    }
    _print_registered([row for row in rows if "load" not in row], mixtures)
    _print_registered([row for row in rows if "load" in row], alone)
    err.print("accuracy and load in %; none, unlabelled: clients that never took part")
    err.print("`fedcoe experts NAME` shows a card: classes, clients, data, limits, lineage")


def _print_registered(rows: list[dict[str, str]], figures: Mapping[str, str]) -> None:
    """Registered versions with these figures, one a line; shares in %."""
    table = Table("name", "version", "alias", *figures.values(), box=None, pad_edge=False)
    for column in table.columns[:-1]:
        column.no_wrap = True
    for row in rows:
        # What `export --version` and `join --version` mean is the mixture's.
        of = "" if row["mixture"] in ("", row["version"]) else f" of {row['mixture']}"
        shown = [row["name"], row["version"] + of, row["aliases"].replace(", ", "\n")]
        for key in figures:
            value = row.get(key, "")
            if value and (key == "load" or key.startswith("accuracy")):
                value = f"{100 * float(value):.1f}"
            # All clients stand on the card, with their accuracies.
            shown.append(value.split(" (")[0] if key == "serves_best" else value)
        table.add_row(*map(escape, shown))
    if rows:  # narrower than 80, columns would be cut off
        Console(width=max(80, out.width)).print(table)


@app.command(epilog="Examples:  fedcoe release   |   fedcoe release 7 --json")
def release(
    version: Annotated[
        int | None, typer.Argument(help="Version of `fedcoe`; default: the candidate.")
    ] = None,
    root: Root = Path("."),
    as_json: AsJson = False,
) -> None:
    """Compare the candidate with the champion; promote it if measurably better, nowhere worse."""
    from flows.release import release as judge

    with _short_errors():
        found = judge(str(root), None if version is None else str(version))
    if as_json:
        typer.echo(json.dumps(found))
        return
    if found["table"]:
        table = Table("accuracy %", "images", "champion", "candidate", "change", "", box=None)
        for row in found["table"]:
            champion, candidate, low, high = (
                100 * row[name] for name in ("champion", "candidate", "low", "high")
            )
            table.add_row(
                row["figure"],
                str(row["images"]),
                f"{champion:.2f}",
                f"{candidate:.2f}",
                f"{low:+.2f} to {high:+.2f}",
                row["verdict"],
            )
        out.print(table)
    against = f"against champion {found['champion']}" if found["champion"] else "no champion before"
    out.print(f"version {found['version']} {found['verdict']} ({against})", highlight=False)


@app.command(epilog="Example:  fedcoe promote --to champion 7")
def promote(
    version: Annotated[int, typer.Argument(help="Version of the registered model `fedcoe`.")],
    to: Annotated[str, typer.Option(help="champion or candidate.")] = "champion",
    root: Root = Path("."),
) -> None:
    """Let an alias name a version by hand, its gate and experts with it; compares nothing."""
    from tasks.registry import use_default_stores
    from tasks.release import ALIASES, aliased, move_alias

    if to not in ALIASES:
        raise FedCoEError(f"--to {to}: there are {', '.join(ALIASES)}")
    use_default_stores(root)
    before = aliased(to)
    move_alias(to, str(version), before)
    out.print(f"{to}: version {before or 'none'} -> {version}", highlight=False)


@app.command(epilog="Example:  fedcoe rollback")
def rollback(root: Root = Path(".")) -> None:
    """Let champion name the version it named before, its gate and experts with it."""
    from tasks.registry import use_default_stores
    from tasks.release import rollback_champion

    use_default_stores(root)
    before, after = rollback_champion()
    out.print(f"champion: version {before} -> {after}", highlight=False)


Models = Annotated[Path, typer.Option(help="Models folder.")]
Version = Annotated[
    str | None,
    typer.Option(
        help="Registered version of `fedcoe`, or champion or candidate, instead of --models."
    ),
]


@contextmanager
def _bundle(
    models: Path, version: str | None, root: Path, precision: Any = None
) -> Iterator["Bundle"]:
    """The mixture in a folder, or a registered one."""
    if version is None:
        from fedcoe.bundle import load_bundle

        yield load_bundle(models, precision)
        return
    from tasks.registry import use_default_stores
    from tasks.release import ALIASES, aliased, load_version

    use_default_stores(root)
    found = aliased(version) if version in ALIASES else version
    if found is None:
        raise FedCoEError(f"--version {version}: no version has that alias; see `fedcoe experts`")
    with load_version(found, precision) as bundle:
        yield bundle


Out = Annotated[Path | None, typer.Option("--out", help="Write predictions: .csv or .json.")]


def _check_out(path: Path | None) -> None:
    if path is not None and path.suffix not in (".csv", ".json"):
        raise FedCoEError(f"--out {path}: must end in .csv or .json")


def _write_out(path: Path | None, predictions: list[dict[str, Any]]) -> None:
    from tasks.files import write_csv, write_json

    if path is not None:
        (write_csv if path.suffix == ".csv" else write_json)(path, predictions)


@app.command(
    epilog="Examples:  fedcoe predict photos/   |   fedcoe predict images.npz --mode unlabelled"
)
def predict(
    images: Annotated[Path, typer.Argument(help="A folder of images, or an .npz with x.")],
    mode: Annotated[
        str, typer.Option(help="none, or unlabelled (estimates the class mix from the images)")
    ] = "none",
    models: Models = Path("models"),
    version: Version = None,
    root: Root = Path("."),
    out_path: Out = None,
    as_json: AsJson = False,
) -> None:
    """Predict classes of images of a client that never took part."""
    import numpy as np

    from fedcoe.data.sources.images import read_images

    if mode not in ("none", "unlabelled"):
        raise FedCoEError(f"--mode {mode}: there are none and unlabelled")
    _check_out(out_path)
    with _bundle(models, version, root) as bundle:
        federation = bundle.method.federation
        names, pixels = read_images(images, federation.shape)
        p = np.exp(bundle.predict(pixels, mode))  # type: ignore[arg-type]
    rows: list[dict[str, Any]] = [
        {"image": name, "class": federation.class_names[int(row.argmax())], "p": float(row.max())}
        for name, row in zip(names, p, strict=True)
    ]
    _write_out(out_path, rows)
    if as_json:
        typer.echo(json.dumps(rows))
        return
    table = Table(Column("image", overflow="fold"), "class", "probability", box=None)
    for row in rows:
        table.add_row(escape(row["image"]), escape(row["class"]), f"{row['p']:.3f}")
    out.print(table)


@app.command(
    epilog="Examples:  fedcoe join --data photos/   |   fedcoe join --data client.npz "
    "--mode unlabelled --out predictions.csv   |   fedcoe join --data photos/ --version champion"
)
def join(
    data: Annotated[
        Path,
        typer.Option(help="Images, flat or in a sub-folder a class; or an .npz: x [, y]."),
    ],
    mode: Annotated[
        str | None,
        typer.Option(help="none, unlabelled or labels; default: labels where there are any."),
    ] = None,
    models: Models = Path("models"),
    version: Version = None,
    root: Root = Path("."),
    out_path: Out = None,
    as_json: AsJson = False,
) -> None:
    """Take in a client never seen: experts that fit it, its class mix, predictions, accuracy."""
    from fedcoe.cold_start import MODES
    from fedcoe.data.sources.client import read_client
    from fedcoe.join import SPLIT
    from fedcoe.join import join as take_in

    if mode is not None and mode not in MODES:
        raise FedCoEError(f"--mode {mode}: there are {', '.join(MODES)}")
    _check_out(out_path)
    with _bundle(models, version, root) as bundle:
        federation = bundle.method.federation
        client = read_client(data, federation.shape, federation.class_names)
        joined = take_in(bundle, client.images, client.labels, mode)
    predictions = joined.rows(client.names, federation.class_names)
    _write_out(out_path, predictions)
    if as_json:
        found = joined.summary(federation.class_names) | {"predictions": predictions}
        typer.echo(json.dumps(found))
        return
    graded = "" if client.labels is None else ", labelled"
    out.print(f"{len(client.names):,} images{graded}; predicted in mode {joined.mode}")
    table = Table(*(name.replace("_", " ") for name in joined.experts[0]), box=None)
    for row in joined.experts:
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()))
    out.print(table)
    table = Table("class", "estimated share", "predicted", "counted", box=None)
    for row in joined.class_rows(federation.class_names):
        table.add_row(*("" if v is None else f"{v:.3f}" if isinstance(v, float) else escape(str(v))
                        for v in row.values()))  # fmt: skip
    out.print(table)
    if joined.modes:
        _show({f"accuracy, mode {name}": v["accuracy"] for name, v in joined.modes.items()}, False)
        err.print(f"mode labels: {SPLIT}", highlight=False)
    if out_path is None:
        err.print("--out FILE.csv (or .json) keeps the predictions", highlight=False)


@app.command(
    epilog="Examples:  fedcoe export --expert 1   |   fedcoe export --mixture --out device.pt2   "
    "|   fedcoe export --expert 0 --version 7"
)
def export(
    expert: Annotated[int | None, typer.Option(help="This expert alone.")] = None,
    mixture: Annotated[
        bool, typer.Option("--mixture", help="All experts, gate and head; mode none.")
    ] = False,
    out_path: Annotated[
        Path | None, typer.Option("--out", help="Default: expert-N.pt2 or mixture.pt2.")
    ] = None,
    models: Models = Path("models"),
    version: Version = None,
    root: Root = Path("."),
) -> None:
    """Write one expert or the mixture as one file for a device, and check what it computes."""
    if (expert is None) != mixture:
        raise FedCoEError("say which: --expert N or --mixture")
    path = out_path or Path("mixture.pt2" if expert is None else f"expert-{expert}.pt2")
    if path.suffix != ".pt2":
        raise FedCoEError(f"--out {path}: must end in .pt2")
    from fedcoe.export import export_pt2

    with _bundle(models, version, root, "fp32") as bundle:
        difference = export_pt2(bundle, path, expert)
    out.print(
        f"{path}: {path.stat().st_size / 1e6:.1f} MB; probabilities differ from the model's by "
        f"at most {difference:.1g}",
        highlight=False,
        soft_wrap=True,
    )


@app.command(epilog="Examples:  fedcoe up   |   fedcoe up --prefect-port 4300 --mlflow-port 5300")
def up(
    root: Root = Path("."),
    prefect_port: Annotated[
        int, typer.Option(envvar="PREFECT_SERVER_API_PORT", min=1, max=65535)
    ] = 4200,
    mlflow_port: Annotated[int, typer.Option(envvar="MLFLOW_PORT", min=1, max=65535)] = 5000,
    as_json: AsJson = False,
) -> None:
    """Start Prefect, MLflow, a worker a GPU and the deployments, on loopback; what runs stays."""
    from tasks.processes import Unready
    from tasks.services import up as start

    try:
        with err.status("starting; this takes about half a minute"):
            rows, environment = start(root, prefect_port, mlflow_port)
    except Unready as error:
        if error.tail:
            err.print(error.tail, markup=False, highlight=False, soft_wrap=True)
        raise
    if as_json:
        typer.echo(json.dumps({"services": rows, "environment": environment}))
        return
    table = Table(box=None, show_header=False)
    for row in rows:
        table.add_row(*row.values())
    out.print(table)
    out.print("in your shell: export " + " ".join(environment), highlight=False, soft_wrap=True)


@app.command(epilog="Example:  fedcoe down")
def down(root: Root = Path(".")) -> None:
    """Stop what `fedcoe up` started here, and the flow runs that are at work."""
    from tasks.services import down as stop

    with err.status("stopping"):
        count = stop(root)
    out.print(f"{count} processes stopped" if count else "nothing was running", highlight=False)


@app.command(epilog="Example:  fedcoe doctor")
def doctor(root: Root = Path("."), as_json: AsJson = False) -> None:
    """Say what is installed, reachable and missing, and what to do about it."""
    from tasks.doctor import examine

    findings = examine(root)
    if as_json:
        typer.echo(json.dumps(findings))
    else:
        marks = {
            "ok": "[green]ok[/green]",
            "note": "[yellow]note[/yellow]",
            "bad": "[red]bad[/red]",
        }
        table = Table(box=None, show_header=False)
        for finding in findings:
            table.add_row(marks[finding["status"]], finding["what"], escape(finding["found"]))
        out.print(table)
    if any(finding["status"] == "bad" for finding in findings):
        raise typer.Exit(1)
