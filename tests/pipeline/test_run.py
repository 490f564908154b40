"""The pipeline end to end: with a network whose result is known, and against StableSR in memory."""

import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline
from pipeline import run as run_module
from pipeline.errors import ConfigError, OutputError, RunMismatch
from pipeline.events import Committed, Event, Notice, RunStarted, StageStarted, UnitsDone
from pipeline.run import run
from pipeline.stages.sample import Sampler
from pipeline.worker import Worker
from pipeline.workers import LocalWorkers
from stablesr import PRESETS
from stablesr.loading import random_model
from tests.pipeline.rasters import (
    Death,
    Listening,
    pattern,
    read_raster,
    rehearsal,
    repeated,
    run_in_pieces,
    upscaled,
    write_raster,
)

STREAMED = 1e-4
"""GiB of memory that are too few for the latents of any canvas."""


@settings(max_examples=25)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    scale=st.integers(1, 8),
    bands=st.integers(1, 5),
    dtype=st.sampled_from(["uint8", "uint16", "int16", "float32"]),
    overlap=st.integers(0, 63),
    block=st.sampled_from([16, 32, 64]),
    patch=st.integers(16, 64),
    batch=st.integers(1, 3),
    memory=st.sampled_from([4.0, STREAMED]),
)
def test_repeating_pixels_through_every_stage_is_repeating_pixels(
    height: int, width: int, scale: int, bands: int, dtype: str, memory: float, block: int, **sampling: int
) -> None:
    values = pattern(bands, height, width, dtype)
    with tempfile.TemporaryDirectory() as name:
        source = write_raster(Path(name) / "source.tif", values)
        target = upscaled(
            source, Path(name) / "target.tif", scale=scale, sampling=sampling, grid={"block": block},
            run={"memory": memory},
        )  # fmt: skip
    expected = repeated(values, scale)
    if dtype == "float32":
        np.testing.assert_allclose(target, expected, rtol=0, atol=2e-6)
    else:
        assert target.dtype == values.dtype
        assert np.count_nonzero(target != expected) == 0


