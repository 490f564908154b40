"""Finished pixels -> the output, under a temporary name."""

from collections.abc import Callable
from pathlib import Path

from pipeline.plan import Plan
from pipeline.raster.ome_zarr import n_shards, write_ome_zarr
from pipeline.raster.tiff import n_tiles, tiles_done, write_tiff
from pipeline.stages.overviews import StoredLevel
from pipeline.store import RunStore

COMPLETE = "export/complete"
"""The unit that is marked when the temporary file is finished."""


def part_of(plan: Plan) -> Path:
    """Where the output grows, before it gets its name."""
    output = Path(plan.config.output)
    return output.with_name(output.name + ".part")


def total(plan: Plan, store: RunStore) -> int:
    """Tiles of the output, over all levels; of OME-Zarr, shards."""
    levels = _levels(plan, store)
    return n_shards(levels) if plan.format == "ome-zarr" else n_tiles(levels, plan.format)


def done(plan: Plan, store: RunStore) -> int:
    """How many of them are in the temporary file already."""
    return total(plan, store) if is_complete(plan, store) else tiles_done(part_of(plan))


def is_complete(plan: Plan, store: RunStore) -> bool:
    """Whether the output is there, under its temporary name or, after the run, its own."""
    return store.marker(COMPLETE) is not None and (part_of(plan).exists() or Path(plan.config.output).exists())


def export(plan: Plan, store: RunStore, on_tiles: Callable[[int], None], stopping: Callable[[], bool]) -> None:
    """Write the temporary file, or go on with it."""
    if store.marker(COMPLETE) is not None and part_of(plan).exists():
        return
    part, levels, options = part_of(plan), _levels(plan, store), plan.config.file
    if plan.format == "ome-zarr":
        write_ome_zarr(part, plan.target, levels, compression=options.compression or "zstd", level=options.level,
                       on_tiles=on_tiles, stopping=stopping)  # fmt: skip
    else:
        compression = options.compression or ("none" if plan.format == "bigtiff" else "zstd")
        write_tiff(part, plan.target, levels, layout=plan.format, compression=compression, level=options.level,
                   on_tiles=on_tiles, stopping=stopping)  # fmt: skip
    store.mark(COMPLETE, {})


def _levels(plan: Plan, store: RunStore) -> list[StoredLevel]:
    return [StoredLevel(plan, store, level) for level in range(plan.n_levels)]
