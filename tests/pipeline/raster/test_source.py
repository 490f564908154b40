"""What GDAL reads, compared with rasterio: headers, pixels, which of them count; and fingerprints."""

import json
import os

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.rpc import RPC
from rasterio.transform import Affine

from pipeline.errors import SourceError
from pipeline.raster.header import Header
from pipeline.raster.source import Pixels, fingerprint, open_source
from stablesr.box import Box
from tests.pipeline.raster.rasters import PLACE, edited, opened, samples, vrt, vrt_band, whole, write
from tests.strategies import boxes

HEIGHT, WIDTH = 40, 56


def header_of(path, bands=None, **options) -> Header:
    with open_source(str(path), bands, **options) as source:
        return source.header


# Pixels


def formats(folder):
    """One raster of each format and layout, by what it is."""
    rgb = samples(3, HEIGHT, WIDTH)
    tiles = {"tiled": True, "blockxsize": 16, "blockysize": 16}
    place = {"crs": "EPSG:32618", "transform": PLACE}
    yield write(folder / "strips.tif", rgb, **place)
    yield write(folder / "tiles.tif", rgb, **place, **tiles, compress="deflate")
    yield write(folder / "planes.tif", rgb, **place, interleave="band", compress="zstd")
    yield write(folder / "big.tif", rgb, **place, BIGTIFF="YES")
    yield write(folder / "lossy.tif", rgb, **place, **tiles, compress="jpeg", photometric="ycbcr")
    yield write(folder / "u16.tif", samples(2, HEIGHT, WIDTH, dtype="uint16"), **place, **tiles)
    yield write(folder / "i16.tif", samples(1, HEIGHT, WIDTH, dtype="int16"), **place)
    yield write(folder / "f32.tif", samples(1, HEIGHT, WIDTH, dtype="float32"), **place, **tiles)
    yield write(folder / "picture.png", rgb, driver="PNG")
    yield write(folder / "picture16.png", samples(1, HEIGHT, WIDTH, dtype="uint16"), driver="PNG")
    yield write(folder / "picture.jpg", rgb, driver="JPEG")
    yield write(folder / "picture.jp2", rgb, driver="JP2OpenJPEG", QUALITY=100, REVERSIBLE="YES")
    yield write(folder / "scene.img", rgb, driver="HFA")
    parts = vrt_band(1, "Byte", "tiles.tif", 3), vrt_band(2, "Byte", "strips.tif")
    yield vrt(folder / "mosaic.vrt", HEIGHT, WIDTH, *parts)
    with opened(folder / "tiles.tif") as dataset:
        rasterio.shutil.copy(dataset, folder / "cog.tif", driver="COG", blocksize=16, overview_count=2)
    yield folder / "cog.tif"


@pytest.fixture(scope="module")
def rasters(tmp_path_factory):
    return {path.name: path for path in formats(tmp_path_factory.mktemp("formats"))}


