"""Rasters as they are read: open any, ask for a window, learn which of its pixels count.

    file --> GdalSource or PagesSource --> WholeRows --> Palette --> Upright --> whoever reads
             (all formats)  (slides)      (of strips)               (scans, photographs)

Those in the middle stand there only where a file needs them; each is a `Source` over another.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import SourceError
from pipeline.raster.header import Header
from stablesr.box import Box

HASHED_WHOLE = 64 << 20
"""Bytes up to which all of a file is hashed. Of larger files only three pieces are: enough for one that was written
anew, while size and time of change stand beside the hash."""
HASHED_PIECE = 1 << 20
"""Bytes."""


class Pixels(NamedTuple):
    """A window of a raster. The arrays are the reader's own: contiguous, and free to be changed."""

    values: NDArray[Any]
    """(bands, h, w) in the header's dtype; arbitrary where not valid."""
    valid: NDArray[np.bool_] | None
    """None where all count (validity "all"); else (1, h, w), or (bands, h, w) with validity "nodata"."""
    alpha: NDArray[Any] | None
    """(h, w) in the header's dtype with validity "alpha", None otherwise; `valid` is alpha > 0."""

    def each(self, change: Callable[[NDArray[Any]], NDArray[Any]]) -> "Pixels":
        """The same change, of the last two axes, made to all arrays."""
        valid, alpha = self.valid, self.alpha
        return Pixels(
            change(self.values),
            None if valid is None else change(valid),
            None if alpha is None else change(alpha),
        )

    def crop(self, box: Box, frame: Box) -> "Pixels":
        """The part of a window `frame` that `box` covers."""
        rows, columns = box.within(frame)
        return self.each(lambda array: array[..., rows, columns].copy())


class Source(ABC):
    """An open raster. One handle belongs to one process and one thread."""

    header: Header
    """Of the raster as it is upscaled: upright, palettes expanded, the bands chosen."""

    @abstractmethod
    def read(self, box: Box) -> Pixels:
        """A window, which lies within the raster.

        Raises:
            SourceError: if the file is damaged there.
        """

    @abstractmethod
    def close(self) -> None:
        """Gives the file back."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def open_source(path: str, bands: Sequence[int] | None = None, *, trusted: bool = False) -> Source:
    """Opens a raster of any format that is known here.

    Args:
        path: of a file, or a name that GDAL understands: a subdataset, /vsizip/..., a URL.
        bands: in the order wanted, counted from 1 (and, of a picture with a palette, after it is expanded); None for
            all. Alpha says which pixels count, so it comes along unasked; it is colour only where it is the one band
            asked for.
        trusted: rasters are read although they are absurdly large for their files, or in blocks of more than 1 GiB.

    Raises:
        SourceError: if it cannot be read, or is not a raster that can be upscaled.
    """
    # here, since they build on the classes above
    from pipeline.raster.gdal_source import open_gdal
    from pipeline.raster.orientation import upright_source
    from pipeline.raster.pages_source import look_at_tiff, open_pages

    tiff = look_at_tiff(path)
    if tiff is not None and tiff.in_pages:
        source: Source = open_pages(path, bands, trusted=trusted)
    else:
        source = open_gdal(path, bands, trusted=trusted)
    return upright_source(source, tiff.orientation if tiff is not None else 1)


def fingerprint(path: str) -> dict[str, object]:
    """What tells, without reading all of it, whether a raster is still the same; JSON-able.

    Returns:
        {"files": [...]}: of each file that the raster consists of, sidecars and the parts of mosaics included, name
        (from the folder of `path`), size in bytes, mtime_ns and sha256: of the whole file, or of the first, middle
        and last MiB of one that is larger than 64 MiB. Of what is not a file on this machine, the name.

    Raises:
        SourceError: if a file is missing or cannot be read.
    """
    from pipeline.raster.gdal_source import files_of_dataset
    from pipeline.raster.pages_source import files_of_pages

    folder = os.path.dirname(os.path.abspath(path))
    files = [_fingerprint_of_file(name, folder) for name in {*files_of_dataset(path), *files_of_pages(path)}]
    return {"files": sorted(files, key=lambda file: str(file["name"]))}


def _fingerprint_of_file(name: str, folder: str) -> dict[str, object]:
    if not os.path.isfile(name):
        return {"name": name}
    try:
        with open(name, "rb") as file:
            status = os.fstat(file.fileno())
            digest = hashlib.sha256()
            if status.st_size <= HASHED_WHOLE:
                while piece := file.read(HASHED_PIECE):
                    digest.update(piece)
            else:
                for start in (0, (status.st_size - HASHED_PIECE) // 2, status.st_size - HASHED_PIECE):
                    file.seek(start)
                    digest.update(file.read(HASHED_PIECE))
    except OSError as error:
        raise SourceError(f"cannot read {name}: {error.strerror}") from None
    return {
        "name": os.path.relpath(name, folder),
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "sha256": digest.hexdigest(),
    }
