"""Rasters to read: small ones of every kind, made by rasterio and tifffile, and rasterio's own reading of them."""

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import tifffile
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import Affine

from pipeline.raster.source import Pixels, open_source
from stablesr.box import Box

PLACE = Affine(10.0, 0.0, 500000.0, 0.0, -10.0, 4500000.0)


def samples(*shape: int, dtype: str = "uint8", seed: int = 0) -> NDArray[Any]:
    """Values over the whole range of the type (of floats, standard normal), the same in every run."""
    rng = np.random.default_rng(seed)
    if dtype == "float32":
        return rng.standard_normal(shape, np.float32)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)


@contextmanager
def opened(path: Path | str, mode: str = "r", **profile: Any) -> Iterator[Any]:
    """rasterio.open, silent about rasters without a place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path, mode, **profile) as dataset:
            yield dataset


def write(path: Path, values: NDArray[Any], **profile: Any) -> Path:
    """(bands, h, w) to a file, a GeoTIFF unless `driver` says otherwise."""
    count, height, width = values.shape
    shape = {"count": count, "height": height, "width": width, "dtype": values.dtype}
    with opened(path, "w", **{"driver": "GTiff", **shape, **profile}) as dataset:
        dataset.write(values)
    return path


def edited(path: Path) -> Any:
    """The raster, to be given a mask, tags, descriptions ..."""
    return opened(path, "r+")


def whole(path: Path | str, bands: list[int] | None = None, **options: Any) -> Pixels:
    """All of a raster, as we read it."""
    with open_source(str(path), bands, **options) as source:
        return source.read(Box(0, 0, source.header.height, source.header.width))


def vrt(path: Path, height: int, width: int, *bands: str, head: str = "") -> Path:
    """A VRT of bands that are written out."""
    path.write_text(
        f'<VRTDataset rasterXSize="{width}" rasterYSize="{height}">{head}{"".join(bands)}</VRTDataset>',
        encoding="utf-8",
    )
    return path


def vrt_band(place: int, dtype: str, source: str, band: int = 1, inside: str = "") -> str:
    """A band of a VRT that shows a band of another raster."""
    return (
        f'<VRTRasterBand dataType="{dtype}" band="{place}">{inside}<SimpleSource>'
        f'<SourceFilename relativeToVRT="1">{source}</SourceFilename><SourceBand>{band}</SourceBand>'
        "</SimpleSource></VRTRasterBand>"
    )


def write_exif(path: Path, orientation: int, dots: tuple[int, int] = (300, 150)) -> None:
    """Puts an EXIF segment of orientation and dots per inch into a JPEG."""
    entries = [
        struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0),
        struct.pack("<HHII", 0x011A, 5, 1, 62),
        struct.pack("<HHII", 0x011B, 5, 1, 70),
        struct.pack("<HHIHH", 0x0128, 3, 1, 2, 0),
    ]
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<I", 0)
    tiff = b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<IIII", dots[0], 1, dots[1], 1)
    segment = b"\xff\xe1" + struct.pack(">H", 2 + 6 + len(tiff)) + b"Exif\0\0" + tiff
    jpeg = path.read_bytes()
    path.write_bytes(jpeg[:2] + segment + jpeg[2:])


def write_svs(path: Path, image: NDArray[Any], **options: Any) -> Path:
    """A slide as Aperio's scanners write it: full resolution, thumbnail, reduced, label. `image` is (h, w, 3)."""
    about = (
        "Aperio Image Library v11.2.1\r\n46000x32914 (240x240) JPEG/RGB Q=30|AppMag = 20|MPP = 0.4990|Date = 12/29/09"
    )
    small = "Aperio Image Library v11.2.1\r\n700x600 -> 175x150 - |AppMag = 20|MPP = 0.4990"
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(image, photometric="rgb", tile=(64, 64), description=about, metadata=None, **options)
        tiff.write(image[::4, ::4], photometric="rgb", description=small, metadata=None)
        tiff.write(image[::2, ::2], photometric="rgb", tile=(64, 64), description=about, metadata=None)
        tiff.write(
            image[::4, ::4], photometric="rgb", description="Aperio\r\nlabel 38x44", subfiletype=1, metadata=None
        )
    return path


def write_ome(path: Path, image: NDArray[Any], axes: str, levels: int = 2, **metadata: Any) -> Path:
    """A pyramidal OME-TIFF."""
    photometric = "rgb" if "S" in axes else "minisblack"
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(image, subifds=levels, tile=(64, 64), photometric=photometric, metadata={"axes": axes, **metadata})
        for level in range(1, levels + 1):
            step = slice(None, None, 2**level)
            reduced = image[..., step, step, :] if axes.endswith("S") else image[..., step, step]
            tiff.write(reduced, subfiletype=1, tile=(64, 64), photometric=photometric)
    return path
