"""The store: what is read is what was written, or an error that names the block; markers come whole or not at all."""

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.errors import Damaged, RunMismatch, WorkFailed
from pipeline.grid import Blocks
from pipeline.store import RunStore, checksum, unit_name, write_atomically
from stablesr.box import Box
from tests.strategies import boxes

ROOT = Path(__file__).resolve().parents[2]

BLOCKS = Blocks(100, 70, 64)
"""Four, of which three are smaller than the others."""

WHOLE = Box(0, 0, 100, 70)


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "run")


def values(seed: int = 0, dtype: str = "uint16", bands: int = 2) -> NDArray[Any]:
    """Of all blocks together; few different ones, so that they can be compressed."""
    return np.random.default_rng(seed).integers(0, 9, (bands, BLOCKS.height, BLOCKS.width)).astype(dtype)


def written(store: RunStore, name: str, array: NDArray[Any], blocks: Blocks = BLOCKS) -> dict[Any, int]:
    """Checksums of all blocks."""
    kind: Any = "latents" if name.startswith("latents") else "pixels"
    store.create(name, kind, len(array), blocks, array.dtype.name)
    everything = Box(0, 0, blocks.height, blocks.width)
    return {
        index: store.write(name, blocks, index, np.ascontiguousarray(array[:, *blocks.box(index).within(everything)]))
        for index in blocks
    }


def file_of(store: RunStore, name: str, row: int, column: int) -> Path:
    return store.folder / "data.zarr" / name / "c" / "0" / str(row) / str(column)


# Arrays


@settings(max_examples=30)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    side=st.sampled_from([16, 32, 64]),
    dtype=st.sampled_from(["uint8", "uint16", "int16", "float32"]),
    kind=st.sampled_from(["pixels", "latents"]),
    data=st.data(),
)
def test_what_is_read_is_what_was_written(
    height: int, width: int, side: int, dtype: str, kind: str, data: st.DataObject
) -> None:
    blocks, everything = Blocks(height, width, side), Box(0, 0, height, width)
    array = np.random.default_rng(0).normal(0, 90, (2, height, width)).astype(np.int16).astype(dtype)
    with tempfile.TemporaryDirectory() as folder:
        store = RunStore(Path(folder))
        sums = written(store, f"{kind}/0", array, blocks)
        box = data.draw(boxes(everything))
        np.testing.assert_array_equal(store.read(f"{kind}/0", box), array[:, *box.within(everything)])
        for index, value in sums.items():
            store.check(f"{kind}/0", blocks, index, value)


def test_a_block_is_one_file_and_the_array_is_plain_zarr(store: RunStore) -> None:
    array = values()
    written(store, "source/0", array)
    written(store, "latents/0/a", array.astype("float32"))
    for name in ("source/0", "latents/0/a"):
        folder = store.folder / "data.zarr" / name
        assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == [
            "c/0/0/0", "c/0/0/1", "c/0/1/0", "c/0/1/1", "zarr.json",
        ]  # fmt: skip
    group: Any = zarr.open_group(store.folder / "data.zarr", mode="r")
    np.testing.assert_array_equal(group["source/0"][:], array)
    assert group["latents/0/a"].chunks == (2, 64, 64)
    assert group["source/0"].metadata.dimension_names == ("band", "y", "x")


def test_bytes_written_are_counted_as_they_are_on_disk(store: RunStore) -> None:
    written(store, "source/0", values())
    assert store.written == sum(file_of(store, "source/0", *index).stat().st_size for index in BLOCKS)


def test_a_block_can_be_written_again_even_where_what_is_there_is_damaged(store: RunStore) -> None:
    array = values()
    written(store, "source/0", array)
    for index in BLOCKS:
        file_of(store, "source/0", *index).write_bytes(b"rubbish")
    written(store, "source/0", array)
    np.testing.assert_array_equal(store.read("source/0", WHOLE), array)


