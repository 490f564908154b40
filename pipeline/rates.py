"""How far, how fast, how long: what the events of a run add up to, and how people say it.

Times come in as numbers, so nothing here looks at a clock.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.events import Event, StageFinished, StageStarted, UnitsDone

Clock = Callable[[], float]
"""Seconds, from any origin, never going back."""

WINDOW_S = 120.0
"""Rates are averages over this time: long enough to be calm, short enough to follow a change."""

FEWEST_SAMPLES = 5
"""Rates are averages over at least as many reports, however long ago: a block may take minutes."""

UNITS = {"sample": "block step", "export": "tile"}
"""What a stage counts, where it is not blocks."""


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
        """Count units; below 0, some that were counted are to be computed again."""
        self.done += n
        if n < 0:  # the workers were as fast as they were: what is lost must not look like standing still
            self._recent = deque((then, done + n) for then, done in self._recent)
        self._recent.append((now, self.done))
        while len(self._recent) > FEWEST_SAMPLES and now - self._recent[1][0] >= WINDOW_S:
            self._recent.popleft()

    def finish(self, now: float) -> None:
        self.done = self.total
        self.finished = now

    @property
    def shown(self) -> int:
        """Units that count: no fewer than none, and no more than there are."""
        return min(max(self.done, 0), self.total)

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


def counted(n: int, stage: str) -> str:
    """
    >>> counted(1, "encode"), counted(8, "sample")
    ('1 block', '8 block steps')
    """
    return f"{n} {UNITS.get(stage, 'block')}{'' if n == 1 else 's'}"


def progress_line(stage: str, done: int, total: int, rate: float | None, seconds_left: float | None) -> str:
    """
    >>> progress_line("encode", 3, 12, 0.5, 18.0)
    'encode: 3 of 12 blocks (25%), 30.0/min, 18.0 s left'
    """
    share = f" ({done / total:.0%})" if total else ""
    line = f"{stage}: {done} of {counted(total, stage)}{share}"
    return line if rate is None or seconds_left is None else f"{line}, {rate_of(rate)}, {duration(seconds_left)} left"
