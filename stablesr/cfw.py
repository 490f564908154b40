"""Controllable feature wrapping: a decoder that also sees the low-resolution image, as much as its weight says.

StableSR, section 3.2, eq. 4: F_m = F_d + w * C(F_e, F_d).
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablesr.autoencoder import EPS, Autoencoder, Posterior, posterior_from_moments
from stablesr.blocks import Modules, ResidualBlock, conv3x3
from stablesr.config import AutoencoderConfig, CFWConfig

RESIDUAL_SCALE = 0.2
"""How much of a dense block is added to its input. ESRGAN (arXiv:1809.00219), section 3.1."""


class DenseBlock(nn.Module):
    """Five convolutions, each of which sees the outputs of all before it."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        outputs = [growth] * 4 + [channels]
        self.convs = Modules[nn.Conv2d](conv3x3(channels + i * growth, out) for i, out in enumerate(outputs))

    def forward(self, x: Tensor) -> Tensor:
        seen = x
        *grow, last = self.convs
        for conv in grow:
            seen = torch.cat([seen, F.leaky_relu(conv(seen), 0.2)], dim=1)
        return x + RESIDUAL_SCALE * last(seen)


class ResidualInResidualDenseBlock(nn.Module):
    """Three dense blocks in a row, beside a skip: ESRGAN's RRDB."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.dense = nn.Sequential(*(DenseBlock(channels, growth) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return x + RESIDUAL_SCALE * self.dense(x)


class Fusion(nn.Module):
    """Encoder features, wrapped into decoder features of the same size: h + weight * C(features, h)."""

    def __init__(self, channels: int, config: CFWConfig) -> None:
        super().__init__()
        self.block_in = ResidualBlock(2 * channels, channels, eps=EPS)
        self.dense = nn.Sequential(
            *(ResidualInResidualDenseBlock(channels, config.growth) for _ in range(config.dense_blocks))
        )
        self.block_out = ResidualBlock(channels, channels, eps=EPS)

    def forward(self, h: Tensor, features: Tensor, weight: float) -> Tensor:
        """(B, C, H, W) both; `weight` from 0 (the plain decoder) to 1 (most of the low-resolution image)."""
        return h + weight * self.block_out(self.dense(self.block_in(torch.cat([features, h], dim=1))))


class Encoded(NamedTuple):
    """What the CFW encoder makes of an image."""

    posterior: Posterior
    features: dict[int, Tensor]
    """By autoencoder level d: (B, C_d, H / 2^d, W / 2^d)."""


class CFWAutoencoder(Autoencoder):
    """An autoencoder whose decoder is wrapped; its encoder may differ from the first stage's."""

    def __init__(self, config: AutoencoderConfig, cfw: CFWConfig) -> None:
        super().__init__(config)
        self.cfw = cfw
        self.fusions = nn.ModuleDict({str(d): Fusion(config.widths[d], cfw) for d in cfw.levels})

    def encode_features(self, image: Tensor) -> Encoded:
        """(B, 3, H, W) in [-1, 1] to its posterior and the features that `decode_wrapped` takes."""
        h, features = self.encoder(image, keep=self.cfw.levels)
        return Encoded(posterior_from_moments(self.quant(h)), features)

    def features(self, image: Tensor) -> dict[int, Tensor]:
        """Those of `encode_features` alone; the encoder below the coarsest of them is spared."""
        levels = range(max(self.cfw.levels) + 1)
        return {d: h for d, h in zip(levels, self.encoder.features(image), strict=False) if d in self.cfw.levels}

    def decode_wrapped(self, latent: Tensor, features: Mapping[int, Tensor], weight: float) -> Tensor:
        """Decode with the look of the low-resolution image.

        Args:
            latent: unscaled, (B, 4, h, w).
            features: of the image whose sides are 8 h and 8 w, from `encode_features` or `features`.
            weight: of the fusion, 0 to 1.

        Returns:
            (B, 3, 8 h, 8 w); about [-1, 1], not clamped.
        """

        def wrap(depth: int, h: Tensor) -> Tensor:
            return self.fusions[str(depth)](h, features[depth], weight) if depth in self.cfw.levels else h

        return self.decoder(self.post_quant(latent), wrap if weight != 0 else None)
