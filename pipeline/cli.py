"""`gigasr`: parse, call, print, exit.

Results go to stdout; progress and errors to stderr. Everything heavy is imported by the command that needs it, so that
`gigasr --help` answers at once.
"""

import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal, NoReturn, TypeAlias

import typer

from pipeline.errors import GigasrError, Stopped
from pipeline.events import Listener, Notice
from pipeline.options import Given, takes_config
from pipeline.progress import Log, download_line, json_object, listening, showing
from pipeline.signals import Stopping, catching_signals

INTERRUPTED = 130
"""What shells give for a command that SIGINT ended."""

app = typer.Typer(
    name="gigasr",
    help="Super-resolution of rasters of any size with StableSR.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
models = typer.Typer(help="The networks' weights: what there is, and getting more.", no_args_is_help=True)
app.add_typer(models, name="models")

TALK = "Messages"
LogOption: TypeAlias = Annotated[
    Log | None,
    typer.Option(
        help="A live display, a line a minute, or JSON lines; by default the first on a terminal, else the second.",
        rich_help_panel=TALK,
    ),
]
QuietOption: TypeAlias = Annotated[bool, typer.Option("--quiet", "-q", help="Warnings only.", rich_help_panel=TALK)]
DebugOption: TypeAlias = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=TALK)
]
JsonOption: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RunArgument: TypeAlias = Annotated[
    Path, typer.Argument(metavar="RUN", help="The run's folder: the output's name with `.run` added, by default.")
]
Released: TypeAlias = Literal["sd21-512", "sd21-768v", "turbo"]
"""As in `stablesr.hub`, which is too heavy to import for a help text."""


def main() -> NoReturn:
    app(prog_name="gigasr")
    raise SystemExit(0)


# ---- rasters ---------------------------------------------------------------------------------------------------------


@app.command()
@takes_config
def upscale(given: Given, *, log: LogOption = None, quiet: QuietOption = False, debug: DebugOption = False) -> None:
    """Upscale a raster.

    Stopped by Ctrl-C or by anything else, the same command goes on where it was.
    """
    with reporting(debug, log):
        config = given.config()
        with at_work(log, quiet, debug) as (listen, stopping):
            from pipeline.run import run

            written = run(config, listen, stopping)
    typer.echo(written)


