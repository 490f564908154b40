"""Writes OME-Zarr 0.5: the levels as sharded Zarr v3 arrays in one group on the local disk.

PART/zarr.json   attributes: "ome", with a CRS also the GeoZarr conventions, and "gigasr": the whole header
PART/0           the raster (c, y, x); one shard for every 2048 x 2048 pixels, in chunks of 512 x 512
PART/1 ...       its overviews
PART/mask        validity (y, x), 0 or 255, of rasters with a mask
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from rasterio.crs import CRS
from rasterio.errors import CRSError
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import LocalStore

from pipeline.errors import ConfigError, Stopped, WorkFailed
from pipeline.raster.header import Header
from pipeline.raster.journal import Journal, sync_folder
from pipeline.raster.overviews import Level
from pipeline.raster.tags import channel_names
from stablesr.box import Box

Compression = Literal["zstd", "deflate", "lzw", "none"]

COMPRESSIONS = ("zstd", "none")
"""Zarr knows no LZW, and its gzip writes the time into every chunk."""

VERSION = 1
"""Of what is written here. An output begun by another version is begun again."""

CHUNK, SHARD = 512, 2048
"""Sides in pixels: of what is read at once, of what is one file."""

CHANNELS = 4
"""Up to so many bands share a chunk; of more, each has its own."""

CONVENTIONS = {
    "proj": ("f17cb550-5864-4468-aeb7-f3180cfb622f", "Coordinate reference system information for geospatial data"),
    "spatial": ("689b58e2-cf7b-45e0-9fff-9cfc0883d6b4", "Spatial coordinate information"),
    "multiscales": ("d35379db-88df-4056-af3a-620245f8e347", "Multiscale layout of zarr datasets"),
}
"""GeoZarr is made of these, version 0.1."""

COLORS = {
    "red": "FF0000",
    "green": "00FF00",
    "blue": "0000FF",
    "cyan": "00FFFF",
    "magenta": "FF00FF",
    "yellow": "FFFF00",
}


def write_ome_zarr(
    part: Path,
    header: Header,
    levels: Sequence[Level],
    *,
    compression: Compression,
    level: int | None = None,
    on_tiles: Callable[[int], None] = lambda n: None,
    stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Write the folder, or what is missing of it: the journal beside it, `part` + ".tiles", says how far it is.

    Every chunk has a checksum. Levels are asked in the calling thread, for boxes of one shard, row by row.

    Args:
        levels: the raster first.
        level: of zstd; None for 3. One that is too high means the highest.
        on_tiles: told of shards as they are written. Those of an earlier start are not counted: see `tiff.tiles_done`.
        stopping: asked between shards.

    Raises:
        ConfigError: if the compression is none of `COMPRESSIONS`.
        Stopped: because `stopping` said so; what is written is kept.
        WorkFailed: if the folder cannot be written; what is in the journal is kept.
    """
    compressors = _compressors(compression, level)
    shapes = [(level.height, level.width) for level in levels]
    options = repr((VERSION, zarr.__version__, compression, level, shapes, header.model_dump_json()))
    journal = Journal(part, hashlib.sha256(options.encode()).digest())
    with _to_disk(part):
        done = _n_intact(part, shards(header, shapes), journal)
        if done:
            for leftover in part.rglob("*.partial"):  # of a shard that was being written when the run was killed
                leftover.unlink()
        else:
            _create(part, header, shapes, compressors)
        journal.begin(done)
    try:
        with ThreadPoolExecutor(1) as committer:
            committing = committer.submit(lambda: None)
            for number, shard in enumerate(itertools.islice(shards(header, shapes), done, None), done):
                if stopping():
                    raise Stopped(
                        f"stopped with {number} of {n_shards(levels)} shards of {part} written\n"
                        "hint: run the same command again to go on"
                    )
                pixels = levels[shard.level].read(shard.box)
                mask = levels[0].read_mask(shard.box) if shard.has_mask else None
                with _to_disk(part):
                    shard.write(part, pixels, mask)
                    committing.result()
                committing = committer.submit(_commit, part, shard, journal)  # while the next is read and compressed
                on_tiles(1)
            with _to_disk(part):
                committing.result()
                journal.remove()
    finally:
        journal.close()


