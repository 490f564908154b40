"""Writes TIFFs in one pass, from level to file: COG, plain BigTIFF, pyramidal OME-TIFF.

GDAL's COG driver would want the raster as another file first, compress everything twice, and begin again after every
interruption. Here the size of everything but the compressed tiles is known beforehand, so that the file is written
from front to back, and goes on where it was left:

    header   what GDAL calls the ghost area (COG)
    base     directory, its values; the tables of its tiles are filled in at the end
    mask     directory of the base's mask
    level 1  ...
    tiles    smallest level first; every tile of pixels is followed by its mask
"""

import hashlib
import itertools
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import Stopped, WorkFailed
from pipeline.raster.header import Header
from pipeline.raster.journal import Journal
from pipeline.raster.overviews import Level
from pipeline.raster.tags import (
    IFD,
    IFD8,
    IMAGE_DESCRIPTION,
    LONG,
    LONG8,
    OF_EVERY_LEVEL,
    SHORT,
    SUB_IFDS,
    Tag,
    descriptive_tags,
    lay_out,
    ome_xml,
    table,
    tag,
    text_tag,
)
from stablesr.box import Box

Layout = Literal["cog", "bigtiff", "ome-tiff"]
Compression = Literal["zstd", "deflate", "lzw", "none"]

VERSION = 1
"""Of the files as they are written here. A file begun by another version is begun again."""

CODES = {"none": 1, "lzw": 5, "deflate": 8, "zstd": 50000}
"""TIFF's numbers of the compressions."""

CLASSIC_LIMIT = 1 << 31
"""Uncompressed bytes of all tiles up to which 32-bit offsets are enough: LZW may make noise half as large again, the
others hardly larger, and the tables take some."""

BATCH = 64 << 20
"""Bytes of tiles between two entries of the journal: what a crash costs at most."""

RUN = 2048
"""Columns that are read at once: four tiles, a chunk of the store."""

TILE_OFFSETS, TILE_COUNTS = 324, 325

GHOST = (
    "LAYOUT=IFDS_BEFORE_DATA\nBLOCK_ORDER=ROW_MAJOR\nBLOCK_LEADER=SIZE_AS_UINT4\n"
    "BLOCK_TRAILER=LAST_4_BYTES_REPEATED\nKNOWN_INCOMPATIBLE_EDITION=NO\n "
)
"""What GDAL wants to know to read a tile with its size in one request. The last blank is where GDAL notes changes."""


