"""Sources that GDAL reads: GeoTIFF and COG, JPEG 2000, PNG, JPEG, VRT and all others it knows."""

import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError  # what rasterio lets through where it does not make an error of its own
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window

from pipeline.errors import SourceError
from pipeline.raster.checks import refuse_bomb, refuse_large_block
from pipeline.raster.gdal_header import Layout, bits_of, header_of, layout_of
from pipeline.raster.palette import Palette, colors_of, is_ramp
from pipeline.raster.rows import WholeRows
from pipeline.raster.source import Pixels, Source
from stablesr.box import Box

CACHE_BYTES = 64 << 20
"""Of decoded blocks that GDAL keeps, of all open rasters; by default it is a twentieth of the machine's memory."""

NAMES_SHOWN = 8
"""Of subdatasets, in an error."""


def open_gdal(path: str, bands: Sequence[int] | None, *, trusted: bool) -> Source:
    """Opens what GDAL can open. Arguments and errors are those of `open_source`."""
    dataset = _open(path)
    try:
        with _gdal(f"read what {path} says of itself"):
            return _source(path, dataset, bands, trusted=trusted)
    except BaseException:
        dataset.close()
        raise


def files_of_dataset(path: str) -> set[str]:
    """All files that a dataset consists of, sidecars and the parts of mosaics included, and those of the parts.

    Raises:
        SourceError: if it cannot be opened. (A part that is missing is left for the reading to find.)
    """
    found: set[str] = set()
    ahead = [path]
    while ahead:
        name = ahead.pop()
        found.add(name)
        try:
            with _open(name) as dataset:
                files = set(dataset.files)
                mosaic = dataset.driver in ("VRT", "GTI")
        except SourceError:
            if name == path:
                raise
            continue
        ahead += files - found if mosaic else []
        found |= files
    return found


class GdalSource(Source):
    """Bands of a dataset, as they are stored."""

    def __init__(self, path: str, dataset: Any, layout: Layout) -> None:
        self._path, self._dataset, self._layout = path, dataset, layout
        self.header = header_of(dataset, layout)

    def read(self, box: Box) -> Pixels:
        assert box.overlap(Box(0, 0, self.header.height, self.header.width)) == box, box
        layout, dataset = self._layout, self._dataset
        window = Window(box.left, box.top, box.width, box.height)
        with _gdal(f"read rows {box.top} to {box.bottom - 1}, columns {box.left} to {box.right - 1} of {self._path}"):
            samples = dataset.read([*layout.colors, *([layout.alpha] if layout.alpha else [])], window=window)
            masks = dataset.read_masks(list(layout.masks), window=window) if layout.masks else None
        values = samples[: len(layout.colors)]
        if layout.validity == "all":
            return Pixels(values, None, None)
        if layout.validity == "nodata":
            return Pixels(values, np.stack([_counts(v, n) for v, n in zip(values, layout.nodata, strict=True)]), None)

        counts = np.ones(values.shape[1:], bool) if masks is None else (masks > 0).all(axis=0)
        if layout.dtype == "float32":
            counts &= np.isfinite(values).all(axis=0)
        if layout.alpha is None:
            return Pixels(values, counts[np.newaxis], None)
        alpha = np.where(counts & (samples[-1] > 0), samples[-1], 0)
        return Pixels(values, (alpha > 0)[np.newaxis], alpha)

    def close(self) -> None:
        self._dataset.close()


def _source(path: str, dataset: Any, bands: Sequence[int] | None, *, trusted: bool) -> Source:
    _refuse_containers(path, dataset)
    _refuse_truncated(path, dataset)
    palettes = {band: palette for band in range(1, dataset.count + 1) if (palette := _palette(dataset, band))}
    if dataset.count > 1 and (unreadable := sorted(palettes.keys() & set(bands or palettes))):
        raise SourceError(
            f"band {unreadable[0]} of {path} is an index into a palette, beside other bands\n"
            f"hint: choose among the others, or expand it: gdal_translate -b {unreadable[0]} -expand rgb {path} rgb.tif"
        )
    palette = palettes.get(1) if dataset.count == 1 else None

    layout = layout_of(path, dataset, bands if palette is None else None)
    source: Source = GdalSource(path, dataset, layout)
    if not trusted:
        refuse_bomb(path, source.header, dataset.files)
        height, width = dataset.block_shapes[layout.colors[0] - 1]
        together = dataset.count if dataset.tags(ns="IMAGE_STRUCTURE").get("INTERLEAVE") == "PIXEL" else 1
        refuse_large_block(path, height, width, height * width * source.header.itemsize * together)
    if dataset.block_shapes[layout.colors[0] - 1][1] >= dataset.width:
        source = WholeRows(source)
    return source if palette is None else Palette(path, source, colors_of(palette, layout.dtype), bands)


