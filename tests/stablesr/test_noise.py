"""Noise of a place: the same bits for everyone, for ever; and normal."""

import hashlib
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stablesr.box import Box
from stablesr.noise import NOISE_CELL, POSTERIOR, START, noise, normal_quantile
from tests.strategies import boxes

GOLDEN = Path(__file__).parents[1] / "golden" / "noise.npy"
"""noise(7, 1, 999, Box(60, 60, 68, 70)), where four cells meet: made by this code with NumPy 2.4 on x86-64.

test_noise_is_philox_and_the_normal_quantile says the same in other words."""

CELL = Box(0, 0, NOISE_CELL, NOISE_CELL)


# The same for ever


def test_the_first_values_of_all():
    values = noise(seed=0, layer=0, step=0, box=Box(0, 0, 1, 4), channels=1)
    expected = [-2.2718842029571533, -0.701327919960022, -1.2189801931381226, 0.16217155754566193]
    assert values.dtype == torch.float32
    assert values.tolist() == [[expected]]


def test_the_corner_of_four_cells_is_the_recorded_one():
    recorded = torch.from_numpy(np.load(GOLDEN))
    assert recorded.shape == (4, 8, 10)
    assert torch.equal(noise(7, 1, 999, Box(60, 60, 68, 70)), recorded)


def test_a_larger_box_has_the_recorded_digest():
    values = noise(0, 0, START, Box(30, 30, 200, 200)).numpy().astype("<f4")
    digest = hashlib.sha256(values.tobytes()).hexdigest()
    assert digest == "de80be6c83c34484599097da8d732d26f58f3adc6c410600f19e5e73644c5620"


