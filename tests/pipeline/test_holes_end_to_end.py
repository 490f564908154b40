"""Holes stay in their hole: what lies under them shows nowhere, and they come back where they were."""

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.config import Config
from pipeline.network import Nearest
from pipeline.plan import read_plan
from pipeline.run import run
from pipeline.stages.context import Context
from pipeline.status import newest_slot
from pipeline.store import RunStore
from stablesr.box import Box
from tests.pipeline.raster.rasters import edited, opened, vrt, vrt_band, write
from tests.pipeline.rasters import pattern, rehearsal, repeated, write_raster
from tests.strategies import seeds

DTYPES = ["uint8", "uint16", "int16", "float32"]


def with_hole(path: Path, values: NDArray[Any], valid: NDArray[np.bool_], kind: str, under: float) -> Path:
    """A raster with a hole, and something under it where the kind allows.

    Args:
        valid: (h, w).
        kind: "value" (the value under the hole is declared as nodata), "nan", "mask" or "alpha".
    """
    filled = np.where(valid, values, np.asarray(under, values.dtype))
    if kind == "alpha":
        alpha = np.where(valid, 200, 0).astype(values.dtype)[np.newaxis]
        photometric = "RGB" if len(values) == 3 else "MINISBLACK"
        return write_raster(path, np.concatenate([filled, alpha]), photometric=photometric, alpha="YES")
    if kind == "nan":
        return write_raster(path, np.where(valid, values, np.float32(np.nan)))
    if kind == "value":
        return write_raster(path, filled, nodata=float(np.asarray(under, values.dtype)))
    write_raster(path, filled)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), edited(path) as dataset:
        dataset.write_mask(valid)
    return path


def upscaled(config: Config, n_bands: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """The output's colours, and which of its pixels count, as GDAL has it."""
    with opened(run(config)) as dataset:
        colors = dataset.read([*range(1, n_bands + 1)])
        if dataset.count > n_bands:
            return colors, dataset.read(n_bands + 1) > 0
        counts = dataset.read_masks([*range(1, n_bands + 1)]).astype(bool)
    assert (counts == counts[0]).all()
    if colors.dtype == np.float32:
        counts &= np.isfinite(colors)
    return colors, counts[0]


@st.composite
def holes(draw: st.DrawFn, height: int, width: int) -> NDArray[np.bool_]:
    """Which pixels count: with rectangles, a disc, or specks missing."""
    valid = np.ones((height, width), bool)
    y, x = np.mgrid[0:height, 0:width]
    for _ in range(draw(st.integers(1, 3))):
        top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        match draw(st.sampled_from(["box", "disc", "specks"])):
            case "box":
                valid[top : top + draw(st.integers(1, 40)), left : left + draw(st.integers(1, 40))] = False
            case "disc":
                valid &= (y - top) ** 2 + (x - left) ** 2 > draw(st.integers(1, 20)) ** 2
            case "specks":
                valid &= np.random.default_rng(draw(seeds)).random((height, width)) > 0.05
    return valid


# With the network that repeats pixels


@settings(max_examples=10)
@given(
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["value", "nan", "mask", "alpha"]),
    valid=holes(70, 60),
    scale=st.sampled_from([1, 2, 4]),
    bands=st.sampled_from([1, 3]),
    color=st.sampled_from(["wavelet", "none"]),
)
def test_what_counts_is_what_it_is_without_the_hole(
    dtype: str, kind: str, valid: NDArray[np.bool_], scale: int, bands: int, color: str
) -> None:
    if kind == "nan":
        dtype = "float32"
    under: float = {"uint8": 0, "uint16": 65535, "int16": -9999, "float32": -9999.0}[dtype]
    whole = pattern(bands, 70, 60, dtype)
    options: dict[str, Any] = {"scale": scale, "grid": {"block": 8}, "sampling": {"steps": 1, "color": color}}
    with tempfile.TemporaryDirectory() as name:
        source = with_hole(Path(name) / "source.tif", whole, valid, kind, under)
        found, counts = upscaled(rehearsal(source, Path(name) / "target.tif", **options), bands)
    expected = repeated(whole, scale)  # which is what becomes of it without a hole
    np.testing.assert_array_equal(counts, repeated(valid, scale))
    inside = np.broadcast_to(counts, found.shape)
    if dtype == "float32":
        np.testing.assert_allclose(found[inside], expected[inside], rtol=0, atol=2e-6)
    else:
        np.testing.assert_array_equal(found[inside], expected[inside])


