"""What a run will do, by hand; what it refuses; and when it is the same run."""

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from pipeline.cost import count_flops
from pipeline.errors import ConfigError, OutputError, RunMismatch, WontFit
from pipeline.plan import GIB, PROCESS, SOURCE_BYTES, Plan, make_plan, read_plan
from pipeline.run import run
from stablesr import PRESETS
from stablesr.box import Box
from tests.pipeline.rasters import Listening, pattern, rehearsal, write_raster


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As large as the Landsat scene."""
    return write_raster(tmp_path_factory.mktemp("scene") / "scene.tif", np.zeros((3, 718, 791), "uint8"), nodata=0)


def planned(source: Path, folder: Path, **more: Any) -> Plan:
    options: dict[str, Any] = {"model": {"weights": "sd21-512", "device": "cpu"}, "grid": {"block": 256}, **more}
    return make_plan(rehearsal(source, folder / "target.tif", **options))


@pytest.fixture
def plan_of(scene: Path, tmp_path: Path) -> Callable[..., Plan]:
    return lambda **more: planned(scene, tmp_path, **more)


# A known case: 718 x 791 pixels, four times larger, 359 x 396 latents


def test_numbers_by_hand(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of()
    assert plan.canvas.latents == Box(0, 0, 359, 396)
    assert len(plan.canvas.tiles) == 11 * 12
    assert len(plan.canvas.blocks) == len(plan.canvas.output_blocks) == 2 * 2
    assert len(plan.canvas.patches) == 4 * 4
    assert (plan.steps, plan.layers, plan.latent_channels) == (200, ((0, 1, 2),), 4)
    assert plan.tile_steps == 132 * 200
    assert plan.n_levels == 4  # 2872 x 3164, 1436 x 1582, 718 x 791, 359 x 396
    assert (plan.target.height, plan.target.width) == (2872, 3164)
    # x_t before and after a step and the low-resolution latents, 4 channels of 4 bytes
    assert plan.resident_bytes == 359 * 396 * 4 * 4 * 3
    # in the store four whole blocks of 256 x 256
    assert plan.latent_bytes == 4 * 256 * 256 * 4 * 4
    source, target = 3 * 718 * 791, 3 * 2872 * 3164
    assert plan.store_bytes == int(3 * plan.latent_bytes + 0.7 * (source + source // 3 + target * 4 / 3))
    assert plan.file_bytes == int(0.7 * (target * 4 / 3))
    assert plan.network_bytes == plan.flops.parameters * 4 + plan.flops.activations * 4
    assert plan.memory_bytes == int(plan.network_bytes + 4 * GIB + SOURCE_BYTES + 2 * PROCESS)
    assert plan.total_flops == 132 * 200 * plan.flops.tile_step + 16 * (
        plan.flops.encode_patch + plan.flops.decode_patch
    )


@pytest.mark.parametrize(
    ("more", "changed"),
    [
        pytest.param({"scale": 2}, {"n_levels": 3}, id="scale"),
        pytest.param({"bands": (2,)}, {"layers": ((0,),)}, id="bands"),
        pytest.param({"sampling": {"steps": 7}}, {"steps": 7, "tile_steps": 132 * 7}, id="steps"),
        pytest.param(
            {"sampling": {"steps": 7, "negative_prompt": "blur"}}, {"tile_steps": 2 * 132 * 7}, id="guidance-doubles"
        ),
        pytest.param(
            {"sampling": {"steps": 7, "guidance": 5.0}}, {"tile_steps": 132 * 7}, id="no-guidance-without-a-negative"
        ),
        pytest.param(
            {"sampling": {"steps": 7, "negative_prompt": "", "guidance": 1.0}}, {"tile_steps": 132 * 7}, id="off"
        ),
        pytest.param({"file": {"format": "bigtiff"}}, {"n_levels": 1, "compressed": False}, id="plain"),
        pytest.param({"file": {"compression": "none"}}, {"n_levels": 4, "compressed": False}, id="uncompressed"),
    ],
)
def test_what_options_change(plan_of: Callable[..., Plan], more: dict[str, Any], changed: dict[str, Any]) -> None:
    plan = plan_of(**more)
    assert {name: getattr(plan, name) for name in changed} == changed


def test_seven_bands_are_three_layers(tmp_path: Path) -> None:
    source = write_raster(tmp_path / "source.tif", pattern(7, 20, 20, "uint8"))
    plan = planned(source, tmp_path, sampling={"steps": 1})
    assert plan.layers == ((0, 1, 2), (3, 4, 5), (6,))
    assert plan.tile_steps == 3


def test_a_pass_costs_what_is_published() -> None:
    """GFLOP of UNet and time-aware encoder, and of the autoencoder, for 512 x 512 pixels; see tests/stablesr."""
    flops = count_flops(PRESETS["sd21-512"], 64, 64)
    assert flops.tile_step / 1e9 == pytest.approx(875.9 + 89.4, rel=0.01)
    assert flops.encode_patch / 1e9 == pytest.approx(1116.7, rel=0.01)
    assert 4999.8 < flops.decode_patch / 1e9 < 4999.8 + 1116.7  # the decoder, and what it needs of the encoder
    assert flops.parameters == pytest.approx(918.9e6 + 52.5e6 + 83.7e6 + 128.0e6, rel=0.001)


def test_a_canvas_smaller_than_a_patch_costs_less(tmp_path: Path) -> None:
    source = write_raster(tmp_path / "source.tif", pattern(1, 20, 20, "uint8"))
    assert planned(source, tmp_path).flops == count_flops(PRESETS["sd21-512"], 64, 64)


def test_adain_decodes_twice(plan_of: Callable[..., Plan]) -> None:
    more = plan_of(sampling={"color": "adain"}).total_flops - plan_of().total_flops
    assert more == 16 * plan_of().flops.decode_patch


def test_a_plan_is_quick_and_leaves_nothing_behind(scene: Path, tmp_path: Path) -> None:
    planned(scene, tmp_path)
    started = time.process_time()
    planned(scene, tmp_path, sampling={"patch": 64})  # which is counted anew
    assert time.process_time() - started < 2.0
    assert [*tmp_path.iterdir()] == []


def test_a_plan_needs_no_device(plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert plan_of(model={"weights": "sd21-512", "device": "cuda:3"}).tile_steps == 132 * 200


def test_on_a_gpu_the_network_takes_half_the_bytes_and_none_of_the_machine(
    plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cpu = plan_of(model={"weights": "sd21-512", "device": "auto"}).network_bytes
    with_memory(monkeypatch, plan_of().memory_bytes - 1 * GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    plan = plan_of(model={"weights": "sd21-512", "device": "auto"})
    assert plan.network_bytes == on_cpu // 2
    assert plan_of(model={"weights": "sd21-512", "precision": "float32"}).network_bytes == on_cpu


def test_the_rows_of_a_report(plan_of: Callable[..., Plan], scene: Path, tmp_path: Path) -> None:
    rows = dict(plan_of().report(3700))
    assert rows["source"] == f"{scene}: 791 x 718 pixels, 3 bands, uint8"
    assert rows["target"] == f"{tmp_path / 'target.tif'}: 3,164 x 2,872 pixels, 3 bands, uint8, cog"
    assert rows["network"] == "sd21-512, 1,183.1 M parameters, 200 steps"
    assert rows["canvas"] == "396 x 359 latents"
    assert rows["layers"] == "1: bands 1, 2, 3"
    assert rows["tiles"] == "132 of 64 x 64 latents, overlapping by 32"
    assert rows["patches"] == "16 of 128 x 128 latents"
    assert rows["blocks"] == "4 of 256 x 256 latents"
    assert rows["arithmetic"] == "26,400 tile steps, 25.8 PFLOP"
    assert rows["memory"].endswith("of which the network 7.41 GiB")
    assert rows["time"] == "about 62 minutes with one worker on this machine"
    assert "sampling" not in rows
    assert "time" not in dict(plan_of().report())
    streamed = dict(plan_of(run={"memory": 0.001}).report())
    assert streamed["sampling"] == "in 4 parts, streamed from disk at every step: the latents take"


# Where the latents are


@pytest.mark.parametrize(
    ("memory", "n_workers", "n_parts", "resident"),
    [
        pytest.param(4.0, 1, 1, True, id="one-worker"),
        pytest.param(4.0, 3, 3, True, id="three-workers"),
        pytest.param(4.0, 9, 4, True, id="more-workers-than-blocks"),
        pytest.param(0.01, 1, 2, False, id="half-of-6.5-MiB-must-fit-into-half-of-10"),
        pytest.param(0.01, 2, 2, True, id="two-workers-have-it"),
        pytest.param(0.002, 2, 4, False, id="as-many-parts-for-each-worker"),
        pytest.param(1e-5, 1, 4, False, id="no-part-is-less-than-a-block"),
    ],
)
def test_memory_decides_whether_latents_stay_in_the_workers(
    plan_of: Callable[..., Plan], memory: float, n_workers: int, n_parts: int, resident: bool
) -> None:
    parts, stay = plan_of(run={"memory": memory}).rectangles([1.0] * n_workers)
    assert (len(parts), stay) == (n_parts, resident)


# Refusals


def with_memory(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=n_bytes, available=n_bytes))


def with_disk(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=n_bytes))


def test_a_disk_that_is_too_small(
    plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan = plan_of()
    needed = plan.store_bytes + plan.file_bytes
    with_disk(monkeypatch, needed)
    plan_of()
    with_disk(monkeypatch, needed - 1)
    with pytest.raises(
        WontFit, match=rf"needs about \S+ MiB at {tmp_path}, where \S+ MiB are free(.|\n)*3,164 x 2,872"
    ):
        plan_of()
    assert [*tmp_path.iterdir()] == []


def test_what_an_interrupted_run_has_on_disk_is_not_needed_twice(
    plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan = plan_of()
    (tmp_path / "target.tif.run").mkdir()
    (tmp_path / "target.tif.run" / "data").write_bytes(bytes(1 << 20))
    with_disk(monkeypatch, plan.store_bytes + plan.file_bytes - (1 << 20))
    plan_of()


def test_a_machine_that_is_too_small(plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    needed = plan_of().memory_bytes
    with_memory(monkeypatch, needed)
    plan_of()
    with_memory(monkeypatch, needed - 1)
    with pytest.raises(WontFit, match="GiB of memory(.|\n)*lower --memory, --batch or --patch"):
        plan_of()
    plan_of(run={"memory": 1.0})
    plan_of(sampling={"patch": 64})


@pytest.mark.parametrize("compression", ["deflate", "lzw"])
def test_ome_zarr_has_not_all_compressions(scene: Path, tmp_path: Path, compression: str) -> None:
    with pytest.raises(ConfigError, match=f"compression={compression} .*OME-Zarr(.|\n)*zstd or none"):
        make_plan(rehearsal(scene, tmp_path / "target.zarr", file={"compression": compression}))
    for good in ("zstd", "none"):
        make_plan(rehearsal(scene, tmp_path / "target.zarr", file={"compression": good}))
    assert [*tmp_path.iterdir()] == []


def test_a_place_for_the_run_that_cannot_be(scene: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        with pytest.raises(OutputError, match="the run's folder .* cannot be: .*/file is a file\nhint: --run"):
            make_plan(rehearsal(scene, tmp_path / "target.tif", run={"folder": folder}))


@pytest.mark.parametrize(
    ("overlap", "tile"), [pytest.param(64, 64, id="as-large-as-a-tile"), pytest.param(99, 64, id="larger")]
)
def test_tiles_must_advance(plan_of: Callable[..., Plan], overlap: int, tile: int) -> None:
    with pytest.raises(ConfigError, match=f"overlap={overlap} must be smaller than the tile, {tile}"):
        plan_of(sampling={"overlap": overlap})


# The same run, or another


@pytest.mark.parametrize("nodata", [None, 7.0, math.nan, -math.inf, -3.4028234663852886e38])
def test_a_plan_there_and_back(tmp_path: Path, nodata: float | None) -> None:
    values = pattern(2, 20, 20, "float32")
    source = write_raster(tmp_path / "source.tif", values, nodata=nodata)
    plan = planned(source, tmp_path, radiometry={"stretch": (0.1, 0.7)}, bands=(2, 1), scale=3)
    back = Plan.model_validate_json(plan.model_dump_json(indent=1))
    assert repr(back) == repr(plan)
    assert plan.differences(back) == back.differences(plan) == []
    assert (back.canvas, back.architecture) == (plan.canvas, plan.architecture)


def test_plans_are_read_from_folders(plan_of: Callable[..., Plan], tmp_path: Path) -> None:
    assert read_plan(tmp_path) is None
    assert read_plan(tmp_path / "nowhere") is None
    (tmp_path / "plan.json").write_text(plan_of().model_dump_json())
    assert read_plan(tmp_path) == plan_of()
    assert read_plan(tmp_path / "plan.json") is None  # not a folder
    (tmp_path / "plan.json").write_text('{"version": "0"}')
    with pytest.raises(RunMismatch, match="not a plan of this version(.|\n)*to start over"):
        read_plan(tmp_path)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        pytest.param({"sampling": {"seed": 1}}, ["sampling.seed: 0 then, 1 now"], id="seed"),
        pytest.param(
            {"sampling": {"steps": 5, "cfw": 1.0}},
            ["sampling.cfw: 0.5 then, 1.0 now", "sampling.steps: None then, 5 now"],
            id="two-options",
        ),
        pytest.param({"scale": 2}, ["scale: 4 then, 2 now"], id="scale"),
        pytest.param({"grid": {"block": 128}}, ["grid.block: 256 then, 128 now"], id="block"),
        pytest.param(
            {"radiometry": {"stretch": (0, 200)}}, ["radiometry.stretch: auto then, [0.0, 200.0] now"], id="stretch"
        ),
        pytest.param({"file": {"compression": "lzw"}}, ["file.compression: None then, lzw now"], id="compression"),
        pytest.param({"file": {"format": "cog"}}, [], id="format-as-by-name"),
        pytest.param(
            {"model": {"weights": "turbo", "device": "cpu"}},
            None,
            id="weights",
        ),
        pytest.param({"model": {"weights": "sd21-512", "device": "cpu", "precision": "float32"}},
                     ["model.precision: auto then, float32 now"], id="precision"),
        pytest.param({"model": {"weights": "sd21-512", "device": "auto"}}, [], id="device"),
        pytest.param({"run": {"memory": 1.0, "keep": True, "commit_seconds": 1}}, [], id="how-the-work-is-done"),
        pytest.param({"file": {"overwrite": True}}, [], id="overwrite"),
    ],
)  # fmt: skip
def test_what_differs_is_named(plan_of: Callable[..., Plan], more: dict[str, Any], named: list[str] | None) -> None:
    found = plan_of(**more).differences(plan_of())
    if named is None:
        assert len(found) == 1
        assert found[0].startswith("the weights: ")
    else:
        assert found == named


def test_a_changed_source_is_named(tmp_path: Path) -> None:
    source = write_raster(tmp_path / "source.tif", pattern(1, 20, 20, "uint8"))
    before = planned(source, tmp_path)
    write_raster(source, pattern(1, 20, 20, "uint8", seed=1))
    assert planned(source, tmp_path).differences(before) == ["the source: source.tif changed since"]
    (tmp_path / "source.tif.aux.xml").write_text(
        '<PAMDataset><Metadata><MDI key="SENSOR">x</MDI></Metadata></PAMDataset>'
    )
    differences = planned(source, tmp_path).differences(before)
    assert differences[0] == "the source: source.tif, source.tif.aux.xml changed since"


def test_another_version_is_another_run(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of()
    newer = plan.model_copy(update={"version": "99"})
    assert newer.differences(plan) == [f"the version of gigasr: {plan.version} then, 99 now"]


def test_a_run_keeps_within_its_plan_for_disk(tmp_path: Path) -> None:
    """The folder of a finished run takes about what was planned, and no more than a little above it."""
    source = write_raster(tmp_path / "source.tif", pattern(3, 300, 300, "uint16"))
    config = rehearsal(source, tmp_path / "target.tif", grid={"block": 64}, sampling={"steps": 1}, run={"keep": True})
    plan = make_plan(config)
    run(config, Listening())
    taken = sum(path.stat().st_size for path in config.folder.rglob("*") if path.is_file())
    assert 0.3 * plan.store_bytes < taken < 1.2 * plan.store_bytes
    assert (tmp_path / "target.tif").stat().st_size < 1.2 * plan.file_bytes