NAMES = [
    "strips.tif", "tiles.tif", "planes.tif", "big.tif", "lossy.tif", "u16.tif", "i16.tif", "f32.tif", "picture.png",
    "picture16.png", "picture.jpg", "picture.jp2", "scene.img", "mosaic.vrt", "cog.tif",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_pixels_are_those_that_rasterio_reads(rasters, name):
    pixels = whole(rasters[name])
    with opened(rasters[name]) as dataset:
        assert np.array_equal(pixels.values, dataset.read())
    assert pixels.values.flags.c_contiguous and pixels.values.flags.writeable
    assert pixels.alpha is None
    if name == "f32.tif":
        assert pixels.valid is not None and pixels.valid.all()
    else:
        assert pixels.valid is None


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_windows_are_crops_of_the_whole(rasters, name, data):
    frame = Box(0, 0, HEIGHT, WIDTH)
    expected = whole(rasters[name])
    with open_source(str(rasters[name])) as source:
        for box in data.draw(st.lists(boxes(frame), min_size=1, max_size=4)):
            assert_same(source.read(box), expected.crop(box, frame))


def assert_same(ours: Pixels, expected: Pixels) -> None:
    assert np.array_equal(ours.values, expected.values)
    for one, other in ((ours.valid, expected.valid), (ours.alpha, expected.alpha)):
        assert (one is None) == (other is None)
        assert one is None or other is None or np.array_equal(one, other)


def test_bands_come_in_the_order_asked_for(tmp_path):
    path = write(tmp_path / "five.tif", values := samples(5, 4, 6), transform=PLACE)
    with edited(path) as dataset:
        dataset.descriptions = tuple("abcde")
    assert np.array_equal(whole(path, [4, 2]).values, values[[3, 1]])
    assert [band.name for band in header_of(path, [4, 2]).bands] == ["d", "b"]


# Headers


def test_the_header_of_a_satellite_scene(tmp_path):
    path = write(tmp_path / "scene.tif", samples(2, 4, 6, dtype="uint16"), crs="EPSG:32618", transform=PLACE, nbits=12)
    with edited(path) as dataset:
        dataset.descriptions = ("red edge", "")
        dataset.colorinterp = (ColorInterp.gray, ColorInterp.undefined)
        dataset.units = ("reflectance", "")
        dataset.scales, dataset.offsets = (0.0001, 1.0), (-0.1, 0.0)
        dataset.update_tags(SENSOR="MSI", AREA_OR_POINT="Point", NODATA_VALUES_OF="nothing")
        dataset.update_tags(1, WAVELENGTH="705")
        dataset.update_tags(ns="ACQUISITION", SUN="high")
        dataset.update_tags(ns="COLOR_PROFILE", SOURCE_ICC_PROFILE="QUJD")
    header = header_of(path)
    assert (header.height, header.width, header.dtype, header.validity) == (4, 6, "uint16", "all")
    first, second = header.bands
    assert (first.name, first.color, first.unit) == ("red edge", "gray", "reflectance")
    assert (first.scale, first.offset, first.tags, first.bits) == (0.0001, -0.1, {"WAVELENGTH": "705"}, 12)
    assert (second.name, second.color, second.unit) == (None, "undefined", None)
    assert (second.scale, second.offset, second.tags, second.bits) == (1.0, 0.0, {}, 12)
    assert header.crs is not None and CRS.from_wkt(header.crs) == CRS.from_epsg(32618)
    assert header.transform == tuple(PLACE)[:6]
    assert header.tags == {"SENSOR": "MSI", "AREA_OR_POINT": "Point", "NODATA_VALUES_OF": "nothing"}
    assert header.domains == {"ACQUISITION": {"SUN": "high"}, "COLOR_PROFILE": {"SOURCE_ICC_PROFILE": "QUJD"}}
    assert (header.gcps, header.gcp_crs, header.rpcs, header.microns_per_pixel) == ((), None, None, None)


def test_a_header_survives_json(rasters):
    for path in rasters.values():
        header = header_of(path)
        assert Header.model_validate_json(header.model_dump_json()) == header


def test_a_picture_has_no_place(rasters):
    header = header_of(rasters["picture.png"])
    assert (header.crs, header.transform, header.gcps, header.rpcs) == (None, None, (), None)
    assert [band.color for band in header.bands] == ["red", "green", "blue"]


def test_a_rotated_transform_is_kept(tmp_path):
    turned = Affine(1.7, 1.5, 7.0, 1.0, -2.6, 8.0)
    header = header_of(write(tmp_path / "turned.tif", samples(1, 4, 6), transform=turned))
    assert header.transform == pytest.approx((1.7, 1.5, 7.0, 1.0, -2.6, 8.0), abs=1e-12)
    assert header.crs is None


def test_ground_control_points_are_kept(tmp_path):
    points = [(0, 0, 10, 50, 3), (4, 6.5, 11, 49, 0), (4, 0, 10, 49, 0)]
    gcps = [GroundControlPoint(*point) for point in points]
    header = header_of(write(tmp_path / "gcps.tif", samples(1, 4, 6), gcps=gcps, crs="EPSG:4326"))
    assert [(p.row, p.col, p.x, p.y, p.z) for p in header.gcps] == points
    assert header.gcp_crs is not None and CRS.from_wkt(header.gcp_crs) == CRS.from_epsg(4326)
    assert (header.transform, header.crs) == (None, None)


def test_rational_polynomials_are_kept_as_gdal_writes_them(tmp_path):
    ones = [1.0] + [0.0] * 19
    rpcs = RPC(
        height_off=1.0, height_scale=2.0, lat_off=3.0, lat_scale=4.0, line_den_coeff=ones, line_num_coeff=ones,
        line_off=5.5, line_scale=6.0, long_off=7.0, long_scale=8.0, samp_den_coeff=ones, samp_num_coeff=ones,
        samp_off=9.0, samp_scale=10.0, err_bias=None, err_rand=None,
    )  # fmt: skip
    path = write(tmp_path / "rpc.tif", samples(1, 4, 6), rpcs=rpcs)
    header = header_of(path)
    assert header.rpcs is not None and float(header.rpcs["LINE_OFF"]) == 5.5
    with opened(path) as dataset:
        assert header.rpcs == dataset.tags(ns="RPC")
    assert header.transform is None and "RPC" not in header.domains
    assert header.scaled(2).rpcs is not None  # which reads the strings as numbers


@pytest.mark.parametrize("bits", [1, 2, 4, 7])
def test_few_bits_are_kept_and_said(tmp_path, bits):
    values = samples(1, 4, 6) >> (8 - bits)
    path = write(tmp_path / "bits.tif", values, nbits=bits, transform=PLACE)
    assert header_of(path).bands[0].bits == bits
    assert header_of(path).bands[0].color == "gray"
    assert np.array_equal(whole(path).values, values)


def test_tags_that_describe_the_file_are_dropped(tmp_path):
    path = write(tmp_path / "scan.tif", samples(1, 4, 6))
    with edited(path) as dataset:
        dataset.update_tags(TIFFTAG_XRESOLUTION="300", TIFFTAG_YRESOLUTION="300", TIFFTAG_RESOLUTIONUNIT="2")
        dataset.update_tags(TIFFTAG_MAXSAMPLEVALUE="9", EXIF_PixelXDimension="6", EXIF_Model="Canon")
        dataset.update_tags(TIFFTAG_IMAGEDESCRIPTION='{"shape": [4, 6]}')
    assert header_of(path).tags == {
        "TIFFTAG_XRESOLUTION": "300",
        "TIFFTAG_YRESOLUTION": "300",
        "TIFFTAG_RESOLUTIONUNIT": "2 (pixels/inch)",
        "EXIF_Model": "Canon",
    }


# Which pixels count


def test_alpha_follows_the_colours_whatever_bands_are_chosen(tmp_path):
    values = samples(4, HEIGHT, WIDTH)
    values[3, 0] = 0
    path = write(tmp_path / "rgba.tif", values, photometric="rgb", alpha="yes", nodata=0)
    for bands, expected in ((None, [0, 1, 2]), ([2], [1]), ([3, 4, 1], [2, 0])):
        header, pixels = header_of(path, bands), whole(path, bands)
        assert (header.validity, header.nodata, len(header.bands)) == ("alpha", None, len(expected))
        assert np.array_equal(pixels.values, values[expected])
        assert pixels.alpha is not None and pixels.alpha.dtype == np.uint8
        assert np.array_equal(pixels.alpha, values[3])
        assert np.array_equal(pixels.valid, values[3:] > 0)


def test_alpha_alone_is_a_band_like_any_other(tmp_path):
    path = write(tmp_path / "rgba.tif", values := samples(4, 4, 6), photometric="rgb", alpha="yes")
    assert np.array_equal(whole(path, [4]).values, values[3:])
    header = header_of(path, [4])
    assert (header.validity, header.bands[0].color) == ("all", "undefined")


@pytest.mark.parametrize("internal", [True, False])
def test_a_mask_says_which_pixels_count(tmp_path, internal):
    mask = samples(HEIGHT, WIDTH) > 99
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal):
        path = write(tmp_path / "masked.tif", values := samples(3, HEIGHT, WIDTH), transform=PLACE, nodata=7)
        with edited(path) as dataset:
            dataset.write_mask(mask)
    assert (tmp_path / "masked.tif.msk").exists() != internal
    header, pixels = header_of(path), whole(path)
    assert (header.validity, header.nodata) == ("mask", None)
    assert np.array_equal(pixels.values, values) and np.array_equal(pixels.valid, mask[np.newaxis])


