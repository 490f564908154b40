"""Noise levels, the times a run visits, and what a prediction says about the clean image."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stablesr.config import DiffusionConfig
from stablesr.schedule import (
    Schedule,
    add_noise,
    full_schedule,
    predicted_eps,
    predicted_x0,
    sampling_timesteps,
    space_timesteps,
    velocity,
)
from tests.strategies import seeded

FULL = full_schedule(DiffusionConfig())

HALVING = Schedule(np.array([0, 1, 2]), np.array([0.5, 0.25, 0.125]))
"""Every step loses half of the variance that is left of the image."""


# Noise levels


@pytest.mark.parametrize(("time", "alpha_bar"), [(0, 0.99915), (500, 0.2763326838229746), (999, 0.004660098513077238)])
def test_alpha_bar(time, alpha_bar):
    assert FULL.alpha_bar[time] == pytest.approx(alpha_bar, rel=1e-12)


def test_alpha_bar_is_the_product_written_out():
    first, last, alpha_bar = 0.00085**0.5, 0.0120**0.5, 1.0
    for time in range(1000):
        alpha_bar *= 1.0 - (first + (last - first) * time / 999) ** 2
        assert FULL.alpha_bar[time] == pytest.approx(alpha_bar, rel=1e-11)


def test_the_full_schedule_visits_every_time():
    assert len(FULL) == 1000
    assert FULL.timesteps.tolist() == [*range(1000)]


def test_tables_of_a_schedule_that_can_be_checked_by_eye():
    np.testing.assert_allclose(HALVING.alpha_bar_prev, [1, 1 / 2, 1 / 4])
    np.testing.assert_allclose(HALVING.betas, [1 / 2, 1 / 2, 1 / 2])
    np.testing.assert_allclose(HALVING.posterior_variance, [0, 1 / 3, 3 / 7])  # beta (1 - prev) / (1 - ab)
    np.testing.assert_allclose(HALVING.posterior_mean_coef1, [1, 2**0.5 / 3, 2 / 7])  # beta sqrt(prev) / (1 - ab)
    np.testing.assert_allclose(HALVING.posterior_mean_coef2, [0, 2**0.5 / 3, 6 / 7 / 2**0.5])


@pytest.mark.parametrize("steps", [1, 2, 4, 50, 200, 1000])
def test_the_posterior_keeps_the_forward_marginals(steps):
    """If x_t has the mean and variance of q(x_t | x_0), the posterior's sample has those of q(x_prev | x_0)."""
    schedule = FULL.respaced(steps)
    c0, c = schedule.posterior_mean_coef1, schedule.posterior_mean_coef2
    signal = c0 + c * np.sqrt(schedule.alpha_bar)
    variance = c**2 * (1 - schedule.alpha_bar) + schedule.posterior_variance
    np.testing.assert_allclose(signal, np.sqrt(schedule.alpha_bar_prev), atol=1e-12)
    np.testing.assert_allclose(variance, 1 - schedule.alpha_bar_prev, atol=1e-12)


# Times of a run


@pytest.mark.parametrize(
    ("steps", "times"),
    [
        pytest.param(1, [999], id="one-step-starts-where-a-run-has-to"),  # here the reference fails
        pytest.param(2, [0, 999], id="two"),
        pytest.param(4, [0, 333, 666, 999], id="turbo"),
        pytest.param(5, [0, 250, 500, 749, 999], id="half-to-even"),  # 249.75, 499.5, 749.25
        pytest.param(1000, [*range(1000)], id="all"),
    ],
)
def test_times_of_a_run(steps, times):
    assert sampling_timesteps(1000, steps).tolist() == times


@given(st.integers(2, 1000).flatmap(lambda n: st.tuples(st.just(n), st.integers(2, n))))
def test_a_run_of_more_than_one_step_visits_both_ends_and_as_many_times_as_steps(sizes):
    n_times, steps = sizes
    times = sampling_timesteps(n_times, steps)
    assert (times[0], times[-1], len(times)) == (0, n_times - 1, steps)
    assert (np.diff(times) >= 1).all()


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_an_impossible_number_of_steps_is_refused(steps):
    with pytest.raises(ValueError, match=f"steps={steps} must be within 1 and 1000"):
        FULL.respaced(steps)


@given(st.integers(1, 1000))
def test_respacing_keeps_the_alpha_bar_of_the_times_it_keeps(steps):
    respaced = FULL.respaced(steps)
    assert respaced.alpha_bar.tolist() == FULL.alpha_bar[respaced.timesteps].tolist()


def test_a_schedule_can_be_thinned_out_again():
    assert FULL.at([0, 333, 999]).at([333]).alpha_bar.tolist() == [FULL.alpha_bar[333]]


