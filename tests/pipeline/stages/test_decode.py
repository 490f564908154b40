"""Latents to samples: with the colours of the source, in its units, and with what its stretch left out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.plan import Plan, read_plan
from pipeline.run import run
from pipeline.stages import decode
from pipeline.stages.context import Context
from pipeline.store import RunStore
from stablesr.box import Box
from stablesr.color import WAVELET_REACH
from stablesr.resize import upscale_bicubic
from tests.pipeline.rasters import pattern, read_raster, rehearsal, repeated, upscaled, write_raster
from tests.strategies import boxes


def few_tiles(micro: str, **sampling: Any) -> dict[str, Any]:
    """Options for a network that looks around."""
    return {
        "model": {"weights": micro, "device": "cpu"},
        "sampling": {"patch": 16, "steps": 1, **sampling},
        "grid": {"block": 8},
    }


# What leaves the stretch


def with_bright_pixels(dtype: str, bright: float) -> NDArray[Any]:
    """A hundred by a hundred pixels between 1000 and 2000, and one of them (0.01 %) far brighter in each band."""
    values = np.stack([1000 + 500 * (1 + np.sin(np.add.outer(np.arange(100) / 7, np.arange(100) / (5 + b))))
                       for b in range(2)])  # fmt: skip
    values[:, 50, 60] = bright
    values[0, 3, 3] = bright
    return np.rint(values).astype(dtype)


@pytest.mark.parametrize("color", ["wavelet", "adain", "none"])
@pytest.mark.parametrize(("dtype", "bright"), [("uint16", 65535), ("int16", -32768), ("float32", 1e6)])
def test_few_extreme_pixels_come_through_the_network_that_repeats_pixels(
    tmp_path: Path, color: str, dtype: str, bright: float
) -> None:
    values = with_bright_pixels(dtype, bright)
    source = write_raster(tmp_path / "source.tif", values)
    target = upscaled(source, tmp_path / "target.tif", scale=2, grid={"block": 16},
                      sampling={"steps": 1, "color": color})  # fmt: skip
    if dtype == "float32":
        np.testing.assert_allclose(target, repeated(values, 2), rtol=1e-5)
    else:
        np.testing.assert_array_equal(target, repeated(values, 2))


def test_low_frequencies_of_few_extreme_pixels_come_through_a_network_that_never_saw_them(
    tmp_path: Path, micro: str
) -> None:
    """Its mean over 64 x 64 target pixels is that of the enlarged source, although its stretch ends at 2100."""
    values = with_bright_pixels("uint16", 65535)[:1, 20:80, 30:90]
    source = write_raster(tmp_path / "source.tif", values)
    target = upscaled(source, tmp_path / "target.tif", scale=2, radiometry={"stretch": (900, 2100)}, **few_tiles(micro))
    expected = upscale_bicubic(torch.from_numpy(values.astype(np.float32)), 2).clamp(0, 65535).numpy()
    row = column = 2 * 30
    around = (slice(None), slice(row - 32, row + 32), slice(column - 32, column + 32))
    assert target[around].mean() == pytest.approx(expected[around].mean(), rel=0.03)
    assert target[0, row, column] > 40_000
    beside = (slice(None), slice(row - 32, row - 8), slice(column - 32, column - 8))
    assert target[beside].mean() == pytest.approx(expected[beside].mean(), rel=0.05)


# AdaIN


def statistics(config: Any) -> tuple[float, NDArray[Any]]:
    """Of all blocks of a run that was kept."""
    markers = [marker for _, marker in RunStore(config.folder).markers("statistics/0")]
    return sum(m["n"] for m in markers), np.sum([m["sums"] for m in markers], axis=0)


def test_statistics_are_of_what_counts_alone(tmp_path: Path) -> None:
    values = pattern(2, 40, 50, "uint8").clip(1)
    values[0, 5:20, 10:35] = 0  # a hole of one band is one of all in a picture
    values[1, 30:, :9] = 0
    config = rehearsal(
        write_raster(tmp_path / "source.tif", values, nodata=0), tmp_path / "target.tif", scale=2,
        sampling={"steps": 1, "color": "adain"}, run={"keep": True},
    )  # fmt: skip
    np.testing.assert_array_equal(read_raster(run(config)), repeated(values, 2))
    n, ((sum_content, squares_content), (sum_style, squares_style)) = statistics(config)
    counted = values[:, (values != 0).all(axis=0)].astype(np.float64) / 255 * 2 - 1
    assert n == 4 * counted.shape[1]
    for sums in (sum_content, sum_style):
        np.testing.assert_allclose(sums, 4 * counted.sum(axis=1), rtol=1e-5)
    for squares in (squares_content, squares_style):
        np.testing.assert_allclose(squares, 4 * (counted**2).sum(axis=1), rtol=1e-5)


@pytest.mark.parametrize("under", [1, 255])
def test_what_lies_under_a_hole_does_not_move_the_colours(tmp_path: Path, micro: str, under: int) -> None:
    """Transparent pixels of any colour; the picture has the mean and deviation of the source where it counts."""
    values = pattern(3, 32, 40, "uint8") // 2 + 50
    alpha = np.full((1, 32, 40), 255, "uint8")
    values[:, 8:20, 10:30], alpha[:, 8:20, 10:30] = under, 0
    source = write_raster(tmp_path / "source.tif", np.concatenate([values, alpha]), photometric="RGB", alpha="YES")
    target = upscaled(source, tmp_path / "target.tif", scale=2, **few_tiles(micro, color="adain"))
    seen = repeated(alpha[0] > 0, 2)
    for band in range(3):
        found, expected = target[band][seen].astype(float), values[band][alpha[0] > 0].astype(float)
        assert found.mean() == pytest.approx(expected.mean(), abs=3)
        assert 0.5 < found.std() / expected.std() < 1.5


def test_a_layer_of_nothing_has_statistics_of_nothing(tmp_path: Path) -> None:
    config = rehearsal(
        write_raster(tmp_path / "source.tif", np.zeros((1, 20, 20), "uint8"), nodata=0), tmp_path / "target.tif",
        sampling={"steps": 1, "color": "adain"}, run={"keep": True},
    )  # fmt: skip
    assert not read_raster(run(config)).any()
    n, sums = statistics(config)
    assert (n, sums.tolist()) == (0, [[[0.0], [0.0]], [[0.0], [0.0]]])


# Bands, strips, patches


@pytest.mark.parametrize(
    ("n_bands", "expected"),
    [
        pytest.param(1, [[4.0]], id="one-is-the-mean-of-three"),
        pytest.param(2, [[1.0], [5.5]], id="the-second-is-the-mean-of-two"),
        pytest.param(3, [[1.0], [2.0], [9.0]], id="three-as-they-are"),
    ],
)
def test_bands_that_were_repeated_are_averaged_back(n_bands: int, expected: list[list[float]]) -> None:
    content = torch.tensor([[[1.0]], [[2.0]], [[9.0]]])
    assert decode._bands(content, n_bands)[:, :, 0].tolist() == expected


@given(boxes(Box(0, 0, 2000, 50)), st.integers(1, 700))
def test_strips_are_a_partition_from_top_to_bottom(box: Box, height: int) -> None:
    strips = decode.strips(box, height)
    assert [strip.top for strip in strips] == [*range(box.top, box.bottom, height)]
    assert [strip.bottom for strip in strips] == [strip.top for strip in strips[1:]] + [box.bottom]
    assert {(strip.left, strip.right) for strip in strips} == {(box.left, box.right)}


@pytest.fixture
def kept(tmp_path: Path) -> Plan:
    """The plan of a run that is kept: 300 x 400 target pixels, the right half of them without a pixel that counts."""
    values = pattern(1, 75, 100, "uint8").clip(1)
    values[:, :, 30:] = 0
    config = rehearsal(
        write_raster(tmp_path / "source.tif", values, nodata=0), tmp_path / "target.tif", run={"keep": True},
        grid={"block": 16}, sampling={"steps": 1, "patch": 16},
    )  # fmt: skip
    run(config)
    plan = read_plan(config.folder)
    assert plan is not None
    return plan


def test_a_block_needs_the_patches_within_reach_of_its_colours(kept: Plan) -> None:
    canvas = kept.canvas
    for index in canvas.output_blocks:
        box = canvas.output_blocks.box(index)
        reach = Box(box.top - WAVELET_REACH, box.left - WAVELET_REACH, box.bottom + WAVELET_REACH,
                    box.right + WAVELET_REACH).overlap(canvas.target)  # fmt: skip
        assert reach is not None
        assert decode.patches_of(kept, index) == [p for p in canvas.patches if p.scaled(8).overlap(reach)]


def test_a_patch_without_a_pixel_that_counts_is_not_decoded(kept: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    context = Context(kept, RunStore(kept.config.folder))
    empty = Box(0, 32, 16, 48)
    monkeypatch.setattr(type(context.network), "decode", None)
    monkeypatch.setattr(type(context.network), "encode", None)
    picture = decode.decode_patch(context, 0, "a", empty)
    np.testing.assert_array_equal(picture, context.picture(0, empty.scaled(8))[:1].numpy())
    assert picture.dtype == np.float32
