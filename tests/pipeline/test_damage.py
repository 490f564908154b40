"""Stored data that are not what was written: they are found, computed again, and leave no trace in the output."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

from pipeline.config import Config
from pipeline.errors import Damaged, WorkFailed
from pipeline.events import Event, Notice, StageFinished, StageStarted, UnitsDone
from pipeline.grid import Blocks, Index
from pipeline.network import Nearest
from pipeline.plan import Plan, make_plan, read_plan
from pipeline.run import REPAIRS, run
from pipeline.status import newest_slot
from pipeline.store import RunStore
from pipeline.verify import verify_run
from stablesr.aggregation import in_batches
from stablesr.schedule import prediction_of
from tests.pipeline.raster.rasters import edited
from tests.pipeline.rasters import Death, Listening, pattern, rehearsal, write_raster

STREAMED = 1e-4
"""GiB of memory that are too few for the latents of a canvas."""

OPTIONS: dict[str, Any] = {"grid": {"block": 32}, "sampling": {"steps": 2, "patch": 64}}

READ_BY = {
    "source/0": "encode",
    "mask": "encode",
    "lr_latents/0": "sample",
    "latents/0/a": "decode",
    "output/0": "overviews",
    "overviews/1": "export",
    "overview_masks/1": "export",
}
"""Every array of a run, and the stage that is the first to read it."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a mask, and so large that its output of 560 x 600 pixels, 3 x 3 blocks, has overviews."""
    path = write_raster(tmp_path_factory.mktemp("source") / "source.tif", pattern(1, 140, 150, "uint16"))
    mask = np.ones((140, 150), bool)
    mask[30:60, 20:70] = False
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), edited(path) as dataset:
        dataset.write_mask(mask)
    return path


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return run(rehearsal(source, tmp_path_factory.mktemp("undisturbed") / "target.tif", **OPTIONS)).read_bytes()


@pytest.fixture
def config(source: Path, tmp_path: Path) -> Config:
    return rehearsal(source, tmp_path / "target.tif", **OPTIONS)


