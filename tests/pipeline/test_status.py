"""How far a run is, read from its folder alone."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pipeline import status as status_module
from pipeline.errors import RunMismatch, UserError
from pipeline.events import Event, StepTaken, UnitsDone
from pipeline.plan import read_plan
from pipeline.run import run
from pipeline.status import StageStatus, Status, newest_slot, read_status, watch_status
from pipeline.store import RunStore
from pipeline.telemetry import NAME, LivingWorker, Snapshot, Warned, read_snapshot
from tests.pipeline.rasters import Death, Listening, pattern, rehearsal, write_raster

OPTIONS: dict[str, Any] = {"grid": {"block": 32}, "sampling": {"steps": 3, "patch": 64}}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers; one block of the source, 3 x 3 of an output with one overview."""
    return write_raster(tmp_path_factory.mktemp("source") / "source.tif", pattern(4, 140, 150, "uint16"))


UNITS = {"ingest": 1, "encode": 2 * 9, "sample": 2 * 3, "decode": 2 * 9, "overviews": 2 * 2, "export": 5}
"""Of a whole run; sampling by steps of a layer; 2 x 2 tiles of the file, and 1 of its overview."""


def counts(status: Status) -> dict[str, tuple[int, int]]:
    return {stage.stage: (stage.done, stage.total) for stage in status.stages if stage.total}


def test_a_run_from_its_beginning_to_its_end(source: Path, tmp_path: Path) -> None:
    """Read while it is at work, after every unit."""
    config = rehearsal(source, tmp_path / "target.tif", **OPTIONS, run={"keep": True, "commit_seconds": 0})
    seen: list[Status] = []

    class Looking(Listening):
        def __call__(self, event: Event) -> None:
            super().__call__(event)
            if isinstance(event, UnitsDone) and event.stage != "export":
                seen.append(read_status(config.folder))

    run(config, Looking())
    before: dict[str, tuple[int, int]] = {stage: (0, total) for stage, total in UNITS.items()}
    for status in seen:
        now = counts(status)
        assert {stage: total for stage, (_, total) in now.items()} == UNITS
        assert all(now[stage][0] >= before[stage][0] for stage in UNITS)
        started = [stage for stage, (done, _) in now.items() if done]
        assert all(now[stage][0] == UNITS[stage] for stage in started[:-1])
        before = now
    assert [status.stage for status in seen[:3]] == ["encode"] * 3
    assert {status.stage for status in seen} == {"encode", "sample", "decode", "overviews", "export"}
    assert seen[-1].stage == "export"
    finished = read_status(config.folder)
    assert finished.stage == "finished"
    assert counts(finished) == {stage: (total, total) for stage, total in UNITS.items()}


def test_a_stopped_run(source: Path, tmp_path: Path) -> None:
    config = rehearsal(source, tmp_path / "target.tif", **OPTIONS)
    with pytest.raises(Death):
        run(config, Listening(die_after=1 + 5))
    status = read_status(config.folder)
    assert (status.source, status.output, status.folder) == (config.source, config.output, str(config.folder))
    assert counts(status)["encode"] == (5 + 1, 18)  # one was asked for ahead
    assert status.stage == "encode"
    assert status.seconds_since_progress is not None
    assert 0 <= status.seconds_since_progress < 60
    rows = dict(status.report())
    assert rows["stage"] == "encode"
    assert rows["encode"] == "6 of 18"
    assert rows["last progress"].endswith(" s ago")
    assert Status.model_validate_json(status.model_dump_json()) == status


def test_a_run_that_has_done_nothing_yet(source: Path, tmp_path: Path) -> None:
    config = rehearsal(source, tmp_path / "target.tif", **OPTIONS)
    with pytest.raises(Death):
        run(config, Listening(die_after=1))
    shutil.rmtree(config.folder / "done")
    status = read_status(config.folder)
    assert status.stage == "ingest"
    assert status.seconds_since_progress is None
    assert "last progress" not in dict(status.report())


def test_a_finished_run_whose_output_is_gone_is_not_finished(source: Path, tmp_path: Path) -> None:
    config = rehearsal(source, tmp_path / "target.tif", **OPTIONS, run={"keep": True})
    run(config)
    assert read_status(config.folder).stage == "finished"
    Path(config.output).unlink()
    assert read_status(config.folder).stage == "export"