@app.command()
@takes_config
def plan(
    given: Given,
    *,
    as_json: JsonOption = False,
    no_measure: Annotated[
        bool, typer.Option("--no-measure", help="Leave out the expected time: it takes a short measurement.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Show what `upscale` would do with the same arguments, and whether it would fit. Starts nothing."""
    with reporting(debug):
        config = given.config()
        from pipeline.plan import make_plan

        plan = make_plan(config)
        seconds = None
        if not no_measure:
            from pipeline.estimate import measure_seconds

            seconds = measure_seconds(plan)
        if as_json:
            typer.echo(json.dumps({**json.loads(plan.model_dump_json()), "expected_seconds": seconds}))
        else:
            typer.echo(aligned(plan.report(seconds)))


@app.command()
def status(
    run: RunArgument,
    as_json: JsonOption = False,
    watch: Annotated[bool, typer.Option("--watch", help="Again every 2 s, until the run has ended.")] = False,
    debug: DebugOption = False,
) -> None:
    """Show how far a run is, how fast, and who works on it: from its folder alone, on any machine."""
    with reporting(debug):
        from pipeline.status import read_status

        if not watch:
            found = read_status(run)
            typer.echo(found.model_dump_json() if as_json else aligned(found.report()))
            return
        from pipeline.status import watch_status

        with showing(sys.stdout) as show:
            for found in watch_status(run):
                if as_json:
                    typer.echo(found.model_dump_json())
                else:
                    show(aligned(found.report()))


@app.command()
def verify(
    run: RunArgument,
    as_json: JsonOption = False,
    log: LogOption = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Read everything a run has stored against its checksums. Exit code 1 if something is damaged."""
    with reporting(debug, log):
        with talking(log, quiet) as listen:
            from pipeline.verify import verify_run

            damaged = verify_run(run, listen)
        if as_json:
            typer.echo(json.dumps({"sound": not damaged, "damaged": damaged}))
        else:
            typer.echo("\n".join(f"damaged: {what}" for what in damaged) or "sound")
        if damaged:
            raise typer.Exit(1)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Where to; made if it is not there.")] = Path("gigasr-demo"),
    log: LogOption = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Upscale a photograph with the embedded network, on the CPU, in a minute or two."""
    with reporting(debug, log):
        with at_work(log, quiet, debug) as (listen, stopping):
            from pipeline.demo import make_demo

            made = make_demo(folder, listen, stopping)
        typer.echo(aligned(made.report()))


# ---- weights ---------------------------------------------------------------------------------------------------------


@models.command("list")
def list_models(debug: DebugOption = False) -> None:
    """Show the presets, and where their weights are."""
    with reporting(debug):
        from pipeline.models import list_weights

        header = ("preset", "weights", "tile (px)", "steps", "licence of the weights")
        rows = [(w.preset, w.state, str(w.tile), str(w.steps), w.licence) for w in list_weights()]
        typer.echo(aligned([header, *rows]))


@models.command()
def pull(preset: Released, debug: DebugOption = False) -> None:
    """Download the released weights of a preset: S-Lab License 1.0, non-commercial use only."""
    with reporting(debug):
        from stablesr import hub

        typer.echo(hub.LICENCE_NOTICE, err=True)
        for path in hub.pull(preset, progress=_show_download if sys.stderr.isatty() else None):
            typer.echo(path)


@models.command()
def convert(
    stablesr: Annotated[Path, typer.Argument(metavar="STABLESR", help="stablesr_*.ckpt")],
    cfw: Annotated[Path, typer.Argument(metavar="CFW", help="vqgan_cfw_*.ckpt")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A .safetensors file.")],
    preset: Annotated[Released, typer.Option(help="What STABLESR was trained as.")],
    dtype: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="Of the numbers.")] = "fp32",
    debug: DebugOption = False,
) -> None:
    """Make one model file of released checkpoints, without running the code in them."""
    with reporting(debug):
        from stablesr import PRESETS, checkpoint
        from stablesr.checkpoint.__main__ import DTYPES

        typer.echo(checkpoint.convert(stablesr, cfw, output, PRESETS[preset], DTYPES[dtype]))


@models.command("verify")
def verify_model(
    preset: Annotated[str, typer.Argument(metavar="PRESET|FILE", help="One that was downloaded.")],
    debug: DebugOption = False,
) -> None:
    """Read downloaded weights against their checksums."""
    with reporting(debug):
        from stablesr import PRESETS, hub

        if preset in PRESETS and preset not in hub.RELEASED:
            typer.echo(f"{preset} is part of the package")
            return
        for path in hub.verify(preset):
            typer.echo(f"sound: {path}")


# ---- around every command --------------------------------------------------------------------------------------------


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gigasr {metadata.version('gigasr')}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


@contextmanager
def talking(log: Log | None, quiet: bool) -> Iterator[Listener]:
    """Events, and what the networks' package logs, on stderr."""
    logger = logging.getLogger("stablesr")
    with listening(log, sys.stderr, quiet=quiet) as listen:
        handler, level = _ToListener(listen), logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield listen
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)


@contextmanager
def at_work(log: Log | None, quiet: bool, debug: bool = False) -> Iterator[tuple[Listener, Stopping]]:
    """What a run is given: somebody to tell, and somebody to ask whether to stop.

    Within, nobody else writes to stdout: Ray prints there whatever happens to a worker, which the run says, too.
    """
    with (
        open(os.devnull, "w") as nowhere,
        redirect_stdout(sys.stderr if debug else nowhere),
        talking(log, quiet) as listen,
        catching_signals(lambda message: listen(Notice(message, warning=True))) as stopping,
    ):
        yield listen, stopping


@contextmanager
def reporting(debug: bool, log: Log | None = None) -> Iterator[None]:
    """An error ends the command with what it says and its exit code; the traceback is for those who ask.

    Warnings of libraries are for those, too: what the user should know is an event.
    """
    try:
        with warnings.catch_warnings():
            if not debug and not sys.warnoptions:
                warnings.simplefilter("ignore")
            yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exception(error)
        message, exit_code = explain(error)
        if log == "json":
            message = json_object(datetime.now(UTC), "Error", message=message, exit_code=exit_code).rstrip("\n")
        typer.echo(message, err=True)
        raise typer.Exit(exit_code) from None


def explain(error: BaseException) -> tuple[str, int]:
    """What to say of an error, and the exit code."""
    message = "\n".join([str(error), *getattr(error, "__notes__", [])])
    match error:
        case KeyboardInterrupt():
            return "interrupted", INTERRUPTED
        case Stopped():
            return message, error.exit_code
        case GigasrError():
            return f"error: {message}", error.exit_code
        case _ if (exit_code := _exit_code_of_networks(error)) is not None:
            return f"error: {message}", exit_code
    what = ": ".join([type(error).__name__, *message.splitlines()[:1]])
    return f"internal error: {what}; run with --debug for the traceback", 1


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """
    >>> print(aligned([("source", "64 x 48"), ("to", "256 x 192")]))
    source  64 x 48
    to      256 x 192
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _exit_code_of_networks(error: BaseException) -> int | None:
    """Of an error that `stablesr` raises on purpose; None for any other.

    Its modules are looked up, not imported: an error of theirs means that they are there.
    """
    errors = sys.modules.get("stablesr.errors")
    if errors is not None and isinstance(error, errors.StableSRError):
        return 1 if isinstance(error, errors.DownloadError) else 2
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    raised_in = frames[-1].f_globals.get("__name__") if frames else None
    return 2 if isinstance(error, ValueError) and raised_in in ("stablesr.loading", "stablesr.hub") else None


def _show_download(done: int, total: int | None) -> None:
    typer.echo(f"\r{download_line(done, total)}", nl=done == total, err=True)


class _ToListener(logging.Handler):
    def __init__(self, listen: Listener) -> None:
        super().__init__()
        self._listen = listen

    def emit(self, record: logging.LogRecord) -> None:
        self._listen(Notice(record.getMessage(), warning=record.levelno >= logging.WARNING))
