"""Stable Diffusion 2.1's denoising UNet, with a condition of the low-resolution image in every residual block."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablesr.blocks import Downsample, KeysValues, Modules, ResidualBlock, TimeMLP, Transformer, Upsample, conv3x3
from stablesr.conditioning import SPADE
from stablesr.config import UNetConfig
from stablesr.norm import GroupNorm

EPS = 1e-5


class Level(nn.Module):
    """Residual blocks of one size, a transformer after each where the level has attention, then a change of size."""

    def __init__(self, blocks: list[ResidualBlock], transformers: list[Transformer], resize: nn.Module | None) -> None:
        super().__init__()
        self.blocks = Modules[ResidualBlock](blocks)
        self.transformers = Modules[Transformer](transformers)
        self.resize = resize


class UNet(nn.Module):
    """x_t, the time, the conditions and a prompt in; noise (eps) or velocity (v) out.

    What does not depend on the image is prepared apart and handed in: the time shifts once per step (`embed_time`),
    the keys and values of the prompt once per run (`embed_prompt`).
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        time_channels = 4 * config.width
        self.time_mlp = TimeMLP(config.width)
        self.conv_in = conv3x3(config.latent_channels, config.width)

        def block(channels_in: int, channels_out: int) -> ResidualBlock:
            spade = SPADE(channels_out, config.condition_channels, config.spade_channels)
            return ResidualBlock(channels_in, channels_out, eps=EPS, time_channels=time_channels, spade=spade)

        def transformer(channels: int) -> Transformer:
            return Transformer(channels, config.context_channels, config.head_channels, config.transformer_depth)

        self.down = Modules[Level]()
        channels = config.width
        skips = [channels]  # channels of what the way up will be given
        deepest = len(config.widths) - 1
        for depth, width in enumerate(config.widths):
            blocks, transformers = [], []
            for _ in range(config.blocks_per_level):
                blocks.append(block(channels, width))
                if 2**depth in config.attention_factors:
                    transformers.append(transformer(width))
                channels = width
                skips.append(channels)
            resize = Downsample(channels) if depth < deepest else None
            if resize is not None:
                skips.append(channels)
            self.down.append(Level(blocks, transformers, resize))

        self.middle_block1 = block(channels, channels)
        self.middle_transformer = transformer(channels)
        self.middle_block2 = block(channels, channels)

        self.up = Modules[Level]()
        for depth, width in reversed(list(enumerate(config.widths))):
            blocks, transformers = [], []
            for _ in range(config.blocks_per_level + 1):
                blocks.append(block(channels + skips.pop(), width))
                if 2**depth in config.attention_factors:
                    transformers.append(transformer(width))
                channels = width
            self.up.append(Level(blocks, transformers, Upsample(channels) if depth > 0 else None))

        self.norm_out = GroupNorm(channels, eps=EPS)
        self.conv_out = conv3x3(channels, config.latent_channels)

    def residual_blocks(self) -> list[ResidualBlock]:
        """In the order in which `forward` meets them."""
        down = [block for level in self.down for block in level.blocks]
        up = [block for level in self.up for block in level.blocks]
        return [*down, self.middle_block1, self.middle_block2, *up]

    def transformers(self) -> list[Transformer]:
        """In the order in which `forward` meets them."""
        down = [transformer for level in self.down for transformer in level.transformers]
        up = [transformer for level in self.up for transformer in level.transformers]
        return [*down, self.middle_transformer, *up]

    def embed_time(self, t: Tensor) -> tuple[Tensor, ...]:
        """What every residual block adds at diffusion time `t` (B,), 0 to 999."""
        time = self.time_mlp(t)
        return tuple(block.time_shift(time) for block in self.residual_blocks())

    def embed_prompt(self, context: Tensor) -> tuple[tuple[KeysValues, ...], ...]:
        """Keys and values of a text embedding (B, words, context_channels) for every transformer."""
        return tuple(transformer.keys_values(context) for transformer in self.transformers())

    def forward(
        self,
        x: Tensor,
        shifts: Sequence[Tensor],
        conditions: Sequence[Tensor],
        prompt: Sequence[tuple[KeysValues, ...]],
    ) -> Tensor:
        """Predict.

        Args:
            x: noisy latents (B, 4, H, W); H and W are multiples of 8 (of 2 for each halving).
            shifts: from `embed_time`, of batch B or 1.
            conditions: one per level, (b, condition_channels, H / f, W / f), f = 1, 2, 4, 8; b divides B.
            prompt: from `embed_prompt`, of batch B or 1.

        Returns:
            (B, 4, H, W).
        """
        shift, keys_values = iter(shifts), iter(prompt)

        def through(level: Level, i: int, h: Tensor, condition: Tensor) -> Tensor:
            h = level.blocks[i](h, next(shift), condition)
            return level.transformers[i](h, next(keys_values)) if len(level.transformers) else h

        h = self.conv_in(x)
        skips = [h]
        for level, condition in zip(self.down, conditions, strict=True):
            for i in range(len(level.blocks)):
                h = through(level, i, h, condition)
                skips.append(h)
            if level.resize is not None:
                h = level.resize(h)
                skips.append(h)

        h = self.middle_block1(h, next(shift), conditions[-1])
        h = self.middle_transformer(h, next(keys_values))
        h = self.middle_block2(h, next(shift), conditions[-1])

        for level, condition in zip(self.up, reversed(conditions), strict=True):
            for i in range(len(level.blocks)):
                h = through(level, i, torch.cat([h, skips.pop()], dim=1), condition)
            if level.resize is not None:
                h = level.resize(h)
        return self.conv_out(F.silu(self.norm_out(h)))
