"""Is a written file what it should be? Looked at from outside, without reading its pixels."""

import itertools
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal
from xml.etree import ElementTree

import numpy as np
import rasterio
import zarr
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import MemoryFile
from rio_cogeo import cog_validate
from zarr.storage import LocalStore

from pipeline.errors import WorkFailed
from pipeline.raster.header import Header
from pipeline.raster.ome_zarr import CHUNK, SHARD, shards
from pipeline.raster.overviews import n_levels
from pipeline.raster.tags import IMAGE_DESCRIPTION, SUB_IFDS, authored, colors
from pipeline.raster.tiff import TILE_COUNTS, TILE_OFFSETS

Format = Literal["cog", "bigtiff", "ome-tiff", "ome-zarr"]


def validate(path: Path, header: Header, format: Format) -> None:
    """Check a written file: it opens, has the size, the bands and the place of the raster, and all of its tiles.

    A COG must pass rio-cogeo's strict validation. No pixel is read.

    Raises:
        WorkFailed: if it is not what it should be; the message says in what.
    """
    with _as_failure(path, format):
        if format == "ome-zarr":
            _check_zarr(path, header)
            return
        _check_tables(path, header, format)
        _check_facts(path, header)
        if format == "cog" and header.width > 1:  # else rio-cogeo takes the overviews for as large as the raster
            with _without_georeference():
                _, errors, complaints = cog_validate(path, strict=True, quiet=True)
            _must(not errors and not complaints, "; ".join([*errors, *complaints]))


class _Wrong(Exception):
    """Something that must hold does not."""


def _must(holds: Any, what: str) -> None:
    if not holds:
        raise _Wrong(what)


def _same(what: str, found: Any, wanted: Any) -> None:
    _must(found == wanted, f"{what}: {found!r} instead of {wanted!r}")


@contextmanager
def _as_failure(path: Path, format: Format) -> Iterator[None]:
    try:
        yield
    except (_Wrong, OSError, ValueError, KeyError, struct.error, rasterio.errors.RasterioError) as error:
        raise WorkFailed(
            f"{path} is not the {format} it should be: {error}\n"
            "hint: the same command writes it again; if it fails again, look at the disk"
        ) from error


@contextmanager
def _without_georeference() -> Iterator[None]:
    """Rasters that lie nowhere on Earth are no mistake."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


# TIFF

Directory = dict[int, tuple[int, int, int]]
"""Of every tag: type, count, and where its value stands."""


def _check_tables(path: Path, header: Header, format: Format) -> None:
    """The levels are there, and every tile has its place in the file, which it shares with no other."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        is_big, directories = _directories(file, size)
        images = [d for d in directories if not _value(file, d, 254) & 4]
        masks = [d for d in directories if _value(file, d, 254) & 4]
        tile = _value(file, images[0], 322)
        shapes = [(_value(file, image, 257), _value(file, image, 256)) for image in images]
        count = 1 if format == "bigtiff" else n_levels(header.height, header.width, tile)
        _same("levels", shapes, _shapes(header, count))
        has_mask = header.validity == "mask" and format != "ome-tiff"
        _same("masks", len(masks), len(images) if has_mask else 0)
        _must(is_big or format == "cog", "a classic TIFF instead of a BigTIFF")
        tables = [_tile_table(file, directory) for directory in directories]
        if format == "ome-tiff":
            _check_ome(file, images[0], header)
    offsets, counts = (np.concatenate(parts) for parts in zip(*tables, strict=True))
    _must(counts.all(), f"{np.count_nonzero(counts == 0)} tiles are missing")
    order = np.argsort(offsets)
    ends = offsets[order] + counts[order]
    _must(ends.max() <= size, f"a tile ends at byte {ends.max()}, but the file has {size}")
    _must((offsets[order][1:] >= ends[:-1]).all(), "tiles overlap")


def _directories(file: BinaryIO, size: int) -> tuple[bool, list[Directory]]:
    """Those that follow each other, then the children of the first."""
    start = _read(file, 0, 16)
    _must(start[:4] in (b"II*\0", b"II+\0"), "it does not begin as a TIFF")
    is_big = start[2] == 43
    at = struct.unpack_from("<Q", start, 8)[0] if is_big else struct.unpack_from("<I", start, 4)[0]
    directories: list[Directory] = []
    while at:
        _must(at < size and len(directories) < 200, f"there is no directory at byte {at}")
        directory, at = _directory(file, at, is_big)
        directories.append(directory)
    if SUB_IFDS in directories[0]:
        for child in _values(file, directories[0], SUB_IFDS):
            directories.append(_directory(file, int(child), is_big)[0])
    return is_big, directories


def _directory(file: BinaryIO, at: int, is_big: bool) -> tuple[Directory, int]:
    n_format, entry, inline, link = ("<Q", "<HHQ", 8, "<Q") if is_big else ("<H", "<HHI", 4, "<I")
    (n,) = struct.unpack(n_format, _read(file, at, struct.calcsize(n_format)))
    at += struct.calcsize(n_format)
    step = struct.calcsize(entry) + inline
    content = _read(file, at, n * step + inline)
    directory = {}
    for k in range(n):
        code, kind, count = struct.unpack_from(entry, content, k * step)
        value_at = at + (k + 1) * step - inline
        if count * _ITEMSIZE.get(kind, 1) > inline:
            (value_at,) = struct.unpack_from(link, content, (k + 1) * step - inline)
        directory[code] = kind, count, value_at
    return directory, struct.unpack_from(link, content, n * step)[0]


