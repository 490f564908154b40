"""What a run will do, decided before anything starts: grids, arithmetic, bytes, and whether it will fit.

A plan is made without a GPU and without loading a network; it can be printed, and it is what a run keeps to.
"""

import errno
import functools
import importlib.metadata
import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline.config import Config, Format
from pipeline.cost import Flops, count_flops
from pipeline.errors import BlockFailed, ConfigError, OutputError, RunMismatch, WontFit
from pipeline.grid import Blocks, Canvas, Index, Loads, share_out
from pipeline.network import architecture, guidance_scale, weights_fingerprint
from pipeline.raster.gdal_source import CACHE_BYTES
from pipeline.raster.header import Frozen, Header
from pipeline.raster.ome_zarr import COMPRESSIONS as ZARR_COMPRESSIONS
from pipeline.raster.overviews import n_levels
from pipeline.raster.rows import ROWS_BYTES
from pipeline.raster.source import fingerprint, open_source
from stablesr.box import Box
from stablesr.config import StableSRConfig

GIB = 2**30

UNEVEN = 1.5
"""How much more than its part of the canvas a worker may hold, where others have more to do in theirs."""

TYPICAL_COMPRESSION = 0.7
"""Of what pixels take in the store and in a compressed file, to what they take as they are; zstd on real pictures."""

SOURCE_BYTES = CACHE_BYTES + 2 * ROWS_BYTES
"""Of decoded source that the process which reads it keeps, at the most."""

PROCESS = 0.6 * GIB
"""Bytes of a worker with nothing to do: Python, PyTorch, Zarr and GDAL."""


