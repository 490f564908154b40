"""Listeners for people and for programs: a live display, plain lines, or JSON lines.

They only listen, and may be called from any thread. Times come from a clock that is an argument.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Literal, TextIO

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.events import (
    Committed,
    Event,
    Listener,
    Notice,
    RunFinished,
    RunStarted,
    StageFinished,
    StageStarted,
    StepTaken,
    UnitsDone,
    WorkerJoined,
    WorkerLeft,
)
from pipeline.rates import Clock, Progress, StageProgress, counted, duration, progress_line, rate_of

Log = Literal["rich", "plain", "json"]

LINE_EVERY_S = 60.0
REPORT_EVERY_S = 1.0


def listening(log: Log | None, stream: TextIO, *, quiet: bool = False) -> AbstractContextManager[Listener]:
    """A listener that writes to a stream while the context lasts.

    Args:
        log: how; None for the live display on a terminal and plain lines elsewhere.
        quiet: warnings only.
    """
    log = log or ("rich" if stream.isatty() else "plain")
    if log == "json":
        listener = JsonLines(stream)
        return nullcontext(only_warnings(listener)) if quiet else _closing(listener)
    if quiet or log == "plain":
        lines = PlainLines(stream)
        return nullcontext(only_warnings(lines) if quiet else lines)
    return live_display(Console(file=stream, force_terminal=True))


def only_warnings(listener: Listener) -> Listener:
    """Passes on what may need an answer."""

    def listen(event: Event) -> None:
        if isinstance(event, Notice) and event.warning:
            listener(event)

    return listen


def download_line(done: int, total: int | None) -> str:
    """
    >>> download_line(1_500_000_000, 6_000_000_000)
    '1.50 of 6.00 GB, 25%'
    """
    return f"{done / 1e9:.2f} of {total / 1e9:.2f} GB, {done / total:.0%}" if total else f"{done / 1e9:.2f} GB"


@contextmanager
def showing(stream: TextIO) -> Iterator[Callable[[str], None]]:
    """Something that shows a text: on a terminal in the place of the one before, elsewhere below it."""
    if not stream.isatty():
        yield lambda text: print(text, end="\n\n", file=stream, flush=True)
        return
    with Live(console=Console(file=stream), auto_refresh=False) as live:
        yield lambda text: live.update(Text(text), refresh=True)


# ---- plain lines -----------------------------------------------------------------------------------------------------


class PlainLines:
    """One line a minute, and one whenever a stage starts or ends or there is something to know."""

    def __init__(self, stream: TextIO, clock: Clock = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._progress = Progress()
        self._written_at = clock()
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        with self._lock:
            now = self._clock()
            stage = self._progress.take(event, now)
            if isinstance(event, UnitsDone):
                due = stage is not None and now - self._written_at >= LINE_EVERY_S
                line = status_line(stage, now) if stage and due else None
            else:
                line = line_of(event)
            if line is not None:
                self._stream.write(line + "\n")
                self._stream.flush()
                self._written_at = now


def line_of(event: Event) -> str | None:
    """What a log says of an event at once; None for what only counts."""
    match event:
        case RunStarted():
            return f"{'going on' if event.resumed else 'started'}: {event.source} -> {event.output}, run {event.run}"
        case StageStarted():
            before = f", {event.done} of them done before" if event.done else ""
            return f"{event.stage}: {counted(event.total, event.stage)}{before}"
        case StageFinished():
            return f"{event.stage}: finished in {duration(event.seconds)}"
        case Notice():
            return f"warning: {event.message}" if event.warning else event.message
        case RunFinished():
            return f"finished in {duration(event.seconds)}: {event.output}"
        case WorkerJoined():
            return f"worker {event.worker} takes part, with {event.device} on {event.node}"
        case UnitsDone() | Committed() | StepTaken() | WorkerLeft():
            return None


def status_line(stage: StageProgress, now: float) -> str:
    """
    >>> status_line(StageProgress("sample", total=200, done=50, started=0.0), now=60.0)
    'sample: 50 of 200 block steps (25%)'
    """
    return progress_line(stage.stage, stage.shown, stage.total, stage.rate(now), stage.seconds_left(now))


# ---- JSON lines ------------------------------------------------------------------------------------------------------


class JsonLines:
    """One object per event: `time` (ISO 8601, UTC), `event` (the name of its class), and its fields.

    `UnitsDone` are added up and written at most once a second for each stage, and before anything else is written.
    """

    def __init__(
        self, stream: TextIO, clock: Clock = time.monotonic, wall: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._stream = stream
        self._clock = clock
        self._wall = wall
        self._pending: dict[str, int] = {}
        self._written_at: dict[str, float] = {}
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        with self._lock:
            if isinstance(event, UnitsDone):
                self._pending[event.stage] = self._pending.get(event.stage, 0) + event.n
                if self._clock() - self._written_at.get(event.stage, float("-inf")) >= REPORT_EVERY_S:
                    self._write_pending(event.stage)
            else:
                self._write_all_pending()
                self._stream.write(json_line(event, self._wall()))
            self._stream.flush()

    def close(self) -> None:
        """Write what was not written yet."""
        with self._lock:
            self._write_all_pending()
            self._stream.flush()

    def _write_all_pending(self) -> None:
        for stage in list(self._pending):
            self._write_pending(stage)

    def _write_pending(self, stage: str) -> None:
        self._stream.write(json_line(UnitsDone(stage, self._pending.pop(stage)), self._wall()))
        self._written_at[stage] = self._clock()


def json_line(event: Event, now: datetime) -> str:
    """
    >>> json_line(UnitsDone("encode", 3), datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
    '{"time": "2026-01-02T03:04:05.000Z", "event": "UnitsDone", "stage": "encode", "n": 3}\\n'
    """
    return json_object(now, type(event).__name__, **asdict(event))


def json_object(now: datetime, event: str, **fields: object) -> str:
    stamp = now.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return json.dumps({"time": stamp, "event": event, **fields}, ensure_ascii=False) + "\n"


@contextmanager
def _closing(listener: JsonLines) -> Iterator[Listener]:
    try:
        yield listener
    finally:
        listener.close()


# ---- the live display ------------------------------------------------------------------------------------------------


@contextmanager
def live_display(console: Console, clock: Clock = time.monotonic) -> Iterator[Listener]:
    """One bar for each stage, and above them whatever there is to know."""
    progress, lock = Progress(), threading.Lock()

    def bars() -> Table:
        with lock:
            return table_of(progress, clock())

    with Live(console=console, get_renderable=bars, refresh_per_second=4) as live:

        def listen(event: Event) -> None:
            with lock:
                progress.take(event, clock())
            if isinstance(event, RunStarted | Notice | RunFinished):
                style = "yellow" if isinstance(event, Notice) and event.warning else ""
                live.console.print(Text(line_of(event) or "", style))

        yield listen


def table_of(progress: Progress, now: float) -> Table:
    """Stage, bar, units, rate, and the time left or taken."""
    table = Table.grid(padding=(0, 2))
    for justify in ("left", "left", "right", "right", "right"):
        table.add_column(justify=justify, no_wrap=True)
    for stage in progress.stages.values():
        bar = ProgressBar(total=max(stage.total, 1), completed=stage.shown if stage.total else 1, width=32)
        rate, left = stage.rate(now), stage.seconds_left(now)
        if stage.finished is not None:
            when = duration(stage.finished - stage.started)
        else:
            when = "" if left is None else f"{duration(left)} left"
        units = f"{stage.shown}/{counted(stage.total, stage.stage)}"
        table.add_row(stage.stage, bar, units, rate_of(rate) if rate else "", when)
    return table
