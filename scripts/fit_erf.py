"""The polynomials of erf in normscope/kernels/cpp/elementary.h: least squares on Chebyshev nodes.

    python scripts/fit_erf.py

Below 1, erf(t) = t + t·P(t²). Above, erf(t) = 1 − exp(t·Q(t)), fitted where 1 − erf is not lost in float32.
"""

import numpy as np
from scipy.special import erf, erfcx


def nodes(low, high, count=4000):
    """Chebyshev nodes of an interval."""
    k = np.arange(count)
    return (low + high) / 2 + (high - low) / 2 * np.cos(np.pi * (k + 0.5) / count)


def fit(x, y, degree, weight):
    """Coefficients, lowest degree first."""
    powers = np.vander(x, degree + 1, increasing=True)
    return np.linalg.lstsq(powers * weight[:, None], y * weight, rcond=None)[0]


def main():
    """Print the coefficients and the largest errors when they are evaluated in float32."""
    t = nodes(1e-3, 1.0)
    small = fit(t * t, erf(t) / t - 1, 6, np.ones_like(t))
    u = nodes(1.0, 4.0)
    large = fit(u, (np.log(erfcx(u)) - u * u) / u, 8, u * (1 - erf(u)))
    print("below 1:", ", ".join(f"{c:.9e}f" for c in small))
    print("above 1:", ", ".join(f"{c:.9e}f" for c in large))
    grid = np.linspace(0, 6, 2_000_001).astype(np.float32)

    def horner(c, x):
        r = np.full_like(x, np.float32(c[-1]))
        for a in c[-2::-1]:
            r = r * x + np.float32(a)
        return r

    clipped = np.minimum(grid, np.float32(4))
    near, far = grid + grid * horner(small, grid * grid), 1 - np.exp(clipped * horner(large, clipped))
    print("largest error of erf:", np.abs(np.where(grid < 1, near, far) - erf(grid.astype(np.float64))).max())


if __name__ == "__main__":
    main()
