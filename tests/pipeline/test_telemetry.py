"""The figures of a run, from its events, with clocks that the tests turn."""

import json
import os
import platform
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pipeline import telemetry as telemetry_module
from pipeline.errors import RunMismatch, Stopped, StoreFailed
from pipeline.events import (
    Committed,
    Event,
    Notice,
    RunStarted,
    StageFinished,
    StageStarted,
    StepTaken,
    UnitsDone,
    WorkerJoined,
    WorkerLeft,
)
from pipeline.run import run
from pipeline.store import RunStore
from pipeline.telemetry import FIGURES, KEPT_WARNINGS, NAME, Snapshot, Telemetry, read_snapshot
from tests.pipeline.rasters import Death, Listening, StopWhen, pattern, rehearsal, write_raster

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


class Clocks:
    """One that counts and one on the wall, which stand still unless moved."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def telemetry(self, folder: Path) -> Telemetry:
        return Telemetry(folder, 50, lambda: 1000.0 + self.seconds, lambda: NOON + timedelta(seconds=self.seconds))


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


def told(telemetry: Telemetry, *events: Event) -> Snapshot:
    for event in events:
        telemetry(event)
    return telemetry.snapshot()


def on_disk(folder: Path) -> Snapshot:
    found = read_snapshot(folder)
    assert found is not None
    return found


# ---- what the events add up to ---------------------------------------------------------------------------------------


def test_stages_have_units_a_rate_and_a_time_left(tmp_path: Path, clocks: Clocks) -> None:
    telemetry = clocks.telemetry(tmp_path)
    assert told(telemetry, RunStarted("r", "s", "o", resumed=False)).stage is None
    began = told(telemetry, StageStarted("encode", total=30, done=10))
    assert began.stage == "encode"
    assert began.stages == {"encode": {"stage_done_units": 10, "stage_total_units": 30}}  # no rate yet
    clocks.seconds = 2.0
    assert told(telemetry, UnitsDone("encode", 10)).stages["encode"] == {
        "stage_done_units": 20, "stage_total_units": 30, "stage_units_per_second": 5.0, "stage_left_seconds": 2.0
    }  # fmt: skip
    finished = told(telemetry, StageFinished("encode", 2.0), StageStarted("sample", total=100, done=0))
    assert finished.stage == "sample"
    assert finished.stages["encode"] == {
        "stage_done_units": 30, "stage_total_units": 30, "stage_units_per_second": 0.0, "stage_left_seconds": 0.0
    }  # fmt: skip
    assert finished.stages["sample"] == {"stage_done_units": 0, "stage_total_units": 100}


def test_steps_tiles_exchanges_and_commits_are_added_up(tmp_path: Path, clocks: Clocks) -> None:
    figures = told(
        clocks.telemetry(tmp_path),
        StepTaken(step=1, seconds=3.0, tiles=200, predicting_s=5.5, sent_bytes=1000),
        StepTaken(step=2, seconds=2.5, tiles=200, predicting_s=5.0, sent_bytes=1000),
        Committed(step=2, steps=50, seconds=0.75),
    ).figures
    assert figures == {
        "diffusion_step": 2, "diffusion_steps": 50, "step_seconds": 2.5, "workers": 0, "steps_taken_total": 2,
        "predicted_tiles_total": 400, "predicting_seconds_total": 10.5, "exchanged_bytes_total": 2000,
        "commits_total": 1, "commit_seconds_total": 0.75, "workers_lost_total": 0, "starts_total": 1
    }  # fmt: skip


def test_lost_steps_are_taken_back_from_what_is_done_but_not_from_the_totals(tmp_path: Path, clocks: Clocks) -> None:
    telemetry = clocks.telemetry(tmp_path)
    told(telemetry, StageStarted("sample", total=500, done=0))
    for step in (1, 2, 3):
        told(telemetry, StepTaken(step, 1.0, 9, 1.0, 0), UnitsDone("sample", 10))
    told(telemetry, Committed(3, 50, 0.1), StepTaken(4, 1.0, 9, 1.0, 0), UnitsDone("sample", 10))
    snapshot = told(telemetry, WorkerLeft(0, "killed"), UnitsDone("sample", -10))
    assert snapshot.stages["sample"]["stage_done_units"] == 30
    assert snapshot.figures["steps_taken_total"] == 4
    assert "diffusion_step" not in snapshot.figures
    again = told(telemetry, StepTaken(4, 1.0, 9, 1.0, 0), UnitsDone("sample", 10))
    assert again.stages["sample"]["stage_done_units"] == 40
    assert (again.figures["diffusion_step"], again.figures["steps_taken_total"]) == (4, 5)


def test_workers_come_and_go(tmp_path: Path, clocks: Clocks) -> None:
    telemetry = clocks.telemetry(tmp_path)
    told(telemetry, WorkerJoined(0, "cuda:0", "a"))
    clocks.seconds = 60.0
    snapshot = told(telemetry, WorkerJoined(1, "cuda:0", "b"))
    assert [(w.worker, w.device, w.node, w.since) for w in snapshot.workers] == [
        (0, "cuda:0", "a", NOON), (1, "cuda:0", "b", NOON + timedelta(minutes=1))
    ]  # fmt: skip
    assert snapshot.figures["workers"] == 2
    snapshot = told(telemetry, WorkerLeft(0, "it was killed"))
    assert [worker.worker for worker in snapshot.workers] == [1]
    assert (snapshot.figures["workers"], snapshot.figures["workers_lost_total"]) == (1, 1)


def test_the_last_few_warnings_are_kept(tmp_path: Path, clocks: Clocks) -> None:
    telemetry = clocks.telemetry(tmp_path)
    told(telemetry, Notice("all is well"), *(Notice(f"take care of {n}", warning=True) for n in range(7)))
    messages = [warning.message for warning in telemetry.snapshot().warnings]
    assert messages == [f"take care of {n}" for n in range(7 - KEPT_WARNINGS, 7)]


def test_figures_are_those_of_the_table(tmp_path: Path, clocks: Clocks) -> None:
    """After a little of everything, each is there."""
    snapshot = told(clocks.telemetry(tmp_path), StageStarted("sample", 10, 0), StepTaken(1, 1.0, 1, 1.0, 1),
                    UnitsDone("sample", 1), Committed(1, 10, 0.1), StageFinished("sample", 1.0))  # fmt: skip
    named = {*snapshot.figures}.union(*snapshot.stages.values())
    assert named == {figure.name for figure in FIGURES}
    assert {figure.name for figure in FIGURES if figure.of_stage} == {*snapshot.stages["sample"]}
    for figure in FIGURES:
        assert figure.name.endswith("_total") == (figure.kind == "counter")
        assert figure.unit.replace(" ", "_").removesuffix("s") in figure.name
        assert figure.description.endswith(".")
        assert [stage for stage, _ in snapshot.values(figure)] == ["sample" if figure.of_stage else None]


def test_events_may_come_from_many_threads(tmp_path: Path, clocks: Clocks) -> None:
    telemetry = clocks.telemetry(tmp_path)

    def work() -> None:
        for step in range(200):
            telemetry(StepTaken(step, 1.0, 1, 1.0, 1))
            telemetry.snapshot()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert telemetry.snapshot().figures["predicted_tiles_total"] == 800


# ---- the file --------------------------------------------------------------------------------------------------------


def test_the_file_says_who_wrote_it_and_when(tmp_path: Path, clocks: Clocks) -> None:
    telemetry = clocks.telemetry(tmp_path)
    clocks.seconds = 7.0
    telemetry.write()
    assert [path.name for path in tmp_path.iterdir()] == ["progress.json"]
    snapshot = on_disk(tmp_path)
    assert snapshot == telemetry.snapshot()
    assert (snapshot.state, snapshot.host, snapshot.pid) == ("running", platform.node(), os.getpid())
    assert (snapshot.started_at, snapshot.written_at) == (NOON, NOON + timedelta(seconds=7))


def test_totals_go_on_with_the_next_start(tmp_path: Path, clocks: Clocks) -> None:
    first = clocks.telemetry(tmp_path)
    told(first, StepTaken(1, 1.0, 20, 1.0, 300), WorkerJoined(0, "cpu", "a"), WorkerLeft(0, "x"),
         Notice("worker 0 is lost", warning=True))  # fmt: skip
    first.write()
    second = clocks.telemetry(tmp_path)
    snapshot = told(second, StepTaken(1, 1.0, 20, 1.0, 300))
    assert snapshot.figures["starts_total"] == 2
    assert snapshot.figures["predicted_tiles_total"] == 40
    assert snapshot.figures["workers_lost_total"] == 1
    assert [warning.message for warning in snapshot.warnings] == ["worker 0 is lost"]
    assert (snapshot.stage, snapshot.workers) == (None, ())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": "odd"}', "\xff\x00"])
def test_a_file_that_cannot_be_understood_is_none(tmp_path: Path, clocks: Clocks, text: str) -> None:
    (tmp_path / NAME).write_bytes(text.encode("latin-1"))
    assert read_snapshot(tmp_path) is None
    assert clocks.telemetry(tmp_path).snapshot().figures["starts_total"] == 1


def test_what_a_later_version_adds_to_the_file_does_no_harm(tmp_path: Path, clocks: Clocks) -> None:
    clocks.telemetry(tmp_path).write()
    known = json.loads((tmp_path / NAME).read_text())
    known["figures"]["new_total"] = 3
    (tmp_path / NAME).write_text(json.dumps({**known, "more": 1}))
    assert on_disk(tmp_path).pid == os.getpid()
    clocks.telemetry(tmp_path).write()


def test_what_cannot_be_written_is_left_out(tmp_path: Path, clocks: Clocks, monkeypatch: pytest.MonkeyPatch) -> None:
    telemetry = clocks.telemetry(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        telemetry.write()
    assert list(tmp_path.iterdir()) == []
    telemetry.write()
    assert on_disk(tmp_path).state == "running"
    gone = clocks.telemetry(tmp_path / "gone")
    gone.write()
    assert not (tmp_path / "gone").exists()


def test_it_is_written_at_once_when_stages_or_workers_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry_module, "WRITE_EVERY_S", 3600.0)
    written = threading.Event()

    class Watched(Telemetry):
        def write(self) -> None:
            super().write()
            written.set()

    with Watched(tmp_path, 50) as telemetry:
        for event in (None, StageStarted("encode", 4, 0), WorkerJoined(0, "cpu", "a"), WorkerLeft(0, "x")):
            if event is not None:
                telemetry(event)
            assert written.wait(30)
            written.clear()
        assert on_disk(tmp_path).state == "running"
    assert on_disk(tmp_path).state == "finished"
    assert on_disk(tmp_path).figures["workers_lost_total"] == 1


@pytest.mark.parametrize(
    ("error", "state", "why"),
    [
        pytest.param(Stopped("stopped; what is finished is kept"), "stopped", None, id="stopped"),
        pytest.param(StoreFailed("the disk is full\nhint: make room"), "failed", "the disk is full", id="failed"),
        pytest.param(Death(), "failed", "Death", id="without-a-word"),
    ],
)
def test_the_file_says_how_a_run_ended(
    tmp_path: Path, clocks: Clocks, error: BaseException, state: str, why: str | None
) -> None:
    telemetry = clocks.telemetry(tmp_path)
    told(telemetry, StageStarted("encode", 10, 0), WorkerJoined(0, "cpu", "a"))
    clocks.seconds = 1.0
    told(telemetry, UnitsDone("encode", 5))
    with pytest.raises(type(error)), telemetry:
        raise error
    snapshot = on_disk(tmp_path)
    assert (snapshot.state, snapshot.why, snapshot.workers) == (state, why, ())
    assert snapshot.stages["encode"] == {
        "stage_done_units": 5, "stage_total_units": 10, "stage_units_per_second": 0.0
    }  # fmt: skip
    assert snapshot.figures["workers"] == 0


# ---- publishing ------------------------------------------------------------------------------------------------------


def test_figures_are_published_while_there_is_somebody_to(tmp_path: Path, clocks: Clocks) -> None:
    telemetry = clocks.telemetry(tmp_path)
    published: list[Snapshot] = []
    with telemetry.published_by(published.append):
        told(telemetry, StageStarted("encode", 10, 0))
        telemetry.write()
        told(telemetry, UnitsDone("encode", 10), StageFinished("encode", 1.0))
    assert [snapshot.stages["encode"]["stage_done_units"] for snapshot in published] == [0, 10]
    telemetry.write()
    assert len(published) == 2


def test_a_cluster_that_takes_no_figures_does_no_harm(tmp_path: Path, clocks: Clocks) -> None:
    telemetry = clocks.telemetry(tmp_path)

    def refuse(snapshot: Snapshot) -> None:
        raise RuntimeError("Ray is gone")

    with telemetry.published_by(refuse):
        telemetry.write()
    assert on_disk(tmp_path).state == "running"


# ---- of whole runs ---------------------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {"grid": {"block": 32}, "sampling": {"steps": 3, "patch": 64}}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_raster(tmp_path_factory.mktemp("source") / "source.tif", pattern(1, 140, 150, "uint16"))


def test_the_figures_of_a_run(source: Path, tmp_path: Path) -> None:
    config = rehearsal(source, tmp_path / "target.tif", **OPTIONS, run={"keep": True})
    listening = Listening()
    run(config, listening)
    snapshot = on_disk(config.folder)
    assert snapshot.state == "finished"
    stages = {event.stage: event.total for event in listening.events if isinstance(event, StageStarted)}
    assert {name: stage["stage_done_units"] for name, stage in snapshot.stages.items()} == stages
    steps = [event for event in listening.events if isinstance(event, StepTaken)]
    assert snapshot.figures["predicted_tiles_total"] == sum(step.tiles for step in steps) > 0
    assert (snapshot.figures["steps_taken_total"], snapshot.figures["diffusion_step"]) == (3, 3)
    assert snapshot.figures["starts_total"] == 1


def test_a_run_that_was_stopped_says_so_and_counts_its_starts(source: Path, tmp_path: Path) -> None:
    config = rehearsal(source, tmp_path / "target.tif", **OPTIONS, run={"keep": True, "commit_seconds": 0})
    listening = Listening(stop_after=1 + 9 + 1)
    with pytest.raises(Stopped):
        run(config, listening, StopWhen(listening))
    stopped = on_disk(config.folder)
    assert (stopped.state, stopped.stage, stopped.figures["steps_taken_total"]) == ("stopped", "sample", 1)
    run(config)
    finished = on_disk(config.folder)
    assert (finished.state, finished.figures["steps_taken_total"]) == ("finished", 3)
    assert finished.figures["starts_total"] == 2
    assert finished.started_at > stopped.started_at


def test_a_run_on_a_disk_without_room_for_figures_gives_the_same_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(rehearsal(source, tmp_path / "a.tif", **OPTIONS)).read_bytes()
    write_text = Path.write_text

    def refuse(path: Path, *args: Any, **options: Any) -> int:
        if path.name.startswith(NAME):
            raise OSError(28, "No space left on device")
        return write_text(path, *args, **options)

    monkeypatch.setattr(Path, "write_text", refuse)
    config = rehearsal(source, tmp_path / "b.tif", **OPTIONS, run={"keep": True})
    assert run(config).read_bytes() == expected
    assert not (config.folder / NAME).exists()


def test_the_file_makes_no_folder_that_of_a_run(source: Path, tmp_path: Path) -> None:
    config = rehearsal(source, tmp_path / "target.tif", **OPTIONS)
    config.folder.mkdir()
    (config.folder / NAME).write_text("{}")
    with pytest.raises(RunMismatch, match="not the folder of a run"):
        run(config)
    assert (config.folder / NAME).read_text() == "{}"


def test_what_an_interrupted_write_left_is_swept_away(tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.123.tmp").write_text("{")
    RunStore(tmp_path).sweep()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_run_that_was_not_to_be_kept(source: Path, tmp_path: Path) -> None:
    config = rehearsal(source, tmp_path / "target.tif", **OPTIONS)
    run(config)
    assert [path.name for path in tmp_path.iterdir()] == ["target.tif"]
