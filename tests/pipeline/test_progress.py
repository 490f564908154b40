"""Listeners, with a clock that the tests turn."""

import doctest
import io
import json
import re
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console

from pipeline import progress
from pipeline.events import Committed, Notice, RunFinished, RunStarted, StageFinished, StageStarted, UnitsDone
from pipeline.progress import JsonLines, PlainLines, listening, live_display, showing


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
    assert tried.attempted >= 3 and tried.failed == 0


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


# ---- a text that changes ---------------------------------------------------------------------------------------------


def test_where_there_is_no_terminal_texts_follow_each_other() -> None:
    stream = io.StringIO()
    with showing(stream) as show:
        show("1 of 2")
        show("2 of 2")
    assert stream.getvalue() == "1 of 2\n\n2 of 2\n\n"


def test_on_a_terminal_a_text_takes_the_place_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    with showing(stream) as show:
        show("[1] of 2\na")
        show("[2] of 2\na")
    last_frame = re.split(r"\x1b\[\d*[AK]", stream.getvalue())[-1]
    assert "[1] of 2" in stream.getvalue()
    assert "[1] of 2" not in last_frame


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