@pytest.mark.parametrize("times", [[1000], [-1], [0, 5000], [1]])
def test_only_times_of_a_schedule_can_be_chosen(times):
    with pytest.raises(ValueError, match="are not all among the 3 of this schedule"):
        FULL.at([0, 500, 999]).at(times)


@pytest.mark.parametrize(
    ("n_times", "sections", "times"),
    [
        pytest.param(10, [3], [0, 4, 9], id="half-to-even"),  # 0, 4.5, 9
        pytest.param(10, [2, 3], [0, 4, 5, 7, 9], id="two-sections"),
        pytest.param(11, [2, 2], [0, 5, 6, 10], id="the-first-section-is-longer"),
        pytest.param(10, [1, 1], [0, 5], id="one-of-each-is-its-first"),
        pytest.param(10, "2,3", [0, 4, 5, 7, 9], id="as-text"),
        pytest.param(10, "ddim5", [0, 2, 4, 6, 8], id="one-stride"),
        pytest.param(10, "ddim4", [0, 3, 6, 9], id="one-stride-with-a-rest"),
    ],
)
def test_times_by_sections(n_times, sections, times):
    assert space_timesteps(n_times, sections).tolist() == times


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        pytest.param([6, 5], "cannot choose 6 times from section 0, which has 5", id="too-many"),
        pytest.param([5, 0], "cannot choose 0 times from section 1", id="none"),
        pytest.param("ddim7", "no integer stride visits exactly 7 of 10 times", id="no-stride"),
    ],
)
def test_impossible_sections_are_refused(sections, message):
    with pytest.raises(ValueError, match=message):
        space_timesteps(10, sections)


# Noise and predictions


def test_adding_noise_to_one_image():
    x0, noise = torch.tensor([3.0]), torch.tensor([-1.0])
    assert add_noise(x0, noise, 0.64).tolist() == pytest.approx([0.8 * 3.0 - 0.6])


def test_every_sample_can_have_its_own_noise_level():
    levels = torch.tensor([1.0, 0.0, 0.36]).reshape(3, 1)
    noised = add_noise(torch.full((3, 2), 10.0), torch.full((3, 2), 1.0), levels)
    torch.testing.assert_close(noised, torch.tensor([[10.0, 10.0], [1.0, 1.0], [6.8, 6.8]]))


def test_noised_unit_variance_stays_unit_variance():
    x0, noise = seeded(2, 100_000)
    for alpha_bar in (0.99915, 0.2763, 0.00466):
        assert add_noise(x0, noise, alpha_bar).var().item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_noise_is_added_in_the_dtype_of_the_image(dtype):
    assert add_noise(torch.ones(2, dtype=dtype), torch.ones(2, dtype=dtype), 0.5).dtype == dtype


def test_velocity_turns_from_noise_towards_minus_the_image():
    x0, noise = torch.tensor([3.0]), torch.tensor([-1.0])
    assert velocity(x0, noise, 0.64).tolist() == pytest.approx([0.8 * -1.0 - 0.6 * 3.0])


@given(st.integers(0, 999))
def test_a_perfect_prediction_gives_image_and_noise_back(time):
    x0, noise = seeded(2, 50, seed=time, dtype=torch.float64)
    alpha_bar = float(FULL.alpha_bar[time])
    x = add_noise(x0, noise, alpha_bar)
    for parameterization, prediction in (("eps", noise), ("v", velocity(x0, noise, alpha_bar))):
        back = predicted_x0(x, prediction, alpha_bar, parameterization)
        torch.testing.assert_close(back, x0, rtol=0, atol=1e-12)
        torch.testing.assert_close(predicted_eps(x, prediction, alpha_bar, parameterization), noise, rtol=0, atol=1e-12)


@given(st.integers(0, 999))
def test_any_prediction_says_the_same_in_eps_and_in_v(time):
    """x_t is the noising of what the prediction implies; so converting to x0 and noise and back loses nothing."""
    x, prediction = seeded(2, 50, seed=time, dtype=torch.float64)
    alpha_bar = float(FULL.alpha_bar[time])
    for parameterization in ("eps", "v"):
        x0 = predicted_x0(x, prediction, alpha_bar, parameterization)
        eps = predicted_eps(x, prediction, alpha_bar, parameterization)
        torch.testing.assert_close(add_noise(x0, eps, alpha_bar), x, rtol=0, atol=1e-12)
        back = {"eps": eps, "v": velocity(x0, eps, alpha_bar)}[parameterization]
        torch.testing.assert_close(back, prediction, rtol=0, atol=1e-12)
