"""The store of a run: pixels and latents in Zarr, and markers that say what of them counts.

    RUN/plan.json               the plan, with the fingerprints of source, weights and options
    RUN/data.zarr/              source/<layer>  mask  lr_latents/<layer>  latents/<layer>/{a,b}  output/<layer>
                                overviews/<level>  overview_masks/<level>
    RUN/done/<stage>/...        a marker for each finished unit, written after its data

An array has (bands, rows, columns) and is written a whole block at a time, by one writer: a block is one object in the
store. Nothing is done because its data happen to be there: a marker says so, with the checksum of the data.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import ByteRequest
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore, MemoryStore, WrapperStore

from pipeline.errors import Damaged, RunMismatch, StoreFailed, WorkFailed
from pipeline.grid import Blocks, Index
from stablesr.box import Box

CHUNK = 512
"""Side of what is compressed at once, in pixels; a block of pixels is a shard of these."""

CHECKED = 1 << 18
"""Bytes that a checksum looks at at once: it wants them copied, and a cache holds that many."""

Kind = Literal["pixels", "latents"]


class _MissingChunk(LookupError):
    """A chunk that should be there is not: Zarr would silently return its fill value."""


class _NothingIsMissing(WrapperStore[LocalStore]):
    """A store in which chunks that are not there are errors, and so are those without a byte."""

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        found = await super().get(key, prototype, byte_range)
        if not found and "/c/" in key:
            raise _MissingChunk(key)
        return found


class RunStore:
    """A run's folder, as one process sees it."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._root = self.folder / "data.zarr"
        self._arrays: dict[tuple[str, bool], zarr.Array[Any]] = {}
        self.written = 0
        """Bytes of pixels and latents that this process has written, compressed."""

    # Arrays

    def create(self, name: str, kind: Kind, bands: int, blocks: Blocks, dtype: str) -> None:
        """Make an empty array, or see that it is there as it should be. The driver does, before anything is written.

        Pixels are compressed in chunks within the block; latents are stored as they are; both with checksums.
        """
        side = blocks.side
        described: dict[str, Buffer] = {}  # what makes a folder an array has no checksum, so it is made every time
        zarr.create_array(
            MemoryStore(described),
            name=name,
            shape=(bands, blocks.height, blocks.width),
            chunks=(bands, min(CHUNK, side), min(CHUNK, side)) if kind == "pixels" else (bands, side, side),
            shards=(bands, side, side) if kind == "pixels" else None,
            dtype=dtype,
            compressors=_pixel_codecs(dtype) if kind == "pixels" else [Crc32cCodec()],
            fill_value=0,
            dimension_names=("band", "y", "x"),
            zarr_format=3,
        )
        for key, metadata in described.items():
            path, content = self._root / key, metadata.to_bytes()
            with self._named(name):
                if not path.is_file() or path.read_bytes() != content:
                    write_atomically(path, content.decode())

    def read(self, name: str, box: Box) -> NDArray[Any]:
        """(bands, box.height, box.width) of an array.

        Raises:
            Damaged: if any of it is missing or fails its checksum.
        """
        array = self._array(name)
        try:
            return np.asarray(array[:, box.top : box.bottom, box.left : box.right])
        except OSError as error:
            raise self._failed(f"reading {name}", error) from error
        except MemoryError:
            raise
        except Exception as error:  # what codecs raise on bad bytes has no common ancestor
            raise self._damage(name, array, box, error) from None

    def write(self, name: str, blocks: Blocks, index: Index, values: NDArray[Any]) -> int:
        """Write a whole block, to disk and not only to the cache; give the checksum of its values."""
        array, box = self._array(name, writing=True), blocks.box(index)
        assert values.shape == (array.shape[0], box.height, box.width), (name, values.shape, box)
        assert values.dtype == array.dtype, (name, values.dtype)
        path = self._path(name, index)
        with self._named(name):
            path.unlink(missing_ok=True)  # or Zarr reads what it is about to replace, and it may be damaged
            array[:, box.top : box.bottom, box.left : box.right] = values
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                self.written += os.fstat(descriptor).st_size
            finally:
                os.close(descriptor)
        return checksum(values)

    def check(self, name: str, blocks: Blocks, index: Index, expected: int) -> None:
        """Read a block again and compare.

        Raises:
            Damaged: if it is missing, fails its checksum, or is not what the marker says.
        """
        if checksum(self.read(name, blocks.box(index))) != expected:
            raise Damaged(f"block {index} of {name} is not what was written", name, index)

    def remove(self, name: str) -> None:
        """An array, or a group of them, that nobody needs any more."""
        for known in [key for key in self._arrays if f"{key[0]}/".startswith(f"{name}/")]:
            del self._arrays[known]
        shutil.rmtree(self._root / name, ignore_errors=True)

    def _array(self, name: str, writing: bool = False) -> "zarr.Array[Any]":
        key = name, writing
        if key not in self._arrays:
            store = LocalStore(self._root)
            try:
                array = zarr.open_array(store if writing else _NothingIsMissing(store), path=name, mode="r+")
            except FileNotFoundError as error:
                raise WorkFailed(f"{self._root / name} is gone: the run cannot go on without it") from error
            except OSError as error:
                raise self._failed(f"opening {name}", error) from error
            except Exception as error:  # as with chunks
                raise WorkFailed(
                    f"{self._root / name / 'zarr.json'} is damaged: {error}\nhint: the same command mends it"
                ) from error
            self._arrays[key] = array.with_config({"write_empty_chunks": True})
        return self._arrays[key]

    def _path(self, name: str, index: Index) -> Path:
        return self._root / name / "c" / "0" / str(index[0]) / str(index[1])

    def _damage(self, name: str, array: "zarr.Array[Any]", box: Box, error: Exception) -> Damaged:
        """Find out which block it is."""
        side = (array.shards or array.chunks)[-1]
        blocks = Blocks(array.shape[-2], array.shape[-1], side)
        for index in blocks.touching(box):
            inner = blocks.box(index)
            try:
                array[:, inner.top : inner.bottom, inner.left : inner.right]
            except Exception as of_block:
                why = "is missing" if isinstance(of_block, _MissingChunk) else f"fails its checksum ({of_block})"
                return Damaged(f"block {index} of {name} {why}", name, index)
        return Damaged(f"{box} of {name} could not be read once ({error}), but was read later", name, (0, 0))

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Say which part of the store an error of the operating system is about."""
        try:
            yield
        except OSError as error:
            raise self._failed(f"writing {what}", error) from error

    def _failed(self, doing: str, error: OSError) -> StoreFailed:
        return StoreFailed(
            f"{doing} in {self.folder} failed: {error.strerror or error}\n"
            "hint: what is finished is kept; make room or mend the disk, and run the same command again"
        )

    # Markers

    def mark(self, unit: str, payload: Mapping[str, Any]) -> None:
        """Say that a unit is done, in one atomic step. `unit` is its path, such as "encode/0/3-5"."""
        with self._named(f"the marker {unit}"):
            write_atomically(self.folder / "done" / f"{unit}.json", _sealed(payload))

    def marker(self, unit: str) -> dict[str, Any] | None:
        """What was said when a unit was done; None if it is not, or if it cannot be trusted any more."""
        try:
            text = (self.folder / "done" / f"{unit}.json").read_text(encoding="utf-8")
            payload: dict[str, Any] = json.loads(text)["payload"]
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._failed(f"reading the marker {unit}", error) from error
        except (ValueError, TypeError, KeyError):  # not what was written: then nothing was said
            return None
        return payload if _sealed(payload) == text else None

    def markers(self, stage: str) -> Iterator[tuple[Index, dict[str, Any]]]:
        """Of all finished blocks of a stage, row by row, one at a time: together they may be large."""
        names = (path.stem.split("-") for path in (self.folder / "done" / stage).glob("*-*.json"))
        for index in sorted((int(row), int(column)) for row, column in names):
            payload = self.marker(unit_name(stage, index))
            if payload is not None:
                yield index, payload

    def finished(self, stage: str) -> set[Index]:
        """The blocks of a stage that are done."""
        return {index for index, _ in self.markers(stage)}

    def n_marked(self, stage: str) -> int:
        """How many blocks of a stage are finished."""
        return sum(1 for _ in (self.folder / "done" / stage).glob("*-*.json"))

    def unmark(self, unit: str) -> None:
        """Forget that a unit, or all units of a stage, are done."""
        path = self.folder / "done" / unit
        Path(f"{path}.json").unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)

    # The folder

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other drivers out.

        Raises:
            RunMismatch: if one is at work.
        """
        with self._named("the lock"):
            self.folder.mkdir(parents=True, exist_ok=True)
            file = open(self.folder / "lock", "w", encoding="utf-8")  # noqa: SIM115 - until the end of the `with` below
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunMismatch(
                    f"another process works on the run {self.folder}\nhint: wait for it, or stop it"
                ) from None
            yield

    def keep_plan(self, text: str) -> None:
        """Write the plan of the run."""
        with self._named("the plan"):
            write_atomically(self.folder / "plan.json", text)

    def sweep(self) -> None:
        """Remove what an interrupted write left behind."""
        for pattern in ("*.partial", "*.tmp"):
            for path in self.folder.rglob(pattern):
                path.unlink(missing_ok=True)


