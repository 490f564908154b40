"""One step each: what the last one ends at, where DDIM and DDPM agree, and that a perfect model is followed home."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stablesr.config import DiffusionConfig
from stablesr.samplers import (
    DDIMStep,
    DDPMStep,
    ddim_step,
    ddim_steps,
    ddpm_step,
    ddpm_steps,
    guide,
    published_ddim_steps,
    take_step,
)
from stablesr.schedule import Schedule, full_schedule, velocity
from tests.strategies import seeded, seeds

FULL = full_schedule(DiffusionConfig())

PARAMETERIZATIONS = st.sampled_from(["eps", "v"])


# Tables


def test_a_run_goes_from_the_noisiest_time_to_the_cleanest():
    assert [step.timestep for step in ddpm_steps(FULL.respaced(4))] == [999, 666, 333, 0]
    assert [step.timestep for step in ddim_steps(FULL.respaced(4))] == [999, 666, 333, 0]


def test_numbers_of_a_schedule_that_can_be_checked_by_eye():
    halving = Schedule(np.array([10, 20]), np.array([0.5, 0.25]))
    noisy, last = ddpm_steps(halving)
    assert (noisy.timestep, noisy.alpha_bar) == (20, 0.25)
    assert (noisy.coef_x0, noisy.coef_x) == pytest.approx((2**0.5 / 3, 2**0.5 / 3))
    assert noisy.sigma == pytest.approx((1 / 3) ** 0.5)
    assert last == DDPMStep(timestep=10, alpha_bar=0.5, coef_x0=1.0, coef_x=0.0, sigma=0.0)
    assert ddim_steps(halving) == [DDIMStep(20, 0.25, 0.5, 0.0), DDIMStep(10, 0.5, 1.0, 0.0)]


@pytest.mark.parametrize("steps", [1, 2, 4, 50, 1000])
def test_ddim_with_eta_1_has_the_variance_of_ddpm(steps):
    schedule = FULL.respaced(steps)
    ddpm, ddim = ([step.sigma for step in table] for table in (ddpm_steps(schedule), ddim_steps(schedule, eta=1.0)))
    assert ddim == pytest.approx(ddpm, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 4, 50, 1000])
def test_ddim_steps_join_and_end_at_the_clean_image(steps):
    table = ddim_steps(FULL.respaced(steps))
    assert [step.alpha_bar_prev for step in table] == [*[step.alpha_bar for step in table[1:]], 1.0]


def test_the_published_ddim_table_tells_other_times_than_it_uses_and_stops_short():
    """Two oddities of the published scripts: 10 steps of time 999, 888, ... have the alpha-bar of 900, 800, ..., 0;
    and the last one goes from alpha-bar_0 to alpha-bar_0."""
    table = published_ddim_steps(FULL, 10)
    assert [step.timestep for step in table] == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    assert [step.alpha_bar for step in table] == [FULL.alpha_bar[t] for t in range(900, -1, -100)]
    assert [step.alpha_bar_prev for step in table] == [FULL.alpha_bar[max(t - 100, 0)] for t in range(900, -1, -100)]
    assert table[-1].alpha_bar_prev == pytest.approx(0.99915)


def test_the_published_ddim_table_can_tell_the_times_it_uses():
    table = published_ddim_steps(FULL, 10, uniform=True)
    assert [step.timestep for step in table] == [*range(900, -1, -100)]
    assert [step.alpha_bar for step in table] == [step.alpha_bar for step in published_ddim_steps(FULL, 10)]


# Steps


def test_one_ddpm_step():
    step = DDPMStep(timestep=500, alpha_bar=0.64, coef_x0=0.5, coef_x=0.25, sigma=0.1)
    x, eps, noise = torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([10.0])
    # x0 = (2 - 0.6 * 1) / 0.8 = 1.75
    assert ddpm_step(x, eps, noise, step).item() == pytest.approx(0.5 * 1.75 + 0.25 * 2.0 + 0.1 * 10.0)


def test_one_ddim_step():
    step = DDIMStep(timestep=500, alpha_bar=0.64, alpha_bar_prev=0.75, sigma=0.3)
    x, eps, noise = torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([10.0])
    # x0 = (2 - 0.6 * 1) / 0.8 = 1.75; direction = sqrt(1 - 0.75 - 0.09) = 0.4
    assert ddim_step(x, eps, noise, step).item() == pytest.approx(0.75**0.5 * 1.75 + 0.4 * 1.0 + 0.3 * 10.0)


@given(st.integers(1, 200), st.data(), seeds, PARAMETERIZATIONS)
def test_ddim_with_eta_1_is_ddpm(steps, data, seed, parameterization):
    schedule = FULL.respaced(steps)
    i = data.draw(st.integers(0, steps - 1))
    x, prediction, noise = seeded(3, 20, seed=seed, dtype=torch.float64)
    ddpm = ddpm_step(x, prediction, noise, ddpm_steps(schedule)[i], parameterization)
    ddim = ddim_step(x, prediction, noise, ddim_steps(schedule, eta=1.0)[i], parameterization)
    torch.testing.assert_close(ddim, ddpm, rtol=0, atol=1e-12)


@given(st.integers(1, 1000), seeds, PARAMETERIZATIONS)
def test_the_last_ddpm_step_is_the_image_the_model_believes_in_whatever_the_noise(steps, seed, parameterization):
    """The reference draws noise for its last step, too, and does not use it."""
    last = ddpm_steps(FULL.respaced(steps))[-1]
    x, prediction, noise = seeded(3, 20, seed=seed, dtype=torch.float64)
    signal, sigma = last.alpha_bar**0.5, (1 - last.alpha_bar) ** 0.5
    x0 = signal * x - sigma * prediction if parameterization == "v" else (x - sigma * prediction) / signal
    torch.testing.assert_close(ddpm_step(x, prediction, noise, last, parameterization), x0, rtol=0, atol=1e-12)


@given(seeds, PARAMETERIZATIONS, st.floats(0, 1))
def test_the_last_ddim_step_ends_at_the_clean_image(seed, parameterization, eta):
    x, prediction, noise = seeded(3, 20, seed=seed, dtype=torch.float64)
    ddpm = ddpm_step(x, prediction, noise, ddpm_steps(FULL)[-1], parameterization)
    ddim = ddim_step(x, prediction, noise, ddim_steps(FULL, eta)[-1], parameterization)
    torch.testing.assert_close(ddim, ddpm, rtol=0, atol=1e-12)


def test_ddim_without_eta_ignores_the_noise():
    x, prediction, noise = seeded(3, 20)
    step = ddim_steps(FULL.respaced(4))[1]
    assert torch.equal(ddim_step(x, prediction, noise, step), ddim_step(x, prediction, -noise, step))


@given(
    st.integers(1, 30), seeds, PARAMETERIZATIONS, st.sampled_from(["ddpm", "ddim"]), st.sampled_from([0.0, 0.5, 1.0])
)
def test_both_samplers_follow_a_model_that_knows_the_image_to_it_from_any_start(
    steps, seed, parameterization, sampler, eta
):
    x0, x = seeded(2, 20, seed=seed, dtype=torch.float64)
    schedule = FULL.respaced(steps)
    for step in ddpm_steps(schedule) if sampler == "ddpm" else ddim_steps(schedule, eta):
        eps = (x - step.alpha_bar**0.5 * x0) / (1 - step.alpha_bar) ** 0.5
        prediction = eps if parameterization == "eps" else velocity(x0, eps, step.alpha_bar)
        noise = seeded(20, seed=seed + step.timestep + 1, dtype=torch.float64)
        x = take_step(x, prediction, noise, step, parameterization)
    torch.testing.assert_close(x, x0, rtol=0, atol=1e-11)


def test_a_step_leaves_its_arguments_alone():
    arguments = seeded(3, 20)
    x, prediction, noise = arguments.clone()
    for step in (ddpm_steps(FULL)[0], ddim_steps(FULL, eta=1.0)[0]):
        take_step(x, prediction, noise, step, "v")
    assert torch.equal(torch.stack([x, prediction, noise]), arguments)


# Guidance


@pytest.mark.parametrize(
    ("scale", "guided"),
    [
        pytest.param(0.0, 2.0, id="the-negative-prompt"),
        pytest.param(1.0, 3.0, id="the-positive-prompt"),
        pytest.param(0.5, 2.5, id="half-way"),
        pytest.param(7.0, 9.0, id="past-the-positive-prompt"),
    ],
)
def test_guidance(scale, guided):
    assert guide(torch.tensor([2.0]), torch.tensor([3.0]), scale).tolist() == [guided]
