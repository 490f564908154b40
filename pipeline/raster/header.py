"""What a raster says about itself, apart from its pixels, and what that becomes `s` times larger."""

import math
import re
from typing import Literal

from pydantic import BaseModel, ConfigDict

DType = Literal["uint8", "uint16", "int16", "float32"]
Validity = Literal["all", "nodata", "mask", "alpha"]

LARGEST = {"uint8": 255, "uint16": 65535, "int16": 32767}
EPSILON, SMALLEST = 2.0**-23, 2.0**-149
"""Of float32: between 1 and the next larger number; between 0 and the next."""

NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
"""At the beginning of a text."""


class Frozen(BaseModel):
    """A value: immutable, complete, JSON there and back (NaN and infinities included)."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Band(Frozen):
    """One band of colour; alpha is not among them."""

    name: str | None = None
    """GDAL's description."""
    color: str = "undefined"
    """Name of rasterio's ColorInterp: red, green, blue, gray, nir, undefined ..."""
    unit: str | None = None
    scale: float = 1.0
    offset: float = 0.0
    tags: dict[str, str] = {}
    bits: int | None = None
    """Significant bits where they are fewer than the type's (GDAL's NBITS); None for all."""


class GroundControlPoint(Frozen):
    """A pixel position (counted from the corner of the first pixel) and where it lies."""

    row: float
    col: float
    x: float
    y: float
    z: float = 0.0
    id: str = ""
    info: str = ""


class Header(Frozen):
    """Everything that is kept of a raster besides its pixels."""

    height: int
    width: int
    dtype: DType
    bands: tuple[Band, ...]
    validity: Validity = "all"
    """How the raster says which pixels count: not at all; by a value (nodata, or NaN in floats); by a mask band, inside
    or in a sidecar; by alpha, which follows the bands as one more."""
    nodata: float | None = None
    """The value of pixels that do not count, NaN allowed; of integers, within the type's range. None with validity
    "nodata" is a float raster whose NaN count as holes although nothing declares them."""
    crs: str | None = None
    """WKT."""
    transform: tuple[float, float, float, float, float, float] | None = None
    """Affine (a, b, c, d, e, f): x = a col + b row + c, y = d col + e row + f, from the corner of the first pixel."""
    gcps: tuple[GroundControlPoint, ...] = ()
    gcp_crs: str | None = None
    """WKT."""
    rpcs: dict[str, str] | None = None
    """GDAL's RPC domain: LINE_OFF, LINE_SCALE, SAMP_NUM_COEFF ..."""
    tags: dict[str, str] = {}
    """The default domain, without what describes the file rather than the picture."""
    domains: dict[str, dict[str, str]] = {}
    """Other domains that are kept as they are."""
    microns_per_pixel: tuple[float, float] | None = None
    """(x, y), of scanned slides."""

    @property
    def count(self) -> int:
        """Bands in the file, alpha included."""
        return len(self.bands) + (self.validity == "alpha")

    @property
    def beside_nodata(self) -> float | None:
        """The value of pixels that count but come so close to nodata that a reader would take them for it; None if
        there is no such value.

        GDAL takes floats for equal where they differ by less than 2 epsilon of their sum, so twice that is kept.
        """
        if self.nodata is None or not math.isfinite(self.nodata):
            return None
        if self.dtype == "float32":
            return self.nodata * (1.0 - 8 * EPSILON) or SMALLEST
        return self.nodata + 1 if self.nodata < LARGEST[self.dtype] else self.nodata - 1

    @property
    def itemsize(self) -> int:
        """Bytes of a sample."""
        return {"uint8": 1, "uint16": 2, "int16": 2, "float32": 4}[self.dtype]

    @property
    def n_bytes(self) -> int:
        """Of all pixels, uncompressed, without overviews and mask."""
        return self.height * self.width * self.count * self.itemsize

    def scaled(self, s: int, tags: dict[str, str] | None = None) -> "Header":
        """The header of the raster with `s` times as many rows and columns.

        Pixels are areas: a position p, from the corner of the first pixel, becomes s p, and the centre of a pixel
        moves with it. RPC offsets are positions of centres: off -> s off + (s - 1) / 2.

        Args:
            tags: added to the default domain.
        """
        transform = self.transform
        if transform is not None:
            a, b, c, d, e, f = transform
            transform = (a / s, b / s, c, d / s, e / s, f)
        return self.model_copy(
            update={
                "height": s * self.height,
                "width": s * self.width,
                "transform": transform,
                "gcps": tuple(p.model_copy(update={"row": s * p.row, "col": s * p.col}) for p in self.gcps),
                "rpcs": None if self.rpcs is None else _rescaled_rpcs(self.rpcs, s),
                "tags": {**_rescaled(self.tags, s), **(tags or {})},
                "bands": tuple(band.model_copy(update={"tags": _still_true(band.tags)}) for band in self.bands),
                "microns_per_pixel": self.microns_per_pixel
                and (self.microns_per_pixel[0] / s, self.microns_per_pixel[1] / s),
            }
        )


def _rescaled_rpcs(rpcs: dict[str, str], s: int) -> dict[str, str]:
    scaled = dict(rpcs)
    for name, shift in (("LINE_OFF", (s - 1) / 2), ("SAMP_OFF", (s - 1) / 2), ("LINE_SCALE", 0.0), ("SAMP_SCALE", 0.0)):
        number = NUMBER.match(rpcs.get(name, ""))  # some files add the unit: "+002199.00 pixels"
        if number is not None:
            scaled[name] = repr(s * float(number[0]) + shift)
    return scaled


def _rescaled(tags: dict[str, str], s: int) -> dict[str, str]:
    """Dots per inch, and the like, of a picture with more dots."""
    kept = _still_true(tags)
    for name in ("TIFFTAG_XRESOLUTION", "TIFFTAG_YRESOLUTION"):
        try:
            value = s * float(kept[name])
        except (KeyError, ValueError):
            continue
        kept[name] = f"{value:.10g}" if math.isfinite(value) else kept[name]
    return kept


def _still_true(tags: dict[str, str]) -> dict[str, str]:
    """Without statistics, which belong to other pixels."""
    return {name: value for name, value in tags.items() if not name.startswith("STATISTICS_")}
