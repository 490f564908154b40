"""The time-aware encoder: from the low-resolution latent and the diffusion time to one condition per UNet level.

StableSR, section 3.1: the condition must grow stronger as the image emerges, so the encoder is told the time.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from stablesr.blocks import Downsample, Modules, ResidualBlock, SpatialAttention, TimeMLP, conv3x3
from stablesr.config import TimeEncoderConfig

EPS = 1e-5


class Level(nn.Module):
    """Residual blocks of one size, an attention after each where the level has it, then a halving."""

    def __init__(
        self, blocks: list[ResidualBlock], attentions: list[SpatialAttention], down: Downsample | None
    ) -> None:
        super().__init__()
        self.blocks = Modules[ResidualBlock](blocks)
        self.attentions = Modules[SpatialAttention](attentions)
        self.down = down


class TimeEncoder(nn.Module):
    """Half a UNet; what it saw at each level comes out, brought to a common width."""

    def __init__(self, config: TimeEncoderConfig) -> None:
        super().__init__()
        self.config = config
        time_channels = 4 * config.width
        self.time_mlp = TimeMLP(config.width)
        self.conv_in = conv3x3(config.latent_channels, config.width)

        def block(channels_in: int, channels_out: int) -> ResidualBlock:
            return ResidualBlock(channels_in, channels_out, eps=EPS, time_channels=time_channels)

        def attention(channels: int) -> SpatialAttention:
            return SpatialAttention(channels, heads=config.heads, eps=EPS)

        self.levels = Modules[Level]()
        channels, deepest = config.width, len(config.widths) - 1
        for depth, width in enumerate(config.widths):
            widths = [channels] + [width] * config.blocks_per_level
            attends = 2**depth in config.attention_factors
            channels = width
            self.levels.append(
                Level(
                    [block(before, after) for before, after in zip(widths, widths[1:], strict=False)],
                    [attention(width) for _ in range(config.blocks_per_level if attends else 0)],
                    Downsample(width) if depth < deepest else None,
                )
            )
        self.middle_block1 = block(channels, channels)
        self.middle_attention = attention(channels)
        self.middle_block2 = block(channels, channels)
        self.heads = Modules[ResidualBlock](block(width, config.condition_channels) for width in config.widths)

    def residual_blocks(self) -> list[ResidualBlock]:
        """In the order in which `forward` meets them."""
        inner = [block for level in self.levels for block in level.blocks]
        return [*inner, self.middle_block1, self.middle_block2, *self.heads]

    def embed_time(self, t: Tensor) -> tuple[Tensor, ...]:
        """What every residual block adds at diffusion time `t` (B,), 0 to 999; once per step for all tiles."""
        time = self.time_mlp(t)
        return tuple(block.time_shift(time) for block in self.residual_blocks())

    def forward(self, latent: Tensor, shifts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Encode.

        Args:
            latent: the scaled low-resolution latent (B, 4, H, W).
            shifts: from `embed_time`, of batch B or 1.

        Returns:
            One condition per UNet level, (B, condition_channels, H / f, W / f) with f = 1, 2, 4, 8; an odd side is
            halved upwards. A condition belongs to its level, whatever its width: images need not be square.
        """
        shift = iter(shifts)
        seen = []
        h = self.conv_in(latent)
        for level in self.levels:
            for i, block in enumerate(level.blocks):
                h = block(h, next(shift))
                h = level.attentions[i](h) if len(level.attentions) else h
            if level.down is not None:
                seen.append(h)
                h = level.down(h)
        h = self.middle_block1(h, next(shift))
        h = self.middle_attention(h)
        seen.append(self.middle_block2(h, next(shift)))
        return tuple(head(h, next(shift)) for head, h in zip(self.heads, seen, strict=True))