def test_the_cell_and_the_special_steps_are_part_of_the_pictures():
    assert (NOISE_CELL, START, POSTERIOR) == (64, 4294967296, 4294967297)


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10, from Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011."""
    word = 2**64 - 1
    for _ in range(10):
        first, second = counter[0] * 0xD2E7470EE14C6C93, counter[2] * 0xCA5A826395121157
        counter = [second >> 64 ^ counter[1] ^ key[0], second & word, first >> 64 ^ counter[3] ^ key[1], first & word]
        key = [key[0] + 0x9E3779B97F4A7C15 & word, key[1] + 0xBB67AE8584CAA73B & word]
    return counter


@pytest.mark.parametrize(
    ("seed", "layer", "step", "row", "column"),
    [
        pytest.param(0, 0, 0, 0, 0, id="zeros"),
        pytest.param(7, 1, 999, 2, 3, id="small"),
        pytest.param(2**64 - 1, 1, START, 0, 5, id="largest-seed-small-layer"),
        pytest.param(5, 2**63 + 1, POSTERIOR, 10**9, 0, id="small-seed-large-layer-far-away"),
        pytest.param(5, 5, 2**64 - 1, 0, 0, id="largest-step"),
    ],
)
def test_noise_is_philox_and_the_normal_quantile(seed, layer, step, row, column):
    values = noise(seed, layer, step, Box(row * 64, column * 64, row * 64 + 1, column * 64 + 8), channels=1)
    blocks = [philox([n, column, row, step], [seed, layer]) for n in (1, 2)]  # NumPy counts before it draws
    bits = [word for block in blocks for word in block]
    expected = [NormalDist().inv_cdf(((word >> 12) + 0.5) / 2**52) for word in bits]
    np.testing.assert_allclose(values[0, 0], expected, rtol=1e-6)


# The place decides, nothing else


@given(st.data())
def test_the_noise_of_a_box_is_the_crop_of_the_noise_of_a_larger_box(data):
    larger = data.draw(boxes(Box(0, 0, 150, 150)))
    box = data.draw(boxes(larger))
    assert torch.equal(noise(3, 0, 500, box), noise(3, 0, 500, larger)[(slice(None), *box.within(larger))])


def test_fewer_channels_are_the_first_ones():
    assert torch.equal(noise(3, 0, 500, CELL, channels=2), noise(3, 0, 500, CELL, channels=4)[:2])


def test_the_noise_is_there_again_whatever_was_drawn_in_between():
    before = noise(3, 0, 500, CELL)
    np.random.seed(1)
    torch.manual_seed(1)
    noise(4, 1, 1, Box(5, 5, 9, 9))
    assert torch.equal(noise(3, 0, 500, CELL), before)


def test_asking_for_noise_leaves_the_global_generators_alone():
    numpy_before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    noise(3, 0, 500, CELL)
    assert np.array_equal(np.random.get_state()[1], numpy_before)
    assert torch.equal(torch.get_rng_state(), torch_before)


def test_torch_defaults_do_not_matter():
    expected = noise(3, 0, 500, CELL)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            values = noise(3, 0, 500, CELL)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (values.dtype, values.device.type) == (torch.float32, "cpu")
    assert torch.equal(values, expected)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param((8, 1, 5, CELL), id="seed"),
        pytest.param((7, 2, 5, CELL), id="layer"),
        pytest.param((1, 7, 5, CELL), id="seed-and-layer-swapped"),
        pytest.param((7, 1, 6, CELL), id="step"),
        pytest.param((7, 1, START, CELL), id="start"),
        pytest.param((7, 1, POSTERIOR, CELL), id="posterior"),
        pytest.param((7, 1, 5, Box(64, 0, 128, 64)), id="cell-below"),
        pytest.param((7, 1, 5, Box(0, 64, 64, 128)), id="cell-to-the-right"),
        pytest.param((7, 1, 5, Box(5 * 64, 0, 6 * 64, 64)), id="row-in-place-of-step"),
    ],
)
def test_another_place_has_unrelated_noise(other):
    here, there = noise(7, 1, 5, CELL).flatten(), noise(*other).flatten()
    correlation = torch.corrcoef(torch.stack([here, there]))[0, 1]
    assert abs(correlation) < 4 / len(here) ** 0.5  # four standard deviations


def test_seeds_next_to_each_other_differ_at_the_far_end_too():
    """Once, NumPy made float64 of [2^64 - 1, 1], and such seeds all had the same noise."""
    assert not torch.equal(noise(2**64 - 1, 1, 5, CELL), noise(2**64 - 2, 1, 5, CELL))


# Normal


def test_the_moments_are_those_of_the_normal_distribution():
    values = noise(11, 0, 500, Box(0, 0, 256, 256)).double().flatten()
    n = len(values)  # 262144; each bound is four standard deviations
    assert abs(values.mean()) < 4 * (1 / n) ** 0.5
    assert abs(values.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((values**3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((values**4).mean() - 3) < 4 * (96 / n) ** 0.5


def test_the_distribution_is_normal_by_kolmogorov_and_smirnov():
    values = sorted(noise(11, 0, 500, CELL).flatten().tolist())
    n = len(values)
    distance = max(abs(NormalDist().cdf(v) - (i + 0.5) / n) for i, v in enumerate(values))
    assert distance < 1.63 / n**0.5  # exceeded by one field in a hundred, and this one is always the same


@pytest.mark.parametrize(("down", "right"), [(0, 1), (1, 0), (1, 1), (0, 64), (64, 0)])
def test_neighbours_are_uncorrelated(down, right):
    values = noise(11, 0, 500, Box(0, 0, 256, 256))
    here, there = values[:, : 256 - down, : 256 - right], values[:, down:, right:]
    assert abs((here * there).mean()) < 4 / here.numel() ** 0.5


def test_channels_are_uncorrelated():
    correlations = torch.corrcoef(noise(11, 0, 500, Box(0, 0, 256, 256)).flatten(1))
    assert (correlations - torch.eye(4)).abs().max() < 4 / 256


def quantile(*bits: int) -> list[float]:
    return normal_quantile(np.array(bits, dtype=np.uint64)).tolist()


@given(st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 63).map(lambda n: 2**n)))  # the tail is likely, too
def test_the_quantile_is_that_of_the_standard_library(bits):
    lower = min(bits, 2**64 - 1 - bits) >> 12  # the lower half, where (lower + 1/2) / 2^52 has no rounding
    expected = -NormalDist().inv_cdf((lower + 0.5) / 2**52)
    assert abs(quantile(bits)[0]) == pytest.approx(expected, rel=4e-15, abs=0)


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        pytest.param(0, -8.209536151601387, id="smallest"),
        pytest.param(2**64 - 1, 8.209536151601387, id="largest"),
        pytest.param(2**62, -0.6744897501960817, id="lower-quartile"),
        pytest.param(3 * 2**62, 0.6744897501960817, id="upper-quartile"),
    ],
)
def test_quantiles(bits, expected):
    assert quantile(bits) == pytest.approx([expected], rel=1e-14)


@given(st.integers(0, 2**64 - 1))
def test_the_quantile_is_odd_and_never_zero(bits):
    below, above = quantile(bits, 2**64 - 1 - bits)
    assert below == -above != 0


@given(st.integers(0, 2**64 - 1 - 2**24))
def test_the_quantile_rises(bits):
    lower, upper = quantile(bits, bits + 2**24)  # enough to be more than rounding
    assert lower < upper


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param((-1, 0, 0, CELL), "seed=-1", id="negative-seed"),
        pytest.param((2**64, 0, 0, CELL), "seed=18446744073709551616", id="seed-too-large"),
        pytest.param((0, -1, 0, CELL), "layer=-1", id="negative-layer"),
        pytest.param((0, 0, 2**64, CELL), "step=18446744073709551616", id="step-too-large"),
        pytest.param((0, 0, 0, Box(-1, 0, 5, 5)), r"Box\(top=-1.* lies before", id="above-the-canvas"),
        pytest.param((0, 0, 0, Box(0, -1, 5, 5)), r"Box\(.*left=-1.* lies before", id="left-of-the-canvas"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        noise(*arguments)