class Plan(Frozen):
    """Everything that a run keeps to."""

    version: str
    """Of gigasr."""
    config: Config
    source_fingerprint: dict[str, Any]
    weights_fingerprint: str
    header: Header
    """Of the source."""
    network: str
    """The network's sizes, as `StableSRConfig.to_json` has them."""
    layers: tuple[tuple[int, ...], ...]
    """Bands of each layer, counted from 0."""
    flops: Flops

    @property
    def architecture(self) -> StableSRConfig:
        return _architecture(self.network)

    @property
    def canvas(self) -> Canvas:
        return _canvas(self.header, self.config, self.architecture)

    @property
    def steps(self) -> int:
        return self.config.sampling.steps or self.architecture.steps

    @property
    def latent_channels(self) -> int:
        return self.architecture.unet.latent_channels

    @property
    def target(self) -> Header:
        """The header of the output, with its provenance."""
        sampling = self.config.sampling
        return self.header.scaled(
            self.config.scale,
            {
                "GIGASR_VERSION": self.version,
                "GIGASR_NOTICE": "Detail in this raster is synthesised by a diffusion model; it was not observed.",
                "GIGASR_WEIGHTS": f"{self.architecture.name} {self.weights_fingerprint}",
                "GIGASR_SEED": str(sampling.seed),
                "GIGASR_SETTINGS": json.dumps(self.config.what_makes_pixels, sort_keys=True),
            },
        )

    @property
    def n_levels(self) -> int:
        """Levels of the output's pyramid, the base included."""
        target = self.target
        return 1 if self.format == "bigtiff" else n_levels(target.height, target.width)

    @property
    def format(self) -> Format:
        return self.config.format

    @property
    def compressed(self) -> bool:
        """Whether the output's pixels are."""
        compression = self.config.file.compression
        return self.format != "bigtiff" if compression is None else compression != "none"

    # Memory

    @property
    def resident_bytes(self) -> int:
        """Of x_t before and after a step and the low-resolution latents, for one layer."""
        return self.canvas.latents.height * self.canvas.latents.width * self.latent_channels * 4 * 3

    def rectangles(self, speeds: Sequence[float], loads: Loads | None = None) -> tuple[list[Box], bool]:
        """How the block grid is shared out for sampling, and whether the shares stay in the workers' memory.

        One share for each worker if that fits; else as many for each as it takes for them to fit, worked on in turn.

        Args:
            speeds: of the workers, relative to each other; only as many get a share as there are blocks.
            loads: how much there is to do in each block; the same in all, unless given.
        """
        budget, blocks = self.config.run.memory * GIB / 2, self.canvas.blocks
        even = Loads.even(blocks.rows, blocks.columns)
        n_workers = min(len(speeds), len(even))
        if self.resident_bytes > budget * len(speeds):
            n_each = math.ceil(self.resident_bytes / budget / n_workers)  # for all as many: nobody waits for the last
            return share_out(even, [1.0] * min(n_each * n_workers, len(even))), False
        fair = share_out(loads or even, speeds[:n_workers])
        largest = max(rectangle.height * rectangle.width for rectangle in fair)
        if largest * self.resident_bytes / len(even) > max(budget, self.resident_bytes / n_workers) * UNEVEN:
            return share_out(even, [1.0] * n_workers), True  # where much is empty, a fair share may be too large
        return fair, True

    @property
    def patch_bytes(self) -> int:
        """Of decoded patches that are kept until the last block that needs them is written."""
        return int(self.config.run.memory * GIB / 2)

    @property
    def network_bytes(self) -> int:
        """Of weights and activations, about."""
        model = self.config.model
        width = {"float32": 4, "bfloat16": 2, "float16": 2}.get(model.precision, 2 if _on_gpu(model.device) else 4)
        return int(self.flops.parameters * width + self.flops.activations * width * self.config.sampling.batch)

    @property
    def memory_bytes(self) -> int:
        """Of one worker and the driver at their peak, about; on a GPU, the network's part is there."""
        return int(self.network_bytes + self.config.run.memory * GIB + SOURCE_BYTES + 2 * PROCESS)

    # Disk

    @property
    def latent_bytes(self) -> int:
        """Of all layers' latents in the store, once; all blocks are as large as the largest."""
        blocks = self.canvas.blocks
        return len(blocks) * blocks.side**2 * self.latent_channels * 4 * len(self.layers)

    @property
    def store_bytes(self) -> int:
        """What the run's folder takes at its largest, about."""
        mask = 0 if self.header.validity == "all" else self.header.height * self.header.width
        pixels = self.header.n_bytes + mask + self.target.n_bytes * (4 / 3 if self.n_levels > 1 else 1)
        return int(3 * self.latent_bytes + TYPICAL_COMPRESSION * pixels)

    @property
    def file_bytes(self) -> int:
        """What the output takes, about."""
        pixels = self.target.n_bytes * (4 / 3 if self.n_levels > 1 else 1)
        return int(pixels * (TYPICAL_COMPRESSION if self.compressed else 1.0))

    @property
    def n_affordable_commits(self) -> int:
        """Of one layer's latents, in a run that writes no more than twice the size of its output; at least 1."""
        spare = 2 * self.target.n_bytes - (self.store_bytes - 2 * self.latent_bytes) - self.file_bytes
        return max(int(spare / self.latent_bytes), 1)

    # Arithmetic

    @property
    def tile_steps(self) -> int:
        """Network evaluations of a tile, each of the steps and layers counted; guidance doubles them."""
        sampling = self.config.sampling
        evaluations = 2 if sampling.negative_prompt is not None and guidance_scale(sampling) != 1.0 else 1
        return len(self.canvas.tiles) * self.steps * len(self.layers) * evaluations

    @property
    def total_flops(self) -> float:
        decoded = 2 if self.config.sampling.color == "adain" else 1
        each = self.flops.encode_patch + decoded * self.flops.decode_patch
        return self.tile_steps * self.flops.tile_step + len(self.canvas.patches) * len(self.layers) * each

    # Places

    def blocks_of(self, stage: str) -> Blocks:
        """The blocks of a stage: "ingest", or a stage and its layer or level, as in "encode/0"."""
        name, _, number = stage.partition("/")
        match name:
            case "ingest":
                return self.canvas.source_blocks
            case "encode" | "sample":
                return self.canvas.blocks
            case "overviews":
                return self.level_blocks(int(number))
        return self.canvas.output_blocks

    def level_blocks(self, level: int) -> Blocks:
        """The blocks of a level of the output's pyramid; 0 is the target itself."""
        blocks = self.canvas.output_blocks
        return Blocks(-(-blocks.height // 2**level), -(-blocks.width // 2**level), blocks.side)

    def place(self, stage: str, index: Index) -> str:
        """Which block it is and where it lies, in words, with the seed: enough to look at it alone."""
        box = self.blocks_of(stage).box(index)
        if stage.startswith(("encode", "sample")):
            box = box.scaled(self.canvas.factor)
        of = "source" if stage == "ingest" else "overview" if stage.startswith("overviews") else "target"
        return (
            f"block {index} of {stage} (window of the {of}: rows {box.top} to {box.bottom}, columns {box.left} to "
            f"{box.right}; seed {self.config.sampling.seed})"
        )

    def block_failed(self, stage: str, index: Index, error: Exception) -> BlockFailed:
        """What to say where the computation of a block raised something."""
        words = f"{type(error).__name__}: {str(error) or 'no message'}"
        return BlockFailed(f"{self.place(stage, index)} failed: {words}", stage, index)

    # Identity

    def differences(self, other: "Plan") -> list[str]:
        """What makes this plan another run than `other`, in words; empty if a run of one may go on with the other."""
        found = []
        if self.source_fingerprint != other.source_fingerprint:
            found.append(f"the source: {_changed(self.source_fingerprint, other.source_fingerprint)}")
        if self.weights_fingerprint != other.weights_fingerprint:
            found.append(f"the weights: {other.weights_fingerprint[:16]} then, {self.weights_fingerprint[:16]} now")
        if self.version != other.version:
            found.append(f"the version of gigasr: {other.version} then, {self.version} now")
        ours, theirs = _flat(self.config.what_makes_pixels), _flat(other.config.what_makes_pixels)
        found += [f"{key}: {theirs.get(key)} then, {ours.get(key)} now" for key in sorted({*ours, *theirs})
                  if ours.get(key) != theirs.get(key)]  # fmt: skip
        return found

    def report(self, seconds: float | None = None) -> list[tuple[str, str]]:
        """The plan in rows of a label and a text.

        Args:
            seconds: how long the run is expected to take, if that was measured.
        """
        canvas, blocks = self.canvas, self.canvas.blocks
        tile, patches = canvas.tile, canvas.patches
        layers = "; ".join(f"bands {', '.join(str(band + 1) for band in bands)}" for bands in self.layers)
        parts, resident = self.rectangles([1.0])
        rows = [
            ("source", f"{self.config.source}: {_size(self.header)}"),
            ("target", f"{self.config.output}: {_size(self.target)}, {self.format}"),
            (
                "network",
                f"{self.architecture.name}, {self.flops.parameters / 1e6:,.1f} M parameters, {self.steps} steps",
            ),
            ("canvas", f"{canvas.latents.width:,} x {canvas.latents.height:,} latents"),
            ("layers", f"{len(self.layers)}: {layers}"),
            ("tiles", f"{len(canvas.tiles):,} of {tile} x {tile} latents, overlapping by {canvas.overlap}"),
            ("patches", f"{len(patches):,} of {patches.tile_width} x {patches.tile_height} latents"),
            ("blocks", f"{len(blocks):,} of {canvas.block} x {canvas.block} latents"),
            ("arithmetic", f"{self.tile_steps:,} tile steps, {_engineering(self.total_flops)}FLOP"),
            ("disk", f"{_bytes(self.store_bytes)} in {self.config.folder} for the time of the run"),
            ("", f"{_bytes(self.file_bytes)} for the output"),
            ("memory", f"{_bytes(self.memory_bytes)}, of which the network {_bytes(self.network_bytes)}"),
        ]
        if not resident:
            rows += [
                ("sampling", f"in {len(parts)} parts, streamed from disk at every step: the latents take"),
                ("", f"{_bytes(self.resident_bytes)}, and more memory (--memory) would make it faster"),
            ]
        if seconds is not None:
            rows.append(("time", f"about {_duration(seconds)} with one worker on this machine"))
        return rows


def make_plan(config: Config) -> Plan:
    """Look at the source, and decide.

    Raises:
        UserError: if the source cannot be upscaled, the output not be written, or the work will not fit.
    """
    _check_output(config)
    with open_source(config.source, config.bands) as source:
        header = source.header
    network = architecture(config.model.weights, config.scale)
    if config.sampling.overlap is not None and config.sampling.overlap >= network.tile:
        raise ConfigError(
            f"sampling.overlap={config.sampling.overlap} must be smaller than the tile, {network.tile} latents, or "
            f"tiles never advance\nhint: {network.tile // 2} is a good overlap"
        )
    n_bands, patches = len(header.bands), _canvas(header, config, network).patches
    plan = Plan(
        version=importlib.metadata.version("gigasr"),
        config=config,
        source_fingerprint=fingerprint(config.source),
        weights_fingerprint=weights_fingerprint(config.model.weights),
        header=header,
        network=network.to_json(),
        layers=tuple(tuple(range(first, min(first + 3, n_bands))) for first in range(0, n_bands, 3)),
        flops=count_flops(network, patches.tile_height, patches.tile_width),
    )
    _check_room(plan)
    return plan


@functools.lru_cache(maxsize=8)
def _architecture(network: str) -> StableSRConfig:
    """Remembered: the driver asks for the canvas some dozens of times for each block."""
    return StableSRConfig.from_json(network)


def _canvas(header: Header, config: Config, network: StableSRConfig) -> Canvas:
    return Canvas(
        header.height,
        header.width,
        config.scale,
        network.autoencoder.factor,
        network.tile,
        network.tile // 2 if config.sampling.overlap is None else config.sampling.overlap,
        config.sampling.patch,
        config.grid.block,
    )


def read_plan(folder: Path) -> Plan | None:
    """The plan of a run's folder; None if there is none.

    Raises:
        RunMismatch: if it cannot be understood.
    """
    try:
        text = (folder / "plan.json").read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return Plan.model_validate_json(text)
    except ValueError as error:
        raise RunMismatch(
            f"{folder / 'plan.json'} is not a plan of this version of gigasr: {str(error).splitlines()[0]}\n"
            f"hint: remove {folder} to start over"
        ) from None


def _check_output(config: Config) -> None:
    output = Path(config.output)
    if config.format == "ome-zarr" and config.file.compression not in (None, *ZARR_COMPRESSIONS):
        raise ConfigError(
            f"compression={config.file.compression} is none that OME-Zarr is written with\n"
            f"hint: {' or '.join(ZARR_COMPRESSIONS)}"
        )
    if os.path.realpath(output) == os.path.realpath(config.source):
        raise OutputError(f"the output {output} is the source\nhint: give the output another name")
    if output.exists() and not config.file.overwrite:
        raise OutputError(f"{output} exists already\nhint: --overwrite replaces it, once the new one is complete")
    if output.is_dir() and config.format != "ome-zarr":
        raise OutputError(f"{output} is a folder\nhint: give the name of a file")
    folder = output.parent
    if not folder.is_dir():
        raise OutputError(f"there is no folder {folder} to write {output.name} to\nhint: mkdir -p {folder}")
    run = _existing(config.folder)
    if not run.is_dir():
        raise OutputError(f"the run's folder {config.folder} cannot be: {run} is a file\nhint: --run names another")
    for place in {folder, run}:
        if not os.access(place, os.W_OK | os.X_OK):
            raise OutputError(f"{place} cannot be written to: {os.strerror(errno.EACCES).lower()}")


def _existing(path: Path) -> Path:
    """A path, or the closest above it that exists."""
    return next(place for place in [path.absolute(), *path.absolute().parents] if place.exists())


def _check_room(plan: Plan) -> None:
    wanted: dict[int, tuple[Path, int]] = {}
    used = _bytes_in(plan.config.folder)
    for folder, n_bytes in ((plan.config.folder, plan.store_bytes - used), (Path(plan.config.output), plan.file_bytes)):
        place = _existing(folder)
        device = place.stat().st_dev
        wanted[device] = (place, wanted.get(device, (place, 0))[1] + max(n_bytes, 0))
    for place, n_bytes in wanted.values():
        free = shutil.disk_usage(place).free
        if n_bytes > free:
            raise WontFit(
                f"the run needs about {_bytes(n_bytes)} at {place}, where {_bytes(free)} are free: "
                f"the target has {plan.target.width:,} x {plan.target.height:,} pixels\n"
                "hint: make room, or put the run's folder on another disk with --run"
            )
    available = psutil.virtual_memory().total
    needed = plan.memory_bytes - (plan.network_bytes if _on_gpu(plan.config.model.device) else 0)
    if needed > available:
        raise WontFit(
            f"the run needs about {_bytes(needed)} of memory, and this machine has {_bytes(available)}\n"
            "hint: lower --memory, --batch or --patch"
        )


def _on_gpu(device: str) -> bool:
    return device != "cpu" and torch.cuda.is_available()


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _changed(now: dict[str, Any], then: dict[str, Any]) -> str:
    """Of two fingerprints, the files that are not in both."""
    names = {
        file["name"] for file in [*now["files"], *then["files"]] if not (file in now["files"] and file in then["files"])
    }
    return f"{', '.join(sorted(names))} changed since"


def _size(header: Header) -> str:
    bands = f"{len(header.bands)} band{'s' * (len(header.bands) != 1)}{' and alpha' * (header.validity == 'alpha')}"
    return f"{header.width:,} x {header.height:,} pixels, {bands}, {header.dtype}"


def _bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.3g} {unit}" if unit != "B" else f"{n:.0f} B"
        n /= 1024
    return f"{n:,.1f} TiB"


def _engineering(n: float) -> str:
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if n < 1000:
            return f"{n:.3g} {prefix}"
        n /= 1000
    return f"{n:.3g} Z"


def _duration(seconds: float) -> str:
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if minutes < 2:
        return f"{max(seconds, 1):.0f} seconds"
    return f"{minutes:.0f} minutes" if hours < 2 else f"{hours:.1f} hours" if days < 3 else f"{days:.1f} days"
