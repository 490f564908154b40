"""What a run costs beside the network, and whether that depends on the size of the raster.

Growing rasters of four uint16 bands go through every stage with a trivial network, each in a fresh process, to a
plain uncompressed BigTIFF and to a COG. In the ordinary run they are small, and no time is asserted. For figures:

    pytest tests/benchmarks/test_pipeline_scaling.py -s --full-size

prints, for targets of 17 to 1108 megapixels, CPU seconds of each stage and bytes written for each megapixel of the
target, the peak of memory, and their ratios between the sizes. 40 GB of disk will do; --basetemp says where.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from numpy.typing import NDArray
from rasterio.transform import Affine
from rasterio.windows import Window
from skimage import data

ROOT = Path(__file__).parents[2]

SCALE = 4
BANDS = 4
BYTES_PER_PIXEL = 2 * BANDS

OPTIONS: dict[str, Any] = {
    "scale": SCALE,
    "model": {"weights": "nearest", "device": "cpu"},
    "sampling": {"steps": 2, "sampler": "ddim"},
    "grid": {"block": 128},
    "run": {"workers": "local", "memory": 0.25},
}
"""Of every run. Latents exceed half of this memory, and are streamed from disk, from 179 megapixels on."""

ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
"""One thread computes: those that wait for others would be counted as if they worked."""

PIECE = 256
"""Side of the pieces of photographs that a source is made of."""

STITCHING = ("decode/blending", "decode/radiometry", "decode/writing the store", "export", "export/reading the store")
"""From decoded patches to the file."""

PEER = 0.153
"""CPU seconds that opensr-utils 2.1 takes for stitching a megapixel."""


def pieces(seed: int) -> Iterator[NDArray[np.uint16]]:
    """Endless (4, PIECE, PIECE) cuttings of photographs, turned, brightened and with sensor noise, in 12 bits."""
    rng = np.random.default_rng(seed)
    photographs = [
        data.astronaut(), data.chelsea(), data.coffee(), data.retina(), data.rocket(), data.immunohistochemistry(),
    ]  # fmt: skip
    while True:
        photograph = photographs[rng.integers(len(photographs))]
        top, left = (rng.integers(n - PIECE + 1) for n in photograph.shape[:2])
        cut = photograph[top : top + PIECE, left : left + PIECE].astype(np.float32).transpose(2, 0, 1)
        cut = np.rot90(cut, rng.integers(4), axes=(1, 2))[:, :, :: rng.choice([-1, 1])]
        bands = np.concatenate([cut, 255 - cut.mean(axis=0, keepdims=True)]) * rng.uniform(8, 15) + 200
        yield np.rint(bands + rng.normal(0, 8, bands.shape)).clip(1, 4095).astype(np.uint16)


def write_source(path: Path, side: int) -> None:
    """A tiled GeoTIFF of `side` x `side` pixels, piece by piece."""
    profile = {"driver": "GTiff", "dtype": "uint16", "count": BANDS, "height": side, "width": side, "tiled": True,
               "blockxsize": PIECE, "blockysize": PIECE, "crs": "EPSG:32633", "interleave": "pixel",
               "transform": Affine(10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0)}  # fmt: skip
    with rasterio.open(path, "w", **profile) as raster:
        for piece, (top, left) in zip(pieces(0), np.ndindex(*[-(-side // PIECE)] * 2), strict=False):
            window = Window(left * PIECE, top * PIECE, *[min(PIECE, side - i * PIECE) for i in (left, top)])
            raster.write(piece[:, : window.height, : window.width], window=window)


def measured(source: Path, output: Path, **more: Any) -> dict[str, Any]:
    """What one run takes; see `measured_run`."""
    options = {**OPTIONS, "source": str(source), "output": str(output), **more}
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.measured_run", json.dumps(options)],
        cwd=ROOT, env=os.environ | ENVIRONMENT, check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def per_megapixel(result: dict[str, Any], pixels: int) -> dict[str, float]:
    """CPU seconds by stage and part, and bytes by kind, of a megapixel of the target."""
    return {what: n / pixels * 1e6 for what, n in {**result["cpu"], **result["written"]}.items()}


def stitching(result: dict[str, Any]) -> float:
    """CPU seconds."""
    return sum(result["cpu"].get(part, 0.0) for part in STITCHING)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two by two blocks, the last ones small."""
    path = tmp_path_factory.mktemp("source") / "source.tif"
    write_source(path, 600)
    return path


