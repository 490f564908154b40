"""Source raster -> store: samples with their holes filled, which of them count, and how they are distributed."""

from typing import Any

import numpy as np

from pipeline.grid import Index
from pipeline.plan import Plan
from pipeline.raster.holes import fill_holes
from pipeline.raster.radiometry import fixed_stretch, histogram
from pipeline.raster.source import Source
from pipeline.stages.context import grown
from pipeline.store import RunStore

HOLE_REACH = 16
"""Source pixels into a hole that continue what lies around it; further in there is nothing to see."""


def create_arrays(plan: Plan, store: RunStore) -> None:
    """Arrays that this stage writes."""
    blocks, header = plan.canvas.source_blocks, plan.header
    for layer, bands in enumerate(plan.layers):
        store.create(f"source/{layer}", "pixels", len(bands), blocks, header.dtype)
    if header.validity != "all":
        n_masks = len(header.bands) if header.validity == "nodata" else 1
        store.create("mask", "pixels", n_masks, blocks, header.dtype if header.validity == "alpha" else "uint8")


def ingest_block(plan: Plan, store: RunStore, source: Source, index: Index) -> dict[str, Any]:
    """Read one block of the source and store it.

    Returns:
        For its marker: checksums by array, and the histogram of each band if the stretch will need it.
    """
    canvas, header = plan.canvas, plan.header
    blocks = canvas.source_blocks
    box = blocks.box(index)
    around = box if header.validity == "all" else grown(box, HOLE_REACH).overlap(canvas.source)
    assert around is not None
    values, valid, alpha = source.read(around)
    if valid is not None and not valid.all():
        values = fill_holes(values, valid, HOLE_REACH, _means(values, valid))
    here = (slice(None), *box.within(around))
    checksums = {
        f"source/{layer}": store.write(
            f"source/{layer}", blocks, index, np.ascontiguousarray(values[list(bands)][here])
        )
        for layer, bands in enumerate(plan.layers)
    }
    if valid is not None:
        stored = valid.astype(np.uint8) if alpha is None else alpha[None]
        checksums["mask"] = store.write("mask", blocks, index, np.ascontiguousarray(stored[here]))
    payload: dict[str, Any] = {"checksums": checksums}
    if fixed_stretch(header, plan.config.radiometry.stretch) is None:
        counted = [None if valid is None else valid[min(b, len(valid) - 1)][here[1:]] for b in range(len(values))]
        payload["histograms"] = [histogram(band[here[1:]], c) for band, c in zip(values, counted, strict=True)]
    return payload


def _means(values: np.ndarray[Any, Any], valid: np.ndarray[Any, Any]) -> list[float]:
    """Of the valid samples of each band; 0 where there are none."""
    means = []
    for band, samples in enumerate(values):
        counted = samples[valid[min(band, len(valid) - 1)]]
        means.append(float(counted.mean(dtype=np.float64)) if counted.size else 0.0)
    return means
