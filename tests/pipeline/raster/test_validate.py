"""What was written passes; what was damaged, or is another raster's, does not."""

import shutil
import struct
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import rasterio
import tifffile
from numpy.typing import NDArray

from pipeline.errors import WorkFailed
from pipeline.raster.header import Band, GroundControlPoint, Header
from pipeline.raster.ome_zarr import write_ome_zarr
from pipeline.raster.overviews import halve, n_levels
from pipeline.raster.tiff import Layout, write_tiff
from pipeline.raster.validate import Format, validate
from stablesr.box import Box

UTM = rasterio.CRS.from_epsg(32618).to_wkt()
NORTH_UP = (10.0, 0.0, 300_000.0, 0.0, -10.0, 4_000_000.0)
RGB = (Band(color="red"), Band(color="green"), Band(color="blue"))


class InMemory:
    """A level that is an array."""

    def __init__(self, pixels: NDArray[Any], mask: NDArray[np.uint8]) -> None:
        self.pixels, self.mask = pixels, mask
        self.height, self.width = pixels.shape[1:]

    def read(self, box: Box) -> NDArray[Any]:
        return self.pixels[:, box.top : box.bottom, box.left : box.right]

    def read_mask(self, box: Box) -> NDArray[np.uint8]:
        return self.mask[box.top : box.bottom, box.left : box.right]


def header(**facts: Any) -> Header:
    return Header(**{"height": 600, "width": 1100, "dtype": "uint8", "bands": RGB, **facts})


def written(folder: Path, head: Header, format: str) -> Path:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 9, (head.count, head.height, head.width)).astype(head.dtype)
    mask = rng.choice(np.array([0, 255], np.uint8), (head.height, head.width))
    levels = [InMemory(pixels, mask)]
    for _ in range(n_levels(head.height, head.width) - 1):
        last = levels[-1]
        if head.validity == "mask":
            levels.append(InMemory(*halve(last.pixels, head, last.mask)))
        else:
            levels.append(InMemory(halve(last.pixels, head), mask))
    path = folder / "output"
    if format == "ome-zarr":
        write_ome_zarr(path, head, levels, compression="zstd")
    else:
        write_tiff(path, head, levels, layout=format, compression="zstd")
    return path


FACTS = {
    "plain": {},
    "a-pixel": {"height": 1, "width": 1},
    "a-line": {"height": 1300, "width": 1},
    "mask": {"validity": "mask"},
    "alpha": {"validity": "alpha"},
    "placed": {"crs": UTM, "transform": NORTH_UP},
    "rotated": {"transform": (1.0, 0.5, 3.0, -0.5, 1.0, 4.0)},
    "points": {"gcps": (GroundControlPoint(row=1, col=2, x=3, y=4),) * 3, "tags": {"AREA_OR_POINT": "Point"}},
    "nan": {"dtype": "float32", "validity": "nodata", "nodata": float("nan")},
    "not-a-float32": {"dtype": "float32", "validity": "nodata", "nodata": -9999.9},
    "five-bands": {"dtype": "int16", "bands": (Band(name="a", color="nir", unit="m", scale=0.5),) * 5},
}


@pytest.mark.parametrize("format", get_args(Format))
@pytest.mark.parametrize("facts", [pytest.param(facts, id=name) for name, facts in FACTS.items()])
def test_what_was_written_is_what_it_should_be(tmp_path, format, facts):
    head = header(**facts)
    validate(written(tmp_path, head, format), head, format)


