"""Slides and microscope pictures, read with tifffile where GDAL sees pages instead of a picture.

SVS, NDPI, SCN, Philips, QPTIFF, OME-TIFF, ImageJ and their like: the full resolution of their largest picture. A TIFF
with a place on the ground is GDAL's.
"""

import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import tifffile
import zarr
from numpy.typing import NDArray

from pipeline.errors import SourceError
from pipeline.raster.checks import choose_bands, refuse_bomb, refuse_large_block, sample_type
from pipeline.raster.pages_header import Planes, header_of
from pipeline.raster.source import Pixels, Source
from stablesr.box import Box

IN_PAGES = ("svs", "ndpi", "ome", "scn", "philips", "qpi", "indica", "lsm", "imagej")
"""Kinds of TIFF, as tifffile tells them apart."""

GEOGRAPHIC_TAGS = (33550, 33922, 34264, 34735)
"""Pixel scale, tie points, transformation, keys: how a GeoTIFF says where it lies."""

ORIENTATION = 274
"""TIFF's tag."""

ALPHA = (1, 2)
"""TIFF's extra samples that are alpha: premultiplied, and not."""

DECODED_BYTES = 64 << 20
"""Of decoded tiles, kept for the next window; one is kept in any case."""

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # or it writes to stderr what becomes an error here


class TiffKind(NamedTuple):
    """What decides how a TIFF is read."""

    in_pages: bool
    """Here, rather than by GDAL."""
    orientation: int
    """1 is upright."""


def look_at_tiff(path: str) -> TiffKind | None:
    """None if it is not a TIFF on this machine, or one so broken that GDAL shall say what is wrong."""
    if not os.path.isfile(path):
        return None
    try:
        with tifffile.TiffFile(path) as tiff:
            tags = tiff.pages.first.tags
            placed = any(tag in tags for tag in GEOGRAPHIC_TAGS)
            in_pages = not placed and any(getattr(tiff, f"is_{kind}") for kind in IN_PAGES)
            return TiffKind(in_pages, int(tags.valueof(ORIENTATION, 1)))
    except Exception:  # tifffile lets through whatever a broken file provokes
        return None


def files_of_pages(path: str) -> set[str]:
    """All files of a TIFF that is read here: OME-TIFF may be spread over several. None of any other file."""
    kind = look_at_tiff(path)
    if kind is None or not kind.in_pages:
        return set()
    with _tifffile(f"open {path}"), tifffile.TiffFile(path) as tiff:
        return {path, *_files(_largest(path, tiff))}


def open_pages(path: str, bands: Sequence[int] | None, *, trusted: bool) -> Source:
    """Opens a TIFF of a kind that is read here. Arguments and errors are those of `open_source`."""
    with _tifffile(f"open {path}"):
        tiff = tifffile.TiffFile(path)
    try:
        with _tifffile(f"read what {path} says of itself"):
            return PagesSource(path, tiff, bands, trusted=trusted)
    except BaseException:
        tiff.close()
        raise


class PagesSource(Source):
    """Full resolution of the largest picture in a TIFF."""

    def __init__(self, path: str, tiff: tifffile.TiffFile, bands: Sequence[int] | None, *, trusted: bool) -> None:
        self._path, self._tiff = path, tiff
        level = _largest(path, tiff)
        page = level.keyframe
        band_axis = _band_axis(path, level)
        if page.photometric == tifffile.PHOTOMETRIC.PALETTE:
            raise SourceError(f"{path} has a palette, which is not read of slides\nhint: convert it to RGB")
        sizes = dict(zip(level.axes, level.shape, strict=True))
        n_bands = sizes[band_axis] if band_axis else 1
        extra = page.extrasamples if band_axis == "S" else ()
        alphas = [n_bands - len(extra) + place for place, kind in enumerate(extra, 1) if kind in ALPHA]
        colors, alpha = choose_bands(path, bands, n_bands, alphas[0] if alphas else None)
        dtype = sample_type(path, [level.dtype.name])
        planes = Planes(dtype, sizes["Y"], sizes["X"], colors, alpha, band_axis == "S", band_axis is None)
        self.header = header_of(tiff, page, planes)
        if not trusted:
            refuse_bomb(path, self.header, _files(level))
        _refuse_truncated(path, level)
        self._bands = [band - 1 for band in (*colors, *([alpha] if alpha else []))]
        self._samples = _Samples(path, level, band_axis, trusted=trusted)

    def read(self, box: Box) -> Pixels:
        assert box.overlap(Box(0, 0, self.header.height, self.header.width)) == box, box
        task = f"read rows {box.top} to {box.bottom - 1}, columns {box.left} to {box.right - 1} of {self._path}"
        with _tifffile(task):
            samples = self._samples.read(self._bands, box)
        values = samples[: len(self.header.bands)]
        if self.header.validity == "all":
            return Pixels(values, None, None)
        finite = np.isfinite(values)
        if self.header.validity == "nodata":
            return Pixels(values, finite, None)
        alpha = np.where(finite.all(axis=0) & (samples[-1] > 0), samples[-1], 0)
        return Pixels(values, (alpha > 0)[np.newaxis], alpha)

    def close(self) -> None:
        self._samples.close()
        self._tiff.close()