def test_a_mask_beside_alpha_makes_pixels_transparent(tmp_path):
    mask = samples(HEIGHT, WIDTH) > 99
    path = write(tmp_path / "both.tif", values := samples(4, HEIGHT, WIDTH), photometric="rgb", alpha="yes")
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), edited(path) as dataset:
        dataset.write_mask(mask)
    pixels = whole(path)
    assert pixels.alpha is not None and np.array_equal(pixels.alpha, np.where(mask, values[3], 0))


def test_a_pixel_whose_bands_all_hold_nodata_is_masked_if_the_file_says_so(tmp_path):
    values = samples(3, HEIGHT, WIDTH) & 1
    path = write(tmp_path / "together.tif", values, transform=PLACE)
    with edited(path) as dataset:
        dataset.update_tags(NODATA_VALUES="0 1 0")
    header, pixels = header_of(path), whole(path)
    assert (header.validity, header.tags) == ("mask", {})
    assert np.array_equal(pixels.valid, ~((values[:1] == 0) & (values[1:2] == 1) & (values[2:] == 0)))


@pytest.mark.parametrize(
    ("dtype", "nodata"),
    [("uint8", 0), ("uint16", 65535), ("int16", -9999), ("float32", -9999), ("float32", float("nan")),
     ("float32", float("-inf")), ("float32", -3.4028234663852886e38), ("float32", 0.1)],
)  # fmt: skip
def test_nodata_counts_out_each_band_by_itself(tmp_path, dtype, nodata):
    values = samples(2, HEIGHT, WIDTH, dtype=dtype)
    values[0, :5], values[1, 3:8] = nodata, nodata
    path = write(tmp_path / "nodata.tif", values, nodata=nodata, transform=PLACE)
    header, pixels = header_of(path), whole(path)
    assert header.validity == "nodata"
    assert header.nodata == pytest.approx(nodata, nan_ok=True)
    assert not pixels.valid[0, :5].any() and not pixels.valid[1, 3:8].any()
    with opened(path) as dataset:
        assert np.array_equal(pixels.valid, dataset.read_masks() > 0)


