"""OME-Zarr: read back by zarr, described as the specification wants it, and resumed shard by shard."""

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import rasterio
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.errors import ConfigError, Stopped, WorkFailed
from pipeline.raster import ome_zarr
from pipeline.raster.header import Band, DType, Header, Validity
from pipeline.raster.ome_zarr import n_shards, write_ome_zarr
from pipeline.raster.overviews import halve, n_levels
from pipeline.raster.tiff import tiles_done
from stablesr.box import Box

RGB = (Band(color="red"), Band(color="green"), Band(color="blue"))


class InMemory:
    """A level that is an array."""

    def __init__(self, pixels: NDArray[Any], mask: NDArray[np.uint8] | None = None) -> None:
        self.pixels, self.mask = pixels, mask
        self.height, self.width = pixels.shape[1:]

    def read(self, box: Box) -> NDArray[Any]:
        return self.pixels[:, box.top : box.bottom, box.left : box.right]

    def read_mask(self, box: Box) -> NDArray[np.uint8]:
        assert self.mask is not None
        return self.mask[box.top : box.bottom, box.left : box.right]


def header(
    height: int = 70, width: int = 90, dtype: str = "uint8", bands: Sequence[Band] = RGB, **facts: Any
) -> Header:
    return Header(height=height, width=width, dtype=dtype, bands=tuple(bands), **facts)


def pyramid(head: Header, seed: int = 0) -> list[InMemory]:
    """Noise, with a corner of zeros, which are the fill value."""
    rng = np.random.default_rng(seed)
    pixels = (rng.normal(size=(head.count, head.height, head.width)) * 40 + 100).astype(head.dtype)
    pixels[:, : ome_zarr.SHARD + 1, : ome_zarr.SHARD + 1] = 0
    mask = rng.choice(np.array([0, 255], np.uint8), (head.height, head.width)) if head.validity == "mask" else None
    levels = [InMemory(pixels, mask)]
    for _ in range(n_levels(head.height, head.width, ome_zarr.CHUNK) - 1):
        last = levels[-1]
        if last.mask is None:
            levels.append(InMemory(halve(last.pixels, head)))
        else:
            levels.append(InMemory(*halve(last.pixels, head, last.mask)))
    return levels


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def small(monkeypatch):
    """Shards of 32 pixels, so that small rasters have many."""
    monkeypatch.setattr(ome_zarr, "CHUNK", 8)
    monkeypatch.setattr(ome_zarr, "SHARD", 32)


# Pixels


@settings(max_examples=10)
@given(
    st.sampled_from(get_args(DType)), st.sampled_from(get_args(Validity)), st.integers(1, 70), st.integers(1, 70),
    st.integers(1, 6), st.sampled_from(["zstd", "none"]),
)  # fmt: skip
def test_any_raster_is_read_back(dtype, validity, height, width, count, compression):
    head = header(height, width, dtype, [Band()] * count, validity=validity, nodata=0 if validity == "nodata" else None)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ome_zarr, "CHUNK", 8)
        patch.setattr(ome_zarr, "SHARD", 32)
        levels = pyramid(head)
        write_ome_zarr(Path(folder, "a.zarr"), head, levels, compression=compression)
        group = zarr.open_group(Path(folder, "a.zarr"), mode="r")
        for k, level in enumerate(levels):
            np.testing.assert_array_equal(group[str(k)][:], level.pixels)
        assert sorted(group.array_keys()) == [*map(str, range(len(levels))), *["mask"] * (validity == "mask")]
        if validity == "mask":
            np.testing.assert_array_equal(group["mask"][:], levels[0].mask)
        assert os.listdir(folder) == ["a.zarr"]


def test_a_shard_is_2048_pixels_in_chunks_of_512(tmp_path):
    head = header(2100, 600)
    levels = pyramid(head)
    write_ome_zarr(tmp_path / "a.zarr", head, levels, compression="zstd")
    array = zarr.open_group(tmp_path / "a.zarr", mode="r")["0"]
    assert (array.shards, array.chunks, array.shape) == ((3, 2048, 2048), (3, 512, 512), (3, 2100, 600))
    assert array.metadata.dimension_names == ("c", "y", "x")
    assert "'checksum': True" in str(array.metadata.codecs[0].to_dict())
    assert n_shards(levels) == 2 + 1 + 1 + 1