def test_a_write_of_less_than_a_block_is_refused(store: RunStore) -> None:
    store.create("source/0", "pixels", 2, BLOCKS, "uint16")
    with pytest.raises(AssertionError):
        store.write("source/0", BLOCKS, (0, 0), values()[:, :63, :64])
    with pytest.raises(AssertionError):
        store.write("source/0", BLOCKS, (0, 0), values(dtype="uint8")[:, :64, :64])


def test_making_an_array_again_keeps_what_is_in_it_and_mends_its_description(store: RunStore) -> None:
    array = values()
    written(store, "source/0", array)
    description = store.folder / "data.zarr" / "source" / "0" / "zarr.json"
    sound, changed = description.read_bytes(), description.stat().st_mtime_ns
    store.create("source/0", "pixels", 2, BLOCKS, "uint16")
    assert description.stat().st_mtime_ns == changed
    description.write_bytes(sound.replace(b"uint16", b"uint17"))
    store.create("source/0", "pixels", 2, BLOCKS, "uint16")
    assert description.read_bytes() == sound
    np.testing.assert_array_equal(RunStore(store.folder).read("source/0", WHOLE), array)


# Damage


def flip(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["source/0", "latents/0/a"])
@pytest.mark.parametrize(
    ("harm", "said"),
    [
        pytest.param(lambda path: flip(path, path.stat().st_size // 3), "checksum", id="a-flipped-bit"),
        pytest.param(lambda path: flip(path, -1), "checksum", id="the-last-byte"),
        pytest.param(lambda path: path.unlink(), "missing", id="no-file"),
        pytest.param(lambda path: path.write_bytes(b""), "missing", id="empty-file"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-9]), "checksum", id="cut-short"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:3]), "checksum", id="three-bytes"),
        pytest.param(lambda path: path.write_bytes(bytes(path.stat().st_size)), "checksum", id="zeros"),
    ],
)
def test_damage_is_found_and_its_block_is_named(store: RunStore, name: str, harm: Any, said: str) -> None:
    array = values(dtype="float32")
    sums = written(store, name, array)
    harm(file_of(store, name, 1, 0))
    for box in (WHOLE, Box(60, 3, 80, 5), BLOCKS.box((1, 0))):
        with pytest.raises(Damaged, match=said) as caught:
            store.read(name, box)
        assert (caught.value.array, caught.value.index) == (name, (1, 0))
    with pytest.raises(Damaged):
        store.check(name, BLOCKS, (1, 0), sums[1, 0])
    beside = BLOCKS.box((0, 1))
    np.testing.assert_array_equal(store.read(name, beside), array[:, *beside.within(WHOLE)])


@settings(max_examples=40)
@given(st.data())
def test_no_flipped_bit_comes_back_as_other_values(data: st.DataObject) -> None:
    array = values()
    with tempfile.TemporaryDirectory() as folder:
        store = RunStore(Path(folder))
        name = data.draw(st.sampled_from(["source/0", "latents/0/a"]))
        written(store, name, array)
        path = file_of(store, name, *data.draw(st.sampled_from([*BLOCKS])))
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
        try:
            found = store.read(name, WHOLE)
        except Damaged:
            return
        np.testing.assert_array_equal(found, array)  # a bit that means nothing


@pytest.mark.parametrize("name", ["source/0", "latents/0/a"])
def test_blocks_that_changed_places_are_sound_but_not_what_was_written(store: RunStore, name: str) -> None:
    blocks = Blocks(64, 128, 64)
    array = np.random.default_rng(0).integers(0, 9, (1, 64, 128)).astype("uint16")
    sums = written(store, name, array, blocks)
    left, right = (file_of(store, name, 0, column) for column in (0, 1))
    contents = left.read_bytes(), right.read_bytes()
    left.write_bytes(contents[1])
    right.write_bytes(contents[0])
    store.read(name, Box(0, 0, 64, 128))
    with pytest.raises(Damaged, match=r"\(0, 1\) of .* is not what was written") as caught:
        store.check(name, blocks, (0, 1), sums[0, 1])
    assert caught.value.index == (0, 1)


def test_an_array_that_is_gone_ends_the_run(store: RunStore) -> None:
    with pytest.raises(WorkFailed, match="source/0 is gone"):
        store.read("source/0", WHOLE)


