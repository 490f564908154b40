"""Rasters of every kind go through a whole run: the same pixels come back, repeated, and all that is known of them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import tifffile
import zarr
from numpy.typing import NDArray
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.rpc import RPC
from rasterio.transform import Affine
from rio_cogeo import cog_validate

from pipeline.run import run
from tests.pipeline.raster.rasters import edited, opened, samples, write, write_exif
from tests.pipeline.rasters import TRANSFORM, pattern, rehearsal, repeated

LANDSAT = Path(__file__).resolve().parents[3] / "shared" / "data" / "landsat7_rgb_utm18.tif"

UTM = {"crs": "EPSG:32633", "transform": TRANSFORM}


def through(source: Path, name: str = "target.tif", scale: int = 2, **more: Any) -> Path:
    """The output of a rehearsal, beside the source."""
    options = {"grid": {"block": 32}, "sampling": {"steps": 1}, **more}
    return run(rehearsal(source, source.parent / name, scale=scale, **options))


def pixels(path: Path) -> NDArray[Any]:
    with opened(path) as dataset:
        found: NDArray[Any] = dataset.read()
    return found


def assert_repeated(target: Path, values: NDArray[Any], scale: int = 2) -> None:
    found, expected = pixels(target), repeated(values, scale)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    if values.dtype == np.float32:
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=2e-6)
    else:
        assert np.count_nonzero(found != expected) == 0


# Types, bands, sizes


@pytest.mark.parametrize(
    ("dtype", "bands"), [("uint8", 6), ("uint8", 1), ("uint16", 7), ("int16", 2), ("float32", 4), ("float32", 3)]
)
def test_every_type_and_any_number_of_bands(tmp_path: Path, dtype: str, bands: int) -> None:
    values = pattern(bands, 40, 30, dtype)
    target = through(write(tmp_path / "source.tif", values, **UTM))
    assert_repeated(target, values)
    with opened(target) as dataset:
        assert dataset.nodata is None
        assert dataset.crs == "EPSG:32633"
        assert dataset.transform == TRANSFORM @ Affine.scale(0.5)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
def test_the_whole_range_of_a_type_survives(tmp_path: Path, dtype: str) -> None:
    """Noise from the smallest to the largest number."""
    values = samples(2, 30, 30, dtype=dtype)
    assert_repeated(through(write(tmp_path / "source.tif", values)), values)


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [
        pytest.param(1, 1, 1, id="a-pixel-as-it-is"),
        pytest.param(1, 1, 3, id="a-pixel"),
        pytest.param(1, 40, 5, id="a-row"),
        pytest.param(40, 1, 7, id="a-column"),
        pytest.param(2, 2001, 4, id="a-long-strip"),
        pytest.param(1500, 3, 4, id="a-tall-strip"),
    ],
)
def test_every_size(tmp_path: Path, height: int, width: int, scale: int) -> None:
    values = pattern(1, height, width, "uint16")
    source = write(tmp_path / "source.tif", values)
    target = run(rehearsal(source, tmp_path / "target.tif", scale=scale, grid={"block": 256}, sampling={"steps": 1}))
    assert_repeated(target, values, scale)


def test_bands_are_chosen_in_any_order_and_what_is_known_of_them_comes_along(tmp_path: Path) -> None:
    values = pattern(5, 20, 30, "uint16")
    source = write(tmp_path / "source.tif", values, **UTM)
    with edited(source) as dataset:
        for band, name in enumerate(["blue", "green", "red", "nir", "swir"], 1):
            dataset.set_band_description(band, name)
            dataset.set_band_unit(band, f"unit {band}")
            dataset.update_tags(band, WAVELENGTH=str(400 + 100 * band))
        dataset.scales, dataset.offsets = [0.1 * band for band in range(1, 6)], [-band for band in range(1, 6)]
    target = through(source, bands=(4, 1, 3, 5))
    assert_repeated(target, values[[3, 0, 2, 4]])
    with opened(target) as dataset:
        assert dataset.descriptions == ("nir", "blue", "red", "swir")
        assert dataset.units == ("unit 4", "unit 1", "unit 3", "unit 5")
        assert dataset.scales == pytest.approx((0.4, 0.1, 0.3, 0.5))
        assert dataset.offsets == (-4, -1, -3, -5)
        assert [dataset.tags(band)["WAVELENGTH"] for band in (1, 2, 3, 4)] == ["800", "500", "700", "900"]


def test_few_bits(tmp_path: Path) -> None:
    """1 bit black and white, and 12 bits."""
    for bits, dtype, largest in ((1, "uint8", "1"), (12, "uint16", "4095")):
        values = (samples(1, 30, 40, dtype=dtype) % (1 << bits)).astype(dtype)
        target = through(write(tmp_path / f"{bits}.tif", values, nbits=bits), f"{bits}-target.tif")
        assert_repeated(target, values)
        with opened(target) as dataset:
            assert dataset.tags()["TIFFTAG_MAXSAMPLEVALUE"] == largest


# Which pixels count


def test_a_palette_becomes_its_colours(tmp_path: Path) -> None:
    indices = (samples(1, 30, 40) % 4).astype("uint8")
    colors = {0: (0, 0, 0, 255), 1: (250, 3, 7, 255), 2: (10, 200, 30, 255), 3: (9, 8, 255, 255)}
    source = tmp_path / "source.tif"
    write(source, indices, photometric="palette")
    with edited(source) as dataset:
        dataset.write_colormap(1, colors)
    target = through(source)
    table = np.array([colors[k][:3] for k in range(4)], "uint8")
    assert_repeated(target, table[indices[0]].transpose(2, 0, 1))
    with opened(target) as dataset:
        assert dataset.colorinterp == (ColorInterp.red, ColorInterp.green, ColorInterp.blue)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_alpha_is_repeated_and_what_is_transparent_comes_back_transparent(tmp_path: Path, dtype: str) -> None:
    colors, alpha = pattern(3, 40, 50, dtype), samples(1, 40, 50, dtype=dtype)
    alpha[:, 10:25, 5:30] = 0
    source = write(tmp_path / "source.tif", np.concatenate([colors, alpha]), photometric="RGB", alpha="YES")
    target = through(source)
    found = pixels(target)
    np.testing.assert_array_equal(found[3:], repeated(alpha, 2))
    seen = np.broadcast_to(repeated(alpha, 2) > 0, (3, 80, 100))
    np.testing.assert_array_equal(found[:3][seen], repeated(colors, 2)[seen])
    with opened(target) as dataset:
        assert dataset.colorinterp[-1] == ColorInterp.alpha


@pytest.mark.parametrize("internal", [True, False], ids=["internal", "sidecar"])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_mask_is_repeated(tmp_path: Path, internal: bool, dtype: str) -> None:
    values, mask = pattern(2, 40, 50, dtype), samples(40, 50) > 60
    source = write(tmp_path / "source.tif", values, **UTM)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal), edited(source) as dataset:
        dataset.write_mask(mask)
    assert source.with_name("source.tif.msk").exists() != internal
    target = through(source)
    with opened(target) as dataset:
        np.testing.assert_array_equal(dataset.read_masks(1), np.where(repeated(mask, 2), 255, 0))
    counts = np.broadcast_to(repeated(mask, 2), (2, 80, 100))
    np.testing.assert_allclose(pixels(target)[counts], repeated(values, 2)[counts], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("dtype", "nodata"),
    [("uint8", 0), ("uint16", 65535), ("int16", -9999), ("float32", -9999.0), ("float32", math.nan), ("float32", 0.1)],
)
def test_nodata_stays_where_it_is(tmp_path: Path, dtype: str, nodata: float) -> None:
    values = pattern(2, 40, 50, dtype)
    if dtype == "uint8":
        values = values.clip(1)
    hole = samples(2, 40, 50) > 150  # of each band by itself
    values[hole] = nodata
    target = through(write(tmp_path / "source.tif", values, nodata=nodata))
    with opened(target) as dataset:
        assert repr(dataset.nodata) == repr(float(np.dtype(dtype).type(nodata)))
        np.testing.assert_array_equal(dataset.read_masks() == 0, repeated(hole, 2))
    np.testing.assert_allclose(pixels(target), repeated(values, 2), rtol=1e-6, atol=2e-6 if dtype == "float32" else 0)


# Where it lies


def test_a_rotated_raster_stays_where_it_is(tmp_path: Path) -> None:
    transform = Affine(8.0, -6.0, 500_000.0, -6.0, -8.0, 4_500_000.0)
    target = through(write(tmp_path / "source.tif", pattern(1, 20, 30, "uint8"), crs="EPSG:32633", transform=transform))
    with opened(target) as dataset:
        assert dataset.transform == transform @ Affine.scale(0.5)
        assert dataset.transform @ (60, 40) == pytest.approx(transform @ (30, 20))


def test_ground_control_points_stay_on_their_pixels(tmp_path: Path) -> None:
    points = [
        GroundControlPoint(row, col, 13.0 + col / 100, 48.0 - row / 100, 7.0) for row in (0, 20) for col in (0, 30.5)
    ]
    source = write(tmp_path / "source.tif", pattern(1, 20, 30, "uint8"), gcps=points, crs="EPSG:4326")
    with opened(through(source, scale=3)) as dataset:
        found, crs = dataset.gcps
        assert crs == "EPSG:4326"
        assert [(p.row, p.col, p.x, p.y, p.z) for p in found] == [(3 * p.row, 3 * p.col, p.x, p.y, p.z) for p in points]


def rpcs(**changed: float) -> RPC:
    numbers: dict[str, Any] = {
        "line_off": 100.0, "samp_off": 80.5, "line_scale": 101.0, "samp_scale": 81.0, "lat_off": 48.0, "lat_scale": 0.1,
        "long_off": 13.0, "long_scale": 0.2, "height_off": 500.0, "height_scale": 300.0, "err_bias": 1.5,
        "err_rand": 0.5, **changed,
    }  # fmt: skip
    coefficients = {f"{axis}_{part}_coeff": [float(k == (part == "num")) for k in range(20)]
                    for axis in ("line", "samp") for part in ("num", "den")}  # fmt: skip
    return RPC(**coefficients, **numbers)


def test_rpcs_are_those_of_the_larger_raster(tmp_path: Path) -> None:
    source = write(tmp_path / "source.tif", pattern(1, 20, 30, "uint16"), rpcs=rpcs())
    with opened(through(source, scale=4)) as dataset:
        expected = rpcs(line_off=4 * 100.0 + 1.5, samp_off=4 * 80.5 + 1.5, line_scale=404.0, samp_scale=324.0)
        assert dataset.rpcs.to_dict() == expected.to_dict()


def test_rpcs_beside_the_file_may_come_with_units(tmp_path: Path) -> None:
    source = write(tmp_path / "source.tif", pattern(1, 20, 30, "uint16"))
    of_text = {name.upper(): value for name, value in rpcs().to_dict().items()}
    units = {"LINE_OFF": "pixels", "SAMP_OFF": "pixels", "LINE_SCALE": "pixels", "SAMP_SCALE": "pixels",
             "LAT_OFF": "degrees"}  # fmt: skip
    lines = []
    for name, value in of_text.items():
        if isinstance(value, list):
            lines += [f"{name}_{k}: {number:+.15e}" for k, number in enumerate(value, 1)]
        else:
            lines.append(f"{name}: {value:+010.2f} {units.get(name, 'meters')}")
    source.with_name("source_RPC.TXT").write_text("\n".join(lines) + "\n")
    with opened(through(source, scale=2)) as dataset:
        assert (dataset.rpcs.line_off, dataset.rpcs.samp_off) == (200.5, 161.5)
        assert (dataset.rpcs.line_scale, dataset.rpcs.samp_scale) == (202.0, 162.0)


# What else is known of it


def test_tags_colours_and_provenance(tmp_path: Path) -> None:
    source = write(tmp_path / "source.tif", pattern(4, 20, 30, "uint16"), photometric="RGB", **UTM)
    with edited(source) as dataset:
        dataset.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.nir]
        dataset.update_tags(SENSOR="MSI", AREA_OR_POINT="Point", TIFFTAG_DATETIME="2024:02:29 10:11:12")
        dataset.update_tags(ns="IMAGERY", CLOUDCOVER="3.5")
        dataset.update_tags(1, STATISTICS_MEAN="7")
    target = through(source, sampling={"steps": 2, "seed": 7})
    with opened(target) as dataset:
        assert dataset.colorinterp == (ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.nir)
        tags = dataset.tags()
        assert (tags["SENSOR"], tags["AREA_OR_POINT"]) == ("MSI", "Point")
        assert tags["TIFFTAG_DATETIME"] == "2024:02:29 10:11:12"
        assert dataset.tags(ns="IMAGERY") == {"CLOUDCOVER": "3.5"}
        assert "STATISTICS_MEAN" not in dataset.tags(1)
        assert dataset.transform == TRANSFORM @ Affine.scale(0.5)
    assert tags["GIGASR_VERSION"]
    assert tags["GIGASR_WEIGHTS"] == "nearest nearest"
    assert tags["GIGASR_SEED"] == "7"
    assert "not observed" in tags["GIGASR_NOTICE"]
    settings = json.loads(tags["GIGASR_SETTINGS"])
    assert (settings["scale"], settings["sampling"]["steps"]) == (2, 2)


def test_a_photograph_is_upright(tmp_path: Path) -> None:
    source = write(tmp_path / "source.jpg", pattern(3, 24, 40, "uint8"), driver="JPEG", quality=95)
    lying = pixels(source)
    write_exif(source, 6, dots=(300, 150))
    target = through(source)
    assert_repeated(target, np.rot90(lying, -1, axes=(1, 2)))
    with opened(target) as dataset:
        tags = dataset.tags()
        assert (float(tags["TIFFTAG_XRESOLUTION"]), float(tags["TIFFTAG_YRESOLUTION"])) == (300, 600)
        assert "EXIF_Orientation" not in tags


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("source.png", {"driver": "PNG"}, id="png"),
        pytest.param("source.jp2", {"driver": "JP2OpenJPEG", "QUALITY": 100, "REVERSIBLE": "YES"}, id="jpeg-2000"),
        pytest.param("source.tif", {"tiled": True, "blockxsize": 16, "blockysize": 16, "compress": "lzw"}, id="tiles"),
    ],
)
def test_other_formats(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    values = pattern(3, 30, 40, "uint8")
    assert_repeated(through(write(tmp_path / name, values, **options)), values)


# Formats of the output


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, NDArray[Any]]:
    """So large that its output has overviews."""
    values = pattern(3, 150, 170, "uint8")
    return write(tmp_path_factory.mktemp("large") / "source.tif", values, photometric="RGB", **UTM), values


@pytest.mark.parametrize(
    ("file", "compression"),
    [
        ({}, "zstd"),
        ({"compression": "deflate", "level": 1}, "deflate"),
        ({"compression": "lzw"}, "lzw"),
        ({"compression": "none"}, None),
    ],
)
def test_a_cog(large: tuple[Path, NDArray[Any]], file: dict[str, Any], compression: str | None) -> None:
    source, values = large
    target = through(source, f"{compression}.tif", scale=4, file=file)
    assert_repeated(target, values, 4)
    assert cog_validate(target, strict=True, quiet=True)[0]
    with rasterio.open(target) as dataset:
        assert dataset.overviews(1) == [2]
        assert dataset.profile.get("compress") == compression
        overview = dataset.read(out_shape=(3, 300, 340))
    np.testing.assert_array_equal(overview, repeated(values, 2))


def test_plain_bigtiff(large: tuple[Path, NDArray[Any]]) -> None:
    source, values = large
    target = through(source, "target.btf", scale=4)
    assert_repeated(target, values, 4)
    assert target.read_bytes()[2] == 43
    with rasterio.open(target) as dataset:
        assert dataset.overviews(1) == []
        assert "compress" not in dataset.profile


def test_pyramidal_ome_tiff(large: tuple[Path, NDArray[Any]]) -> None:
    source, values = large
    target = through(source, "target.ome.tif", scale=4)
    with tifffile.TiffFile(target) as tiff:
        assert tiff.is_ome
        (series,) = tiff.series
        assert [level.shape for level in series.levels] == [(600, 680, 3), (300, 340, 3)]
        np.testing.assert_array_equal(series.asarray(), repeated(values, 4).transpose(1, 2, 0))
        np.testing.assert_array_equal(series.levels[1].asarray(), repeated(values, 2).transpose(1, 2, 0))


def test_ome_zarr(large: tuple[Path, NDArray[Any]]) -> None:
    source, values = large
    group: Any = zarr.open_group(through(source, "target.zarr", scale=4), mode="r")
    np.testing.assert_array_equal(group["0"][:], repeated(values, 4))
    np.testing.assert_array_equal(group["1"][:], repeated(values, 2))
    assert group.attrs["ome"]["version"] == "0.5"
    assert group.attrs["spatial:transform"] == [2.5, 0.0, 500_000.0, 0.0, -2.5, 5_000_000.0]


@pytest.mark.parametrize("name", ["target.tif", "target.btf", "target.ome.tif", "target.zarr"])
def test_a_pixel_and_nothing_but_holes_in_every_format(tmp_path: Path, name: str) -> None:
    pixel = write(tmp_path / "pixel.tif", np.full((1, 1, 1), 7, "uint8"))
    target = through(pixel, name, scale=1)
    if not target.is_dir():
        assert pixels(target).tolist() == [[[7]]]
    source = write(tmp_path / "holes.tif", np.full((2, 3, 5), np.nan, "float32"))
    target = through(source, f"holes-{name}", scale=3)
    if not target.is_dir():
        assert np.isnan(pixels(target)).all()


# A real one


def test_the_landsat_scene(tmp_path: Path) -> None:
    if not LANDSAT.is_file():
        pytest.skip(f"there is no {LANDSAT.name} in shared/data")
    target = run(rehearsal(LANDSAT, tmp_path / "target.tif", scale=2, grid={"block": 256}, sampling={"steps": 1}))
    with rasterio.open(LANDSAT) as before, rasterio.open(target) as after:
        expected = repeated(before.read(), 2)
        assert np.count_nonzero(after.read() != expected) == 0
        assert (after.nodata, after.crs, after.dtypes) == (0, before.crs, before.dtypes)
        assert after.transform.almost_equals(before.transform @ Affine.scale(0.5))
        assert after.bounds == pytest.approx(before.bounds)
        assert after.colorinterp == before.colorinterp
        for level in (1, 2, 3):
            np.testing.assert_array_equal(after.read_masks(level), repeated(before.read_masks(level), 2))
        kept = {k: v for k, v in before.tags().items() if not k.startswith("STATISTICS")}
        assert kept.items() <= after.tags().items()
    assert cog_validate(target, strict=True, quiet=True)[0]