class DyingAt(Listening):
    """Dies when a stage begins."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage = stage

    def __call__(self, event: Event) -> None:
        super().__call__(event)
        if isinstance(event, StageStarted) and event.stage == self.stage:
            raise Death


class DyingAtUnit(Listening):
    """Dies when so many units of a stage are done."""

    def __init__(self, stage: str, n: int) -> None:
        super().__init__()
        self.stage, self.left = stage, n

    def __call__(self, event: Event) -> None:
        super().__call__(event)
        if isinstance(event, UnitsDone) and event.stage == self.stage:
            self.left -= 1
            if not self.left:
                raise Death


def stopped_at(config: Config, stage: str) -> RunStore:
    with pytest.raises(Death):
        run(config, DyingAt(stage))
    return RunStore(config.folder)


def file_of(config: Config, array: str, index: Index = (0, 0)) -> Path:
    return config.folder / "data.zarr" / array / "c" / "0" / str(index[0]) / str(index[1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x20
    path.write_bytes(content)


def warnings_of(listening: Listening) -> list[str]:
    return [event.message for event in listening.events if isinstance(event, Notice) and event.warning]


HARM = pytest.mark.parametrize("harm", [pytest.param(flip, id="flipped-bit"), pytest.param(Path.unlink, id="no-file")])


@HARM
@pytest.mark.parametrize("array", READ_BY)
def test_what_is_damaged_between_two_starts_is_computed_again(
    config: Config, undisturbed: bytes, array: str, harm: Callable[[Path], None]
) -> None:
    stopped_at(config, READ_BY[array])
    harm(file_of(config, array))
    listening = Listening()
    target = run(config, listening)
    (warning,) = warnings_of(listening)
    assert warning.startswith(f"block (0, 0) of {array} ")
    assert warning.endswith(": it is computed again")
    assert target.read_bytes() == undisturbed
    assert not config.folder.exists()


def test_only_what_is_damaged_is_computed_again(config: Config) -> None:
    stopped_at(config, "decode")
    flip(file_of(config, "source/0"))  # of which everything is made, but everything else is done
    flip(file_of(config, "lr_latents/0", (1, 1)))  # which nobody needs any more
    listening = Listening()
    run(config, listening)
    assert len(warnings_of(listening)) == 1
    units = [event.stage for event in listening.events if isinstance(event, UnitsDone)]
    assert units.count("ingest") == 1
    assert "encode" not in units
    assert "sample" not in units


def test_damage_in_many_places_at_once(config: Config, undisturbed: bytes) -> None:
    stopped_at(config, "decode")
    for array, index in (("source/0", (0, 0)), ("mask", (0, 0)), ("latents/0/a", (2, 2)), ("latents/0/a", (0, 1))):
        flip(file_of(config, array, index))
    flip(file_of(config, "lr_latents/0", (1, 1)))  # met only because sampling is repeated
    listening = Listening()
    assert run(config, listening).read_bytes() == undisturbed
    named = {line.partition(" of ")[2].split()[0] for line in warnings_of(listening)}
    assert named == {"source/0", "latents/0/a", "lr_latents/0"}  # the mask was mended with its block


def test_damage_that_happens_while_the_run_is_at_work(config: Config, undisturbed: bytes) -> None:
    harmed = []

    class Harming(Listening):
        def __call__(self, event: Event) -> None:
            super().__call__(event)
            for array, stage in READ_BY.items():
                if isinstance(event, StageStarted) and event.stage == stage and array not in harmed:
                    harmed.append(array)
                    flip(file_of(config, array))

    listening = Harming()
    assert run(config, listening).read_bytes() == undisturbed
    assert harmed == [*READ_BY]
    assert len(warnings_of(listening)) == len(READ_BY) - 2  # a block and its mask are mended together


@pytest.mark.parametrize("array", ["lr_latents/0", "latents/0/a", "output/0", "overview_masks/1"])
def test_damage_that_comes_back_every_time_ends_the_run(
    config: Config, undisturbed: bytes, monkeypatch: pytest.MonkeyPatch, array: str
) -> None:
    write = RunStore.write

    def bad_disk(store: RunStore, name: str, blocks: Blocks, index: Index, values: Any) -> int:
        expected = write(store, name, blocks, index, values)
        if (name, index) == (array, (0, 0)):
            flip(file_of(config, name, index))
        return expected

    listening = Listening()
    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "write", bad_disk)
        with pytest.raises(Damaged, match=rf"block \(0, 0\) of {array}") as caught:
            run(config, listening)
    assert (caught.value.array, caught.value.index) == (array, (0, 0))
    assert len(warnings_of(listening)) == REPAIRS
    assert run(config).read_bytes() == undisturbed  # on another disk


@pytest.fixture
def wilful(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network whose picture depends on every step that was taken."""

    def predict_tiles(
        network: Nearest, tiles: Any, frame: Any, x: Any, latent: Any, time: Any, prompt: Any, batch: int
    ) -> Any:
        def predict(x: Any, latent: Any) -> Any:
            return prediction_of(x, latent + 0.3 * (9 * x).sin(), time, network.config.diffusion.parameterization)

        return in_batches(predict, tiles, frame, (x, latent), batch)

    monkeypatch.setattr(Nearest, "predict_tiles", predict_tiles)


@pytest.fixture
def half_streamed(wilful: None, source: Path, tmp_path: Path) -> Callable[[int], tuple[Config, bytes]]:
    """A run that died when so many steps and two shares of the next were streamed; and what it should become."""

    def start(steps: int) -> tuple[Config, bytes]:
        more = {"grid": {"block": 64}, "sampling": {"steps": 3, "patch": 64, "overlap": 8}, "run": {"memory": STREAMED}}
        expected = run(rehearsal(source, tmp_path / "undisturbed.tif", **more)).read_bytes()
        config = rehearsal(source, tmp_path / "target.tif", **more)
        n_shares = len(make_plan(config).rectangles([1.0])[0])
        assert n_shares > 2
        with pytest.raises(Death):
            run(config, DyingAtUnit("sample", steps * n_shares + 2))
        store = RunStore(config.folder)
        assert newest_slot(store, 0)[1] == steps
        assert store.n_marked(f"stream/0/{steps + 1}") == 2
        return config, expected

    return start


def test_a_half_streamed_step_is_not_taken_for_the_same_step_from_another_start(
    half_streamed: Callable[[int], tuple[Config, bytes]],
) -> None:
    """What it started from is lost: sampling begins again, and comes to that step with other latents in its place."""
    config, expected = half_streamed(2)
    flip(file_of(config, "latents/0/b", (1, 1)))
    listening = Listening()
    assert run(config, listening).read_bytes() == expected
    assert len(warnings_of(listening)) == 1