def test_a_description_that_makes_no_sense_is_mended_by_the_driver(store: RunStore) -> None:
    written(store, "source/0", values())
    (store.folder / "data.zarr" / "source" / "0" / "zarr.json").write_text('{"zarr_format": 3, "shape"')
    with pytest.raises(WorkFailed, match="zarr.json is damaged.*\n.*mends it"):
        RunStore(store.folder).read("source/0", WHOLE)
    store.create("source/0", "pixels", 2, BLOCKS, "uint16")
    np.testing.assert_array_equal(RunStore(store.folder).read("source/0", WHOLE), values())


def test_damage_travels_between_processes() -> None:
    damage = pickle.loads(pickle.dumps(Damaged("block (1, 2) of mask is missing", "mask", (1, 2))))
    assert (str(damage), damage.array, damage.index) == ("block (1, 2) of mask is missing", "mask", (1, 2))


def test_the_checksum_is_that_of_the_values_not_of_their_layout() -> None:
    array = values(dtype="float32")
    assert checksum(array) == checksum(np.asfortranarray(array)) == checksum(array.copy()[:, ::1])
    assert checksum(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283  # the check value of CRC-32C


# Errors of the operating system


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EDQUOT, errno.EROFS])
def test_a_full_or_forbidden_disk_is_one_error_that_names_the_run(
    store: RunStore, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    store.create("source/0", "pixels", 2, BLOCKS, "uint16")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    named = rf"{os.strerror(number)}(.|\n)*same command"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)  # of markers
        patch.setattr(Path, "replace", fail)  # of Zarr's chunks
        with pytest.raises(WorkFailed, match=rf"writing source/0 in {store.folder} failed: {named}"):
            store.write("source/0", BLOCKS, (0, 0), values()[:, :64, :64])
        with pytest.raises(WorkFailed, match=f"writing the marker ingest/0-0 in {store.folder} failed: {named}"):
            store.mark("ingest/0-0", {})
        with pytest.raises(WorkFailed, match=f"writing the plan in {store.folder} failed: {named}"):
            store.keep_plan("{}")
        with pytest.raises(WorkFailed, match=f"writing mask in {store.folder} failed: {named}"):
            store.create("mask", "pixels", 1, BLOCKS, "uint8")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", fail)
        with pytest.raises(WorkFailed, match=f"the lock in {store.folder} failed: {named}"), store.locked():
            pass
    assert store.marker("ingest/0-0") is None
    store.sweep()
    assert not [*store.folder.rglob("*.tmp"), *store.folder.rglob("*.partial")]


def test_a_disk_that_cannot_be_read_is_not_called_damage(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    written(store, "source/0", values())
    store.mark("ingest/0-0", {})
    store.read("source/0", WHOLE)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "open", fail)
    for doing, reading in (
        ("reading source/0", lambda: store.read("source/0", WHOLE)),
        ("opening source/0", lambda: RunStore(store.folder).read("source/0", WHOLE)),
        ("reading the marker ingest/0-0", lambda: store.marker("ingest/0-0")),
    ):
        with pytest.raises(WorkFailed, match=f"{doing} in .* failed: Input/output error") as caught:
            reading()
        assert not isinstance(caught.value, Damaged)


# Markers


def test_markers_say_what_was_said(store: RunStore) -> None:
    assert store.marker("ingest/0-0") is None
    assert dict(store.markers("ingest")) == {}
    payload = {"checksums": {"source/0": 4_000_000_000}, "low": 0.1, "text": "nö"}
    store.mark("ingest/0-12", payload)
    store.mark(unit_name("ingest", (3, 5)), {})
    assert store.marker("ingest/0-12") == payload
    assert dict(store.markers("ingest")) == {(0, 12): payload, (3, 5): {}}
    assert store.finished("ingest") == {(0, 12), (3, 5)}
    assert store.n_marked("ingest") == 2
    store.unmark("ingest/0-12")
    store.unmark("ingest/9-9")
    assert dict(store.markers("ingest")) == {(3, 5): {}}
    store.unmark("ingest")
    assert dict(store.markers("ingest")) == {}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"3", b"null", b"\xff\xfe", b'{"payload": {"n": 1}}', b'{"payload": {"n": 2}, "crc32c": 1}', b"{}"],
    ids=repr,
)
def test_a_marker_that_is_not_what_was_written_says_nothing(store: RunStore, content: bytes) -> None:
    store.mark("statistics/0/0-0", {"n": 1})
    (store.folder / "done" / "statistics" / "0" / "0-0.json").write_bytes(content)
    assert store.marker("statistics/0/0-0") is None
    assert store.finished("statistics/0") == set()


