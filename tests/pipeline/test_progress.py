"""Listeners, with a clock that the tests turn."""

import doctest
import io
import json
import re
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pipeline import progress
from pipeline.events import Committed, Notice, RunFinished, RunStarted, StageFinished, StageStarted, UnitsDone
from pipeline.progress import JsonLines, PlainLines, StageProgress, duration, listening, live_display


class Clock:
    """Stands still unless moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_the_examples_of_the_module_are_true() -> None:
    tried = doctest.testmod(progress)
    assert tried.attempted > 4 and tried.failed == 0


# ---- rate and time left ----------------------------------------------------------------------------------------------


def test_what_was_done_before_does_not_count_for_the_rate() -> None:
    stage = StageProgress("sample", total=100, done=60, started=0.0)
    stage.add(10, now=5.0)
    assert stage.rate(5.0) == 2.0
    assert stage.seconds_left(5.0) == 15.0


def test_there_is_no_rate_before_the_first_unit() -> None:
    stage = StageProgress("sample", total=100, done=60, started=0.0)
    assert stage.rate(10.0) is None
    assert stage.seconds_left(10.0) is None


def test_the_rate_follows_a_change_within_its_window() -> None:
    stage = StageProgress("encode", total=10_000, done=0, started=0.0)
    for second in range(1, 601):
        stage.add(10, now=float(second))
    for second in range(601, 601 + int(progress.WINDOW_S) + 1):
        stage.add(1, now=float(second))
    assert stage.rate(601 + progress.WINDOW_S) == pytest.approx(1.0, rel=0.1)


def test_slow_units_have_a_rate_too() -> None:
    stage = StageProgress("decode", total=10, done=0, started=0.0)
    for block in range(1, 9):
        stage.add(1, now=600.0 * block)
    assert stage.rate(4800.0) == pytest.approx(1 / 600)
    assert stage.seconds_left(4800.0) == pytest.approx(1200.0)


def test_a_stage_that_stands_still_gets_slower() -> None:
    stage = StageProgress("encode", total=100, done=0, started=0.0)
    stage.add(10, now=10.0)
    assert stage.rate(10.0) == 1.0
    assert stage.rate(100.0) == 0.1


def test_a_finished_stage_has_the_rate_of_the_whole_and_nothing_left() -> None:
    stage = StageProgress("encode", total=1000, done=500, started=0.0)
    for second in range(1, 501):
        stage.add(1, now=float(second))
    stage.finish(1000.0)
    assert stage.rate(5000.0) == 0.5
    assert stage.seconds_left(5000.0) is None


def test_units_that_are_done_again_do_not_exceed_the_total() -> None:
    stage = StageProgress("sample", total=10, done=0, started=0.0)
    stage.add(8, now=1.0)
    stage.add(8, now=2.0)
    assert stage.shown == 10
    assert stage.seconds_left(2.0) == 0.0


@given(st.floats(0, 1e8))
def test_durations_are_short_and_never_have_sixty_of_anything(seconds: float) -> None:
    text = duration(seconds)
    assert len(text) <= 12
    assert not re.search(r"\b60 (min|s)|\b60\.0 s", text)


# ---- plain lines -----------------------------------------------------------------------------------------------------


def test_plain_is_a_line_at_every_start_and_end_and_one_a_minute_between(clock: Clock) -> None:
    stream = io.StringIO()
    listen = PlainLines(stream, clock)
    listen(RunStarted("out.tif.run", "in.tif", "out.tif", resumed=True))
    listen(StageStarted("sample", total=400, done=100))
    for _ in range(150):
        clock.now += 1
        listen(UnitsDone("sample", 2))
    listen(Committed(6, 8, 0.1))
    listen(StageFinished("sample", 150.0))
    listen(RunFinished("out.tif", 163.2))
    assert stream.getvalue().splitlines() == [
        "going on: in.tif -> out.tif, run out.tif.run",
        "sample: 400 block steps, 100 of them done before",
        "sample: 220 of 400 block steps (55%), 2.0/s, 1 min 30 s left",
        "sample: 340 of 400 block steps (85%), 2.0/s, 30.0 s left",
        "sample: finished in 2 min 30 s",
        "finished in 2 min 43 s: out.tif",
    ]


def test_notices_are_told_at_once(clock: Clock) -> None:
    stream = io.StringIO()
    listen = PlainLines(stream, clock)
    listen(Notice("a worker died; going on from step 3"))
    listen(Notice("the weights are not trained", warning=True))
    assert stream.getvalue() == "a worker died; going on from step 3\nwarning: the weights are not trained\n"


def test_events_of_stages_that_were_never_announced_do_no_harm(clock: Clock) -> None:
    listen = PlainLines(io.StringIO(), clock)
    listen(UnitsDone("encode", 1))
    listen(StageFinished("encode", 1.0))


# ---- JSON lines ------------------------------------------------------------------------------------------------------

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def test_json_is_an_object_for_each_event(clock: Clock) -> None:
    stream = io.StringIO()
    listen = JsonLines(stream, clock, lambda: NOON)
    listen(RunStarted("out.tif.run", "in.tif", "out.tif", resumed=False))
    listen(Notice("Grüße", warning=True))
    assert [json.loads(line) for line in stream.getvalue().splitlines()] == [
        {
            "time": "2026-03-01T12:00:00.000Z",
            "event": "RunStarted",
            "run": "out.tif.run",
            "source": "in.tif",
            "output": "out.tif",
            "resumed": False,
        },
        {"time": "2026-03-01T12:00:00.000Z", "event": "Notice", "message": "Grüße", "warning": True},
    ]


def test_units_are_told_at_most_once_a_second_and_none_is_lost(clock: Clock) -> None:
    stream = io.StringIO()
    listen = JsonLines(stream, clock, lambda: NOON)
    listen(StageStarted("encode", total=35, done=0))
    for _ in range(35):
        listen(UnitsDone("encode", 1))
        clock.now += 0.125
    listen(StageFinished("encode", 4.4))
    told = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["event"] for event in told] == ["StageStarted"] + 6 * ["UnitsDone"] + ["StageFinished"]
    assert [event["n"] for event in told[1:-1]] == [1, 8, 8, 8, 8, 2]


def test_units_that_were_not_told_are_told_at_the_end(tmp_path: Path) -> None:
    with open(tmp_path / "log", "w") as stream, listening("json", stream) as listen:
        listen(UnitsDone("encode", 1))
        listen(UnitsDone("encode", 3))
    told = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [event["n"] for event in told] == [1, 3]


# ---- the live display ------------------------------------------------------------------------------------------------


def shown_on_a_terminal(clock: Clock, *events: tuple[float, progress.Event]) -> list[str]:
    """The lines that are left on a terminal of 100 columns, after events at these seconds."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, color_system=None, legacy_windows=False)
    with live_display(console, clock) as listen:
        for seconds, event in events:
            clock.now = 1000.0 + seconds
            listen(event)
    last_frame = re.split(r"\x1b\[\d*[AK]", stream.getvalue())[-1]
    return [line.rstrip() for line in re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", last_frame).splitlines() if line.strip()]


def test_the_display_has_a_bar_for_each_stage(clock: Clock) -> None:
    lines = shown_on_a_terminal(
        clock,
        (0, StageStarted("encode", total=8, done=4)),
        (2, UnitsDone("encode", 4)),
        (2, StageFinished("encode", 2.0)),
        (3, StageStarted("sample", total=100, done=50)),
        (13, UnitsDone("sample", 20)),
    )
    encode, sample = lines
    assert encode.split() == ["encode", "━" * 32, "8/8", "blocks", "2.0/s", "2.0", "s"]
    assert re.sub("[━╸╺]+", "", sample).split() == ["sample", "70/100", "block", "steps", "2.0/s", "15.0", "s", "left"]


def test_the_display_keeps_what_there_is_to_know_above_the_bars() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, color_system=None)
    with live_display(console) as listen:
        listen(StageStarted("encode", total=8, done=4))
        listen(Notice("[bold] is no markup here: a[1]", warning=True))
        listen(RunFinished("out.tif", 3.0))
    assert "warning: [bold] is no markup here: a[1]" in stream.getvalue()
    assert "finished in 3.0 s: out.tif" in stream.getvalue()