def test_a_half_streamed_step_is_forgotten_where_a_commit_is_written(
    half_streamed: Callable[[int], tuple[Config, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next start has memory enough (or workers), and dies before its commit counts; the third has not."""
    config, expected = half_streamed(1)
    mark = RunStore.mark

    def dying_mark(store: RunStore, unit: str, payload: Any) -> None:
        if unit == "sample/0/b":
            raise Death
        mark(store, unit, payload)

    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "mark", dying_mark)
        with pytest.raises(Death):
            run(config.model_copy(update={"run": config.run.model_copy(update={"memory": 4.0})}))
    assert run(config).read_bytes() == expected


# What has no checksum of its own


ADAIN = {**OPTIONS, "sampling": {**OPTIONS["sampling"], "color": "adain"}}
"""Whose sums over the picture are in markers alone."""


@pytest.fixture(scope="module")
def undisturbed_adain(source: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return run(rehearsal(source, tmp_path_factory.mktemp("adain") / "target.tif", **ADAIN)).read_bytes()


@pytest.fixture(scope="module")
def at_export(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that is finished but for the file."""
    config = rehearsal(source, tmp_path_factory.mktemp("adain") / "target.tif", **ADAIN)
    stopped_at(config, "export")
    return config.folder


@pytest.fixture
def stopped_adain(source: Path, at_export: Path, tmp_path: Path) -> Config:
    config = rehearsal(source, tmp_path / "target.tif", **ADAIN)
    shutil.copytree(at_export, config.folder)
    return config


@pytest.mark.parametrize(
    "unit",
    ["ingest/0-0", "stretch", "encode/0/1-1", "sample/0/a", "statistics/0/0-0", "decode/0/0-2", "overviews/1/0-0"],
)
def test_a_damaged_marker_says_nothing(stopped_adain: Config, undisturbed_adain: bytes, unit: str) -> None:
    config, expected = stopped_adain, undisturbed_adain
    marker = config.folder / "done" / f"{unit}.json"
    marker.write_text(marker.read_text().replace("1", "2", 1))
    shutil.rmtree(config.folder / "done" / "decode")  # what is made of it is made again
    assert run(config).read_bytes() == expected


def test_a_damaged_description_of_an_array_is_mended(config: Config, undisturbed: bytes) -> None:
    stopped_at(config, "sample")
    for array in ("lr_latents/0", "output/0"):
        path = config.folder / "data.zarr" / array / "zarr.json"
        path.write_text(path.read_text()[:99])
    assert run(config).read_bytes() == undisturbed


def test_a_file_that_is_not_what_it_should_be_is_written_again(config: Config, undisturbed: bytes) -> None:
    part = Path(config.output + ".part")

    def cut_short(event: Event) -> None:
        if isinstance(event, StageFinished) and event.stage == "export":
            part.write_bytes(part.read_bytes()[:-1000])

    with pytest.raises(WorkFailed, match="is not the cog it should be(.|\n)*writes it again"):
        run(config, cut_short)
    assert not Path(config.output).exists()
    assert run(config).read_bytes() == undisturbed
    assert not part.exists()


# A disk that fails, and an end at the very end


@pytest.mark.parametrize("nth", [1, 11, 25])
def test_a_full_disk_is_one_error_and_the_run_goes_on_when_there_is_room(
    config: Config, undisturbed: bytes, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    replace, n = Path.replace, 0
    config = config.model_copy(update={"run": config.run.model_copy(update={"patience_seconds": 0.0})})

    def full(path: Path, target: Any) -> Any:  # of Zarr, which gives every chunk its name so
        nonlocal n
        n += 1
        if n >= nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(WorkFailed, match=f"in {config.folder} failed: No space left on device\n.*make room"):
            run(config)
    assert not Path(config.output).exists()
    assert run(config).read_bytes() == undisturbed
    assert sorted(path.name for path in config.folder.parent.iterdir()) == ["target.tif"]


@pytest.mark.parametrize("name", ["target.tif", "target.zarr"])
def test_an_end_while_the_old_output_makes_room_for_the_new(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    target, replace = tmp_path / name, os.replace
    config = rehearsal(source, target, **OPTIONS, file={"overwrite": True})
    run(config)

    def dying_replace(a: Any, b: Any) -> None:
        if Path(b) == target:
            raise Death
        replace(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying_replace)
        with pytest.raises(Death):
            run(config)
    assert run(config) == target
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_output_that_cannot_get_its_name_is_kept(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def forbidden(a: Any, b: Any) -> None:
        if Path(b) == Path(config.output):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        replace(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", forbidden)
        with pytest.raises(WorkFailed, match="is complete, but cannot be renamed to target.tif: Permission denied"):
            run(config)
    listening = Listening()
    run(config, listening)
    assert not [event for event in listening.events if isinstance(event, UnitsDone)]


# Looking for it


def plan_of(config: Config) -> Plan:
    plan = read_plan(config.folder)
    assert plan is not None
    return plan


def test_verifying_finds_every_damaged_block_names_it_and_takes_it_back(
    source: Path, tmp_path: Path, undisturbed: bytes
) -> None:
    config = rehearsal(source, tmp_path / "target.tif", **OPTIONS, run={"keep": True})
    run(config)
    listening = Listening()
    assert verify_run(config.folder, listening) == []
    started = next(event for event in listening.events if isinstance(event, StageStarted))
    checked = sum(event.n for event in listening.events if isinstance(event, UnitsDone))
    blocks = plan_of(config).canvas.blocks
    # source and mask; lr_latents and latents; output; overviews and their masks
    assert started.total == checked == 2 + 2 * len(blocks) + 9 + 2 * len(plan_of(config).level_blocks(1))

    for number, array in enumerate(READ_BY):
        (flip if number % 2 else Path.unlink)(file_of(config, array))
    left, right = (file_of(config, "lr_latents/0", (1, column)) for column in (0, 1))
    contents = left.read_bytes(), right.read_bytes()
    left.write_bytes(contents[1])  # blocks that changed places are sound, but in the wrong place
    right.write_bytes(contents[0])
    listening = Listening()
    found = verify_run(config.folder, listening)
    assert warnings_of(listening) == found
    wanted = {f"block (0, 0) of {array} " for array in READ_BY}
    wanted |= {f"block (1, {column}) of lr_latents/0 is not what was written" for column in (0, 1)}
    assert len(found) == len(wanted)
    assert all(any(line.startswith(start) for line in found) for start in wanted)
    assert verify_run(config.folder) == []  # what was damaged no longer counts as done

    Path(config.output).unlink()
    listening = Listening()
    assert run(config, listening).read_bytes() == undisturbed
    assert warnings_of(listening) == []
    assert verify_run(config.folder) == []


def test_verifying_a_run_that_is_at_work_touches_nothing(config: Config) -> None:
    found = []

    def listener(event: Event) -> None:
        if isinstance(event, StageStarted) and event.stage == "sample" and not found:
            flip(file_of(config, "lr_latents/0"))
            found.extend(verify_run(config.folder))
            assert RunStore(config.folder).marker("encode/0/0-0") is not None

    run(config, listener)
    assert [line.partition(" of ")[2].split()[0] for line in found] == ["lr_latents/0"]


def test_verifying_does_not_call_damaged_what_the_run_takes_back_meanwhile(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot is written over while it is read."""
    stopped_at(config, "decode")
    check = RunStore.check

    def late(store: RunStore, name: str, *args: Any) -> None:
        if name == "latents/0/a":
            flip(file_of(config, name, args[1]))
            store.unmark("sample/0/a")
        check(store, name, *args)

    monkeypatch.setattr(RunStore, "check", late)
    assert verify_run(config.folder) == []


def test_verifying_a_stopped_run_sees_the_half_done_step(tmp_path: Path, source: Path) -> None:
    config = rehearsal(source, tmp_path / "target.tif", **OPTIONS, run={"memory": STREAMED})
    with pytest.raises(Death):
        run(config, DyingAtUnit("sample", 2))
    assert verify_run(config.folder) == []
    flip(file_of(config, "latents/0/a", (0, 0)))
    (line,) = verify_run(config.folder)
    assert line.startswith("block (0, 0) of latents/0/a fails its checksum")
    assert verify_run(config.folder) == []
