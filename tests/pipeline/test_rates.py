"""How far, how fast, how long, in numbers."""

import doctest
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import rates
from pipeline.rates import StageProgress, duration


def test_the_examples_of_the_module_are_true() -> None:
    tried = doctest.testmod(rates)
    assert tried.attempted >= 4 and tried.failed == 0


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
    for second in range(601, 601 + int(rates.WINDOW_S) + 1):
        stage.add(1, now=float(second))
    assert stage.rate(601 + rates.WINDOW_S) == pytest.approx(1.0, rel=0.1)


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


def test_steps_that_were_lost_with_a_worker_count_for_the_rate_but_not_for_what_is_done() -> None:
    stage = StageProgress("sample", total=100, done=20, started=0.0)
    stage.add(40, now=10.0)
    assert (stage.shown, stage.rate(10.0), stage.seconds_left(10.0)) == (60, 4.0, 10.0)
    stage.add(-30, now=10.0)
    assert (stage.shown, stage.rate(10.0), stage.seconds_left(10.0)) == (30, 4.0, 17.5)
    stage.add(20, now=20.0)
    assert (stage.shown, stage.rate(20.0), stage.seconds_left(20.0)) == (50, 3.0, pytest.approx(50 / 3))
    stage.finish(40.0)
    assert stage.rate(50.0) == 2.0  # of the 80 that there were to do


@given(st.lists(st.tuples(st.integers(-50, 50), st.floats(0, 300)), max_size=30))
def test_neither_counts_nor_rates_leave_their_range(reports: list[tuple[int, float]]) -> None:
    stage, now = StageProgress("sample", total=100, done=40, started=0.0), 0.0
    for n, seconds in reports:
        now += seconds
        stage.add(n, now)
        assert 0 <= stage.shown <= 100
        rate, left = stage.rate(now), stage.seconds_left(now)
        assert rate is None or rate > 0
        assert left is None or left >= 0


@given(st.floats(0, 1e8))
def test_durations_are_short_and_never_have_sixty_of_anything(seconds: float) -> None:
    text = duration(seconds)
    assert len(text) <= 12
    assert not re.search(r"\b60 (min|s)|\b60\.0 s", text)