@given(st.integers(0, 10**6), st.integers(0, 7))
def test_no_flipped_bit_makes_a_marker_say_something_else(byte: int, bit: int) -> None:
    payload = {"low": [0.1, 200.0], "high": [0.9, 9000.0]}
    with tempfile.TemporaryDirectory() as folder:
        store = RunStore(Path(folder))
        store.mark("stretch", payload)
        path = Path(folder) / "done" / "stretch.json"
        content = bytearray(path.read_bytes())
        content[byte % len(content)] ^= 1 << bit
        path.write_bytes(content)
        assert store.marker("stretch") is None


def test_an_interrupted_write_leaves_the_old_file_and_is_swept_away(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.mark("stretch", {"low": [0.0]})
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.mark("stretch", {"low": [1.0]})
    assert store.marker("stretch") == {"low": [0.0]}
    assert [*store.folder.rglob("*.tmp")]
    store.sweep()
    assert not [*store.folder.rglob("*.tmp")]
    assert store.marker("stretch") == {"low": [0.0]}


def test_a_file_written_atomically_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened = []
    replace, fsync = os.replace, os.fsync

    def noted_replace(a: Any, b: Any) -> None:
        happened.append("replace")
        replace(a, b)

    def noted_fsync(descriptor: int) -> None:
        happened.append("fsync")
        fsync(descriptor)

    monkeypatch.setattr(os, "replace", noted_replace)
    monkeypatch.setattr(os, "fsync", noted_fsync)
    write_atomically(tmp_path / "a" / "b.json", json.dumps({}))
    assert happened == ["fsync", "replace", "fsync"]  # the file; its name


# The folder


def test_one_driver_at_a_time(store: RunStore) -> None:
    with store.locked(), pytest.raises(RunMismatch, match="another process"), RunStore(store.folder).locked():
        pass
    with store.locked():
        pass


WRITER = """
import sys, zlib
from pathlib import Path
import numpy as np
from pipeline.grid import Blocks
from pipeline.store import RunStore, unit_name
store, blocks = RunStore(Path(sys.argv[1])), Blocks(256, 256, 128)
for name, kind in (("source/0", "pixels"), ("latents/0/a", "latents")):
    store.create(name, kind, 2, blocks, "float32")
store.sweep()
print("ready", flush=True)
n = int(sys.argv[2])
while True:
    for index in blocks:
        n += 1
        store.unmark(unit_name("work", index))
        values = np.random.default_rng(n).normal(size=(2, 128, 128)).astype("float32")
        checksums = {name: store.write(name, blocks, index, values) for name in ("source/0", "latents/0/a")}
        store.mark(unit_name("work", index), {"checksums": checksums})
"""
"""Blocks are written, marked, taken back and written again, without end."""


def test_a_killed_writer_leaves_no_marker_without_its_data(store: RunStore) -> None:
    blocks, n_marked = Blocks(256, 256, 128), 0
    for attempt in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(store.folder), str(1000 * attempt)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(0.05 + 0.037 * attempt)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        for index, marker in RunStore(store.folder).markers("work"):
            n_marked += 1
            for name, expected in marker["checksums"].items():
                RunStore(store.folder).check(name, blocks, index, expected)
    assert n_marked >= 4
    store.sweep()
    assert not [*store.folder.rglob("*.partial"), *store.folder.rglob("*.tmp")]