def _palette(dataset: Any, band: int) -> Mapping[int, Sequence[int]] | None:
    """Of a band, unless it says no more than that the samples are shades of gray."""
    if dataset.colorinterp[band - 1] != ColorInterp.palette:
        return None
    try:
        palette: Mapping[int, Sequence[int]] = dataset.colormap(band)
    except ValueError:  # it is called an index, but there is no palette
        return None
    return None if is_ramp(palette, bits_of(dataset, band)) else palette


def _open(path: str) -> Any:
    try:
        with _gdal(""), warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            dataset = rasterio.open(path, sharing=False)
            # GDAL looks at other pages only now; an error that it gets over there would be raised by whatever call
            # is the next to look for one
            with suppress(CPLE_BaseError):
                _ = dataset.subdatasets, dataset.colorinterp
            return dataset
    except SourceError as error:
        problem = str(error)
    # what GDAL says of these is true, but not helpful
    if os.path.isdir(path):
        raise SourceError(f"{path} is a folder, not a raster\nhint: name the file")
    if os.path.isfile(path):
        if not os.access(path, os.R_OK):
            raise SourceError(f"{path} cannot be read: no permission")
        if os.path.getsize(path) == 0:
            raise SourceError(f"{path} is empty: 0 bytes")
        raise SourceError(f"{path} is not a raster that GDAL can read, or it is damaged: {problem}")
    if re.match(r"[A-Za-z0-9_]{2,}:|/vsi", path):
        raise SourceError(f"{path} cannot be opened: {problem}")
    raise SourceError(f"there is no file {path}")


@contextmanager
def _gdal(task: str) -> Iterator[None]:
    """Turns errors of GDAL and rasterio into ours.

    GDAL's way of reading a whole PNG at once is off: it returns whatever was in memory where the file is truncated,
    without an error (3.10.3), and it keeps all of the picture.
    """
    try:
        with rasterio.Env(GDAL_PNG_WHOLE_IMAGE_OPTIM="NO", GDAL_CACHEMAX=CACHE_BYTES):
            yield
    except (RasterioError, CPLE_BaseError, UnicodeDecodeError) as error:
        problem = str(error.__cause__ or error)
        raise SourceError(f"cannot {task}: {problem}" if task else problem) from None


def _refuse_containers(path: str, dataset: Any) -> None:
    """Raises if the file holds several rasters, and the first is not clearly the one that is meant."""
    parts = dataset.subdatasets
    if dataset.count and len(parts) < 2:
        return
    if dataset.count:
        described = dataset.tags(ns="SUBDATASETS").values()
        sizes = [match for text in described if (match := re.match(r"Page \d+ \((\d+)P x (\d+)L", text))]
        pixels = [int(match[1]) * int(match[2]) for match in sizes]
        if len(pixels) < 2 or max(pixels[1:]) < pixels[0]:
            return  # thumbnails and labels behind the picture; or datasets beside the one that GDAL prefers
    if not parts:
        raise SourceError(f"{path} holds no raster")
    names = "\n".join(f"    {name}" for name in parts[:NAMES_SHOWN])
    more = f"\n    ... and {len(parts) - NAMES_SHOWN} more" if len(parts) > NAMES_SHOWN else ""
    raise SourceError(f"{path} holds several rasters:\n{names}{more}\nhint: give one of these names as the source")


def _refuse_truncated(path: str, dataset: Any) -> None:
    """Raises if a TIFF ends before its last block does, which reading would find only after hours of work."""
    if dataset.driver != "GTiff" or not os.path.isfile(path):
        return
    size = os.path.getsize(path)
    height, width = dataset.block_shapes[0]
    last = f"{(dataset.width - 1) // width}_{(dataset.height - 1) // height}"
    for band in (1, dataset.count):
        for block in ("0_0", last):
            start = dataset.get_tag_item(f"BLOCK_OFFSET_{block}", "TIFF", bidx=band)
            length = dataset.get_tag_item(f"BLOCK_SIZE_{block}", "TIFF", bidx=band)
            if start and length and int(start) + int(length) > size:
                raise SourceError(
                    f"{path} is truncated: it has {size:,} bytes, but its pixels reach to byte "
                    f"{int(start) + int(length):,}\nhint: copy or download it again"
                )


def _counts(values: NDArray[Any], nodata: float | None) -> NDArray[np.bool_]:
    """Where a band has a value, and a finite one.

    Floats equal nodata within two rounding errors, as GDAL has it, for files whose nodata was rounded on its way.
    """
    if values.dtype != np.float32:
        return np.ones(values.shape, bool) if nodata is None else values != int(nodata)
    counts = np.isfinite(values)
    if nodata is not None and np.isfinite(nodata):
        wide = np.where(counts, values, 0).astype(np.float64)
        near = 2 * np.finfo(np.float32).eps * np.abs(wide + nodata)
        counts &= (np.abs(wide - nodata) >= near) & (values != nodata)
    return counts
