"""The text tower: OpenCLIP's ViT-H-14, read one block before its end.

    tokens (N, L) -> embed + position -> [ x + attention(norm(x)); x + mlp(norm(x)) ] * (layers - 1) -> norm

Stable Diffusion 2 conditions on the second-to-last block, normalised by the tower's last LayerNorm. The last block of
the released tower, its projection and its temperature are therefore never computed, and not built here.

Shapes: N prompts, L tokens (77), W width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablesr.config import TextConfig
from stablesr.tokenizer import tokenize


class TextTower(nn.Module):
    """What each token means in the light of those before it: the `context` of the UNet's cross-attention."""

    def __init__(self, config: TextConfig) -> None:
        """Raises ValueError when heads do not divide width, or when leaving out the last block leaves none."""
        super().__init__()
        if config.width % config.heads:
            raise ValueError(f"text.width={config.width} must be a multiple of text.heads={config.heads}")
        if config.layers < 2:
            raise ValueError(f"text.layers={config.layers} must be at least 2: the last block is not used")
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.width).normal_(std=0.01))
        self.blocks = nn.ModuleList(TextBlock(config.width, config.heads) for _ in range(config.layers - 1))
        self.norm_out = nn.LayerNorm(config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 (N, L), L the context length -> context (N, L, W). Padding is read like any other token.

        Raises ValueError for any other shape of tokens.
        """
        if tokens.ndim != 2 or tokens.shape[1] != len(self.positional_embedding):
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}, expected (N, {len(self.positional_embedding)})")
        x = self.token_embedding(tokens) + self.positional_embedding  # (N, L, W)
        for block in self.blocks:
            x = block(x)
        return self.norm_out(x)


class TextBlock(nn.Module):
    """Causal self-attention, then a two-layer network with exact GELU; each on a normalised copy, each added back."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = CausalSelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """x (N, L, W) -> (N, L, W)."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and those before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, L, W) -> (N, L, W)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (N, heads, L, W/heads)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(seen.transpose(1, 2).flatten(2))


@torch.no_grad()
def encode_prompts(tower: TextTower, texts: Sequence[str]) -> Tensor:
    """The context of each prompt, (N, L, W), on the device and in the precision of `tower`, without gradients.

    Raises ValueError for a prompt that is not a str, and for a lone str in place of a sequence.
    """
    tokens = tokenize(texts, context_length=len(tower.positional_embedding))
    return tower(tokens.to(tower.token_embedding.weight.device))
