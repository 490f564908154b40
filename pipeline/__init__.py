"""gigasr: super-resolution of rasters that fit no single GPU. Where pixels are, and who has them.

`upscale` does all of it. The command line is `gigasr`.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Config, make_config
from pipeline.errors import (
    ConfigError,
    Damaged,
    GigasrError,
    OutputError,
    RunMismatch,
    SourceError,
    Stopped,
    UserError,
    WontFit,
    WorkFailed,
)
from pipeline.events import Event, Listener

if TYPE_CHECKING:
    from pipeline.plan import Plan
    from pipeline.status import Status

__all__ = [
    "Config",
    "ConfigError",
    "Damaged",
    "Event",
    "GigasrError",
    "Listener",
    "OutputError",
    "RunMismatch",
    "SourceError",
    "Stopped",
    "UserError",
    "WontFit",
    "WorkFailed",
    "open_run",
    "plan",
    "upscale",
]

PathLike = str | os.PathLike[str]

# What follows imports PyTorch, GDAL and Zarr: not before they are needed.


def upscale(source: PathLike, output: PathLike, *, listener: Listener = lambda event: None, **options: Any) -> Path:
    """Make a raster larger, with detail to match; or go on with a run that was interrupted.

    Args:
        source: any raster that GDAL opens, or a pyramidal TIFF.
        output: its name says the format: .tif a COG, .btf plain BigTIFF, .ome.tif OME-TIFF, .zarr OME-Zarr.
        listener: is told what happens; see `pipeline.events`.
        options: of `Config`, nested as there: `scale=4, model={"weights": "tiny"}, run={"workers": "local"}`.

    Returns:
        The output.

    Raises:
        GigasrError: see `pipeline.errors`.
    """
    from pipeline.run import run

    return run(make_config(source=os.fspath(source), output=os.fspath(output), **options), listener)


def plan(source: PathLike, output: PathLike, **options: Any) -> "Plan":
    """What `upscale` would do with the same arguments, decided without doing any of it."""
    from pipeline.plan import make_plan

    return make_plan(make_config(source=os.fspath(source), output=os.fspath(output), **options))


def open_run(folder: PathLike) -> "Status":
    """How far the run in a folder is; it may be at work.

    Raises:
        UserError: if it is not the folder of a run.
    """
    from pipeline.status import read_status

    return read_status(Path(folder))