def test_many_bands_are_chunked_one_by_one(tmp_path, small):
    head = header(bands=[Band()] * 5)
    write_ome_zarr(tmp_path / "a.zarr", head, pyramid(head), compression="zstd")
    assert zarr.open_group(tmp_path / "a.zarr", mode="r")["0"].shards == (1, 32, 32)


def test_shards_of_nothing_but_the_fill_value_are_files_too(tmp_path, small):
    head = header()
    write_ome_zarr(tmp_path / "a.zarr", head, pyramid(head), compression="zstd")
    assert (tmp_path / "a.zarr" / "0" / "c" / "0" / "0" / "0").stat().st_size > 0


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_a_flipped_bit_is_found(tmp_path, small, compression):
    head = header(32, 32)
    write_ome_zarr(
        tmp_path / "a.zarr", head, [InMemory(np.full((3, 32, 32), 7, np.uint8))] * 3, compression=compression
    )
    shard = tmp_path / "a.zarr" / "0" / "c" / "0" / "0" / "0"
    damaged = bytearray(shard.read_bytes())
    damaged[12] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(Exception):  # noqa: B017 - of the codec's own kind
        zarr.open_group(tmp_path / "a.zarr", mode="r")["0"][:]


@pytest.mark.parametrize("compression", ["lzw", "deflate"])
def test_other_compressions_are_refused(tmp_path, compression):
    head = header()
    with pytest.raises(
        ConfigError, match=rf"'{compression}' is none that OME-Zarr is written with\nhint: zstd or none"
    ):
        write_ome_zarr(tmp_path / "a.zarr", head, pyramid(head), compression=compression)
    assert os.listdir(tmp_path) == []


# What it says


def attributes(path: Path, head: Header) -> dict[str, Any]:
    write_ome_zarr(path, head, pyramid(head), compression="zstd")
    return zarr.open_group(path, mode="r").attrs.asdict()


def test_the_levels_lie_on_each_other(tmp_path):
    head = header(600, 1025, microns_per_pixel=(0.25, 0.5))
    ome = attributes(tmp_path / "a.zarr", head)["ome"]
    assert ome["version"] == "0.5"
    (multiscale,) = ome["multiscales"]
    assert multiscale["axes"] == [
        {"name": "c", "type": "channel"},
        {"name": "y", "type": "space", "unit": "micrometer"},
        {"name": "x", "type": "space", "unit": "micrometer"},
    ]
    assert [dataset["path"] for dataset in multiscale["datasets"]] == ["0", "1", "2"]
    assert multiscale["datasets"][2]["coordinateTransformations"] == [
        {"type": "scale", "scale": [1.0, 2.0, 1.0]},
        {"type": "translation", "translation": [0.0, 0.75, 0.375]},  # the centre of 4 pixels is 1.5 pixels further
    ]


def test_without_a_size_of_pixels_they_are_the_unit(tmp_path):
    (multiscale,) = attributes(tmp_path / "a.zarr", header())["ome"]["multiscales"]
    assert multiscale["axes"][1] == {"name": "y", "type": "space"}
    assert multiscale["datasets"][0]["coordinateTransformations"][0] == {"type": "scale", "scale": [1.0, 1.0, 1.0]}


def test_channels_have_names_colours_and_a_window(tmp_path):
    omero = attributes(tmp_path / "a.zarr", header(validity="alpha", bands=[*RGB]))["ome"]["omero"]
    assert [(c["label"], c["color"], c["active"]) for c in omero["channels"]] == [
        ("red", "FF0000", True), ("green", "00FF00", True), ("blue", "0000FF", True), ("alpha", "FFFFFF", False),
    ]  # fmt: skip
    assert omero["channels"][0]["window"] == {"min": 0, "max": 255, "start": 0, "end": 255}


