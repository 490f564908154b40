"""A network so small that whole runs take a second."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stablesr import PRESETS, StableSRConfig
from stablesr.checkpoint import CONFIG_KEY, LazyTensor, model_shapes, write_model_file
from stablesr.config import AutoencoderConfig, CFWConfig

MICRO = replace(
    PRESETS["tiny"],
    name="micro",
    autoencoder=AutoencoderConfig(width=32, multipliers=(1, 1, 1, 1), blocks_per_level=1),
    cfw=CFWConfig(levels=(2,), dense_blocks=1, growth=8),
    tile=16,
    steps=3,
)
"""Tiles of 16 latents, so that a canvas of 60 has many."""


def write_random_weights(path: Path, config: StableSRConfig) -> Path:
    """A model file of small random numbers."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in model_shapes(config).items():
        values = torch.randn(shape, generator=generator) * 0.05
        tensors[name] = LazyTensor(tuple(shape), lambda values=values: values)  # type: ignore[misc]
    write_model_file(path, tensors, {CONFIG_KEY: config.to_json()}, torch.float32)
    return path


@pytest.fixture(scope="session")
def micro(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a model file."""
    return str(write_random_weights(tmp_path_factory.mktemp("weights") / "micro.safetensors", MICRO))
