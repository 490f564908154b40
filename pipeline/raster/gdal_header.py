"""What a GDAL dataset says about its raster, as a `Header`."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from rasterio.enums import ColorInterp, MaskFlags

from pipeline.raster.checks import choose_bands, sample_type
from pipeline.raster.header import Band, DType, GroundControlPoint, Header, Validity

DROPPED_TAGS = re.compile(
    r"NODATA_VALUES|OVR_RESAMPLING_ALG|TIFFTAG_(MIN|MAX)SAMPLEVALUE|EXIF_(Pixel[XY]Dimension|[XY]Resolution|"
    r"ResolutionUnit|ComponentsConfiguration|CompressedBitsPerPixel|Compression|JPEGInterchangeFormat.*|"
    r"YCbCrPositioning|ExifVersion|FlashPixVersion|Interoperability_.*)"
)
"""Tags that describe a file, or its samples, rather than the picture. EXIF's resolution is kept under TIFF's names."""

DROPPED_DOMAINS = re.compile(
    r"IMAGE_STRUCTURE|RPC|DERIVED_SUBDATASETS|SUBDATASETS|GEOLOCATION|TILING_SCHEME|FILES|xml:VRT|"
    r"(new_)?vrt_sources|xml:gml\.root-instance|_.*"
)
"""Domains that describe a file, that have fields of their own, or that count the source's pixels. ICC profiles
(COLOR_PROFILE), XMP and whatever satellites say of themselves are kept."""

MADE_BY_FILE = re.compile(r'\{"shape"|ImageJ=|<\?xml|<OME')
"""Beginnings of image descriptions by which programs recognise their own files, of their own size."""

EXIF_UNITS = {"2": "2 (pixels/inch)", "3": "3 (pixels/cm)"}


class Layout(NamedTuple):
    """Which bands of a dataset are read, counted from 1, and how they tell which pixels count."""

    dtype: DType
    colors: tuple[int, ...]
    alpha: int | None
    masks: tuple[int, ...]
    """Bands whose masks must all agree that a pixel counts."""
    nodata: tuple[float | None, ...]
    """Of each colour; consulted only with validity "nodata"."""

    @property
    def validity(self) -> Validity:
        if self.alpha is not None:
            return "alpha"
        if self.masks:
            return "mask"
        return "nodata" if self.dtype == "float32" or any(value is not None for value in self.nodata) else "all"


def layout_of(path: str, dataset: Any, bands: Sequence[int] | None) -> Layout:
    """Alpha comes before a mask, a mask before nodata: so GDAL has it, and rasterio for alpha beside nodata.

    A mask beside alpha, which is rare, is heeded too. Masks that bands have of their own are taken together: a pixel
    counts where all bands have it.
    """
    alphas = [band for band, color in enumerate(dataset.colorinterp, 1) if color == ColorInterp.alpha]
    colors, alpha = choose_bands(path, bands, dataset.count, alphas[0] if alphas else None)
    dtype = sample_type(path, [dataset.dtypes[band - 1] for band in (*colors, *([alpha] if alpha else []))])

    masked = [band for band in colors if _has_mask(dataset.mask_flag_enums[band - 1])]
    for_all = [band for band in masked if MaskFlags.per_dataset in dataset.mask_flag_enums[band - 1]]
    nodata = tuple(dataset.nodatavals[band - 1] for band in colors)
    return Layout(
        dtype,
        colors,
        alpha,
        masks=tuple(for_all[:1]) if len(for_all) == len(colors) else colors if masked else (),
        nodata=tuple(value if value is not None and _holds(dtype, value) else None for value in nodata),
    )


def header_of(dataset: Any, layout: Layout) -> Header:
    """All that is kept of a dataset, for the bands chosen."""
    transform = tuple(dataset.transform)[:6]
    gcps, gcp_crs = dataset.gcps
    rpcs = dataset.tags(ns="RPC")
    unplaced = transform == (1, 0, 0, 0, 1, 0) and (not dataset.crs or gcps or rpcs)
    nodata = [value for value in layout.nodata if value is not None]
    return Header(
        height=dataset.height,
        width=dataset.width,
        dtype=layout.dtype,
        bands=tuple(_band(dataset, band, layout.dtype) for band in layout.colors),
        validity=layout.validity,
        nodata=nodata[0] if nodata and layout.validity == "nodata" else None,
        crs=dataset.crs.to_wkt() if dataset.crs else None,
        transform=None if unplaced else transform,
        gcps=tuple(
            GroundControlPoint(row=p.row, col=p.col, x=p.x, y=p.y, z=p.z or 0.0, id=p.id or "", info=p.info or "")
            for p in gcps
        ),
        gcp_crs=gcp_crs.to_wkt() if gcps and gcp_crs else None,
        rpcs=rpcs or None,
        tags=_tags(dataset.tags()),
        domains={
            name: dataset.tags(ns=name) for name in dataset.tag_namespaces() if not DROPPED_DOMAINS.fullmatch(name)
        },
    )


def bits_of(dataset: Any, band: int) -> int:
    """Significant bits of a sample, of integers."""
    structure = dataset.tags(band, ns="IMAGE_STRUCTURE")
    return int(structure.get("NBITS", 8 * np.dtype(dataset.dtypes[band - 1]).itemsize))


def _band(dataset: Any, band: int, dtype: DType) -> Band:
    color = dataset.colorinterp[band - 1]
    bits = bits_of(dataset, band)
    if color == ColorInterp.palette:  # open_gdal has seen to all that are more than a ramp of grays
        color = ColorInterp.gray
    elif color == ColorInterp.alpha:  # chosen as a colour, or one alpha too many
        color = ColorInterp.undefined
    return Band(
        name=dataset.descriptions[band - 1] or None,
        color=color.name,
        unit=dataset.units[band - 1] or None,
        scale=dataset.scales[band - 1],
        offset=dataset.offsets[band - 1],
        tags=dataset.tags(band),
        bits=bits if dtype != "float32" and bits < 8 * np.dtype(dtype).itemsize else None,
    )


def _has_mask(flags: Sequence[MaskFlags]) -> bool:
    """Whether a band has a mask in the file, or one for all bands that takes all of their values to compute."""
    if MaskFlags.all_valid in flags or MaskFlags.alpha in flags:
        return False
    return MaskFlags.nodata not in flags or MaskFlags.per_dataset in flags


def _holds(dtype: DType, value: float) -> bool:
    if dtype == "float32":
        return not math.isfinite(value) or abs(value) <= float(np.finfo(np.float32).max)
    limits = np.iinfo(dtype)
    return math.isfinite(value) and value == int(value) and limits.min <= value <= limits.max


def _tags(tags: dict[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in tags.items() if not DROPPED_TAGS.fullmatch(name)}
    if MADE_BY_FILE.match(kept.get("TIFFTAG_IMAGEDESCRIPTION", "")):
        del kept["TIFFTAG_IMAGEDESCRIPTION"]
    if (unit := EXIF_UNITS.get(tags.get("EXIF_ResolutionUnit", ""))) and "TIFFTAG_XRESOLUTION" not in kept:
        for axis in "XY":
            if resolution := tags.get(f"EXIF_{axis}Resolution", "").strip("()"):
                kept[f"TIFFTAG_{axis}RESOLUTION"] = resolution
                kept["TIFFTAG_RESOLUTIONUNIT"] = unit
    return kept
