"""Lloyd–Max levels: the codebooks of the scalar codecs.

A rotated unit vector of length d has coordinates with density (1 - t²)^((d-3)/2); levels are the minimum-MSE
quantizer of that density, in units of 1/√d so that they sit near those of N(0, 1). `solve` computes them;
`TABLES` holds its results for common head dimensions, so that start-up solves nothing.
"""

from __future__ import annotations

from functools import cache

import numpy as np

# Positive halves; a codebook is symmetric about zero.
TABLES: dict[int, dict[int, tuple[float, ...]]] = {
    64: {
        2: (0.45211895, 1.4999748),
        3: (0.243753431, 0.750658105, 1.32934287, 2.11131145),
        4: (0.12735218, 0.384718264, 0.650494145, 0.931894014, 1.23940422, 1.59084912, 2.02330982, 2.64637049),
    },
    80: {
        2: (0.452253571, 1.50206127),
        3: (0.244022254, 0.751726529, 1.33223872, 2.11933755),
        4: (0.12756045, 0.385382728, 0.651742179, 0.933970323, 1.24273937, 1.59622144, 2.03229946, 2.66321927),
    },
    96: {
        2: (0.452342651, 1.50345285),
        3: (0.244201288, 0.752439111, 1.33417415, 2.12471615),
        4: (0.127699386, 0.385826149, 0.652575604, 0.935358157, 1.2449712, 1.59982155, 2.03833437, 2.67456013),
    },
    112: {
        2: (0.452405953, 1.50444712),
        3: (0.244329079, 0.752948238, 1.33555897, 2.12857169),
        4: (0.127798668, 0.386143091, 0.653171586, 0.936351238, 1.24656949, 1.60240218, 2.04266562, 2.68271424),
    },
    128: {
        2: (0.45245325, 1.50519298),
        3: (0.244424873, 0.753330159, 1.33659888, 2.13147084),
        4: (0.127873151, 0.386380912, 0.653618942, 0.937097014, 1.24777045, 1.60434265, 2.04592537, 2.68885925),
    },
    192: {
        2: (0.452563014, 1.50693383),
        3: (0.244648219, 0.754221547, 1.33902966, 2.13826058),
        4: (0.128047017, 0.386936203, 0.65466399, 0.938840364, 1.2505802, 1.6088871, 2.05356929, 2.70329631),
    },
    256: {
        2: (0.452617583, 1.50780451),
        3: (0.244759802, 0.754667364, 1.34024731, 2.14166864),
        4: (0.128133986, 0.38721404, 0.655187145, 0.939713715, 1.25198901, 1.61116811, 2.0574112, 2.71056698),
    },
}


def solve(bits: int, dim: int, *, points: int = 400_001, tolerance: float = 1e-12) -> tuple[float, ...]:
    """The positive half of the 2^bits Lloyd–Max levels for dimension `dim`, by Lloyd's iteration on a grid.

    Raises:
        ValueError: if bits is not 1..8 or dim is under 4.
    """
    if not 1 <= bits <= 8 or dim < 4:
        raise ValueError(f"no Lloyd–Max table of {bits} bits for dimension {dim}: bits 1 to 8, dimension from 4")
    # The density is symmetric: solve the positive half, where boundaries are 0, midpoints, √d.
    edge = min(np.sqrt(dim), 12.0)
    t = np.linspace(0.0, edge, points)
    density = (1 - np.minimum(t * t / dim, 1.0)) ** ((dim - 3) / 2)
    step = t[1] - t[0]
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)]) * step
    first = np.concatenate([[0.0], np.cumsum((density[1:] * t[1:] + density[:-1] * t[:-1]) / 2)]) * step
    n = 2 ** (bits - 1)
    levels = np.sqrt(2) * (np.arange(n) + 0.5) / n * 1.8
    for _ in range(100_000):
        cuts = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, [edge]])
        m, f = np.interp(cuts, t, mass), np.interp(cuts, t, first)
        new = np.diff(f) / np.maximum(np.diff(m), 1e-300)
        if np.max(np.abs(new - levels)) < tolerance:
            break
        levels = new
    return tuple(float(x) for x in new)


@cache
def lloyd_max(bits: int, dim: int) -> tuple[float, ...]:
    """All 2^bits levels for dimension `dim`, ascending, in units of 1/√dim."""
    half = TABLES.get(dim, {}).get(bits) or solve(bits, dim)
    return (*(-x for x in reversed(half)), *half)
