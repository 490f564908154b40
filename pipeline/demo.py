"""`gigasr demo`: a photograph that scikit-image ships, as a small georeferenced raster, and upscaled."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import Affine

from pipeline.config import make_config
from pipeline.errors import ConfigError, OutputError
from pipeline.events import Listener
from pipeline.network import is_untrained
from pipeline.run import run
from pipeline.signals import NEVER, Stopping

SCALE = 4
PRESET = "tiny"

CRS = "EPSG:32633"
CORNER = (500_000.0, 5_400_000.0)
"""Easting and northing of the top left corner, in metres: a meadow on the middle meridian of UTM zone 33."""
PIXEL = 10.0
"""Metres."""

DIVIDER = 4
"""White columns between the two pictures."""

UNTRAINED = (
    f"the weights of {PRESET!r} are not trained yet, they are random numbers: "
    "the picture has the right size, place and colours, but its details are noise"
)

Image = NDArray[np.uint8]
"""(bands, height, width), as rasterio has it."""


@dataclass(frozen=True)
class Demo:
    """What was made."""

    source: Path
    output: Path
    comparison: Path
    untrained: bool
    """Whether the weights are random numbers."""

    def report(self) -> list[tuple[str, str]]:
        rows = [
            ("source", str(self.source)),
            (f"{SCALE} times larger", str(self.output)),
            ("side by side", f"{self.comparison} (left: bicubic, right: gigasr)"),
        ]
        return [*rows, ("please note", UNTRAINED)] if self.untrained else rows


def make_demo(folder: Path, listener: Listener, stopping: Stopping = NEVER) -> Demo:
    """Write the raster, its enlargement and a comparison to a folder; files of an earlier demo are replaced.

    Raises:
        ConfigError: if scikit-image is not installed.
        OutputError: if the folder cannot be written.
    """
    source, output = folder / "photograph.tif", folder / f"photograph_x{SCALE}.tif"
    picture = photograph()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (source.exists() and np.array_equal(_read(source), picture)):  # an unfinished demo may go on
            write_source(source, picture)
    except (OSError, rasterio.RasterioIOError) as error:
        raise OutputError(f"cannot write the demo to {str(folder)!r}: {error}\nhint: gigasr demo FOLDER") from None
    config = make_config(
        source=source,
        output=output,
        scale=SCALE,
        model={"weights": PRESET, "device": "cpu"},
        file={"overwrite": True},
        run={"workers": "local"},  # a single small worker: starting Ray would take longer than its work
    )
    run(config, listener, stopping)
    comparison = folder / "side_by_side.png"
    write_png(comparison, side_by_side(_read(source, SCALE), _read(output)))
    return Demo(source, output, comparison, is_untrained(PRESET))


def photograph() -> Image:
    """The face of Chelsea the cat, at half her size: 128 x 192 pixels, two tiles of the network at four times that.

    Raises:
        ConfigError: if scikit-image is not installed.
    """
    try:
        from skimage import data
    except ModuleNotFoundError:
        raise ConfigError(
            "the demo's photograph comes with scikit-image, which is not installed\nhint: pip install 'gigasr[demo]'"
        ) from None
    pixels = data.chelsea().transpose(2, 0, 1)[:, 16:272, 28:412]
    means = pixels.reshape(3, 128, 2, 192, 2).mean(axis=(2, 4))
    return np.rint(means).astype(np.uint8)


def write_source(path: Path, picture: Image) -> None:
    """As a GeoTIFF with a place on Earth."""
    easting, northing = CORNER
    place = Affine(PIXEL, 0, easting, 0, -PIXEL, northing)
    with _create(path, "GTiff", picture, crs=CRS, transform=place, compress="deflate") as raster:
        raster.write(picture)
        raster.colorinterp = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)


def side_by_side(left: Image, right: Image) -> Image:
    """Two pictures of one size, with a thin line between them."""
    divider = np.full((3, left.shape[1], DIVIDER), 255, dtype=np.uint8)
    return np.concatenate([left, divider, right], axis=2)


def write_png(path: Path, picture: Image) -> None:
    """Without a place on Earth, and without a file beside it that says so."""
    with warnings.catch_warnings(), rasterio.Env(GDAL_PAM_ENABLED="NO"):
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with _create(path, "PNG", picture) as raster:
            raster.write(picture)


def _create(path: Path, driver: str, picture: Image, **profile: Any) -> Any:
    bands, height, width = picture.shape
    return rasterio.open(path, "w", driver=driver, dtype="uint8", count=bands, height=height, width=width, **profile)


def _read(path: Path, scale: int = 1) -> Image:
    """The first three bands, bicubically enlarged."""
    with rasterio.open(path) as raster:
        shape = (3, raster.height * scale, raster.width * scale)
        picture: Image = raster.read([1, 2, 3], out_shape=shape, resampling=Resampling.cubic)
        return picture
