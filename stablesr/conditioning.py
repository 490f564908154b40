"""How the low-resolution image speaks to the UNet: features scaled and shifted by what was seen at the same place.

SPADE (arXiv:1903.07291), used by StableSR as its spatial feature transformation (section 3.1, eq. 3).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablesr.norm import GroupNorm


class SPADE(nn.Module):
    """norm(h) * (1 + gamma) + beta, with gamma and beta convolved from the condition.

    The published keys call the norm "parameter free", yet it has a learned gain and bias, which we keep.

    Args:
        channels: C of the features that are modulated.
        condition_channels: K of the condition.
        hidden_channels: between the two convolutions.
    """

    def __init__(self, channels: int, condition_channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels, eps=1e-5)
        self.shared = nn.Conv2d(condition_channels, hidden_channels, 3, padding=1)
        self.gamma_beta = nn.Conv2d(hidden_channels, 2 * channels, 3, padding=1)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        """Modulate.

        Args:
            h: (B, C, H, W).
            condition: (b, K, H, W). B is a multiple of b: with guidance the same tiles come once for each prompt,
                and what their condition says is computed once.
        """
        gamma_beta = self.gamma_beta(F.relu(self.shared(condition)))
        repeats = h.shape[0] // gamma_beta.shape[0]
        if repeats > 1:
            gamma_beta = gamma_beta.repeat(repeats, 1, 1, 1)
        gamma, beta = gamma_beta.chunk(2, dim=1)
        h = self.norm(h)
        return torch.addcmul(h + beta, h, gamma)