# With a network that looks around


def looked_at(source: Path, micro: str, **more: Any) -> Config:
    """With a network of random weights, whose tiles and patches see over every hole."""
    options = {
        "scale": 2,
        "model": {"weights": micro, "device": "cpu"},
        "sampling": {"patch": 16, "steps": 1},
        "grid": {"block": 8},
        **more,
    }
    return rehearsal(source, source.with_name(f"{source.stem}-target.tif"), **options)


VALID = np.ones((40, 44), bool)
VALID[5:30, 8:20] = False
VALID[33, :] = False
VALID[20:25, 30:] = False


@pytest.mark.parametrize(
    ("kind", "dtype", "absurd"),
    [
        pytest.param("mask", "uint16", [65535, 0], id="mask"),
        pytest.param("mask", "float32", [-1e30, math.nan], id="mask-of-floats"),
        pytest.param("alpha", "uint8", [255, 0], id="alpha"),
        pytest.param("value", "float32", [-9999.0, math.nan, -3.4028234663852886e38, math.inf], id="nodata-of-floats"),
        pytest.param("value", "int16", [-32768, 32767], id="nodata"),
    ],
)
def test_no_fill_value_shines_through(tmp_path: Path, micro: str, kind: str, dtype: str, absurd: list[float]) -> None:
    """Whatever lies under a hole, all pixels that count are the same to the bit."""
    whole = pattern(3 if kind == "alpha" else 1, *VALID.shape, dtype)
    pictures = []
    for number, under in enumerate(absurd):
        source = with_hole(tmp_path / f"{number}.tif", whole, VALID, kind, under)
        colors, counts = upscaled(looked_at(source, micro), len(whole))
        np.testing.assert_array_equal(counts, repeated(VALID, 2))
        pictures.append(colors[:, counts])
    for other in pictures[1:]:
        np.testing.assert_array_equal(other, pictures[0])
    assert np.isfinite(pictures[0]).all()
    low, high = (f(whole[:, VALID].astype(float)) for f in (np.min, np.max))
    assert pictures[0].min() > low - (high - low)  # nor does it leak in a milder form
    assert pictures[0].max() < high + (high - low)


@pytest.mark.parametrize(
    ("dtype", "nodata"), [pytest.param("int16", 2500, id="int16"), pytest.param("float32", 0.5, id="float32")]
)
def test_what_counts_never_becomes_nodata_where_the_picture_comes_close_to_it(
    tmp_path: Path, micro: str, dtype: str, nodata: float
) -> None:
    """Nodata in the middle of what the pixels are like, so that the network's output crosses it in many places."""
    whole = pattern(1, *VALID.shape, dtype)
    near = np.asarray(1 if dtype != "float32" else 1e-3, dtype)
    whole[0, 10:20, 22:28] = np.asarray(nodata, dtype) + near
    whole[0, 10:20, 28:34] = np.asarray(nodata, dtype) - near
    whole[whole == np.asarray(nodata, dtype)] += near
    source = with_hole(tmp_path / "source.tif", whole, VALID, "value", nodata)
    config = looked_at(source, micro)
    _, counts = upscaled(config, 1)
    np.testing.assert_array_equal(counts, repeated(VALID, 2))
    with opened(Path(config.output)) as dataset:
        assert dataset.nodata == nodata


# Nothing to see