class _Samples:
    """The samples of a picture as (bands, rows, columns), whatever their order in the file."""

    def __init__(self, path: str, level: tifffile.TiffPageSeries, band_axis: str | None, *, trusted: bool) -> None:
        self._axes, self._band_axis = level.axes, band_axis
        self._dtype = level.dtype.newbyteorder("=")
        self._mapped: NDArray[Any] | None = None
        if level.dataoffset is not None:  # one piece of uncompressed samples: the system reads what is touched
            file = level.keyframe.parent.filehandle
            stored = level.dtype.newbyteorder(level.keyframe.parent.byteorder)
            self._mapped = self._planar(np.memmap(file.path, stored, "r", level.dataoffset, level.shape))
            return
        self._array = zarr.open_array(level.aszarr(level=0), mode="r")
        chunk = dict(zip(level.axes, self._array.chunks, strict=True))
        self._chunk = chunk[band_axis] if band_axis else 1, chunk["Y"], chunk["X"]
        n_bytes = math.prod(self._array.chunks) * level.dtype.itemsize
        if not trusted:
            refuse_large_block(path, chunk["Y"], chunk["X"], n_bytes)
        self._tile = lru_cache(max(1, DECODED_BYTES // n_bytes))(self._decode)

    def read(self, bands: Sequence[int], box: Box) -> NDArray[Any]:
        """Args: `bands` count from 0."""
        if self._mapped is not None:
            rows, columns = slice(box.top, box.bottom), slice(box.left, box.right)
            return np.stack([self._mapped[band, rows, columns] for band in bands]).astype(self._dtype)
        out = np.empty((len(bands), box.height, box.width), self._dtype)
        depth, height, width = self._chunk
        for k in sorted({band // depth for band in bands}):
            wanted = [(place, band - k * depth) for place, band in enumerate(bands) if band // depth == k]
            for i in range(box.top // height, -(-box.bottom // height)):
                for j in range(box.left // width, -(-box.right // width)):
                    tile = self._tile(k, i, j)
                    frame = Box(i * height, j * width, i * height + tile.shape[1], j * width + tile.shape[2])
                    part = frame.overlap(box)
                    assert part is not None
                    for place, band in wanted:
                        out[(place, *part.within(box))] = tile[(band, *part.within(frame))]
        return out

    def close(self) -> None:
        """Lets go of the file."""
        self._mapped = None

    def _decode(self, k: int, i: int, j: int) -> NDArray[Any]:
        """A chunk, cut at the edges of the raster."""
        index = tuple({self._band_axis: k, "Y": i, "X": j}.get(axis, 0) for axis in self._axes)
        return self._planar(np.asarray(self._array.get_block_selection(index)))

    def _planar(self, stored: NDArray[Any]) -> NDArray[Any]:
        kept = [axis for axis in self._axes if axis in ("Y", "X", self._band_axis)]
        stored = stored[tuple(slice(None) if axis in kept else 0 for axis in self._axes)]
        return stored[np.newaxis] if self._band_axis is None else np.moveaxis(stored, kept.index(self._band_axis), 0)


def _largest(path: str, tiff: tifffile.TiffFile) -> tifffile.TiffPageSeries:
    """Of all pictures in the file (slides have thumbnails and labels, too), at its full resolution."""
    pictures = [series.levels[0] for series in tiff.series if {"Y", "X"} <= set(series.axes)]
    if not pictures:
        raise SourceError(f"{path} holds no picture")
    return max(pictures, key=lambda level: level.shape[level.axes.index("Y")] * level.shape[level.axes.index("X")])


def _band_axis(path: str, level: tifffile.TiffPageSeries) -> str | None:
    """Along which the bands lie: samples of a page, or channels; None if there is one band."""
    axes = "".join(axis for axis, n in zip(level.axes, level.shape, strict=True) if n > 1 or axis in "YX")
    if axes not in ("YX", "YXS", "SYX", "CYX", "YXC"):
        sizes = ", ".join(f"{axis}={n}" for axis, n in zip(level.axes, level.shape, strict=True))
        raise SourceError(
            f"{path} has more than rows, columns and bands: its axes are {sizes}\n"
            "hint: write one plane to a file of its own, for example with Bio-Formats: bfconvert -z 0 -timepoint 0"
        )
    return axes.strip("YX") or None


def _files(level: tifffile.TiffPageSeries) -> set[str]:
    return {page.parent.filehandle.path for page in level.pages if page is not None}


def _refuse_truncated(path: str, level: tifffile.TiffPageSeries) -> None:
    """Raises if a file ends before its pixels do, which reading would find only after hours of work."""
    for page in level.pages:
        if page is None or not page.dataoffsets:
            continue
        end, size = _end(page.dataoffsets, page.databytecounts), page.parent.filehandle.size
        if end > size:
            raise SourceError(
                f"{path} is truncated: it has {size:,} bytes, but its pixels reach to byte {end:,}\n"
                "hint: copy or download it again"
            )


def _end(offsets: Iterable[int], lengths: Iterable[int]) -> int:
    return max(offset + length for offset, length in zip(offsets, lengths, strict=True))


@contextmanager
def _tifffile(task: str) -> Iterator[None]:
    """Turns whatever tifffile and its codecs raise into our error; there is no common kind."""
    try:
        yield
    except SourceError:
        raise
    except Exception as error:
        raise SourceError(f"cannot {task}: {str(error) or type(error).__name__}\nhint: it may be damaged") from None
