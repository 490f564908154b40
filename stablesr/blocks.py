"""What the networks are made of: residual blocks, attention, changes of size, the embedding of time.

Shapes: B batch, C channels, H W sides, N = H * W positions. Images and features are (B, C, H, W) and best kept in
channels_last memory: then the tokens of an attention, (B, N, C), are a view of them.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablesr.conditioning import SPADE
from stablesr.norm import GroupNorm

M = TypeVar("M", bound=nn.Module)


class Modules(nn.ModuleList, Generic[M]):
    """A list of modules that tells the type checker what it holds."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[M]: ...

        def __getitem__(self, index: int) -> M: ...  # type: ignore[override]


def conv3x3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1)


def time_embedding(t: Tensor, channels: int) -> Tensor:
    """Sinusoids of the diffusion time, cosines first. DDPM (arXiv:2006.11239), appendix B.

    Args:
        t: diffusion times (B,), 0 to 999; integers or floats.
        channels: width of the embedding, even.

    Returns:
        (B, channels), float32: the angles are rounded as the published networks saw them in training.
    """
    half = channels // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.to(torch.float32)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimeMLP(nn.Sequential):
    """From a diffusion time to the vector that every residual block reads."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))
        self.width = width

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, 4 * width)."""
        return super().forward(time_embedding(t, self.width).to(next(self.parameters()).dtype))


class ResidualBlock(nn.Module):
    """Two convolutions beside a skip, with a shift by time and a modulation by a condition where they are asked for.

    The modulation comes after the second convolution and before the skip (StableSR, section 3.1, "SFT").

    Args:
        channels_in, channels_out: C before and after; a 1x1 convolution adapts the skip where they differ.
        eps: of the norms; 1e-5 in the diffusion networks, 1e-6 in the autoencoder.
        time_channels: width of the time vector; None for a block that knows no time.
        spade: the modulation layer; None for a block that knows no condition.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        eps: float,
        time_channels: int | None = None,
        spade: SPADE | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = GroupNorm(channels_in, eps=eps)
        self.conv1 = conv3x3(channels_in, channels_out)
        self.time = nn.Linear(time_channels, channels_out) if time_channels else None
        self.norm2 = GroupNorm(channels_out, eps=eps)
        self.conv2 = conv3x3(channels_out, channels_out)
        self.spade = spade
        self.skip = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def time_shift(self, time: Tensor) -> Tensor:
        """(B, time_channels) -> (B, C, 1, 1), what `forward` adds between the convolutions."""
        assert self.time is not None
        return self.time(F.silu(time))[:, :, None, None]

    def forward(self, x: Tensor, shift: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if shift is not None:
            h = h + shift
        h = self.conv2(F.silu(self.norm2(h)))
        if self.spade is not None:
            h = self.spade(h, condition)
        return self.skip(x) + h


class Downsample(nn.Module):
    """Half the sides, by a strided convolution with a border of zeros all around."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Twice the sides: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class SpatialAttention(nn.Module):
    """Every position attends to every position of its image; a residual layer.

    Args:
        channels: C; a multiple of `heads`.
        heads: how many; 1 in the autoencoder.
        eps: of the norm.
    """

    def __init__(self, channels: int, *, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm(channels, eps=eps)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = to_tokens(self.norm(x))  # (B, N, C)
        q, k, v = split_heads(self.qkv(tokens), 3, self.heads)
        return x + to_image(self.out(join_heads(F.scaled_dot_product_attention(q, k, v))), x.shape[-2:])


class SelfAttention(nn.Module):
    """Attention among tokens; queries, keys and values come from one product."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(x), 3, self.heads)
        return self.out(join_heads(F.scaled_dot_product_attention(q, k, v)))


KeysValues = tuple[Tensor, Tensor]
"""Keys and values of a context, (B or 1, heads, words, C / heads) each."""


class CrossAttention(nn.Module):
    """Attention of tokens to a context, whose keys and values are computed once and used for many images."""

    def __init__(self, channels: int, context_channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(channels, channels, bias=False)
        self.kv = nn.Linear(context_channels, 2 * channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def keys_values(self, context: Tensor) -> KeysValues:
        """(B, words, context_channels) -> keys and values."""
        k, v = split_heads(self.kv(context), 2, self.heads)
        return k.contiguous(), v.contiguous()

    def forward(self, x: Tensor, keys_values: KeysValues) -> Tensor:
        (q,) = split_heads(self.q(x), 1, self.heads)
        k, v = (kv.expand(x.shape[0], -1, -1, -1) for kv in keys_values)
        return self.out(join_heads(F.scaled_dot_product_attention(q, k, v)))


class GatedFeedForward(nn.Module):
    """GEGLU (arXiv:2002.05202): one half of the hidden layer, gated by the exact GELU of the other."""

    def __init__(self, channels: int, expansion: int = 4) -> None:
        super().__init__()
        self.inner = nn.Linear(channels, 2 * expansion * channels)
        self.out = nn.Linear(expansion * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.inner(x).chunk(2, dim=-1)
        return self.out(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    def __init__(self, channels: int, context_channels: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.self_attention = SelfAttention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.cross_attention = CrossAttention(channels, context_channels, heads)
        self.norm3 = nn.LayerNorm(channels)
        self.feed_forward = GatedFeedForward(channels)

    def forward(self, x: Tensor, keys_values: KeysValues) -> Tensor:
        x = x + self.self_attention(self.norm1(x))
        x = x + self.cross_attention(self.norm2(x), keys_values)
        return x + self.feed_forward(self.norm3(x))


class Transformer(nn.Module):
    """The positions of an image as tokens of a transformer; a residual layer.

    Args:
        channels: C, a multiple of `head_channels`.
        context_channels: width of the context that the cross-attention reads.
    """

    def __init__(self, channels: int, context_channels: int, head_channels: int, depth: int) -> None:
        super().__init__()
        heads = channels // head_channels
        self.norm = GroupNorm(channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.blocks = Modules[TransformerBlock](
            TransformerBlock(channels, context_channels, heads) for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels)

    def keys_values(self, context: Tensor) -> tuple[KeysValues, ...]:
        return tuple(block.cross_attention.keys_values(context) for block in self.blocks)

    def forward(self, x: Tensor, keys_values: tuple[KeysValues, ...]) -> Tensor:
        tokens = self.proj_in(to_tokens(self.norm(x)))
        for block, kv in zip(self.blocks, keys_values, strict=True):
            tokens = block(tokens, kv)
        return x + to_image(self.proj_out(tokens), x.shape[-2:])


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C); a view of channels_last memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_image(tokens: Tensor, sides: torch.Size) -> Tensor:
    """(B, H * W, C) -> (B, C, H, W), in channels_last memory."""
    return tokens.unflatten(1, tuple(sides)).permute(0, 3, 1, 2)


def split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(B, N, parts * heads * d) -> `parts` tensors (B, heads, N, d)."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def join_heads(x: Tensor) -> Tensor:
    """(B, heads, N, d) -> (B, N, heads * d)."""
    return x.transpose(1, 2).flatten(2)
