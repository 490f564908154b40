"""One diffusion step each, as pure functions: state and noise in, state out.

Nothing here remembers anything, so any worker can run any step, and a run can go on at any step.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from stablesr.config import Parameterization
from stablesr.schedule import FloatTable, IntTable, Schedule, predicted_eps, predicted_x0


@dataclass(frozen=True)
class DDPMStep:
    """Numbers of one ancestral step. DDPM (arXiv:2006.11239), eqs. 6 and 7."""

    timestep: int
    """What the networks are told."""
    alpha_bar: float
    coef_x0: float
    coef_x: float
    sigma: float
    """Standard deviation of the fresh noise; 0 in the last step."""


@dataclass(frozen=True)
class DDIMStep:
    """Numbers of one DDIM step. arXiv:2010.02502, eqs. 12 and 16."""

    timestep: int
    alpha_bar: float
    alpha_bar_prev: float
    sigma: float


Step = DDPMStep | DDIMStep


def ddpm_steps(schedule: Schedule) -> list[DDPMStep]:
    """The steps of a run, in the order they are taken: from the noisiest time to the clean image."""
    sigma = np.sqrt(schedule.posterior_variance)  # the fixed small variance; exactly 0 at index 0, so noise ends there
    table = zip(
        schedule.timesteps, schedule.alpha_bar, schedule.posterior_mean_coef1, schedule.posterior_mean_coef2, sigma,
        strict=True,
    )  # fmt: skip
    return [DDPMStep(int(t), float(ab), float(c1), float(c2), float(s)) for t, ab, c1, c2, s in reversed(list(table))]


def ddim_steps(schedule: Schedule, eta: float = 0.0) -> list[DDIMStep]:
    """The steps of a run, in the order they are taken. The last one ends at the clean image (alpha-bar 1).

    The networks are told the very times whose alpha-bar is used. (The reference pairs the times of one spacing with the
    alpha-bars of another and stops at alpha-bar_0; see `published_ddim_steps`.)

    Args:
        eta: 0 is deterministic; 1 has the variance of DDPM.
    """
    return ddim_table(schedule.timesteps, schedule.alpha_bar, schedule.alpha_bar_prev, eta)


def published_ddim_steps(schedule: Schedule, steps: int, eta: float = 0.0, *, uniform: bool = False) -> list[DDIMStep]:
    """The table of the published DDIM scripts, kept to compare with them.

    Args:
        schedule: the full one.
        uniform: tell the networks the times of the coefficients, instead of those of `space_timesteps`.
    """
    coefficients = schedule.at(np.arange(0, len(schedule), len(schedule) // steps))
    previous = np.concatenate([coefficients.alpha_bar[:1], coefficients.alpha_bar[:-1]])
    told = coefficients if uniform else schedule.respaced(steps)
    return ddim_table(told.timesteps[:steps], coefficients.alpha_bar[:steps], previous[:steps], eta)


def ddim_table(timesteps: IntTable, alpha_bar: FloatTable, alpha_bar_prev: FloatTable, eta: float) -> list[DDIMStep]:
    """Steps of any pairing of times and noise levels, which rise with the index; in the order the steps are taken."""
    steps = []
    for t, a, a_prev in zip(timesteps, alpha_bar, alpha_bar_prev, strict=True):
        sigma = eta * float(np.sqrt((1.0 - a_prev) / (1.0 - a) * (1.0 - a / a_prev)))
        steps.append(DDIMStep(int(t), float(a), float(a_prev), sigma))
    return steps[::-1]


def ddpm_step(
    x: Tensor, prediction: Tensor, noise: Tensor, step: DDPMStep, parameterization: Parameterization = "eps"
) -> Tensor:
    """One ancestral step from x_t.

    Args:
        x: x_t, any shape.
        prediction: of the network at x_t, the same shape.
        noise: standard normal, the same shape; without effect in the last step.
    """
    x0 = predicted_x0(x, prediction, step.alpha_bar, parameterization)
    return step.coef_x0 * x0 + step.coef_x * x + step.sigma * noise


def ddim_step(
    x: Tensor, prediction: Tensor, noise: Tensor, step: DDIMStep, parameterization: Parameterization = "eps"
) -> Tensor:
    """One DDIM step from x_t. arXiv:2010.02502, eq. 12.

    Args:
        x: x_t, any shape.
        prediction: of the network at x_t, the same shape.
        noise: standard normal, the same shape; without effect where eta is 0.
    """
    eps = predicted_eps(x, prediction, step.alpha_bar, parameterization)
    x0 = predicted_x0(x, eps, step.alpha_bar, "eps")  # the image the model believes in
    direction = max(1.0 - step.alpha_bar_prev - step.sigma**2, 0.0) ** 0.5
    return step.alpha_bar_prev**0.5 * x0 + direction * eps + step.sigma * noise  # the same image, less noisy


def take_step(x: Tensor, prediction: Tensor, noise: Tensor, step: Step, parameterization: Parameterization) -> Tensor:
    """One step of whichever kind `step` is."""
    if isinstance(step, DDPMStep):
        return ddpm_step(x, prediction, noise, step, parameterization)
    return ddim_step(x, prediction, noise, step, parameterization)


def guide(negative: Tensor, positive: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv:2207.12598, eq. 6): away from one prompt's prediction, past another's."""
    return negative + scale * (positive - negative)