def n_shards(levels: Sequence[Level]) -> int:
    """Shards of the output; of one place, those of all bands and of the mask are one."""
    return sum(-(-level.height // SHARD) * -(-level.width // SHARD) for level in levels)


@dataclass(frozen=True)
class Shard:
    """One place of a level: the unit of writing."""

    level: int
    row: int
    col: int
    box: Box
    has_mask: bool
    n_files: int
    """Of pixels: one, or one for every band."""

    def files(self, part: Path) -> list[Path]:
        place = Path(str(self.row), str(self.col))
        files = [part / str(self.level) / "c" / str(band) / place for band in range(self.n_files)]
        return [*files, part / "mask" / "c" / place] if self.has_mask else files

    def n_bytes(self, part: Path) -> int:
        return sum(file.stat().st_size for file in self.files(part))

    def write(self, part: Path, pixels: Any, mask: Any) -> None:
        """Whole files."""
        for file in self.files(part):
            file.unlink(missing_ok=True)  # at the raster's edge zarr would read and complete what is there
        rows, columns = self.box.within(Box(0, 0, self.box.bottom, self.box.right))
        _array(part, str(self.level))[:, rows, columns] = pixels
        if mask is not None:
            _array(part, "mask")[rows, columns] = mask


def shards(header: Header, shapes: Sequence[tuple[int, int]]) -> Iterator[Shard]:
    """In the order in which they are written; `shapes` are (height, width) of the levels."""
    n_files = 1 if header.count <= CHANNELS else header.count
    for k, (height, width) in enumerate(shapes):
        for row in range(-(-height // SHARD)):
            for col in range(-(-width // SHARD)):
                bottom, right = min((row + 1) * SHARD, height), min((col + 1) * SHARD, width)
                box = Box(row * SHARD, col * SHARD, bottom, right)
                yield Shard(k, row, col, box, header.validity == "mask" and k == 0, n_files)


def _commit(part: Path, shard: Shard, journal: Journal) -> None:
    """Note a shard, once its files are on disk."""
    for file in shard.files(part):
        _sync(file)
        sync_folder(file.parent)
        if shard.col == 0:  # the folder is new
            sync_folder(file.parent.parent)
    journal.append(np.array([[shard.n_bytes(part)]], np.uint64))


def _n_intact(part: Path, shards: Iterable[Shard], journal: Journal) -> int:
    """Shards that the journal knows and that are as long as it says, up to the first that is not."""
    n = 0
    for shard, (size,) in zip(shards, journal.sizes, strict=False):
        if not all(file.exists() for file in shard.files(part)) or shard.n_bytes(part) != size:
            break
        n += 1
    return n


def _create(part: Path, header: Header, shapes: Sequence[tuple[int, int]], compressors: list[Any]) -> None:
    """The group and its arrays, without any data."""
    if part.is_dir():
        shutil.rmtree(part)
    group = zarr.create_group(LocalStore(part), zarr_format=3, attributes=_attributes(header, shapes))
    bands = header.count if header.count <= CHANNELS else 1
    nodata = _in_json(header)["nodata"]
    for k, shape in enumerate(shapes):
        group.create_array(
            str(k),
            shape=(header.count, *shape),
            chunks=(bands, CHUNK, CHUNK),
            shards=(bands, SHARD, SHARD),
            dtype=header.dtype,
            fill_value=_fill_value(header),
            compressors=compressors,
            dimension_names=("c", "y", "x"),
            attributes={**({} if nodata is None else {"nodata": nodata}), **_place_of_array(header, shape, k)},
        )
    if header.validity == "mask":
        group.create_array(
            "mask",
            shape=shapes[0],
            chunks=(CHUNK, CHUNK),
            shards=(SHARD, SHARD),
            dtype="uint8",
            fill_value=0,
            compressors=compressors,
            dimension_names=("y", "x"),
            attributes=_place_of_array(header, shapes[0], 0),
        )
    for file in part.rglob("zarr.json"):
        _sync(file)
        sync_folder(file.parent)
    sync_folder(part.parent)


def _array(part: Path, name: str) -> zarr.Array[Any]:
    array = zarr.open_array(LocalStore(part), path=name, mode="r+", zarr_format=3)
    return array.with_config({"write_empty_chunks": True})  # so that a missing file is a missing file


def _compressors(compression: Compression, level: int | None) -> list[Any]:
    """With a checksum: without one, a flipped bit comes back as pixels."""
    if compression not in COMPRESSIONS:
        raise ConfigError(
            f"compression {compression!r} is none that OME-Zarr is written with\nhint: {' or '.join(COMPRESSIONS)}"
        )
    return [Crc32cCodec() if compression == "none" else ZstdCodec(level=min(level or 3, 22), checksum=True)]


def _fill_value(header: Header) -> float | int:
    """Nodata where the type holds it; it stands for pixels that were never written, of which there are none."""
    if header.dtype == "float32":
        with np.errstate(over="ignore"):
            nodata = float("nan") if header.nodata is None else float(np.float32(header.nodata))
        return nodata if header.validity == "nodata" else 0.0
    return int(header.nodata) if header.nodata is not None and float(header.nodata).is_integer() else 0


# Attributes


def _attributes(header: Header, shapes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    microns = header.microns_per_pixel
    unit = {} if microns is None else {"unit": "micrometer"}
    x, y = microns or (1.0, 1.0)
    datasets = [
        {
            "path": str(k),
            "coordinateTransformations": [
                {"type": "scale", "scale": [1.0, y * 2**k, x * 2**k]},
                {"type": "translation", "translation": [0.0, y * (2**k - 1) / 2, x * (2**k - 1) / 2]},  # of centres
            ],
        }
        for k in range(len(shapes))
    ]
    axes = [
        {"name": "c", "type": "channel"},
        {"name": "y", "type": "space", **unit},
        {"name": "x", "type": "space", **unit},
    ]
    multiscale = {"axes": axes, "datasets": datasets, "type": "mean"}
    ome = {"version": "0.5", "multiscales": [multiscale], **_omero(header)}
    return {"ome": ome, **_geozarr(header, shapes), "gigasr": {"header": _in_json(header)}}


def _in_json(header: Header) -> dict[str, Any]:
    """As JSON has it, which knows NaN and infinities as text only."""
    plain: dict[str, Any] = json.loads(header.model_dump_json())
    return plain


def _omero(header: Header) -> dict[str, Any]:
    """How to show the channels, where the whole range is what one wants to see: of 8 bits, of known bits, of RGB."""
    is_rgb = [band.color for band in header.bands[:3]] == ["red", "green", "blue"]
    if header.dtype == "float32" or not (header.dtype == "uint8" or is_rgb or all(band.bits for band in header.bands)):
        return {}
    limits = np.iinfo(header.dtype)
    channels = []
    for k, label in enumerate(channel_names(header)):
        band = header.bands[k] if k < len(header.bands) else None
        top = (1 << band.bits) - 1 if band is not None and band.bits else int(limits.max)
        window = {"min": int(limits.min), "max": int(limits.max), "start": 0, "end": top}
        color = COLORS.get(band.color, "FFFFFF") if band is not None else "FFFFFF"
        channels.append({"label": label, "color": color, "active": not is_rgb or k < 3, "window": window})
    return {"omero": {"channels": channels, "rdefs": {"model": "color" if is_rgb else "greyscale"}}}


def _geozarr(header: Header, shapes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    if header.transform is None:
        return {}
    crs = _crs(header)
    names = ["proj", "spatial", "multiscales"] if crs else ["spatial", "multiscales"]
    layout = []
    for k in range(len(shapes)):
        step = {"scale": [2.0, 2.0] if k else [1.0, 1.0], "translation": [0.0, 0.0]}
        layout.append({"asset": str(k), **({"derived_from": str(k - 1)} if k else {}), "transform": step})
    return {
        "zarr_conventions": [_convention(name) for name in names],
        **crs,
        **_spatial(header, shapes[0], 0),
        "multiscales": {"layout": layout, "resampling_method": "average"},
    }


def _place_of_array(header: Header, shape: tuple[int, int], level: int) -> dict[str, Any]:
    place = _spatial(header, shape, level)
    return {"zarr_conventions": [_convention("spatial")], **place} if place else {}


def _convention(name: str) -> dict[str, str]:
    uuid, description = CONVENTIONS[name]
    return {
        "uuid": uuid,
        "name": name,
        "schema_url": f"https://raw.githubusercontent.com/zarr-conventions/{name}/refs/tags/v0.1/schema.json",
        "spec_url": f"https://github.com/zarr-conventions/{name}/blob/v0.1/README.md",
        "description": description,
    }


def _crs(header: Header) -> dict[str, str]:
    if header.crs is None:
        return {}
    try:
        return {"proj:wkt2": CRS.from_wkt(header.crs).to_wkt(version="WKT2_2019")}
    except CRSError:  # WKT1 can say what WKT2 cannot; the header keeps it
        return {}


def _spatial(header: Header, shape: tuple[int, int], level: int) -> dict[str, Any]:
    if header.transform is None:
        return {}
    a, b, c, d, e, f = header.transform
    corners = [
        (a * col + b * row + c, d * col + e * row + f) for col in (0, header.width) for row in (0, header.height)
    ]
    (left, right), (bottom, top) = ((min(axis), max(axis)) for axis in zip(*corners, strict=True))
    s = 2.0**level
    return {
        "spatial:dimensions": ["y", "x"],
        "spatial:transform_type": "affine",
        "spatial:transform": [a * s, b * s, c, d * s, e * s, f],
        "spatial:shape": list(shape),
        "spatial:bbox": [left, bottom, right, top],
        "spatial:registration": "pixel",
    }


# Disk


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _to_disk(part: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WorkFailed(
            f"cannot write {part}: {error.strerror or error}\n"
            "hint: make room, or take away what stands in the way, and run the same command again"
        ) from error
