"""Stored target -> its overviews, level by level, block by block; and all of them as the writers want to read them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.grid import Index
from pipeline.plan import Plan
from pipeline.raster.overviews import halve
from pipeline.store import CHUNK, RunStore
from stablesr.box import Box


def create_arrays(plan: Plan, store: RunStore) -> None:
    """Arrays that this stage writes."""
    for level in range(1, plan.n_levels):
        blocks = plan.level_blocks(level)
        store.create(f"overviews/{level}", "pixels", plan.target.count, blocks, plan.header.dtype)
        if plan.header.validity == "mask":
            store.create(f"overview_masks/{level}", "pixels", 1, blocks, "uint8")


class StoredLevel:
    """One level of the finished pixels; see `pipeline.raster.tiff.Level`."""

    def __init__(self, plan: Plan, store: RunStore, level: int) -> None:
        self.plan, self.store, self.level = plan, store, level
        blocks = plan.level_blocks(level)
        self.height, self.width = blocks.height, blocks.width

    def read(self, box: Box) -> NDArray[Any]:
        """(bands, h, w); alpha, if there is any, is the last."""
        if self.level:
            return self.store.read(f"overviews/{self.level}", box)
        parts = [self.store.read(f"output/{layer}", box) for layer in range(len(self.plan.layers))]
        if self.plan.header.validity == "alpha":
            parts.append(self._enlarged_mask(box))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def read_mask(self, box: Box) -> NDArray[np.uint8]:
        """(h, w), 0 or 255."""
        if self.level:
            mask: NDArray[np.uint8] = self.store.read(f"overview_masks/{self.level}", box)[0]
            return mask
        return np.where(self._enlarged_mask(box)[0] != 0, np.uint8(255), np.uint8(0))

    def _enlarged_mask(self, box: Box) -> NDArray[Any]:
        """The stored mask or alpha under a part of the target, each source pixel repeated."""
        behind, scale = self.plan.canvas.behind(box), self.plan.config.scale
        stored = self.store.read("mask", behind)
        return stored.repeat(scale, axis=-2).repeat(scale, axis=-1)[(slice(None), *box.within(behind.scaled(scale)))]


def overview_block(plan: Plan, store: RunStore, level: int, index: Index) -> dict[str, Any]:
    """Compute one block of a level from the level below."""
    blocks, finer, header = plan.level_blocks(level), StoredLevel(plan, store, level - 1), plan.target
    box = blocks.box(index)
    pixels = np.empty((header.count, box.height, box.width), dtype=header.dtype)
    masked = header.validity == "mask"
    mask = np.empty((1, box.height, box.width), dtype=np.uint8)
    for top in range(box.top, box.bottom, CHUNK):
        for left in range(box.left, box.right, CHUNK):
            part = Box(top, left, min(top + CHUNK, box.bottom), min(left + CHUNK, box.right))
            below = part.scaled(2).overlap(Box(0, 0, finer.height, finer.width))
            assert below is not None
            here = (slice(None), *part.within(box))
            if masked:
                pixels[here], mask[(0, *here[1:])] = halve(finer.read(below), header, finer.read_mask(below))
            else:
                pixels[here] = halve(finer.read(below), header)
    checksums = {f"overviews/{level}": store.write(f"overviews/{level}", blocks, index, pixels)}
    if masked:
        checksums[f"overview_masks/{level}"] = store.write(f"overview_masks/{level}", blocks, index, mask)
    return {"checksums": checksums}