def write_tiff(
    part: Path,
    header: Header,
    levels: Sequence[Level],
    *,
    layout: Layout,
    compression: Compression,
    level: int | None = None,
    tile: int = 512,
    threads: int = 2,
    on_tiles: Callable[[int], None] = lambda n: None,
    stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Write the file, or what is missing of it: the journal beside it, `part` + ".tiles", says how far it is.

    The bytes depend on the header, the pixels and the options only: not on the threads, nor on interruptions. Levels
    are asked in the calling thread, row by row, for boxes one tile high. A plain BigTIFF has no overviews.

    Args:
        levels: the raster first.
        compression: with a predictor, unless "none".
        level: of the compression; None for zstd's 3 or deflate's 6. One that is too high means the highest.
        tile: side of the tiles; a multiple of 16.
        threads: that compress.
        on_tiles: told of tiles as they are written. Those of an earlier start are not counted: see `tiles_done`.
        stopping: asked between tiles.

    Raises:
        Stopped: because `stopping` said so; what is written is kept.
        WorkFailed: if the file cannot be written; what is in the journal is kept.
    """
    plan = _Plan.of(header, levels, layout, compression, tile)
    encoder = _Encoder(compression, level, tile)
    versions = VERSION, imagecodecs.__version__
    options = repr((versions, layout, compression, level, tile, plan.shapes, header.model_dump_json()))
    digest = hashlib.sha256(options.encode() + plan.head).digest()
    with _Assembly(part, plan, digest) as assembly, ThreadPoolExecutor(max(1, threads)) as pool:
        waiting: deque[Future[list[Any]]] = deque()
        for pixels, mask in _tiles(levels, plan, assembly.n_tiles):
            waiting.append(pool.submit(encoder.encode, pixels, mask))
            if len(waiting) > 2 * threads:
                assembly.add(waiting.popleft().result())
                on_tiles(1)
            if stopping():
                break
        while waiting:
            assembly.add(waiting.popleft().result())
            on_tiles(1)
        assembly.commit()
        if assembly.n_tiles < plan.n_tiles:
            raise Stopped(
                f"stopped with {assembly.n_tiles} of {plan.n_tiles} tiles of {part} written\n"
                "hint: run the same command again to go on"
            )
        assembly.finish()


def n_tiles(levels: Sequence[Level], layout: Layout, tile: int = 512) -> int:
    """Tiles of the file; a tile and its mask are one."""
    return sum(-(-level.height // tile) * -(-level.width // tile) for level in levels[: _n_levels(levels, layout)])


def tiles_done(part: Path) -> int:
    """Tiles (of an OME-Zarr: shards) that an earlier start has finished, if the same file is wanted again."""
    return len(Journal(part).sizes) if part.exists() else 0


def _n_levels(levels: Sequence[Level], layout: Layout) -> int:
    return 1 if layout == "bigtiff" else len(levels)


# Where everything stands


@dataclass(frozen=True)
class _Image:
    """A directory of the file: the pixels or the mask of a level."""

    is_mask: bool
    offsets_at: int
    """Where the offsets of its tiles stand."""
    counts_at: int
    """Where their numbers of bytes stand."""
    n_tiles: int


@dataclass(frozen=True)
class _Plan:
    """Everything of a file that is known before its tiles are."""

    shapes: tuple[tuple[int, int], ...]
    """(height, width) of its levels."""
    tile: int
    images: tuple[_Image, ...]
    is_big: bool
    framed: int
    """Bytes before, and after, every tile: its size and its last bytes, in COGs."""
    head: bytes
    """The file up to its tiles."""
    n_bytes: int
    """Of the file, if nothing could be compressed."""

    @classmethod
    def of(
        cls, header: Header, levels: Sequence[Level], layout: Layout, compression: Compression, tile: int
    ) -> "_Plan":
        if tile <= 0 or tile % 16:
            raise ValueError(f"tile={tile} must be a multiple of 16")
        shapes = tuple((level.height, level.width) for level in levels[: _n_levels(levels, layout)])
        wanted = tuple((-(-header.height // 2**k), -(-header.width // 2**k)) for k in range(len(shapes)))
        if shapes != wanted:
            raise ValueError(f"the levels are {shapes}, but the raster needs {wanted}")
        n_tiles = sum(-(-height // tile) * -(-width // tile) for height, width in shapes)
        has_mask = header.validity == "mask" and layout != "ome-tiff"
        n_bytes = n_tiles * tile * tile * header.count * header.itemsize + n_tiles * tile * tile // 8 * has_mask
        is_big = layout != "cog" or n_bytes > CLASSIC_LIMIT
        ghost = b""
        if layout == "cog":
            ghost = (GHOST + "MASK_INTERLEAVED_WITH_IMAGERY=YES\n" * has_mask).encode()
            ghost = b"GDAL_STRUCTURAL_METADATA_SIZE=%06d bytes\n" % len(ghost) + ghost
        tables = _tables(header, shapes, layout, compression, tile, has_mask, is_big)
        head, positions = lay_out(ghost, tables, is_big, chained=layout != "ome-tiff")
        order = itertools.product(shapes, range(1 + has_mask))
        images = tuple(
            _Image(bool(mask), at[TILE_OFFSETS], at[TILE_COUNTS], -(-height // tile) * -(-width // tile))
            for ((height, width), mask), at in zip(order, positions, strict=True)
        )
        return cls(shapes, tile, images, is_big, 4 * (layout == "cog"), head, n_bytes + len(head))

    @property
    def has_mask(self) -> bool:
        return any(image.is_mask for image in self.images)

    @property
    def n_tiles(self) -> int:
        return sum(down * across for down, across in map(self.grid, range(len(self.shapes))))

    def grid(self, level: int) -> tuple[int, int]:
        """Tiles of a level: down, across."""
        height, width = self.shapes[level]
        return -(-height // self.tile), -(-width // self.tile)


def _tables(
    header: Header,
    shapes: Sequence[tuple[int, int]],
    layout: Layout,
    compression: Compression,
    tile: int,
    has_mask: bool,
    is_big: bool,
) -> list[list[Tag]]:
    """The tags of every directory in their order, with tables of zeros."""
    described = descriptive_tags(header)
    if layout == "ome-tiff":
        kept = [tag for tag in described if tag.code != IMAGE_DESCRIPTION]
        described = [*kept, text_tag(IMAGE_DESCRIPTION, ome_xml(header))]
    predictor = 1 if compression == "none" else 3 if header.dtype == "float32" else 2
    tables = []
    for k, (height, width) in enumerate(shapes):
        n = -(-height // tile) * -(-width // tile)
        size = [
            tag(256, LONG, width), tag(257, LONG, height), tag(322, LONG, tile), tag(323, LONG, tile),
            table(TILE_OFFSETS, LONG8 if is_big else LONG, n), table(TILE_COUNTS, LONG, n),
        ]  # fmt: skip
        tables.append(
            [
                *size, tag(254, LONG, 1 if k else 0), tag(259, SHORT, CODES[compression]), tag(317, SHORT, predictor),
                *(tag for tag in described if not k or tag.code in OF_EVERY_LEVEL),
            ]
        )  # fmt: skip
        if has_mask:
            tables.append(
                [
                    *size, tag(254, LONG, 5 if k else 4), tag(258, SHORT, 1), tag(259, SHORT, CODES["deflate"]),
                    tag(262, SHORT, 4), tag(277, SHORT, 1), tag(284, SHORT, 1), tag(339, SHORT, 1),
                ]
            )  # fmt: skip
    if layout == "ome-tiff" and len(tables) > 1:
        tables[0].append(table(SUB_IFDS, IFD8 if is_big else IFD, len(tables) - 1))
    return [sorted(directory, key=lambda tag: tag.code) for directory in tables]


# Tiles


def _tiles(levels: Sequence[Level], plan: _Plan, first: int) -> Iterator[tuple[NDArray[Any], NDArray[np.uint8] | None]]:
    """Pixels and masks of the tiles in the file's order, from number `first` on; cut at the raster's edge."""
    tile, number = plan.tile, 0
    for k in reversed(range(len(plan.shapes))):
        (height, width), (down, across) = plan.shapes[k], plan.grid(k)
        for row in range(down):
            skipped = min(max(first - number, 0), across)
            number += across
            top, bottom = row * tile, min((row + 1) * tile, height)
            step = max(tile, RUN // tile * tile)
            for left in range(skipped * tile, width, step):
                box = Box(top, left, bottom, min(left + step, width))
                pixels = levels[k].read(box)
                mask = levels[k].read_mask(box) if plan.has_mask else None
                for start in range(0, box.width, tile):
                    columns = slice(start, start + tile)
                    yield pixels[:, :, columns], None if mask is None else mask[:, columns]


@dataclass(frozen=True)
class _Encoder:
    """Makes of the pixels of a tile what stands in the file."""

    compression: Compression
    level: int | None
    tile: int

    def encode(self, pixels: NDArray[Any], mask: NDArray[np.uint8] | None) -> list[Any]:
        """Buffers: the pixels, and the mask if there is one."""
        encoded = [self._compress(self._predict(self._interleave(pixels)))]
        if mask is not None:
            whole = np.zeros((self.tile, self.tile), np.uint8)
            whole[: mask.shape[0], : mask.shape[1]] = mask
            encoded.append(imagecodecs.deflate_encode(np.packbits(whole != 0).tobytes(), 6, raw=False))
        return encoded

    def _interleave(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """(count, h, w) as (tile, tile, count); beyond the raster's edge its last pixels are repeated."""
        count, height, width = pixels.shape
        whole = np.empty((self.tile, self.tile, count), pixels.dtype)
        for band in range(count):  # one by one is several times faster than to transpose
            whole[:height, :width, band] = pixels[band]
        whole[:height, width:] = whole[:height, width - 1 : width]
        whole[height:] = whole[height - 1 : height]
        return whole

    def _predict(self, whole: NDArray[Any]) -> NDArray[Any]:
        """What is left of samples when their left neighbour is taken away."""
        if self.compression == "none":
            return whole
        if whole.dtype == np.float32:
            predicted: NDArray[Any] = imagecodecs.floatpred_encode(whole, axis=-2)
            return predicted
        differences = np.empty_like(whole)
        differences[:, 0] = whole[:, 0]
        count = whole.shape[2]
        rows, out = whole.reshape(self.tile, -1), differences.reshape(self.tile, -1)
        np.subtract(rows[:, count:], rows[:, :-count], out=out[:, count:])
        return differences

    def _compress(self, whole: Any) -> Any:
        match self.compression:
            case "zstd":
                return imagecodecs.zstd_encode(whole, min(self.level or 3, 22))
            case "deflate":
                return imagecodecs.deflate_encode(whole, min(self.level or 6, 12), raw=False)
            case "lzw":
                return imagecodecs.lzw_encode(whole)
            case "none":
                return whole


class _Assembly:
    """The file, open at its end, and its journal."""

    def __init__(self, part: Path, plan: _Plan, digest: bytes) -> None:
        self._part = part
        self._plan = plan
        self._journal = Journal(part, digest, columns=1 + plan.has_mask)
        self._batch: list[list[int]] = []
        self._batch_bytes = 0
        self._committing: Future[None] | None = None
        self.n_tiles = 0
        """In the file, of this start and earlier ones."""

    def __enter__(self) -> "_Assembly":
        with self._to_disk():
            self._file: BinaryIO = os.fdopen(os.open(self._part, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
            try:
                self._go_on()
            except BaseException:
                self._close()
                raise
        self._committer = ThreadPoolExecutor(1)
        return self

    def _go_on(self) -> None:
        """Drop what the journal does not know; of a new file, write what is known beforehand."""
        ends = self._ends()
        self.n_tiles = int(np.searchsorted(ends, self._file.seek(0, os.SEEK_END), side="right"))
        self._file.seek(int(ends[self.n_tiles - 1]) if self.n_tiles else 0)
        self._file.truncate()
        if not self.n_tiles:
            self._file.write(self._plan.head)
            self._file.flush()
        os.fsync(self._file.fileno())
        self._journal.begin(self.n_tiles)

    def __exit__(self, *exc_info: object) -> None:
        self._committer.shutdown()
        self._close()

    def _close(self) -> None:
        self._journal.close()
        with suppress(OSError):  # what is not in the journal does not count
            self._file.close()

    def add(self, buffers: Sequence[Any]) -> None:
        """A tile, and its mask."""
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        with self._to_disk():
            for view in views:
                if self._plan.framed:
                    self._file.write(struct.pack("<I", len(view)))
                self._file.write(view)
                if self._plan.framed:
                    self._file.write(view[-4:])
        self.n_tiles += 1
        self._batch.append([len(view) for view in views])
        self._batch_bytes += sum(self._batch[-1])
        if self._batch_bytes >= BATCH:
            self._commit_behind()

    def commit(self) -> None:
        """Wait until all that was added is on disk, and in the journal."""
        self._commit_behind()
        self._join()

    def finish(self) -> None:
        """Fill the tables of tiles in, and do away with the journal."""
        with self._to_disk():
            sizes = self._journal.reread()
            offsets = self._ends()[:, np.newaxis] - np.cumsum((sizes + 2 * self._plan.framed)[:, ::-1], axis=1)[:, ::-1]
            offsets += self._plan.framed
            last = len(sizes)
            for image in self._plan.images:
                last -= 0 if image.is_mask else image.n_tiles
                rows, column = slice(last, last + image.n_tiles), int(image.is_mask)
                self._patch(image.offsets_at, offsets[rows, column], "<u8" if self._plan.is_big else "<u4")
                self._patch(image.counts_at, sizes[rows, column], "<u4")
            self._file.flush()
            os.fsync(self._file.fileno())
            self._journal.remove()

    def _ends(self) -> NDArray[np.uint64]:
        """Where the tiles of the journal end in the file."""
        framed = (self._journal.sizes + 2 * self._plan.framed).sum(axis=1)
        ends: NDArray[np.uint64] = len(self._plan.head) + np.cumsum(framed)
        return ends

    def _patch(self, where: int, values: NDArray[Any], dtype: str) -> None:
        self._file.seek(where)
        self._file.write(values.astype(dtype).tobytes())

    def _commit_behind(self) -> None:
        """Send the batch to disk while the next is compressed."""
        self._join()
        batch, self._batch, self._batch_bytes = np.array(self._batch, np.uint64), [], 0
        with self._to_disk():
            self._file.flush()
        if len(batch):
            self._committing = self._committer.submit(self._sync, batch)

    def _sync(self, batch: NDArray[np.uint64]) -> None:
        os.fsync(self._file.fileno())
        # nobody reads it soon: the pages that the system keeps of it do better for what is written next
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._journal.append(batch)

    def _join(self) -> None:
        if self._committing is not None:
            with self._to_disk():
                self._committing.result()
            self._committing = None

    @contextmanager
    def _to_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise WorkFailed(
                f"cannot write {self._part}: {error.strerror or error}. It may take {self._plan.n_bytes:,} bytes\n"
                "hint: make room, or take away what stands in the way, and run the same command again"
            ) from error