@pytest.mark.parametrize("name", ["target.btf", "target.tif"])
def test_writes_little_and_right(source: Path, tmp_path: Path, name: str) -> None:
    output = tmp_path / name
    result = measured(source, output, grid={"block": 64})
    with rasterio.open(source) as raster, rasterio.open(output) as target:
        expected = raster.read().repeat(SCALE, axis=-2).repeat(SCALE, axis=-1)
        assert np.count_nonzero(target.read() != expected) == 0
        uncompressed = target.width * target.height * BYTES_PER_PIXEL
    assert sum(result["written"].values()) < 2 * uncompressed
    assert result["written"]["file"] == output.stat().st_size
    assert result["peak"] < 1.5 * 2**30
    assert {"ingest", "encode", "sample", "decode", "export"} <= {part.partition("/")[0] for part in result["cpu"]}
    assert 0 < stitching(result) < sum(result["cpu"].values())


SIDES = (1024, 2176, 4096, 8320)
"""Of the sources: targets of 17, 76, 268 and 1108 megapixels, made of whole tiles and, patch for patch, alike: of other
sizes the last row and column of patches overlap more, and blocks there need up to 16 of them instead of 9."""


@pytest.mark.parametrize("ending", [".btf", ".tif"])
def test_full_size(tmp_path: Path, ending: str, full_size: bool) -> None:
    if not full_size:
        pytest.skip("figures are taken with --full-size")
    costs, peaks = {}, {}
    for side in SIDES:
        source, output = tmp_path / "source.tif", tmp_path / f"target{ending}"
        pixels = (SCALE * side) ** 2
        write_source(source, side)
        result = measured(source, output, stand_in=True)
        output.unlink()
        costs[side], peaks[side] = per_megapixel(result, pixels), result["peak"]
        _print(result, pixels)
    first = SIDES[0]
    for side in SIDES[1:]:
        whole = [sum(s for part, s in costs[n].items() if part not in ("store", "markers", "file", "before"))
                 for n in (first, side)]  # fmt: skip
        print(
            f"{(SCALE * side) ** 2 / 1e6:.0f} megapixels to {(SCALE * first) ** 2 / 1e6:.0f}: CPU seconds for each"
            f" {whole[1] / whole[0]:.2f}, peak of memory {peaks[side] / peaks[first]:.2f}"
        )


def _print(result: dict[str, Any], pixels: int) -> None:
    each = per_megapixel(result, pixels)
    written = sum(result["written"].values())
    print(f"\n{pixels / 1e6:.0f} megapixels, {result['wall']:.0f} s")
    for part in sorted(result["cpu"]):
        print(f"  {part:32s} {each[part] * 1e3:8.2f} ms of CPU a megapixel")
    print(f"  {'all but starting':32s} {sum(each[p] for p in result['cpu'] if p != 'before') * 1e3:8.2f}")
    print(f"  {'stitching and writing':32s} {stitching(result) / pixels * 1e9:8.2f}, {PEER * 1e3:.0f} elsewhere")
    print(
        f"  written {', '.join(f'{kind} {each[kind] / BYTES_PER_PIXEL / 1e6:.3f}' for kind in result['written'])}:"
        f" {written / pixels / BYTES_PER_PIXEL:.3f} of the uncompressed output,"
        f" {result['written_to_disk'] / pixels / BYTES_PER_PIXEL:.3f} by the system's count"
    )
    print(
        "  peak of memory "
        + ", ".join(
            f"{peak / 2**20:.0f} MiB after {stage} ({now / 2**20:.0f} left)"
            for stage, (peak, now) in result["peak_after"].items()
        )
    )