@pytest.mark.parametrize(
    ("dtype", "band", "end"),
    [
        pytest.param("uint16", Band(bits=12), 4095, id="known-bits"),
        pytest.param("uint16", Band(), None, id="unknown-bits"),
        pytest.param("float32", Band(), None, id="float"),
    ],
)
def test_what_the_eye_should_see_is_said_only_where_it_is_known(tmp_path, dtype, band, end):
    ome = attributes(tmp_path / "a.zarr", header(dtype=dtype, bands=[band]))["ome"]
    assert (ome["omero"]["channels"][0]["window"]["end"] if "omero" in ome else None) == end


def test_a_place_on_earth_is_told_as_geozarr_does(tmp_path):
    head = header(600, 400, crs=rasterio.CRS.from_epsg(32618).to_wkt(), transform=(10, 0, 1000, 0, -20, 9000))
    found = attributes(tmp_path / "a.zarr", head)
    assert [convention["name"] for convention in found["zarr_conventions"]] == ["proj", "spatial", "multiscales"]
    assert rasterio.CRS.from_wkt(found["proj:wkt2"]).to_epsg() == 32618
    assert found["spatial:transform"] == [10, 0, 1000, 0, -20, 9000]
    assert found["spatial:bbox"] == [1000, 9000 - 600 * 20, 1000 + 400 * 10, 9000]
    assert [level["asset"] for level in found["multiscales"]["layout"]] == ["0", "1"]
    of_level = zarr.open_group(tmp_path / "a.zarr", mode="r")["1"].attrs.asdict()
    assert of_level["spatial:transform"] == [20, 0, 1000, 0, -40, 9000]
    assert (of_level["spatial:shape"], of_level["spatial:bbox"]) == ([300, 200], found["spatial:bbox"])


def test_a_place_nowhere_is_not_told(tmp_path):
    assert attributes(tmp_path / "a.zarr", header()).keys() == {"ome", "gigasr"}


@pytest.mark.parametrize(
    ("dtype", "nodata", "said", "fill"),
    [
        ("uint8", 7, 7, 7), ("uint8", 7.5, 7.5, 0), ("int16", -32768, -32768, -32768),
        ("float32", float("nan"), "NaN", np.nan), ("float32", None, None, np.nan),
        ("float32", -9999.9, -9999.9, np.float32(-9999.9)), ("float32", 1e300, 1e300, np.inf),
        ("float32", float("-inf"), "-Infinity", -np.inf),
    ],
)  # fmt: skip
def test_nodata_is_the_fill_value_where_the_type_holds_it(tmp_path, dtype, nodata, said, fill):
    head = header(dtype=dtype, validity="nodata", nodata=nodata)
    write_ome_zarr(tmp_path / "a.zarr", head, pyramid(head), compression="zstd")
    array = zarr.open_group(tmp_path / "a.zarr", mode="r")["0"]
    assert array.attrs.get("nodata") == said
    np.testing.assert_equal(float(array.fill_value), float(fill))


def test_the_whole_header_is_kept(tmp_path):
    head = header(tags={"MADE": "by gigasr"}, rpcs={"LINE_OFF": "1"}, microns_per_pixel=(0.1, 0.1))
    assert Header.model_validate(attributes(tmp_path / "a.zarr", head)["gigasr"]["header"]) == head


# Interruptions


def the_story() -> tuple[Header, list[InMemory]]:
    head = header(validity="mask", dtype="uint16")
    return head, pyramid(head)


def test_a_writer_that_dies_at_every_shard_ends_with_the_same_bytes(tmp_path, small, monkeypatch):
    head, levels = the_story()
    write_ome_zarr(tmp_path / "whole.zarr", head, levels, compression="zstd")
    part, total, read = tmp_path / "part.zarr", n_shards(levels), InMemory.read
    for done in range(total):
        asked: list[Box] = []

        def once(level: InMemory, box: Box, asked: list[Box] = asked) -> NDArray[Any]:
            asked.append(box)
            if len(asked) == 2:
                raise RuntimeError("killed")
            return read(level, box)

        monkeypatch.setattr(InMemory, "read", once)
        assert tiles_done(part) == done
        if done < total - 1:
            with pytest.raises(RuntimeError, match="killed"):
                write_ome_zarr(part, head, levels, compression="zstd")
        else:
            write_ome_zarr(part, head, levels, compression="zstd")
    assert content(part) == content(tmp_path / "whole.zarr")
    assert sorted(os.listdir(tmp_path)) == ["part.zarr", "whole.zarr"]


