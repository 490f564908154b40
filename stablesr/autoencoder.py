"""Stable Diffusion's KL autoencoder: images in [-1, 1] to latents of an eighth of their sides, and back.

Latent Diffusion (arXiv:2112.10752), section 3.1.
"""

from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablesr.blocks import Modules, ResidualBlock, SpatialAttention, Upsample, conv3x3
from stablesr.config import AutoencoderConfig
from stablesr.norm import GroupNorm

EPS = 1e-6


class Posterior(NamedTuple):
    """The Gaussian over latents that an image encodes to; unscaled."""

    mean: Tensor
    """(B, 4, h, w)."""
    logvar: Tensor
    """(B, 4, h, w), within [-30, 20]."""

    def sample(self, noise: Tensor) -> Tensor:
        """One draw, from standard normal noise of the same shape."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise


def posterior_from_moments(moments: Tensor) -> Posterior:
    """(B, 8, h, w): the mean in the first half of the channels, the log-variance, to be clamped, in the second."""
    mean, logvar = moments.chunk(2, dim=1)
    return Posterior(mean, logvar.clamp(-30.0, 20.0))


class HalvingConv(nn.Module):
    """Half the sides; zeros are added below and to the right alone, so that an odd side is rounded down."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block1 = ResidualBlock(channels, channels, eps=EPS)
        self.attention = SpatialAttention(channels, heads=1, eps=EPS)
        self.block2 = ResidualBlock(channels, channels, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.block2(self.attention(self.block1(x)))


class EncoderLevel(nn.Module):
    def __init__(self, widths: list[int], *, halves: bool) -> None:
        super().__init__()
        self.blocks = residual_blocks(widths)
        self.down = HalvingConv(widths[-1]) if halves else nn.Identity()


class DecoderLevel(nn.Module):
    def __init__(self, widths: list[int], *, doubles: bool) -> None:
        super().__init__()
        self.blocks = residual_blocks(widths)
        self.up = Upsample(widths[-1]) if doubles else nn.Identity()


def residual_blocks(widths: list[int]) -> nn.Sequential:
    """One block from each width to the next."""
    return nn.Sequential(*(ResidualBlock(a, b, eps=EPS) for a, b in zip(widths, widths[1:], strict=False)))


class Encoder(nn.Module):
    """Image to moments, level by level from fine (0) to coarse."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.conv_in = conv3x3(config.image_channels, config.width)
        self.levels = Modules[EncoderLevel]()
        channels, deepest = config.width, len(config.widths) - 1
        for depth, width in enumerate(config.widths):
            self.levels.append(EncoderLevel([channels] + [width] * config.blocks_per_level, halves=depth < deepest))
            channels = width
        self.middle = Middle(channels)
        self.norm_out = GroupNorm(channels, eps=EPS)
        self.conv_out = conv3x3(channels, 2 * config.latent_channels)

    def features(self, image: Tensor) -> Iterator[Tensor]:
        """Of each level, from fine to coarse, before it is halved; one is computed when it is asked for."""
        h = self.conv_in(image)
        for level in self.levels:
            h = level.blocks(h)
            yield h
            h = level.down(h)

    def forward(self, image: Tensor, keep: Collection[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """Encode.

        Args:
            image: (B, 3, H, W) in [-1, 1].
            keep: levels whose features, before they are halved, are wanted.

        Returns:
            Moments before their last 1x1 convolution, (B, 8, H / 8, W / 8), and the features by level.
        """
        kept = {}
        for depth, h in enumerate(self.features(image)):
            if depth in keep:
                kept[depth] = h
        return self.conv_out(F.silu(self.norm_out(self.middle(h)))), kept


class Decoder(nn.Module):
    """Latent to image, level by level from coarse to fine (0)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels = config.widths[-1]
        self.conv_in = conv3x3(config.latent_channels, channels)
        self.middle = Middle(channels)
        levels = []
        for depth, width in reversed(list(enumerate(config.widths))):
            levels.append(DecoderLevel([channels] + [width] * (config.blocks_per_level + 1), doubles=depth > 0))
            channels = width
        self.levels = Modules[DecoderLevel](reversed(levels))
        self.norm_out = GroupNorm(channels, eps=EPS)
        self.conv_out = conv3x3(channels, config.image_channels)

    def forward(self, latent: Tensor, wrap: Callable[[int, Tensor], Tensor] | None = None) -> Tensor:
        """Decode.

        Args:
            latent: (B, 4, h, w), unscaled and after the 1x1 convolution.
            wrap: what to do to the features of a level after its blocks and before they are doubled; gets the level
                (0 is full resolution) and the features, returns features of the same shape.

        Returns:
            (B, 3, 8 h, 8 w).
        """
        h = self.middle(self.conv_in(latent))
        for depth in reversed(range(len(self.levels))):
            level = self.levels[depth]
            h = level.blocks(h)
            if wrap is not None:
                h = wrap(depth, h)
            h = level.up(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Autoencoder(nn.Module):
    """The first stage: latents here are unscaled; `StableSR` scales them."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def encode(self, image: Tensor) -> Posterior:
        """(B, 3, H, W) in [-1, 1] to the posterior of its latent; a side's remainder modulo 8 is dropped."""
        h, _ = self.encoder(image)
        return posterior_from_moments(self.quant(h))

    def decode(self, latent: Tensor) -> Tensor:
        """(B, 4, h, w) to (B, 3, 8 h, 8 w); about [-1, 1], not clamped."""
        return self.decoder(self.post_quant(latent))