def test_floats_that_are_almost_nodata_are_as_gdal_has_it(tmp_path):
    steps = [np.float32(0.1)]
    for _ in range(12):
        steps.append(np.nextafter(steps[-1], np.float32(1)))
    path = write(tmp_path / "near.tif", np.array([[steps]]), nodata=0.1, transform=PLACE)
    valid = whole(path).valid
    assert valid is not None and not valid[..., :3].any() and valid[..., 8:].all()
    with opened(path) as dataset:
        assert np.array_equal(valid, dataset.read_masks() > 0)


def test_floats_that_are_no_numbers_never_count(tmp_path):
    values = np.array([[[1, np.nan, np.inf, -np.inf]], [[np.nan, 2, 3, 4]]], np.float32)
    finite = np.isfinite(values)
    plain = write(tmp_path / "plain.tif", values, transform=PLACE)
    assert (header_of(plain).validity, header_of(plain).nodata) == ("nodata", None)
    assert np.array_equal(whole(plain).valid, finite)

    masked = write(tmp_path / "masked.tif", values[:1], transform=PLACE)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), edited(masked) as dataset:
        dataset.write_mask(np.array([[True, True, True, False]]))
    assert whole(masked).valid.tolist() == [[[True, False, False, False]]]

    with_alpha = np.concatenate((values[:1], np.array([[[0.5, 1, 1, np.nan]]], np.float32)))
    alpha = whole(write(tmp_path / "alpha.tif", with_alpha, photometric="minisblack", alpha="yes"))
    assert alpha.alpha.tolist() == [[0.5, 0, 0, 0]]
    assert alpha.valid.tolist() == [[[True, False, False, False]]]


def test_each_band_may_have_its_own_nodata(tmp_path):
    values = write(tmp_path / "values.tif", np.array([[[1, 2, 3]], [[1, 2, 3]], [[1, 2, 3]]], np.uint8)).name
    own = ["<NoDataValue>1</NoDataValue>", "<NoDataValue>3</NoDataValue>", ""]
    bands = [vrt_band(k, "Byte", values, k, own[k - 1]) for k in (1, 2, 3)]
    path = vrt(tmp_path / "own.vrt", 1, 3, *bands)
    assert header_of(path).nodata == 1
    assert (whole(path).valid * 1).tolist() == [[[0, 1, 1]], [[1, 1, 0]], [[1, 1, 1]]]
    assert header_of(path, [3, 2]).nodata == 3
    assert header_of(path, [3]).validity == "all"


