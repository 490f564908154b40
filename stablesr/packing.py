"""Convolutions with their weights laid out once as oneDNN wants them, instead of anew in every call.

For inference on a CPU. The gain is largest where images are small and weights are many: the bottom of the UNet.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class PackedConv2d(nn.Module):
    """A convolution for inference; computes what the one it is made of does, up to rounding, for input of any size.

    Args:
        conv: on the CPU.
        shape: of the input (B, C, H, W) that the layout is best for; None for no particular one. Once chosen, the
            layout stays, so that rounding does not depend on what was computed before.
    """

    def __init__(self, conv: nn.Conv2d, shape: torch.Size | None = None) -> None:
        super().__init__()
        self.geometry = ([int(p) for p in conv.padding], list(conv.stride), list(conv.dilation), conv.groups)
        self.packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
            conv.weight.detach(), *self.geometry, None if shape is None else list(shape)
        )
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


def pack_convolutions(module: nn.Module, shapes: Mapping[str, torch.Size], prefix: str = "") -> None:
    """Replace every convolution within a module on the CPU by a packed one; one copy of the weights at a time.

    Args:
        shapes: of the input of each convolution, by its name within the module; see `seen_shapes`.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d):
            setattr(module, name, PackedConv2d(child, shapes.get(prefix + name)))
        else:
            pack_convolutions(child, shapes, f"{prefix}{name}.")


@contextmanager
def seen_shapes(module: nn.Module) -> Iterator[dict[str, torch.Size]]:
    """The shape of the last input of every convolution that runs within the context, by its name within the module."""
    shapes: dict[str, torch.Size] = {}

    def recorder(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(conv: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            shapes[name] = inputs[0].shape

        return record

    convs = [(name, child) for name, child in module.named_modules() if isinstance(child, nn.Conv2d)]
    hooks = [conv.register_forward_pre_hook(recorder(name)) for name, conv in convs]
    try:
        yield shapes
    finally:
        for hook in hooks:
            hook.remove()