_ITEMSIZE = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


def _values(file: BinaryIO, directory: Directory, code: int) -> NDArray[Any]:
    kind, count, at = directory[code]
    size = _ITEMSIZE.get(kind, 1)
    return np.frombuffer(_read(file, at, count * size), f"<u{size}")


def _value(file: BinaryIO, directory: Directory, code: int) -> int:
    """One number; 0 if there is no such tag."""
    return int(_values(file, directory, code)[0]) if code in directory else 0


def _tile_table(file: BinaryIO, directory: Directory) -> tuple[NDArray[Any], NDArray[Any]]:
    """Where the tiles begin, and their numbers of bytes."""
    offsets, counts = (_values(file, directory, code).astype(np.uint64) for code in (TILE_OFFSETS, TILE_COUNTS))
    width, height, across, down = (_value(file, directory, code) for code in (256, 257, 322, 323))
    n = -(-height // down) * -(-width // across)
    _same("tiles in the tables", (len(offsets), len(counts)), (n, n))
    return offsets, counts


def _read(file: BinaryIO, at: int, size: int) -> bytes:
    file.seek(at)
    content = file.read(size)
    _must(len(content) == size, f"it ends before byte {at + size}")
    return content


def _shapes(header: Header, count: int) -> list[tuple[int, int]]:
    return [(-(-header.height // 2**k), -(-header.width // 2**k)) for k in range(count)]


def _check_ome(file: BinaryIO, directory: Directory, header: Header) -> None:
    _, count, at = directory[IMAGE_DESCRIPTION]
    try:
        root = ElementTree.fromstring(_read(file, at, count).rstrip(b"\0"))
    except ElementTree.ParseError as error:
        raise _Wrong(f"its OME-XML cannot be read: {error}") from error
    pixels = root.find("{*}Image/{*}Pixels")
    _must(pixels is not None, "its OME-XML describes no image")
    assert pixels is not None
    found = [pixels.get(f"Size{axis}") for axis in "XYC"]
    _same("size in its OME-XML", found, [str(n) for n in (header.width, header.height, header.count)])


def _check_facts(path: Path, header: Header) -> None:
    """What GDAL reads is what it would read of a file that it had written."""
    with (
        _without_georeference(),
        MemoryFile(authored(header)) as memory,
        memory.open() as wanted,
        rasterio.open(path) as file,
    ):
        _same("driver", file.driver, "GTiff")
        _same("size", (file.height, file.width), (header.height, header.width))
        _same("types of the bands", file.dtypes, (header.dtype,) * header.count)
        _same("CRS", file.crs, wanted.crs)
        _same("transform", tuple(file.transform)[:6], tuple(wanted.transform)[:6])
        _same("colours", [color.name for color in file.colorinterp], colors(header))
        _must(_are_nodata(file.nodatavals, header), f"nodata: {file.nodatavals} instead of {header.nodata}")
        points = header.gcps if header.transform is None else ()
        found = [(p.row, p.col, p.x, p.y, p.z) for p in file.gcps[0]]
        _same("ground control points", found, [(p.row, p.col, p.x, p.y, p.z) for p in points])


def _are_nodata(values: Sequence[float | None], header: Header) -> bool:
    """As what the type makes of it."""
    if header.nodata is None:
        return all(value is None for value in values)
    with np.errstate(over="ignore"):
        wanted = float(np.float32(header.nodata)) if header.dtype == "float32" else header.nodata
    return all(value is not None and (value == wanted or np.isnan([value, wanted]).all()) for value in values)


# OME-Zarr


def _check_zarr(path: Path, header: Header) -> None:
    group = zarr.open_group(LocalStore(path, read_only=True), mode="r", zarr_format=3)
    attributes: dict[str, Any] = group.attrs.asdict()
    _same("OME version", attributes["ome"]["version"], "0.5")
    found = Header.model_validate(attributes["gigasr"]["header"]).model_dump_json()  # text, since NaN is not NaN
    _same("header", found, Header.model_validate_json(header.model_dump_json()).model_dump_json())
    paths = [dataset["path"] for dataset in attributes["ome"]["multiscales"][0]["datasets"]]
    shapes = _shapes(header, n_levels(header.height, header.width, CHUNK))
    _same("levels", paths, [str(k) for k in range(len(shapes))])
    wanted: list[tuple[tuple[int, ...], str]] = [((header.count, *shape), header.dtype) for shape in shapes]
    if header.validity == "mask":
        paths, wanted = [*paths, "mask"], [*wanted, (shapes[0], "uint8")]
    for name, (shape, dtype) in zip(paths, wanted, strict=True):
        array = group[name]
        assert isinstance(array, zarr.Array)
        _same(f"array {name}", (array.shape, array.dtype.name), (shape, dtype))
    for file in itertools.chain.from_iterable(shard.files(path) for shard in shards(header, shapes)):
        _check_shard(file)


def _check_shard(path: Path) -> None:
    """The index at its end says where its chunks are: one after the other, up to the index."""
    n = (SHARD // CHUNK) ** 2
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        _must(size > 16 * n + 4, f"shard {path} is only {size} bytes long")
        index = np.frombuffer(_read(file, size - 16 * n - 4, 16 * n), "<u8").reshape(n, 2)
    present = index[index[:, 0] != np.iinfo(np.uint64).max]
    _must(
        len(present) and present.sum(axis=1).max() == size - 16 * n - 4,
        f"shard {path} is not as long as its index says",
    )