class Committed:
    """An array whose blocks are held against checksums when they are read: for what may have been written again, half
    or by a process that was taken for dead."""

    def __init__(self, store: RunStore, name: str, blocks: Blocks, checksums: Mapping[str, int]) -> None:
        """
        Args:
            checksums: by block, "row-column".
        """
        self._store, self._name, self._blocks, self._checksums = store, name, blocks, checksums

    def read(self, region: Box) -> NDArray[Any]:
        """(bands, region.height, region.width).

        Raises:
            Damaged: if a block that touches the region is missing or is not what was written.
        """
        values: NDArray[Any] | None = None
        for index in self._blocks.touching(region):
            box = self._blocks.box(index)
            block = self._store.read(self._name, box)
            if checksum(block) != self._checksums[f"{index[0]}-{index[1]}"]:
                raise Damaged(f"block {index} of {self._name} is not what was written", self._name, index)
            part = box.overlap(region)
            assert part is not None
            if values is None:
                values = np.empty((len(block), region.height, region.width), block.dtype)
            values[(slice(None), *part.within(region))] = block[(slice(None), *part.within(box))]
        assert values is not None
        return values


def _pixel_codecs(dtype: str) -> list[BloscCodec | Crc32cCodec | ZstdCodec]:
    """Compression that is quick rather than thorough, and checksums.

    Of samples of several bytes, bits of one significance are put side by side: the upper ones are much the same in a
    whole chunk. That takes less time than zstd, which does not see it, and less space; see tests/benchmarks/notes.
    """
    if np.dtype(dtype).itemsize == 1:
        return [ZstdCodec(level=1, checksum=True)]
    return [BloscCodec(typesize=np.dtype(dtype).itemsize, cname="lz4", clevel=1, shuffle="bitshuffle"), Crc32cCodec()]


def unit_name(stage: str, index: Index) -> str:
    return f"{stage}/{index[0]}-{index[1]}"


def _sealed(payload: Mapping[str, Any]) -> str:
    """A marker's text, with the CRC-32C of what it says."""
    return json.dumps({"payload": payload, "crc32c": google_crc32c.value(json.dumps(payload).encode())})


def checksum(values: NDArray[Any]) -> int:
    """CRC-32C of an array's bytes in C order."""
    whole, crc = np.ascontiguousarray(values).reshape(-1).view(np.uint8), 0
    for start in range(0, len(whole), CHECKED):
        crc = google_crc32c.extend(crc, whole[start : start + CHECKED].tobytes())
    return int(crc)


def write_atomically(path: Path, text: str) -> None:
    """A file is there whole, or not at all, whenever the machine stops."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