@pytest.mark.parametrize(
    ("height", "width", "bands", "scale", "sampling"),
    [
        pytest.param(40, 56, 3, 4, {"steps": 2}, id="smaller-than-a-tile"),
        pytest.param(40, 56, 3, 4, {"steps": 1, "color": "adain"}, id="adain"),
        pytest.param(40, 56, 3, 4, {"steps": 1, "color": "none"}, id="no-colour-correction"),
        pytest.param(40, 56, 1, 4, {"steps": 1}, id="one-band"),
        pytest.param(40, 56, 1, 4, {"steps": 1, "color": "adain"}, id="one-band-adain"),
        pytest.param(150, 168, 3, 4, {"steps": 2, "batch": 2, "sampler": "ddim", "eta": 0.5}, id="several-tiles"),
        pytest.param(75, 100, 3, 7, {"steps": 1, "posterior": "sample", "start": "noise", "patch": 64}, id="odd-scale"),
    ],
)
def test_the_pipeline_gives_what_stablesr_gives_in_memory(
    tmp_path: Path, height: int, width: int, bands: int, scale: int, sampling: dict[str, Any]
) -> None:
    values = pattern(bands, height, width, "float32")
    source = write_raster(tmp_path / "source.tif", values)
    config = rehearsal(
        source, tmp_path / "target.tif", scale=scale, model={"weights": "tiny", "device": "cpu"}, grid={"block": 32},
        radiometry={"stretch": (0.0, 1.0)}, sampling={**sampling, "seed": 7},
    )  # fmt: skip
    target = read_raster(run(config))
    model = random_model(PRESETS["tiny"])
    model.pack()
    image = values.transpose(1, 2, 0) if bands == 3 else values[0]
    expected = model.upscale(image, scale, seed=7, **sampling)
    assert isinstance(expected, np.ndarray)
    # the file keeps floats beyond [0, 1], which an image in memory cannot
    clipped = np.clip(target, 0.0, 1.0)
    np.testing.assert_allclose(clipped.transpose(1, 2, 0) if bands == 3 else clipped[0], expected, rtol=0, atol=1e-5)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Four bands, two layers, six blocks of a target of 384 x 260 pixels."""
    return write_raster(tmp_path / "source.tif", pattern(4, 65, 96, "uint16"))


def options(**more: Any) -> dict[str, Any]:
    return {"grid": {"block": 32}, "sampling": {"steps": 3, "patch": 32}, **more}


def many_tiles(micro: str, **more: Any) -> dict[str, Any]:
    """Options under which a small raster has many tiles, patches and blocks."""
    return {
        "model": {"weights": micro, "device": "cpu"},
        "sampling": {"patch": 16, "overlap": 6},
        "grid": {"block": 8},
        **more,
    }


@pytest.fixture
def one_band(tmp_path: Path) -> Path:
    return write_raster(tmp_path / "band.tif", pattern(1, 37, 58, "uint16"))


@pytest.mark.parametrize("n", [2, 3, 5])
def test_workers_leave_no_trace(
    one_band: Path, tmp_path: Path, micro: str, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    alone = upscaled(one_band, tmp_path / "alone.tif", **many_tiles(micro))
    monkeypatch.setattr(
        run_module, "_make_workers", lambda plan, folder, stopping: LocalWorkers(plan, folder, n, stopping)
    )
    together = upscaled(one_band, tmp_path / f"{n}.tif", **many_tiles(micro))
    np.testing.assert_array_equal(together, alone)


def test_streaming_from_disk_gives_the_same_picture(one_band: Path, tmp_path: Path, micro: str) -> None:
    resident = upscaled(one_band, tmp_path / "resident.tif", **many_tiles(micro))
    listening = Listening()
    run(rehearsal(one_band, tmp_path / "streamed.tif", **many_tiles(micro, run={"memory": 1e-5})), listening)
    np.testing.assert_array_equal(read_raster(tmp_path / "streamed.tif"), resident)
    assert [event.step for event in listening.events if isinstance(event, Committed)] == [1, 2, 3]


def test_blocks_and_batches_leave_no_trace(one_band: Path, tmp_path: Path, micro: str) -> None:
    expected = upscaled(one_band, tmp_path / "a.tif", **many_tiles(micro))
    for block in (16, 64):
        more = many_tiles(micro, grid={"block": block})
        np.testing.assert_array_equal(upscaled(one_band, tmp_path / f"{block}.tif", **more), expected)
    more = many_tiles(micro)
    more["sampling"]["batch"] = 3
    batched = upscaled(one_band, tmp_path / "batched.tif", **more)
    # another shape, another kernel: the last bits may differ, and with them the rounding of some pixels
    assert np.abs(batched.astype(int) - expected).max() <= 1


class Work:
    """What workers did: how often each unit was marked as finished, and each step taken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.units: Counter[str] = Counter()
        self.die_before: int | None = None
        """Die when this many units were marked, and the data of one more are written."""
        mark, advance = Worker._mark, Sampler.advance

        def counted_mark(worker: Worker, unit: str, payload: dict[str, Any]) -> None:
            if (
                self.die_before is not None
                and sum(1 for u in self.units if not u.startswith("step")) >= self.die_before
            ):
                raise Death
            mark(worker, unit, payload)
            self.units[unit] += 1

        def counted_advance(sampler: Sampler, *args: Any) -> None:
            advance(sampler, *args)
            self.units[f"step {sampler.step} of {sampler.layer} in {sampler.share.region}"] += 1

        monkeypatch.setattr(Worker, "_mark", counted_mark)
        monkeypatch.setattr(Sampler, "advance", counted_advance)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    return Work(monkeypatch)


MEMORY = pytest.mark.parametrize("memory", [pytest.param(4.0, id="resident"), pytest.param(STREAMED, id="streamed")])


@MEMORY
@pytest.mark.parametrize("ending", ["die_after", "stop_after"])
def test_a_run_that_ends_after_every_unit_gives_the_same_file_and_repeats_nothing(
    source: Path, tmp_path: Path, work: Work, ending: str, memory: float
) -> None:
    """Ends by a signal, and by a death between two units, at every place where it can."""
    expected = run(rehearsal(source, tmp_path / "undisturbed.tif", **options(run={"memory": memory})))
    once = dict(work.units)
    assert set(once.values()) == {1}
    assert len({unit.partition("/")[0] for unit in once}) >= 5
    work.units.clear()
    config = rehearsal(source, tmp_path / "target.tif", **options(run={"memory": memory, "commit_seconds": 0}))
    starts = run_in_pieces(config, **{ending: 1})
    assert starts > 10
    assert work.units == once
    assert (tmp_path / "target.tif").read_bytes() == expected.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source.tif", "target.tif", "undisturbed.tif"]


@MEMORY
def test_a_death_between_the_data_and_their_marker_leaves_nothing_half_done(
    source: Path, tmp_path: Path, work: Work, memory: float
) -> None:
    expected = run(rehearsal(source, tmp_path / "undisturbed.tif", **options(run={"memory": memory})))
    n_units = len(work.units)
    config = rehearsal(source, tmp_path / "target.tif", **options(run={"memory": memory, "commit_seconds": 0}))
    for _ in range(n_units):
        work.units.clear()
        work.die_before = 1  # one unit of progress, and one that was in vain
        try:
            run(config)
            break
        except Death:
            continue
    assert (tmp_path / "target.tif").read_bytes() == expected.read_bytes()


