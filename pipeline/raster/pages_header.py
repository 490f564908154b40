"""What slides and microscopes say in a TIFF, as a `Header`."""

import base64
import math
import re
from collections.abc import Sequence
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import tifffile
from tifffile import PHOTOMETRIC

from pipeline.raster.header import Band, DType, Header

MICRONS = {
    "pm": 1e-6, "Å": 1e-4, "nm": 1e-3, "µm": 1.0, "μm": 1.0, "um": 1.0, "micron": 1.0, "microns": 1.0, "\\u00B5m": 1.0,
    "mm": 1e3, "cm": 1e4, "dm": 1e5, "m": 1e6, "in": 25400.0, "inch": 25400.0,
}  # fmt: skip
"""In a unit of length, as OME and ImageJ write them (both characters that look like mu among them)."""

COLORS: dict[int, tuple[str, ...]] = {
    PHOTOMETRIC.MINISBLACK: ("gray",),
    PHOTOMETRIC.RGB: ("red", "green", "blue"),
    PHOTOMETRIC.YCBCR: ("red", "green", "blue"),  # as which tifffile decodes it
}

RESOLUTION_UNITS = {2: "2 (pixels/inch)", 3: "3 (pixels/cm)"}
"""TIFF's numbers, in GDAL's words."""

KEPT_TAGS = {
    "TIFFTAG_DOCUMENTNAME": 269, "TIFFTAG_DATETIME": 306, "TIFFTAG_ARTIST": 315, "TIFFTAG_COPYRIGHT": 33432,
}  # fmt: skip
"""By GDAL's names. Image descriptions are not kept: they hold the size of the source, and programs that recognise a
slide by them would take ours for the scanner's."""


class Planes(NamedTuple):
    """Which samples of a series are read."""

    dtype: DType
    height: int
    width: int
    colors: tuple[int, ...]
    """From 1."""
    alpha: int | None
    interleaved: bool
    """Whether all samples of a pixel are in one page (axis S): colours, rather than channels."""
    single: bool
    """Whether there is one band in the file."""


def header_of(tiff: tifffile.TiffFile, page: tifffile.TiffPage, planes: Planes) -> Header:
    """Args: `page` is the first of the series."""
    names = _channel_names(tiff, planes)
    colors = dict(enumerate(COLORS.get(page.photometric, ()), 1)) if planes.interleaved or planes.single else {}
    validity = "nodata" if planes.dtype == "float32" else "all"
    bits = page.bitspersample if isinstance(page.bitspersample, int) else page.bitspersample[0]
    return Header(
        height=planes.height,
        width=planes.width,
        dtype=planes.dtype,
        bands=tuple(
            Band(
                name=names.get(band),
                color=colors.get(band, "undefined"),
                bits=bits if planes.dtype != "float32" and bits < 8 * np.dtype(planes.dtype).itemsize else None,
            )
            for band in planes.colors
        ),
        validity="alpha" if planes.alpha is not None else validity,
        tags=_tags(page),
        domains=_profile(page),
        microns_per_pixel=microns_per_pixel(tiff, page, planes.height, planes.width),
    )


def microns_per_pixel(
    tiff: tifffile.TiffFile, page: tifffile.TiffPage, height: int, width: int
) -> tuple[float, float] | None:
    """(x, y) of a slide; None where nothing tells, or only dots per inch of a screen."""
    x = y = math.nan
    if tiff.is_ome and (pixels := _ome_pixels(tiff.ome_metadata or "", height, width)) is not None:
        x, y = (_ome_length(pixels, f"PhysicalSize{axis}") for axis in "XY")
    elif tiff.is_svs and (match := re.search(r"\bMPP\s*=\s*([0-9.eE+-]+)", page.description)):
        x = y = float(match[1])
    elif tiff.is_imagej:
        unit = MICRONS.get(str((tiff.imagej_metadata or {}).get("unit")), math.nan)
        x, y = (unit / dots for dots in _dots(page))
    elif not tiff.is_ome:
        unit = {2: 25400.0, 3: 10000.0}.get(page.resolutionunit, math.nan)
        x, y = (unit / dots for dots in _dots(page))
    y = x if math.isnan(y) else y
    return (x, y) if 0 < x < math.inf and 0 < y < math.inf else None


def _dots(page: tifffile.TiffPage) -> tuple[float, float]:
    """Pixels for each unit of length, NaN where the file does not say."""
    x, y = page.resolution
    return x or math.nan, y or math.nan


def _ome_pixels(xml: str, height: int, width: int) -> ElementTree.Element | None:
    """What OME says of the first image of that size."""
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError:
        return None
    sizes = {"SizeY": str(height), "SizeX": str(width)}
    for pixels in root.iterfind("{*}Image/{*}Pixels"):
        if all(pixels.get(name) == size for name, size in sizes.items()):
            return pixels
    return None


def _ome_length(pixels: ElementTree.Element, name: str) -> float:
    """In microns; NaN if it is not given, or in pixels."""
    return float(pixels.get(name, "nan")) * MICRONS.get(pixels.get(f"{name}Unit", "µm"), math.nan)


def _channel_names(tiff: tifffile.TiffFile, planes: Planes) -> dict[int, str]:
    """By band. Where one channel holds all samples, its name is of none of them."""
    if not tiff.is_ome or planes.interleaved:
        return {}
    pixels = _ome_pixels(tiff.ome_metadata or "", planes.height, planes.width)
    channels: Sequence[ElementTree.Element] = [] if pixels is None else pixels.findall("{*}Channel")
    return {band: name for band, channel in enumerate(channels, 1) if (name := channel.get("Name"))}


def _tags(page: tifffile.TiffPage) -> dict[str, str]:
    tags = {name: str(found.value) for name, code in KEPT_TAGS.items() if (found := page.tags.get(code)) is not None}
    if unit := RESOLUTION_UNITS.get(page.resolutionunit):
        for axis, dots in zip("XY", _dots(page), strict=True):
            if 0 < dots < math.inf:
                tags |= {f"TIFFTAG_{axis}RESOLUTION": f"{dots:.10g}", "TIFFTAG_RESOLUTIONUNIT": unit}
    return tags


def _profile(page: tifffile.TiffPage) -> dict[str, dict[str, str]]:
    """The ICC profile, as GDAL has it."""
    profile = page.iccprofile
    return {"COLOR_PROFILE": {"SOURCE_ICC_PROFILE": base64.b64encode(profile).decode()}} if profile else {}
