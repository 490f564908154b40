"""What a worker tells of itself while it works, and how it is held."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.grid import Share
from pipeline.plan import make_plan
from pipeline.stages import encode, sample
from pipeline.store import RunStore
from pipeline.worker import Brake, Worker, deadline_s
from stablesr.box import Box
from tests.pipeline.rasters import pattern, rehearsal, write_raster


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    """With 2 x 3 tiles to sample."""
    options: dict[str, Any] = {"grid": {"block": 128}, "sampling": {"steps": 4, "overlap": 48}}
    source = write_raster(tmp_path / "source.tif", pattern(1, 150, 176, "uint8"))
    plan = make_plan(rehearsal(source, tmp_path / "target.tif", **options))
    store = RunStore(plan.config.folder)
    for stage in (encode, sample):
        stage.create_arrays(plan, store)
    store.write("lr_latents/0", plan.canvas.blocks, (0, 0), _zeros(plan.canvas.latents))
    return Worker(plan, plan.config.folder)


def _zeros(box: Box) -> Any:
    return np.zeros((12, box.height, box.width), np.float32)


def take_step(worker: Worker, step: int) -> int:
    worker.do("interior", step)
    return int(worker.do("advance", step).step)


def loaded(worker: Worker) -> Worker:
    worker.do("load", 0, Share(worker.context.canvas, Box(0, 0, 1, 1)), 0, None)
    return worker


# Deadlines


@pytest.mark.parametrize(
    ("longest_s", "expected"),
    [
        pytest.param(None, 600.0, id="never-seen"),
        pytest.param(0.1, 60.0, id="quick"),
        pytest.param(12.0, 240.0, id="slow-work-takes-its-time"),
    ],
)
def test_how_long_a_worker_may_get_nowhere(longest_s: float | None, expected: float) -> None:
    assert deadline_s(60.0, longest_s) == expected


def test_the_pulse_of_a_worker_that_has_nothing_to_do(worker: Worker) -> None:
    pulse = worker.pulse()
    assert (pulse.doing, pulse.still_s, pulse.longest_s, pulse.step) == (None, 0.0, None, 0)


def test_the_pulse_tells_what_is_done_and_since_when_it_got_on(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    pulses = []

    def work(worker: Worker) -> None:
        time.sleep(0.02)
        pulses.append(worker.pulse())
        worker._gives_up(0)  # as between two tiles
        pulses.append(worker.pulse())

    monkeypatch.setattr(Worker, "work", work, raising=False)
    worker.do("work")
    first, second = pulses
    assert (first.doing, first.longest_s, second.doing) == ("work", None, "work")
    assert first.still_s >= 0.02 > second.still_s
    assert second.longest_s is not None
    assert second.longest_s >= 0.02
    assert worker.pulse().doing is None


# Steps


def test_steps_are_counted_and_told(worker: Worker) -> None:
    loaded(worker)
    assert [take_step(worker, step) for step in range(3)] == [1, 2, 3]
    assert worker.pulse().step == 3
    told = worker.do("advance", 3)
    assert (told.step, told.tiles, told.sent_bytes) == (3, 6, 0)  # nothing was prepared


def test_a_step_is_given_up_beyond_the_goal_and_what_was_asked_ahead_is_not_taken(worker: Worker) -> None:
    loaded(worker)
    take_step(worker, 0)
    worker.release(1)
    assert [take_step(worker, step) for step in (1, 2, 3)] == [1, 1, 1]
    assert worker.do("border", 1, [Box(0, 0, 10, 10)]) == [None]
    assert sorted(worker.do("commit", "a", 1)) == ["0-0"]
    loaded(worker)  # another round
    assert take_step(worker, 0) == 1


def test_a_step_whose_neighbour_gave_up_is_given_up(worker: Worker) -> None:
    loaded(worker)
    worker.do("interior", 0)
    assert worker.do("advance", 0, None).step == 0
    assert take_step(worker, 0) == 1


def test_what_is_raised_in_a_step_is_told_at_its_end_and_by_nobody_else(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no")

    loaded(worker)
    monkeypatch.setattr(type(worker.context.network), "predict_tiles", fails)
    assert worker.do("border", 0, [Box(0, 0, 10, 10)]) == [None]  # the neighbour just gives up
    worker.do("interior", 0)
    for _ in range(2):
        with pytest.raises(Exception, match=r"block \(0, 0\) of sample/0 .* failed: RuntimeError: no"):
            worker.do("advance", 0)


def test_holding_waits_for_the_goal(worker: Worker) -> None:
    """The step that is being taken is finished; no other is begun until it is known how far to go."""
    loaded(worker)
    take_step(worker, 0)
    assert worker.hold() == 1
    reached: list[int] = []
    going = threading.Thread(target=lambda: reached.extend(take_step(worker, step) for step in (1, 2, 3)))
    going.start()
    going.join(0.2)
    assert going.is_alive()
    assert worker.pulse().step == 1
    worker.release(3)
    going.join(20)
    assert reached == [2, 3, 3]


def test_a_brake_that_nobody_pulled() -> None:
    brake = Brake()
    assert not brake.beyond(10**6)
    brake.release(5)
    assert [brake.beyond(step) for step in (4, 5, 6)] == [False, True, True]
    brake.release()
    assert not brake.beyond(6)
