"""The group norm: exact, whatever the memory format, and the same bits for any number of threads."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stablesr.norm import GroupNorm


def layer(channels: int, dtype: torch.dtype = torch.float32) -> GroupNorm:
    norm = GroupNorm(channels, eps=1e-6).requires_grad_(False)
    norm.weight.copy_(torch.linspace(0.5, 1.5, channels))
    norm.bias.copy_(torch.linspace(-1.0, 1.0, channels))
    return norm.to(dtype)


def far_from_zero(*shape: int) -> Tensor:
    """Where a naive sum of squares loses most: a mean of five standard deviations."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 5).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("sides", [(256, 256), (5, 7), (2, 300)])
def test_channels_last_is_as_exact_as_float64(sides: tuple[int, int]) -> None:
    norm, x = layer(64), far_from_zero(2, 64, *sides)
    exact = F.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double(), norm.eps)
    torch.testing.assert_close(norm(x).double(), exact, atol=1e-5, rtol=0)


def test_memory_format_and_dtype_are_kept() -> None:
    x = far_from_zero(2, 64, 8, 8).bfloat16()
    y = layer(64, torch.bfloat16)(x)
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)
    # up to 6.5: neighbouring bfloat16 values there are 1/32 apart
    torch.testing.assert_close(y.float(), layer(64)(x.float()), atol=1 / 32, rtol=0)


def test_the_number_of_threads_changes_no_bit() -> None:
    norm, x = layer(96), far_from_zero(1, 96, 64, 64)
    threads = torch.get_num_threads()
    try:
        answers = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            answers.append(norm(x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


def test_planar_memory_takes_the_same_values() -> None:
    norm, x = layer(64), far_from_zero(1, 64, 16, 24)
    torch.testing.assert_close(norm(x.contiguous()), norm(x), atol=1e-5, rtol=0)
