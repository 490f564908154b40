"""Colour correction: details of one image, colours of another; and in windows, exactly what the whole would be."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stablesr.box import Box
from stablesr.color import (
    WAVELET_REACH,
    ChannelStatistics,
    adain_correction,
    channel_statistics,
    low_frequencies,
    wavelet_correction,
)
from tests.strategies import boxes, seeded, seeds, with_reach

sides = st.one_of(st.integers(1, 5), st.integers(1, 100))


# Low frequencies


def test_a_point_is_spread_by_five_blurs_whose_holes_double():
    """[1 2 1] / 4 five times, the k-th time with a distance of 2^k: all 63 weights of one axis."""
    line = torch.zeros(1, 127)
    line[0, 63] = 1.0
    weights = torch.tensor([1.0])
    for level in range(5):
        kernel = torch.zeros(2 * 2**level + 1)
        kernel[0], kernel[2**level], kernel[-1] = 0.25, 0.5, 0.25
        weights = F.conv1d(weights[None], kernel[None, None], padding=2 * 2**level)[0]
    assert len(weights) == 2 * 31 + 1
    assert torch.equal(low_frequencies(line)[0], F.pad(weights, (32, 32)))


def blur_by_convolution(image: Tensor) -> Tensor:
    """The same as one 3 x 3 convolution per level, as published."""
    kernel = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]], dtype=image.dtype) / 16
    for hole in (1, 2, 4, 8, 16):
        padded = F.pad(image[:, None], (hole,) * 4, mode="replicate")
        image = F.conv2d(padded, kernel[None, None], dilation=hole)[:, 0]
    return image


@given(sides, sides, seeds)
def test_low_frequencies_are_five_dilated_convolutions_even_of_images_smaller_than_the_holes(height, width, seed):
    image = seeded(2, height, width, seed=seed, dtype=torch.float64)
    torch.testing.assert_close(low_frequencies(image), blur_by_convolution(image), rtol=0, atol=1e-13)


def test_every_blur_repeats_the_edge_of_the_one_before():
    # [0, 1] -> [1, 3] / 4 -> [3, 5] / 8 -> [7, 9] / 16 -> [15, 17] / 32 -> [31, 33] / 64
    assert low_frequencies(torch.tensor([[0.0, 1.0]])).tolist() == [[31 / 64, 33 / 64]]


def test_a_flat_image_has_low_frequencies_only():
    assert torch.equal(low_frequencies(torch.full((3, 20, 50), 0.7)), torch.full((3, 20, 50), 0.7))


# Wavelet correction


@given(sides, sides, st.data(), seeds)
def test_a_window_with_its_reach_gives_exactly_the_crop_of_the_whole(height, width, data, seed):
    content, style = seeded(2, 3, height, width, seed=seed)
    canvas = Box(0, 0, height, width)
    window = data.draw(boxes(canvas))
    around = with_reach(window, WAVELET_REACH, canvas)
    here = (slice(None), *around.within(canvas))
    corrected = wavelet_correction(content[here], style[here])[(slice(None), *window.within(around))]
    assert torch.equal(corrected, wavelet_correction(content, style)[(slice(None), *window.within(canvas))])


def test_thirty_pixels_around_a_window_would_not_be_enough():
    assert WAVELET_REACH == 31
    content, style = torch.zeros(2, 1, 1, 100)
    style[..., 10] = 1.0
    at_41 = wavelet_correction(content, style)[..., 41].item()
    assert at_41 == 0.25**5
    assert wavelet_correction(content[..., 10:], style[..., 10:])[..., 31].item() == at_41
    assert wavelet_correction(content[..., 11:], style[..., 11:])[..., 30].item() == 0.0


@given(sides, sides, seeds)
def test_the_result_has_the_details_of_content_and_the_low_frequencies_of_style(height, width, seed):
    content, style = seeded(2, 3, height, width, seed=seed, dtype=torch.float64)
    two_passes = (content - low_frequencies(content)) + low_frequencies(style)
    torch.testing.assert_close(wavelet_correction(content, style), two_passes, rtol=0, atol=1e-13)


def test_an_image_in_its_own_colours_stays_as_it_is_to_the_last_bit():
    content = seeded(3, 40, 50)
    assert torch.equal(wavelet_correction(content, content), content)


def test_a_tint_of_the_content_is_removed():
    content, style = seeded(2, 3, 40, 50)
    tint = torch.tensor([0.5, -0.25, 3.0])[:, None, None]
    torch.testing.assert_close(
        wavelet_correction(content + tint, style), wavelet_correction(content, style), rtol=0, atol=2e-6
    )


def test_a_tint_of_the_style_is_taken_over():
    content = seeded(3, 40, 50)
    tint = torch.tensor([0.5, -0.25, 3.0])[:, None, None]
    torch.testing.assert_close(wavelet_correction(content, content + tint), content + tint, rtol=0, atol=2e-6)


def test_a_single_pixel_takes_the_colour_of_the_style():
    content, style = torch.tensor([0.5, -1.0]).reshape(2, 1, 1), torch.tensor([0.25, 1.0]).reshape(2, 1, 1)
    assert torch.equal(wavelet_correction(content, style), style)


@pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 3)])
def test_channels_and_batches_are_corrected_one_by_one(leading):
    content, style = seeded(2, *leading, 20, 30)
    corrected = wavelet_correction(content, style)
    assert corrected.shape == (*leading, 20, 30)
    planes = [image.reshape(-1, 20, 30) for image in (content, style, corrected)]
    for one_content, one_style, one_corrected in zip(*planes, strict=True):
        assert torch.equal(wavelet_correction(one_content, one_style), one_corrected)


# AdaIN


def test_channel_statistics():
    image = torch.tensor([[[0.0, 2.0], [4.0, 6.0]], [[5.0, 5.0], [5.0, 5.0]]])[None]
    mean, std = channel_statistics(image)
    assert mean.shape == std.shape == (1, 2, 1, 1)
    assert mean.flatten().tolist() == [3.0, 5.0]
    assert std.flatten().tolist() == pytest.approx([(20 / 3 + 1e-5) ** 0.5, 1e-5**0.5])


def test_adain_of_one_pixel():
    content = torch.tensor([7.0]).reshape(1, 1, 1, 1)
    of_content, of_style = (
        ChannelStatistics(torch.tensor(5.0), torch.tensor(4.0)),
        ChannelStatistics(torch.tensor(100.0), torch.tensor(10.0)),
    )
    assert adain_correction(content, of_content, of_style).item() == 105.0


@given(seeds)
def test_adain_gives_the_statistics_of_the_style(seed):
    content, style = seeded(2, 2, 3, 16, 16, seed=seed, dtype=torch.float64)
    of_style = channel_statistics(style * 0.3 + 5.0)
    corrected = channel_statistics(adain_correction(content, channel_statistics(content), of_style))
    torch.testing.assert_close(corrected.mean, of_style.mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(corrected.std, of_style.std, rtol=1e-4, atol=0)  # 1e-5 is added to the variance


def test_a_flat_channel_takes_the_mean_of_the_style():
    content, style = torch.full((1, 1, 4, 4), 0.7), seeded(1, 1, 4, 4)
    corrected = adain_correction(content, channel_statistics(content), channel_statistics(style))
    torch.testing.assert_close(corrected, style.mean().expand(1, 1, 4, 4), rtol=0, atol=1e-4)