def test_an_empty_stage_is_full(clock: Clock) -> None:
    (line,) = shown_on_a_terminal(clock, (0, StageStarted("encode", total=0, done=0)))
    assert line.split() == ["encode", "━" * 32, "0/0", "blocks"]


# ---- which one -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log", [None, "plain", "json", "rich"])
def test_a_quiet_listener_passes_on_warnings_only(log: progress.Log | None) -> None:
    stream = io.StringIO()
    with listening(log, stream, quiet=True) as listen:
        listen(StageStarted("encode", total=8, done=4))
        listen(UnitsDone("encode", 4))
        listen(Notice("all is well"))
        listen(Notice("take care", warning=True))
        listen(RunFinished("out.tif", 3.0))
    (line,) = stream.getvalue().splitlines()
    assert "take care" in line


def test_what_is_no_terminal_gets_plain_lines() -> None:
    stream = io.StringIO()
    with listening(None, stream) as listen:
        listen(StageStarted("encode", total=8, done=0))
    assert stream.getvalue() == "encode: 8 blocks\n"


@pytest.mark.parametrize("log", ["plain", "json", "rich"])
def test_events_may_come_from_many_threads(log: progress.Log) -> None:
    stream = io.StringIO()
    with listening(log, stream) as listen:
        listen(StageStarted("encode", total=400, done=0))

        def work() -> None:
            for _ in range(100):
                listen(UnitsDone("encode", 1))
                listen(Notice("a"))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if log == "json":
        told = [json.loads(line) for line in stream.getvalue().splitlines()]
        assert sum(event["n"] for event in told if event["event"] == "UnitsDone") == 400
