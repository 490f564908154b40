"""Small rasters to upscale, and short ways to do it."""

from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.transform import Affine

from pipeline.config import Config, make_config
from pipeline.errors import Stopped
from pipeline.events import Event, UnitsDone
from pipeline.run import run

TRANSFORM = Affine(10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0)


def pattern(bands: int, height: int, width: int, dtype: str, seed: int = 0) -> NDArray[Any]:
    """Smooth, with an edge and some noise, over much of the type's range; every pixel differs from its neighbours."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (5.0 + b) + b) + np.cos(y / (7.0 + b)) + 0.5 * ((x // 9 + y // 6) % 2) for b in range(bands)]
    unit = (np.stack(waves) + 2.0) / 4.5 * 0.8 + 0.1 + rng.uniform(-0.05, 0.05, (bands, height, width))
    low, high = {"uint8": (0, 255), "uint16": (200, 9000), "int16": (-3000, 8000), "float32": (0.0, 1.0)}[dtype]
    values = low + unit * (high - low)
    return (values if dtype == "float32" else np.rint(values)).astype(dtype)


def write_raster(path: Path, values: NDArray[Any], **profile: Any) -> Path:
    """A GeoTIFF in UTM, unless the profile says otherwise."""
    options = {"driver": "GTiff", "crs": "EPSG:32633", "transform": TRANSFORM, **profile}
    bands, height, width = values.shape
    with rasterio.open(
        path, "w", count=bands, height=height, width=width, dtype=values.dtype.name, **options
    ) as dataset:
        dataset.write(values)
    return path


def read_raster(path: Path) -> NDArray[Any]:
    with rasterio.open(path) as dataset:
        pixels: NDArray[Any] = dataset.read()
    return pixels


def rehearsal(source: Path, output: Path, **options: Any) -> Config:
    """A configuration of the network that repeats pixels, in small blocks, in this process."""
    options = {
        "model": {"weights": "nearest", "device": "cpu"},
        "grid": {"block": 16},
        **options,
        "run": {"workers": "local", **options.get("run", {})},
    }
    return make_config(source=str(source), output=str(output), **options)


def upscaled(source: Path, output: Path, **options: Any) -> NDArray[Any]:
    """The pixels of a rehearsal's output."""
    return read_raster(run(rehearsal(source, output, **options)))


def repeated(values: NDArray[Any], scale: int) -> NDArray[Any]:
    """What nearest-neighbour upscaling of a whole image gives."""
    return values.repeat(scale, axis=-2).repeat(scale, axis=-1)


class Death(BaseException):
    """Stands for a process that ends in the middle: nobody may catch it."""


class Listening:
    """Keeps the events, and dies, or asks to stop, after a given number of finished units.

    Of the file's tiles it keeps out: they are finished by the batch, which the writer's own tests interrupt.
    """

    def __init__(self, die_after: int | None = None, stop_after: int | None = None) -> None:
        self.events: list[Event] = []
        self.die_after, self.stop_after = die_after, stop_after
        self.n_units = 0

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, UnitsDone) and event.stage != "export":
            self.n_units += 1
            if self.die_after == self.n_units:
                raise Death


class StopWhen:
    """What the command line's signals are to a run."""

    def __init__(self, listening: Listening) -> None:
        self._listening = listening

    def __call__(self) -> bool:
        return self._listening.stop_after is not None and self._listening.n_units >= self._listening.stop_after

    def install(self) -> None: ...


def run_in_pieces(config: Config, **ending: int) -> int:
    """Start a run again and again until it is finished; how often."""
    for start in range(1, 200):
        listening = Listening(**ending)
        try:
            run(config, listening, StopWhen(listening))
        except (Death, Stopped):
            continue
        return start
    raise AssertionError("the run makes no progress")