@pytest.mark.parametrize("format", get_args(Format))
@pytest.mark.parametrize(
    "change",
    [
        {"height": 601}, {"width": 1099}, {"dtype": "int16"}, {"bands": RGB[:2]}, {"nodata": 9},
        {"crs": rasterio.CRS.from_epsg(32619).to_wkt()}, {"transform": (*NORTH_UP[:5], 4_000_001.0)},
        {"validity": "mask", "nodata": None},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_another_rasters_file_is_refused(tmp_path, format, change):
    head = header(crs=UTM, transform=NORTH_UP, validity="nodata", nodata=7)
    if format == "ome-tiff" and "validity" in change:
        change = {"nodata": None}  # it has no masks
    path = written(tmp_path, head, format)
    with pytest.raises(WorkFailed, match=f"output is not the {format} it should be: .* instead of .*"):
        validate(path, head.model_copy(update=change), format)


@pytest.mark.parametrize("format", get_args(Layout))
def test_a_file_that_lost_its_end_is_refused(tmp_path, format):
    head = header(validity="mask")
    path = written(tmp_path, head, format)
    whole = path.read_bytes()
    for end in (0, 7, 20, 1000, len(whole) // 2, len(whole) - 8):
        path.write_bytes(whole[:end])
        with pytest.raises(WorkFailed, match=f"is not the {format} it should be"):
            validate(path, head, format)


@pytest.mark.parametrize("format", get_args(Layout))
@pytest.mark.parametrize("table", [324, 325], ids=["offsets", "counts"])
@pytest.mark.parametrize(("value", "complaint"), [(0, "missing|overlap"), (1 << 30, "ends at byte"), (3000, "overlap")])
def test_a_wrong_entry_in_a_table_of_tiles_is_found(tmp_path, format, table, value, complaint):
    head = header()
    path = written(tmp_path, head, format)
    with tifffile.TiffFile(path) as file:
        tag = file.pages.first.tags[table]
        where, letter = tag.valueoffset + tag.valuebytecount // tag.count * 2, {4: "<I", 16: "<Q"}[int(tag.dtype)]
        counts = file.pages.first.databytecounts
    content = bytearray(path.read_bytes())
    if table == 325 and value == 3000:
        value = counts[2] + 20
    struct.pack_into(letter, content, where, value)
    path.write_bytes(content)
    with pytest.raises(WorkFailed, match=complaint):
        validate(path, head, format)


def test_a_file_that_was_never_finished_is_refused(tmp_path):
    head = header()
    path = written(tmp_path, head, "cog")
    with tifffile.TiffFile(path) as file:
        tables = [
            (tag.valueoffset, tag.valuebytecount) for page in file.pages for tag in map(page.tags.get, (324, 325))
        ]
    content = bytearray(path.read_bytes())
    for where, size in tables:
        content[where : where + size] = bytes(size)
    path.write_bytes(content)
    with pytest.raises(WorkFailed, match="9 tiles are missing"):  # 2 x 3, 1 x 2 and 1 of the levels
        validate(path, head, "cog")


def test_a_tiff_of_another_layout_is_refused(tmp_path):
    head = header()
    for written_as, wanted, complaint in (
        ("bigtiff", "cog", "levels"),
        ("cog", "bigtiff", "levels"),
        ("cog", "ome-tiff", "a classic TIFF"),
        ("ome-tiff", "bigtiff", "levels"),
    ):
        path = written(tmp_path, head, written_as)
        with pytest.raises(WorkFailed, match=complaint):
            validate(path, head, wanted)


def test_a_cog_must_please_its_validator(tmp_path):
    head = header(transform=NORTH_UP)
    path = written(tmp_path, head, "cog")
    with rasterio.open(path, "r+", IGNORE_COG_LAYOUT_BREAK="YES") as file:
        file.update_tags(ADDED="x" * 1000)
    with pytest.raises(WorkFailed, match="main IFD"):
        validate(path, head, "cog")


@pytest.mark.parametrize("format", get_args(Format))
def test_what_is_not_there_is_refused(tmp_path, format):
    with pytest.raises(WorkFailed, match="hint: the same command"):
        validate(tmp_path / "nothing", header(), format)


def test_a_zarr_without_a_shard_or_with_a_torn_one_is_refused(tmp_path):
    head = header(validity="mask")
    path = written(tmp_path, head, "ome-zarr")
    for shard in (path / "1/c/0/0/0", path / "mask/c/0/0"):
        whole = shard.read_bytes()
        shard.write_bytes(whole[:50])
        with pytest.raises(WorkFailed, match="only 50 bytes long"):
            validate(path, head, "ome-zarr")
        shard.write_bytes(whole[1000:])
        with pytest.raises(WorkFailed, match="not as long as its index says"):
            validate(path, head, "ome-zarr")
        shard.unlink()
        with pytest.raises(WorkFailed, match="No such file"):
            validate(path, head, "ome-zarr")
        shard.write_bytes(whole)
    validate(path, head, "ome-zarr")
    shutil.rmtree(path / "1")
    with pytest.raises(WorkFailed):
        validate(path, head, "ome-zarr")