def test_what_is_no_run(source: Path, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere", source):
        with pytest.raises(UserError, match="is not the folder of a run"):
            read_status(path)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(RunMismatch, match="not a plan"):
        read_status(tmp_path)


def test_adain_has_one_stage_more(source: Path, tmp_path: Path) -> None:
    config = rehearsal(source, tmp_path / "target.tif", bands=(1,), scale=1,
                       **{**OPTIONS, "sampling": {"steps": 1, "color": "adain"}}, run={"keep": True})  # fmt: skip
    run(config)
    assert counts(read_status(config.folder))["statistics"] == (1, 1)


@pytest.mark.parametrize(
    ("marked", "newest"),
    [
        pytest.param({}, (None, 0), id="none"),
        pytest.param({"a": 3}, ("a", 3), id="one"),
        pytest.param({"a": 3, "b": 4}, ("b", 4), id="both"),
        pytest.param({"a": 10, "b": 9}, ("a", 10), id="by-number"),
    ],
)
def test_the_newest_slot(tmp_path: Path, marked: dict[str, int], newest: tuple[str | None, int]) -> None:
    store = RunStore(tmp_path)
    for slot, step in marked.items():
        store.mark(f"sample/0/{slot}", {"step": step, "checksums": {}})
    assert newest_slot(store, 0) == newest
    assert newest_slot(store, 1) == (None, 0)


def test_the_first_incomplete_stage_is_the_one(source: Path) -> None:
    stages = (StageStatus(stage="a", done=2, total=2), StageStatus(stage="b", done=0, total=0),
              StageStatus(stage="c", done=1, total=2), StageStatus(stage="d", done=0, total=2))  # fmt: skip
    status = Status(folder="f", source="s", output="o", stages=stages, seconds_since_progress=time.time())
    assert status.stage == "c"
    assert read_plan(source) is None


# ---- what the driver tells -------------------------------------------------------------------------------------------

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def told(**more: Any) -> Snapshot:
    """Of a run in the middle of its second start."""
    worker = {"device": "cuda:0", "since": NOON}
    return Snapshot(
        **{
            "state": "running",
            "written_at": NOON,
            "started_at": NOON - timedelta(hours=1),
            "host": "head",
            "pid": 4711,
            "stage": "sample",
            "stages": {
                "encode": {"stage_done_units": 9, "stage_total_units": 9, "stage_units_per_second": 0.0},
                "sample": {"stage_done_units": 220, "stage_total_units": 400, "stage_units_per_second": 2.0,
                           "stage_left_seconds": 90.0},
            },
            "figures": {"diffusion_step": 22, "diffusion_steps": 40, "step_seconds": 4.96, "workers": 3,
                        "workers_lost_total": 1, "starts_total": 2},
            "workers": [LivingWorker(worker=n, node=node, **worker) for n, node in ((1, "a"), (2, "a"), (3, "b"))],
            "warnings": [Warned(at=NOON - timedelta(seconds=75), message="worker 0 is lost: killed\nand more")],
            **more,
        }
    )  # fmt: skip


def status_of(driver: Snapshot | None, **more: Any) -> Status:
    stages = (StageStatus(stage="encode", done=9, total=9), StageStatus(stage="sample", done=20, total=40))
    return Status(folder="f", source="s", output="o", stages=stages, seconds_since_progress=3.0, driver=driver, **more)


def test_the_report_of_a_run_at_work() -> None:
    assert status_of(told(), state="running", silent_seconds=1.0).report() == [
        ("run", "f"),
        ("source", "s"),
        ("output", "o"),
        ("stage", "sample"),
        ("encode", "9 of 9"),
        ("sample", "20 of 40"),
        ("last progress", "3 s ago"),
        ("driver", "running, process 4711 on head"),
        ("at work on", "sample: 220 of 400 block steps (55%), 2.0/s, 1 min 30 s left"),
        ("step", "22 of 40, the last took 5.0 s"),
        ("workers", "2 with cuda:0 on a, 1 with cuda:0 on b"),
        ("workers lost", "1"),
        ("restarts", "1"),
        ("warning", "1 min 16 s ago: worker 0 is lost: killed"),
    ]


def test_the_report_of_a_run_that_has_just_begun() -> None:
    driver = told(stage=None, stages={}, figures={"starts_total": 1}, workers=(), warnings=())
    rows = status_of(driver, state="running", silent_seconds=0.0).report()
    assert rows[7:] == [("driver", "running, process 4711 on head"), ("workers", "none yet")]


@pytest.mark.parametrize(
    ("state", "more", "row"),
    [
        pytest.param("silent", {}, "no sign of life for 2 min 05 s; it was process 4711 on head", id="silent"),
        pytest.param("failed", {"why": "the disk is full"}, "failed: the disk is full", id="failed"),
        pytest.param("stopped", {}, "stopped", id="stopped"),
        pytest.param("finished", {}, "finished", id="finished"),
    ],
)
def test_a_run_that_is_not_at_work_has_no_pace(state: Any, more: dict[str, Any], row: str) -> None:
    rows = dict(status_of(told(**more), state=state, silent_seconds=125.0).report())
    assert rows["driver"] == row
    assert rows.keys() & {"at work on", "step", "workers"} == set()
    assert (rows["workers lost"], rows["restarts"]) == ("1", "1")


def test_a_run_at_work_tells_its_pace(source: Path, tmp_path: Path) -> None:
    """Read while it is at work, once the driver has written again."""
    config = rehearsal(source, tmp_path / "target.tif", **OPTIONS, run={"keep": True, "commit_seconds": 0})
    seen: list[Status] = []

    def look(event: Event) -> None:
        if isinstance(event, StepTaken) and event.step == 2 and not seen:
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                status = read_status(config.folder)
                if status.driver is not None and status.driver.figures.get("diffusion_step") == 2:
                    seen.append(status)
                    return
                time.sleep(0.1)

    run(config, look)
    (status,) = seen
    assert status.driver is not None
    assert (status.state, status.driver.pid, status.driver.stage) == ("running", os.getpid(), "sample")
    rows = dict(status.report())
    assert rows["at work on"].startswith("sample: 9 of 54 block steps (17%), ")
    assert rows["step"].startswith("2 of 3, the last took ")
    assert rows["workers"].startswith("1 with cpu on ")
    assert read_status(config.folder).state == "finished"
    assert Status.model_validate_json(status.model_dump_json()) == status


@pytest.fixture
def died(source: Path, tmp_path: Path) -> Path:
    """The folder of a run whose driver is gone, and has written that it is running."""
    config = rehearsal(source, tmp_path / "target.tif", **OPTIONS)
    with pytest.raises(Death):
        run(config, Listening(die_after=3))
    write(config.folder, state="running", why=None)
    return config.folder


def write(folder: Path, ago_s: float = 0.0, file_ago_s: float | None = None, **changed: Any) -> None:
    """Change what the driver has written, and when by its clock and by that of the file."""
    snapshot = read_snapshot(folder)
    assert snapshot is not None
    now = time.time()
    written_at = datetime.fromtimestamp(now - ago_s, UTC)
    text = snapshot.model_copy(update={"written_at": written_at, **changed}).model_dump_json()
    (folder / NAME).write_text(text)
    file_time = now - (ago_s if file_ago_s is None else file_ago_s)
    os.utime(folder / NAME, (file_time, file_time))


@pytest.mark.parametrize(
    ("ago_s", "file_ago_s", "state"),
    [
        pytest.param(0, 0, "running", id="just-now"),
        pytest.param(20, 20, "running", id="a-little-late"),
        pytest.param(100, 100, "silent", id="long-ago"),
        pytest.param(-4000, 100, "running", id="its-clock-is-ahead"),
        pytest.param(4000, 1, "running", id="its-clock-is-behind"),
    ],
)
def test_a_driver_that_has_not_written_for_long_is_silent(
    died: Path, ago_s: float, file_ago_s: float, state: str
) -> None:
    write(died, ago_s, file_ago_s)
    status = read_status(died)
    assert status.state == state
    assert status.silent_seconds is not None and status.silent_seconds >= 0


def test_what_a_driver_has_written_last_does_not_get_old(died: Path) -> None:
    write(died, 4000, state="failed", why="killed")
    assert read_status(died).state == "failed"


def test_without_a_word_of_the_driver_the_markers_say_what_is_done(died: Path) -> None:
    (died / NAME).write_text("{")
    status = read_status(died)
    assert (status.state, status.silent_seconds, status.driver) == (None, None, None)
    assert dict(status.report())["stage"] == "encode"


# ---- watching --------------------------------------------------------------------------------------------------------


def watched(folder: Path, *meanwhile: Callable[[], Any]) -> list[Status]:
    """What is seen while these things happen, one after another."""
    happening = iter(meanwhile)
    return [*watch_status(folder, lambda seconds: next(happening)())]


def test_a_run_is_watched_until_it_has_ended(died: Path) -> None:
    seen = watched(died, lambda: write(died, 100), lambda: write(died), lambda: write(died, state="stopped"))
    assert [status.state for status in seen] == ["running", "silent", "running", "stopped"]
    assert [status.state for status in watched(died)] == ["stopped"]


def test_a_run_that_is_finished_and_removed_was_finished(died: Path) -> None:
    def finish() -> None:
        shutil.rmtree(died)
        died.with_suffix("").write_text("the target")

    before, after = watched(died, finish)
    assert before.stage == "encode"
    assert (after.stage, after.state) == ("finished", "finished")
    assert counts(after) == {stage: (total, total) for stage, total in UNITS.items()}


def test_a_run_that_removes_its_folder_was_finished(died: Path) -> None:
    def begin() -> None:
        write(died, state="finished")
        shutil.rmtree(died / "done")

    assert watched(died, begin)[-1].stage == "finished"


def test_a_run_that_is_removed_without_an_output_is_an_error(died: Path) -> None:
    with pytest.raises(UserError, match="not the folder of a run"):
        watched(died, lambda: shutil.rmtree(died))


def test_what_vanishes_while_one_looks_is_looked_at_again(died: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def vanished(folder: Path) -> Status:
        monkeypatch.setattr(status_module, "read_status", read_status)
        raise FileNotFoundError

    seen = watched(
        died, lambda: monkeypatch.setattr(status_module, "read_status", vanished), lambda: write(died, state="failed")
    )
    assert [status.state for status in seen] == ["running", "failed"]


def test_status_does_without_ray() -> None:
    code = "import sys, pipeline.status; print(sorted({'ray', 'rich', 'typer'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "[]\n"
