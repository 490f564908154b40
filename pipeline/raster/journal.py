"""How much of an output that is written from front to back is safely on disk."""

import os
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray


class Journal:
    """Bytes of the pieces of an output that are safely on disk, in their order; in a file beside it.

        magic  digest  columns | rows  sizes ...  crc32 | rows  sizes ...  crc32 | ...

    What a crash left unfinished at its end does not count.
    """

    MAGIC = b"gigasr.1"

    def __init__(self, beside: Path, digest: bytes | None = None, columns: int = 1) -> None:
        """Reads the journal of an output, if it is there and of the same digest; None for any."""
        self.beside = beside
        self.path = beside.with_name(beside.name + ".tiles")
        self.columns = columns
        self.digest = digest or bytes(32)
        self.sizes: NDArray[np.uint64] = np.empty((0, columns), np.uint64)
        """(pieces, columns): bytes of each."""
        self._file: BinaryIO | None = None
        if self.path.exists():
            self._read(any_digest=digest is None)

    def _read(self, any_digest: bool) -> None:
        content = self.path.read_bytes()
        start = len(self.MAGIC) + 32 + 4
        if len(content) < start or not content.startswith(self.MAGIC):
            return
        digest, (columns,) = content[8:40], struct.unpack_from("<I", content, 40)
        if not any_digest and (digest, columns) != (self.digest, self.columns):
            return
        batches = []
        while len(content) >= start + 4:
            (rows,) = struct.unpack_from("<I", content, start)
            end = start + 4 + 8 * rows * columns
            if (
                not rows
                or len(content) < end + 4
                or struct.unpack_from("<I", content, end)[0] != zlib.crc32(content[start:end])
            ):
                break
            batches.append(np.frombuffer(content, "<u8", rows * columns, start + 4).reshape(rows, columns))
            start = end + 4
        self.sizes = np.concatenate(batches) if batches else np.empty((0, columns), np.uint64)

    def begin(self, keep: int) -> None:
        """Write it anew with the first `keep` pieces, and stay open for more."""
        self.sizes = self.sizes[:keep]
        new = self.path.with_name(self.path.name + ".new")
        with open(new, "wb") as file:
            file.write(self.MAGIC + self.digest + struct.pack("<I", self.columns))
            if keep:
                file.write(_entry(self.sizes))
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.path)
        sync_folder(self.path.parent)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - until `close`

    def append(self, sizes: NDArray[np.uint64]) -> None:
        """Note pieces that are on disk."""
        assert self._file is not None
        self._file.write(_entry(sizes))
        os.fsync(self._file.fileno())

    def reread(self) -> NDArray[np.uint64]:
        """All pieces, of this start and earlier ones."""
        self._read(any_digest=False)
        return self.sizes

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def remove(self) -> None:
        """The output is complete."""
        self.close()
        self.path.unlink()


def _entry(sizes: NDArray[np.uint64]) -> bytes:
    entry = struct.pack("<I", len(sizes)) + sizes.astype("<u8").tobytes()
    return entry + struct.pack("<I", zlib.crc32(entry))


def sync_folder(folder: Path) -> None:
    """Makes sure that what was created in it is found after a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
