"""Noise that belongs to the place: any box gets the crop of one infinite field, whoever asks, wherever, again.

The field is drawn in fixed cells. A cell's values come from Philox (Salmon et al., SC 2011), a counter-based generator,
keyed by the seed and the layer and counted from (step, row, column); they become normal by arithmetic that IEEE 754
rounds the same everywhere. So neither tiling, batch, device, worker nor restart can change the picture.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablesr.box import Box

NOISE_CELL = 64
"""Side of the cells noise is drawn in, in latents. Changing it changes every image ever made."""

START = 1 << 32
"""In place of a step: the noise that a run starts from."""

POSTERIOR = START + 1
"""In place of a step: the noise that samples the autoencoder's posterior."""


def noise(seed: int, layer: int, step: int, box: Box, channels: int = 4) -> Tensor:
    """Standard normal noise of a place.

    Args:
        seed: 0 to 2^64 - 1; of the run.
        layer: 0 to 2^64 - 1; of the canvas, where a raster has several.
        step: the diffusion time, 0 to 999, or START, or POSTERIOR.
        box: in latents of the canvas, not before its origin.

    Returns:
        (channels, box.height, box.width), float32, on the CPU. Values reach 8.21 at the most.

    Raises:
        ValueError: if an argument is out of its range.
    """
    for name, value in (("seed", seed), ("layer", layer), ("step", step)):
        if not 0 <= value < 1 << 64:
            raise ValueError(f"{name}={value} must be within 0 and 2^64 - 1")
    if box.top < 0 or box.left < 0:
        raise ValueError(f"noise starts at the origin of the canvas; {box} lies before it")
    field = np.empty((channels, box.height, box.width), dtype=np.float32)
    for row in range(box.top // NOISE_CELL, -(-box.bottom // NOISE_CELL)):
        for column in range(box.left // NOISE_CELL, -(-box.right // NOISE_CELL)):
            top, left = row * NOISE_CELL, column * NOISE_CELL
            cell = Box(top, left, top + NOISE_CELL, left + NOISE_CELL)
            part = cell.overlap(box)
            assert part is not None
            values = _cell(seed, layer, step, row, column, channels)
            field[(slice(None), *part.within(box))] = values[(slice(None), *part.within(cell))]
    return torch.from_numpy(field)


def _cell(seed: int, layer: int, step: int, row: int, column: int, channels: int) -> NDArray[np.float32]:
    # As arrays: of a list, NumPy makes float64 where numbers on either side of 2^63 meet, and the seed loses its end.
    key, counter = np.array([seed, layer], dtype=np.uint64), np.array([0, column, row, step], dtype=np.uint64)
    philox = np.random.Philox(key=key, counter=counter)
    bits = philox.random_raw(channels * NOISE_CELL * NOISE_CELL)
    return normal_quantile(bits).astype(np.float32).reshape(channels, NOISE_CELL, NOISE_CELL)


# Wichura, algorithm AS 241 (1988), PPND16: numerator and denominator, from the constant term up.
_CENTRE = (
    (3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
     4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3),
    (1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
     2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3),
)  # fmt: skip
_TAIL = (
    (1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0, 3.64784832476320460504e0,
     1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4),
    (1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
     1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9),
)  # fmt: skip
_FAR_TAIL = (
    (6.65790464350110377720e0, 5.46378491116411436990e0, 1.78482653991729133580e0, 2.96560571828504891230e-1,
     2.65321895265761230930e-2, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7),
    (1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2,
     7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7, 2.04426310338993978564e-15),
)  # fmt: skip


def normal_quantile(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Standard normal values of uniform 64-bit integers, by inversion.

    Only additions, multiplications, divisions and square roots, each rounded as IEEE 754 says: no library's logarithm
    or cosine, which differ in the last place from one machine to the next.
    """
    # The middles of 2^52 equal parts of (-1/2, 1/2): odd multiples of 2^-53, all exact, none at the ends.
    q = ((bits >> np.uint64(12)).astype(np.float64) + 0.5 - 2.0**51) * 2.0**-52
    z = np.empty_like(q)
    centre = np.abs(q) <= 0.425
    z[centre] = q[centre] * _ratio(_CENTRE, 0.180625 - q[centre] * q[centre])
    outer = q[~centre]
    r = np.sqrt(-_log(0.5 - np.abs(outer)))
    z[~centre] = np.copysign(np.where(r <= 5.0, _ratio(_TAIL, r - 1.6), _ratio(_FAR_TAIL, r - 5.0)), outer)
    return z


def _ratio(polynomials: tuple[tuple[float, ...], tuple[float, ...]], x: NDArray[np.float64]) -> NDArray[np.float64]:
    numerator, denominator = (_horner(coefficients, x) for coefficients in polynomials)
    return numerator / denominator


def _horner(coefficients: tuple[float, ...], x: NDArray[np.float64]) -> NDArray[np.float64]:
    y = np.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        y = y * x + c
    return y


def _log(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Natural logarithm of positive numbers, to about 1e-15: log m = 2 artanh((m - 1) / (m + 1)), m in [0.7, 1.4]."""
    mantissa, exponent = np.frexp(x)
    low = mantissa < 0.5**0.5
    mantissa, exponent = np.where(low, 2.0 * mantissa, mantissa), exponent - low
    s = (mantissa - 1.0) / (mantissa + 1.0)
    series = _horner(tuple(2.0 / (2 * k + 1) for k in range(12)), s * s)
    return exponent * 0.6931471805599453 + s * series
