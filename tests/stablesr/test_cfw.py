"""The features that the wrapped decoder takes, made without what it does not take."""

import pytest
import torch

from stablesr.cfw import CFWAutoencoder
from stablesr.config import AutoencoderConfig, CFWConfig


@pytest.fixture(scope="module")
def autoencoder() -> CFWAutoencoder:
    torch.manual_seed(0)
    config = AutoencoderConfig(width=32, multipliers=(1, 1, 1, 1), blocks_per_level=1)
    return CFWAutoencoder(config, CFWConfig(levels=(0, 2), dense_blocks=1, growth=8)).eval().requires_grad_(False)


def test_features_alone_are_those_of_the_whole_encoding(autoencoder: CFWAutoencoder) -> None:
    image = torch.rand(1, 3, 16, 24)
    alone, encoded = autoencoder.features(image), autoencoder.encode_features(image).features
    assert {level: tuple(h.shape) for level, h in alone.items()} == {0: (1, 32, 16, 24), 2: (1, 32, 4, 6)}
    assert all(torch.equal(alone[level], encoded[level]) for level in encoded)


def test_features_alone_spare_the_end_of_the_encoder(autoencoder: CFWAutoencoder) -> None:
    ran: list[str] = []
    encoder = autoencoder.encoder
    watched = {"level 2": encoder.levels[2].blocks, "halving": encoder.levels[2].down, "middle": encoder.middle}
    hooks = [module.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, module in watched.items()]
    autoencoder.features(torch.rand(1, 3, 16, 16))
    for hook in hooks:
        hook.remove()
    assert ran == ["level 2"]