def test_the_folder_of_a_finished_run_goes_unless_it_is_to_be_kept(source: Path, tmp_path: Path) -> None:
    run(rehearsal(source, tmp_path / "a.tif", **options()))
    run(rehearsal(source, tmp_path / "b.tif", **options(run={"keep": True})))
    assert not (tmp_path / "a.tif.run").exists()
    assert (tmp_path / "b.tif.run" / "plan.json").is_file()
    # what is kept can be used again: everything is done but the file
    (tmp_path / "b.tif").unlink()
    listening = Listening()
    run(rehearsal(source, tmp_path / "b.tif", **options(run={"keep": True})), listening)
    assert listening.events[0] == RunStarted(
        str(tmp_path / "b.tif.run"), str(source), str(tmp_path / "b.tif"), resumed=True
    )
    assert {event.stage for event in listening.events if isinstance(event, UnitsDone)} == {"export"}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        pytest.param({"sampling": {"steps": 3, "patch": 32, "seed": 5}}, "sampling.seed: 0 then, 5 now", id="seed"),
        pytest.param({"scale": 2}, "scale: 4 then, 2 now", id="scale"),
        pytest.param({"bands": (1, 2, 3)}, "bands: None then", id="bands"),
        pytest.param({"model": {"weights": "tiny", "device": "cpu"}}, "the weights: nearest then, tiny", id="weights"),
    ],
)
def test_a_run_is_not_continued_with_other_options(
    source: Path, tmp_path: Path, changed: dict[str, Any], named: str
) -> None:
    target = tmp_path / "target.tif"
    with pytest.raises(Death):
        run(rehearsal(source, target, **options()), Listening(die_after=3))
    with pytest.raises(RunMismatch, match=re.escape(named)):
        run(rehearsal(source, target, **options() | changed))
    assert (tmp_path / "target.tif.run").is_dir()
    run(rehearsal(source, target, **options()))  # the run is as good as before


def test_a_run_is_not_continued_with_another_source(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.tif"
    with pytest.raises(Death):
        run(rehearsal(source, target, **options()), Listening(die_after=3))
    write_raster(source, pattern(4, 65, 96, "uint16", seed=1))
    with pytest.raises(RunMismatch, match="the source"):
        run(rehearsal(source, target, **options()))


def test_two_drivers_do_not_work_on_one_run(source: Path, tmp_path: Path) -> None:
    config = rehearsal(source, tmp_path / "target.tif", **options())

    def listener(event: Event) -> None:
        if isinstance(event, StageStarted) and event.stage == "encode":
            with pytest.raises(RunMismatch, match="another process"):
                run(config)
            listener.met = True  # type: ignore[attr-defined]

    run(config, listener)
    assert listener.met  # type: ignore[attr-defined]


def test_an_output_is_replaced_only_when_asked_and_only_by_a_finished_one(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.tif"
    target.write_text("precious")
    with pytest.raises(OutputError, match="--overwrite"):
        run(rehearsal(source, target, **options()))
    config = rehearsal(source, target, **options(file={"overwrite": True}))
    with pytest.raises(Death):
        run(config, Listening(die_after=20))
    assert target.read_text() == "precious"
    run(config)
    np.testing.assert_array_equal(read_raster(target), repeated(read_raster(source), 4))


def test_what_cannot_be_done_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    for wrong, error in (
        ({"bands": (9,)}, pipeline.SourceError),
        ({"model": {"weights": "nosuch"}}, ConfigError),
        ({"sampling": {"overlap": 64}}, ConfigError),
        ({"run": {"memory": 1e6}}, pipeline.WontFit),
    ):
        with pytest.raises(error):
            run(rehearsal(source, tmp_path / "target.tif", **wrong))
    with pytest.raises(OutputError, match="no folder"):
        run(rehearsal(source, tmp_path / "nowhere" / "target.tif"))
    with pytest.raises(OutputError, match="is the source"):
        run(rehearsal(source, source, file={"overwrite": True}))
    assert sorted(tmp_path.iterdir()) == before


def test_untrained_weights_are_called_untrained(source: Path, tmp_path: Path) -> None:
    listening = Listening()
    run(rehearsal(source, tmp_path / "target.tif", model={"weights": "tiny", "device": "cpu"}, sampling={"steps": 1},
                  bands=(1,), scale=1), listening)  # fmt: skip
    notices = [event for event in listening.events if isinstance(event, Notice)]
    assert any(notice.warning and "untrained" in notice.message for notice in notices)
