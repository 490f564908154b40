"""What is refused of a source, whoever reads it."""

import os
from collections.abc import Iterable, Sequence
from typing import cast, get_args

from pipeline.errors import SourceError
from pipeline.raster.header import DType, Header

BOMB_BYTES = 1 << 30
"""Rasters up to this size are never refused for it."""
BOMB_FACTOR = 2000
"""Bytes that a byte on disk may stand for. Deflate reaches 1032 on constant data; sparse files have no limit."""
BLOCK_BYTES = 1 << 30
"""Of one block (a strip or tile, all its bands), which has to be decoded whole."""

_INSTEAD = {"bool": "Byte", "int8": "Int16"}
"""GDAL's type that holds what another does; Float32 for the rest."""


def sample_type(path: str, dtypes: Sequence[str]) -> DType:
    """The one type of all chosen bands."""
    taken = get_args(DType)
    for dtype in dtypes:
        if dtype.startswith("complex"):
            raise SourceError(
                f"{path} has complex samples ({dtype}), which no picture shows\n"
                f"hint: upscale their amplitude: gdal_translate -ot Float32 DERIVED_SUBDATASET:AMPLITUDE:{path} "
                "amplitude.tif"
            )
        if dtype not in taken:
            raise SourceError(
                f"{path} has samples of type {dtype}; those taken are {', '.join(taken)}\n"
                f"hint: gdal_translate -ot {_INSTEAD.get(dtype, 'Float32')} {path} converted.tif"
            )
    if len(set(dtypes)) > 1:
        raise SourceError(
            f"the bands of {path} are of different types: {', '.join(dtypes)}\n"
            f"hint: choose bands of one type, or convert them: gdal_translate -ot Float32 {path} converted.tif"
        )
    return cast(DType, dtypes[0])


def choose_bands(
    path: str, bands: Sequence[int] | None, n_bands: int, alpha: int | None
) -> tuple[tuple[int, ...], int | None]:
    """The bands of colour, and the one of alpha, that are read; all counted from 1."""
    if bands is None:
        bands = range(1, n_bands + 1)
    for band in bands:
        if not 1 <= band <= n_bands:
            has = f"{n_bands} band" + "s" * (n_bands > 1)
            raise SourceError(f"{path} has {has}: there is no band {band}\nhint: the first band is 1")
    colors = tuple(band for band in bands if band != alpha)
    if not bands:
        raise SourceError(f"no band of {path} is chosen\nhint: leave `bands` out to upscale all {n_bands}")
    return (colors, alpha) if colors else (tuple(bands), None)


def refuse_bomb(path: str, header: Header, files: Iterable[str]) -> None:
    """Raises if a small file claims to be a huge raster."""
    on_disk = sum(os.path.getsize(name) for name in files if os.path.isfile(name))
    if on_disk and header.n_bytes > max(BOMB_BYTES, BOMB_FACTOR * on_disk):
        raise SourceError(
            f"{path} would be {header.n_bytes / 2**30:,.1f} GiB of pixels ({header.width} x {header.height}) from "
            f"{on_disk / 2**20:,.1f} MiB on disk: more than {BOMB_FACTOR} bytes from each\n"
            "hint: if it is meant to be that empty, say that the source is trusted"
        )


def refuse_large_block(path: str, height: int, width: int, n_bytes: int) -> None:
    """Raises if blocks are so large that memory would depend on them.

    Args:
        n_bytes: of one block, decoded, all its bands.
    """
    if n_bytes > BLOCK_BYTES:
        raise SourceError(
            f"{path} is stored in blocks of {width} x {height} pixels, {n_bytes / 2**30:,.1f} GiB each, that can only "
            "be decoded whole\n"
            f"hint: store it in tiles: gdal_translate -co TILED=YES -co BIGTIFF=YES {path} tiled.tif; or, where memory "
            "allows, say that the source is trusted"
        )
