"""Listeners for people and for programs: a live display, plain lines, or JSON lines.

They only listen, and may be called from any thread. Times come from a clock that is an argument.
"""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
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

Log = Literal["rich", "plain", "json"]
Clock = Callable[[], float]
"""Seconds, from any origin, never going back."""

WINDOW_S = 120.0
"""Rates are averages over this time: long enough to be calm, short enough to follow a change."""

FEWEST_SAMPLES = 5
"""Rates are averages over at least as many reports, however long ago: a block may take minutes."""

LINE_EVERY_S = 60.0
REPORT_EVERY_S = 1.0

UNITS = {"sample": "block step", "export": "tile"}
"""What a stage counts, where it is not blocks."""


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


# ---- how far, how fast, how long -------------------------------------------------------------------------------------


@dataclass
class StageProgress:
    """How far a stage is.

    The rate does not count what an earlier start of the run had done, nor what was long ago; once the stage is
    finished, it is that of the whole.
    """

    stage: str
    total: int
    done: int
    started: float
    finished: float | None = None
    _first: tuple[float, int] = field(init=False)
    """When, and how much was done then."""
    _recent: deque[tuple[float, int]] = field(init=False)

    def __post_init__(self) -> None:
        self._first = self.started, self.done
        self._recent = deque([self._first])

    def add(self, n: int, now: float) -> None:
        self.done += n
        self._recent.append((now, self.done))
        while len(self._recent) > FEWEST_SAMPLES and now - self._recent[1][0] >= WINDOW_S:
            self._recent.popleft()

    def finish(self, now: float) -> None:
        self.done = self.total
        self.finished = now

    @property
    def shown(self) -> int:
        """Units that count: work that was lost with a worker is done, and reported, again."""
        return min(self.done, self.total)

    def rate(self, now: float) -> float | None:
        """Units per second, lately; None before there is anything to go by."""
        since, then = self._recent[0] if self.finished is None else self._first
        until = now if self.finished is None else self.finished
        return (self.done - then) / (until - since) if self.done > then and until > since else None

    def seconds_left(self, now: float) -> float | None:
        rate = self.rate(now)
        return None if rate is None or self.finished is not None else (self.total - self.shown) / rate


class Progress:
    """What the events so far add up to: the stages, in the order in which they began."""

    def __init__(self) -> None:
        self.stages: dict[str, StageProgress] = {}

    def take(self, event: Event, now: float) -> StageProgress | None:
        """Count an event; gives the stage that it is about."""
        match event:
            case StageStarted():
                self.stages[event.stage] = StageProgress(event.stage, event.total, event.done, now)
            case UnitsDone() if event.stage in self.stages:
                self.stages[event.stage].add(event.n, now)
            case StageFinished() if event.stage in self.stages:
                self.stages[event.stage].finish(now)
            case _:
                return None
        return self.stages[event.stage]


def duration(seconds: float) -> str:
    """As people say it.

    >>> [duration(s) for s in (0.04, 3.6, 75, 3600, 7830, 180_000)]
    ['0.0 s', '3.6 s', '1 min 15 s', '1 h 00 min', '2 h 10 min', '2 d 2 h']
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def rate_of(units_per_second: float) -> str:
    """The unit of time that gives a number one can grasp.

    >>> [rate_of(r) for r in (1234.0, 2.0, 0.05, 0.001)]
    ['1234/s', '2.0/s', '3.0/min', '3.6/h']
    """
    for factor, unit in ((1, "s"), (60, "min"), (3600, "h")):
        value = units_per_second * factor
        if value >= 1 or unit == "h":
            break
    return f"{value:.0f}/{unit}" if value >= 100 else f"{value:.1f}/{unit}"


def download_line(done: int, total: int | None) -> str:
    """
    >>> download_line(1_500_000_000, 6_000_000_000)
    '1.50 of 6.00 GB, 25%'
    """
    return f"{done / 1e9:.2f} of {total / 1e9:.2f} GB, {done / total:.0%}" if total else f"{done / 1e9:.2f} GB"


def counted(n: int, stage: str) -> str:
    """
    >>> counted(1, "encode"), counted(8, "sample")
    ('1 block', '8 block steps')
    """
    return f"{n} {UNITS.get(stage, 'block')}{'' if n == 1 else 's'}"


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
    share = f" ({stage.shown / stage.total:.0%})" if stage.total else ""
    line = f"{stage.stage}: {stage.shown} of {counted(stage.total, stage.stage)}{share}"
    rate, left = stage.rate(now), stage.seconds_left(now)
    return line if rate is None or left is None else f"{line}, {rate_of(rate)}, {duration(left)} left"


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