class Seen:
    """How many tiles and patches a network was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tiles, self.encoded, self.decoded = 0, 0, 0
        predict_tiles, encode, decode = Nearest.predict_tiles, Nearest.encode, Nearest.decode

        def counted_tiles(network: Nearest, tiles: Any, *args: Any, **more: Any) -> Any:
            self.tiles += len(tiles)
            return predict_tiles(network, tiles, *args, **more)

        def counted_encode(network: Nearest, image: Any) -> Any:
            self.encoded += 1
            return encode(network, image)

        def counted_decode(network: Nearest, *args: Any) -> Any:
            self.decoded += 1
            return decode(network, *args)

        monkeypatch.setattr(Nearest, "predict_tiles", counted_tiles)
        monkeypatch.setattr(Nearest, "encode", counted_encode)
        monkeypatch.setattr(Nearest, "decode", counted_decode)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return Seen(monkeypatch)


@pytest.mark.parametrize(
    ("dtype", "nodata"), [("uint8", 0), ("uint16", 7), ("float32", math.nan), ("float32", -9999.0)]
)
def test_a_raster_of_nothing_but_nodata(tmp_path: Path, seen: Seen, dtype: str, nodata: float) -> None:
    source = write_raster(tmp_path / "source.tif", np.full((2, 40, 50), nodata, dtype), nodata=nodata)
    target = run(rehearsal(source, tmp_path / "target.tif", sampling={"steps": 2}))
    with opened(target) as dataset:
        np.testing.assert_array_equal(dataset.read(), np.full((2, 160, 200), nodata, dtype))
        assert not dataset.read_masks().any()
    assert (seen.tiles, seen.encoded, seen.decoded) == (0, 0, 0)


def test_nothing_is_asked_of_the_network_where_there_is_nothing(tmp_path: Path, seen: Seen) -> None:
    """A canvas of 7 x 2 tiles; all that is there lies under the leftmost two columns of them, or the last."""
    values = pattern(1, 128, 512, "uint8").clip(1)
    values[:, :, 128:496] = 0
    config = rehearsal(
        write_raster(tmp_path / "source.tif", values, nodata=0), tmp_path / "target.tif", grid={"block": 32},
        sampling={"steps": 3, "overlap": 32, "patch": 64},
    )  # fmt: skip
    with opened(run(config)) as dataset:
        np.testing.assert_array_equal(dataset.read(), repeated(values, 4))
    # 64 x 256 latents; tiles begin in columns 0, 32 ... 192, and what counts ends in column 64, and begins in 248
    assert seen.tiles == 3 * 3
    assert seen.encoded == seen.decoded == 3


def test_tiles_that_are_left_out_lead_to_the_low_resolution_latents(tmp_path: Path) -> None:
    """So that they do not disturb their neighbours; seen in the latents of a run that is kept."""
    values = pattern(1, 128, 256, "uint8").clip(1)
    values[:, :, 100:] = 0
    config = rehearsal(
        write_raster(tmp_path / "source.tif", values, nodata=0), tmp_path / "target.tif", grid={"block": 64},
        sampling={"steps": 2, "overlap": 0, "patch": 64}, run={"keep": True},
    )  # fmt: skip
    run(config)
    plan, store = read_plan(config.folder), RunStore(config.folder)
    assert plan is not None
    assert Context(plan, store).is_empty(0, Box(0, 512, 512, 1024))
    empty = Box(0, 64, 64, 128)
    slot, _ = newest_slot(store, 0)
    np.testing.assert_allclose(
        store.read(f"latents/0/{slot}", empty), store.read("lr_latents/0", empty), rtol=0, atol=1e-5
    )


def test_every_band_may_have_a_nodata_value_of_its_own(tmp_path: Path) -> None:
    """The output has one for all: holes get it, and what counts and happens to be it is moved by one."""
    values = pattern(3, 30, 40, "uint8").clip(2)
    values[0, 5:9, 3:7] = 0  # nodata of the first band
    values[1, 12:20, 8:20] = 255  # and of the second
    values[2, 3:5, 3:5] = 0  # which counts in the third, where there is none
    write(tmp_path / "plain.tif", values)
    source = vrt(
        tmp_path / "source.vrt", 30, 40,
        vrt_band(1, "Byte", "plain.tif", 1, "<NoDataValue>0</NoDataValue>"),
        vrt_band(2, "Byte", "plain.tif", 2, "<NoDataValue>255</NoDataValue>"),
        vrt_band(3, "Byte", "plain.tif", 3),
    )  # fmt: skip
    with opened(run(rehearsal(source, tmp_path / "target.tif", scale=2, sampling={"steps": 1}))) as dataset:
        assert dataset.nodatavals == (0, 0, 0)
        found, counts = dataset.read(), dataset.read_masks() > 0
    expected = values.copy()
    expected[1, 12:20, 8:20] = 0
    np.testing.assert_array_equal(counts[:2], repeated(expected[:2] != 0, 2))
    assert counts[2].all()
    expected[2, 3:5, 3:5] = 1
    np.testing.assert_array_equal(found, repeated(expected, 2))
