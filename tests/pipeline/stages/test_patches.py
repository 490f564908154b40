"""Which patches a block needs, and which blocks need a patch: the same, asked from either side."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.grid import Canvas
from pipeline.stages import decode, encode

SIDES = st.integers(1, 200)


@pytest.mark.parametrize("stage", [encode, decode], ids=["encode", "decode"])
@given(
    height=SIDES, width=SIDES, scale=st.integers(1, 8), patch=st.sampled_from([16, 24, 40]),
    block=st.sampled_from([8, 16, 32]),
)  # fmt: skip
def test_a_block_needs_a_patch_if_the_patch_is_needed_by_the_block(
    stage: Any, height: int, width: int, scale: int, patch: int, block: int
) -> None:
    canvas = Canvas(height, width, scale, 8, 16, 6, patch, block)
    plan = SimpleNamespace(canvas=canvas)
    blocks = canvas.blocks if stage is encode else canvas.output_blocks
    needs = {(index, p) for index in blocks for p in stage.patches_of(plan, index)}
    assert needs == {(index, p) for p in canvas.patches for index in stage.blocks_of(plan, p)}