@pytest.mark.parametrize(("dtype", "nodata"), [("Byte", "-9999"), ("Byte", "0.5"), ("Byte", "nan"), ("Int16", "65535")])
def test_nodata_that_no_sample_can_have_is_none(tmp_path, dtype, nodata):
    values = write(tmp_path / "values.tif", np.zeros((1, 1, 3), "uint8" if dtype == "Byte" else "int16")).name
    path = vrt(tmp_path / "odd.vrt", 1, 3, vrt_band(1, dtype, values, 1, f"<NoDataValue>{nodata}</NoDataValue>"))
    assert (header_of(path).validity, header_of(path).nodata) == ("all", None)


def test_masks_of_single_bands_are_taken_together(tmp_path):
    write(tmp_path / "masks.tif", np.array([[[255, 0, 255]], [[255, 255, 0]]], np.uint8))
    write(tmp_path / "values.tif", np.array([[[1, 2, 3]], [[4, 5, 6]]], np.uint8))
    masks = [vrt_band(1, "Byte", "masks.tif", k).replace(' band="1"', "") for k in (1, 2)]
    bands = [vrt_band(k, "Byte", "values.tif", k, f"<MaskBand>{masks[k - 1]}</MaskBand>") for k in (1, 2)]
    path = vrt(tmp_path / "masked.vrt", 1, 3, *bands)
    assert header_of(path).validity == "mask"
    assert whole(path).valid.tolist() == [[[True, False, False]]]
    assert whole(path, [2]).valid.tolist() == [[[True, True, False]]]


# Fingerprints


def test_a_fingerprint_names_every_file_and_its_content(tmp_path):
    path = write(tmp_path / "masked.tif", samples(1, 4, 6), transform=PLACE)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), edited(path) as dataset:
        dataset.write_mask(True)
    write(tmp_path / "other.tif", samples(1, 4, 6), transform=PLACE)
    mosaic = vrt(tmp_path / "a.vrt", 4, 6, vrt_band(1, "Byte", "masked.tif"), vrt_band(2, "Byte", "other.tif"))
    nested = vrt(tmp_path / "b.vrt", 4, 6, vrt_band(1, "Byte", "a.vrt"))
    for name in (mosaic, nested):
        found = fingerprint(str(name))
        assert json.loads(json.dumps(found)) == found
        names = [file["name"] for file in found["files"]]
        assert set(names) == {"a.vrt", "masked.tif", "masked.tif.msk", "other.tif"} | {name.name}
    size = os.path.getsize(path)
    by_name = {file["name"]: file for file in fingerprint(str(path))["files"]}
    assert (by_name["masked.tif"]["size"], len(by_name["masked.tif"]["sha256"])) == (size, 64)


def test_a_fingerprint_tells_a_changed_file_from_a_copy(tmp_path):
    (tmp_path / "there").mkdir()
    path, copy = tmp_path / "a.tif", tmp_path / "there" / "a.tif"
    write(path, samples(1, 4, 6), transform=PLACE)
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(0, path.stat().st_mtime_ns))
    assert fingerprint(str(copy)) == fingerprint(str(path))
    content = bytearray(copy.read_bytes())
    content[-1] ^= 1
    copy.write_bytes(content)
    os.utime(copy, ns=(0, path.stat().st_mtime_ns))
    assert fingerprint(str(copy)) != fingerprint(str(path))


def test_three_pieces_of_a_large_file_are_hashed(tmp_path):
    path = tmp_path / "large.vrt"
    write(tmp_path / "values.tif", samples(1, 4, 6), transform=PLACE)
    vrt(path, 4, 6, vrt_band(1, "Byte", "values.tif"), head=f"<!--{' ' * (80 << 20)}-->")

    def hash_with(place: int | None) -> object:
        content = bytearray(path.read_bytes())
        if place is not None:
            content[place] ^= 1
        file = tmp_path / "edited.vrt"
        file.write_bytes(content)
        return next(f["sha256"] for f in fingerprint(str(file))["files"] if f["name"] == "edited.vrt")

    unchanged, size = hash_with(None), path.stat().st_size
    assert hash_with(20 << 20) == unchanged
    assert hash_with(size // 2) != unchanged


def test_what_is_missing_has_no_fingerprint(tmp_path):
    with pytest.raises(SourceError, match="there is no file"):
        fingerprint(str(tmp_path / "nowhere.tif"))
