"""Convolutions with their weights laid out once as oneDNN wants them, instead of anew in every call.

For inference on a CPU. The gain is largest where images are small and weights are many: the bottom of the UNet.
"""

from typing import Any

import torch
from torch import Tensor, nn


class PackedConv2d(nn.Module):
    """A convolution for inference; computes what the one it is made of does, up to rounding."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.geometry = ([int(p) for p in conv.padding], list(conv.stride), list(conv.dilation), conv.groups)
        # No input size is given: the layout, and with it the rounding, must not depend on what was computed before.
        self.packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(conv.weight.detach(), *self.geometry, None)
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(x, self.packed, self.bias, *self.geometry, "none", [], "")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.packed.to_dense()


def can_pack() -> bool:
    """Whether this PyTorch was built with oneDNN and still has the operators, which are not public."""
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in ("_reorder_convolution_weight", "_convolution_pointwise")
    )


def pack_convolutions(module: nn.Module) -> None:
    """Replace every convolution within a module on the CPU by a packed one; one copy of the weights at a time."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d):
            setattr(module, name, PackedConv2d(child))
        else:
            pack_convolutions(child)
