"""How far a run is, read from its folder alone."""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RunMismatch, UserError
from pipeline.events import Event, UnitsDone
from pipeline.plan import read_plan
from pipeline.run import run
from pipeline.status import StageStatus, Status, newest_slot, read_status
from pipeline.store import RunStore
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
