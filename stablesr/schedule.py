"""The diffusion's clock: betas, alpha-bar, which times a short run visits, and conversions between predictions.

Notation of DDPM (arXiv:2006.11239): alpha_bar_t is the share of the image's variance left at time t.
All tables are float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablesr.config import DiffusionConfig, Parameterization

FloatTable = NDArray[np.float64]
IntTable = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Schedule:
    """The noise levels a run visits, from the cleanest (index 0) to the noisiest.

    A respaced schedule keeps the alpha-bar of the times that it keeps.
    """

    timesteps: IntTable
    """Diffusion time of each entry, rising; what the networks are told."""
    alpha_bar: FloatTable

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def alpha_bar_prev(self) -> FloatTable:
        """alpha-bar of the entry before; 1, a clean image, before the first."""
        return np.concatenate([[1.0], self.alpha_bar[:-1]])

    @property
    def betas(self) -> FloatTable:
        return 1.0 - self.alpha_bar / self.alpha_bar_prev

    @property
    def posterior_variance(self) -> FloatTable:
        """Variance of q(x_prev | x_t, x_0). DDPM eq. 7; 0 at index 0."""
        return self.betas * (1.0 - self.alpha_bar_prev) / (1.0 - self.alpha_bar)

    @property
    def posterior_mean_coef1(self) -> FloatTable:
        """Weight of x_0 in the mean of q(x_prev | x_t, x_0). DDPM eq. 7."""
        return self.betas * np.sqrt(self.alpha_bar_prev) / (1.0 - self.alpha_bar)

    @property
    def posterior_mean_coef2(self) -> FloatTable:
        """Weight of x_t in the mean of q(x_prev | x_t, x_0). DDPM eq. 7."""
        return (1.0 - self.alpha_bar_prev) * np.sqrt(1.0 - self.betas) / (1.0 - self.alpha_bar)

    def at(self, timesteps: Sequence[int] | IntTable) -> "Schedule":
        """The schedule that visits only these times, which must be among ours."""
        chosen = np.asarray(timesteps, dtype=np.int64)
        index = np.searchsorted(self.timesteps, chosen)
        if (index >= len(self)).any() or (self.timesteps[np.minimum(index, len(self) - 1)] != chosen).any():
            raise ValueError(f"times {chosen.tolist()} are not all among the {len(self)} of this schedule")
        return Schedule(chosen, self.alpha_bar[index])

    def respaced(self, steps: int) -> "Schedule":
        """A run of `steps` steps over the same noise levels; see `sampling_timesteps`."""
        return self.at(sampling_timesteps(len(self), steps))


def full_schedule(config: DiffusionConfig) -> Schedule:
    """All times, with betas whose square roots are evenly spaced (Latent Diffusion calls it "linear")."""
    betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.timesteps, dtype=np.float64) ** 2
    return Schedule(np.arange(config.timesteps), np.cumprod(1.0 - betas).astype(np.float64))


def sampling_timesteps(n_times: int, steps: int) -> IntTable:
    """The times of a run of `steps` steps: evenly spaced, the first and the last always among them.

    One step is taken from the noisiest time, where a run has to start. (`space_timesteps` would choose the cleanest,
    and the reference fails.)

    Raises:
        ValueError: unless 1 <= steps <= n_times.
    """
    if not 1 <= steps <= n_times:
        raise ValueError(f"steps={steps} must be within 1 and {n_times}")
    return np.asarray([n_times - 1]) if steps == 1 else space_timesteps(n_times, [steps])


def space_timesteps(n_times: int, section_counts: Sequence[int] | str) -> IntTable:
    """Choose times by sections, as improved diffusion does (arXiv:2102.09672, section 4).

    [0, n_times) is cut into one section per count, as equal as can be and the first ones longer; in each the given
    number of times is spread from its first to its last, rounded half to even. Any form of count works as text, too:
    "100,200", and "ddim50" for 50 times with one integer stride from 0.

    Raises:
        ValueError: if a section is shorter than its count, or no integer stride gives the count of "ddimN".
    """
    if isinstance(section_counts, str):
        if section_counts.startswith("ddim"):
            return _integer_stride(n_times, int(section_counts.removeprefix("ddim")))
        section_counts = [int(count) for count in section_counts.split(",")]
    times: list[int] = []
    start = 0
    for i, count in enumerate(section_counts):
        size = n_times // len(section_counts) + (i < n_times % len(section_counts))
        if not 1 <= count <= size:
            raise ValueError(f"cannot choose {count} times from section {i}, which has {size}")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            times.append(start + round(position))
            position += stride  # accumulated, not multiplied: a rounding of the published rule
        start += size
    return np.asarray(sorted(set(times)), dtype=np.int64)


def _integer_stride(n_times: int, count: int) -> IntTable:
    for stride in range(1, n_times):
        if len(range(0, n_times, stride)) == count:
            return np.arange(0, n_times, stride)
    raise ValueError(f"no integer stride visits exactly {count} of {n_times} times")


def add_noise(x0: Tensor, noise: Tensor, alpha_bar: float | Tensor) -> Tensor:
    """q(x_t | x_0), DDPM eq. 4. `alpha_bar` is a number or one per sample, shaped to broadcast."""
    alpha_bar = torch.as_tensor(alpha_bar, dtype=torch.float64)
    signal, sigma = alpha_bar.sqrt().to(x0), (1.0 - alpha_bar).sqrt().to(x0)
    return signal * x0 + sigma * noise


def velocity(x0: Tensor, noise: Tensor, alpha_bar: float | Tensor) -> Tensor:
    """The target of v-prediction (arXiv:2202.00512, section 4)."""
    return add_noise(noise, -x0, alpha_bar)


def predicted_x0(x: Tensor, prediction: Tensor, alpha_bar: float, parameterization: Parameterization) -> Tensor:
    """The clean image that a prediction at x_t implies; not clipped."""
    if parameterization == "v":
        return alpha_bar**0.5 * x - (1.0 - alpha_bar) ** 0.5 * prediction
    return (1.0 / alpha_bar) ** 0.5 * x - (1.0 / alpha_bar - 1.0) ** 0.5 * prediction


def predicted_eps(x: Tensor, prediction: Tensor, alpha_bar: float, parameterization: Parameterization) -> Tensor:
    """The noise that a prediction at x_t implies."""
    if parameterization == "v":
        return alpha_bar**0.5 * prediction + (1.0 - alpha_bar) ** 0.5 * x
    return prediction


def prediction_of(x: Tensor, x0: Tensor, alpha_bar: float, parameterization: Parameterization) -> Tensor:
    """What a network would have to say at x_t for the clean image to be `x0`: `predicted_x0` the other way round."""
    target = alpha_bar**0.5 * x - x0 if parameterization == "v" else x - alpha_bar**0.5 * x0
    return target / (1.0 - alpha_bar) ** 0.5