def test_a_stop_says_how_far_it_came(tmp_path, small):
    head, levels = the_story()
    part, asked, told = tmp_path / "part.zarr", itertools.count(), []
    with pytest.raises(Stopped, match=f"stopped with 4 of {n_shards(levels)} shards"):
        write_ome_zarr(part, head, levels, compression="zstd", on_tiles=told.append, stopping=lambda: next(asked) == 4)
    assert tiles_done(part) == sum(told) == 4
    write_ome_zarr(part, head, levels, compression="zstd", on_tiles=told.append)
    assert sum(told) == n_shards(levels)


def test_a_shard_that_is_not_what_the_journal_says_is_written_again(tmp_path, small):
    head, levels = the_story()
    write_ome_zarr(tmp_path / "whole.zarr", head, levels, compression="zstd")
    part = tmp_path / "part.zarr"
    for damage in (lambda shard: shard.unlink(), lambda shard: shard.write_bytes(b"torn")):
        asked, told = itertools.count(), []
        with pytest.raises(Stopped):
            write_ome_zarr(part, head, levels, compression="zstd", stopping=lambda asked=asked: next(asked) == 6)
        damage(part / "0" / "c" / "0" / "1" / "0")  # the fourth
        (part / "0" / "c" / "0" / "1" / "0.1234.partial").write_bytes(b"left behind by a kill")
        write_ome_zarr(part, head, levels, compression="zstd", on_tiles=told.append)
        assert sum(told) == n_shards(levels) - 3
        assert content(part) == content(tmp_path / "whole.zarr")


def test_what_was_begun_differently_is_begun_again(tmp_path, small):
    head, levels = the_story()
    part, asked, told = tmp_path / "part.zarr", itertools.count(), []
    with pytest.raises(Stopped):
        write_ome_zarr(part, head, levels, compression="zstd", stopping=lambda: next(asked) == 6)
    write_ome_zarr(part, head, levels, compression="none", on_tiles=told.append)
    assert sum(told) == n_shards(levels)
    write_ome_zarr(tmp_path / "whole.zarr", head, levels, compression="none")
    assert content(part) == content(tmp_path / "whole.zarr")


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path, small):
    (tmp_path / "file").write_text("")
    head, levels = the_story()
    with pytest.raises(WorkFailed, match=r"cannot write .*a.zarr: Not a directory\nhint"):
        write_ome_zarr(tmp_path / "file" / "a.zarr", head, levels, compression="zstd")


KILLED = """
import sys, time
from pathlib import Path
from pipeline.raster import ome_zarr
from tests.pipeline.raster import test_ome_zarr as story

ome_zarr.CHUNK, ome_zarr.SHARD = 8, 32
head, levels = story.the_story()
story.write_ome_zarr(Path(sys.argv[1]), head, levels, compression="zstd", on_tiles=lambda n: time.sleep(0.05))
"""


def test_a_killed_process_leaves_no_trace(tmp_path, small):
    head, levels = the_story()
    part = tmp_path / "part.zarr"
    victim = subprocess.Popen([sys.executable, "-c", KILLED, str(part)], cwd=Path(__file__).parents[3])
    try:
        deadline = time.monotonic() + 60
        while tiles_done(part) < 3:
            assert victim.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        victim.send_signal(signal.SIGKILL)
    finally:
        victim.kill()
        victim.wait()
    assert 3 <= tiles_done(part) < n_shards(levels)
    write_ome_zarr(part, head, levels, compression="zstd")
    write_ome_zarr(tmp_path / "whole.zarr", head, levels, compression="zstd")
    assert content(part) == content(tmp_path / "whole.zarr")
