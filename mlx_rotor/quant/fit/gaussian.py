"""What each fit loses on independent normal weights, which is what is known of a weight before it is read.

The tables are what `python -c "from mlx_rotor.quant.fit import gaussian; gaussian.print_tables()"` prints.
"""

from __future__ import annotations

import mlx.core as mx

from ...errors import RotorError
from ..policy import FITS
from ..spec import BITS, FIXED, GROUP_SIZES, OURS, Spec, bits_of, sizes
from .fitted import fit as fit_weights
from .fitted import squared_error

ROWS, COLUMNS = 1024, 1024  # weights measured on: errors are known to half a percent
SEED = 0

# (bits, group size): errors of fast, search, best
ERRORS: dict[tuple[int, int], tuple[float, float, float]] = {
    (2, 32): (0.1308, 0.0877, 0.0871),
    (2, 64): (0.1552, 0.1017, 0.1014),
    (2, 128): (0.1792, 0.1099, 0.1095),
    (3, 32): (0.0293, 0.02087, 0.02073),
    (3, 64): (0.03621, 0.02696, 0.0268),
    (3, 128): (0.04284, 0.03164, 0.03124),
    (4, 32): (0.006563, 0.004854, 0.004824),
    (4, 64): (0.008277, 0.006577, 0.006543),
    (4, 128): (0.01, 0.008266, 0.008162),
    (5, 32): (0.001554, 0.001168, 0.001161),
    (5, 64): (0.001966, 0.001604, 0.001597),
    (5, 128): (0.002387, 0.002048, 0.002037),
    (6, 32): (0.0003923, 0.0002982, 0.0002914),
    (6, 64): (0.0004954, 0.0004093, 0.0004006),
    (6, 128): (0.0005974, 0.0005204, 0.0005114),
    (8, 32): (4.403e-05, 2.038e-05, 1.969e-05),
    (8, 64): (5.527e-05, 2.683e-05, 2.626e-05),
    (8, 128): (6.358e-05, 3.325e-05, 3.279e-05),
}
MODE_ERRORS: dict[str, float] = {
    "mxfp4": 0.01328,
    "mxfp8": 0.0007127,
    "nvfp4": 0.009034,
}
# Our own modes, likewise. Codebooks are lengthened, which is error here: see `fit_lloyd`.
OUR_ERRORS: dict[Spec, tuple[float, float, float]] = {
    Spec(4, 16, "iq4_nl"): (0.005193, 0.004135, 0.004097),
    Spec(4, 32, "iq4_nl"): (0.006385, 0.005435, 0.005391),
    Spec(2, 64, "lloyd"): (0.1049, 0.1033, 0.1033),
    Spec(2, 128, "lloyd"): (0.1144, 0.1136, 0.1135),
    Spec(2, 256, "lloyd"): (0.1194, 0.1189, 0.1188),
    Spec(3, 64, "lloyd"): (0.02255, 0.0201, 0.01998),
    Spec(3, 128, "lloyd"): (0.02764, 0.02599, 0.02585),
    Spec(3, 256, "lloyd"): (0.03092, 0.02993, 0.02981),
    Spec(4, 64, "lloyd"): (0.003822, 0.003044, 0.00298),
    Spec(4, 128, "lloyd"): (0.005677, 0.005006, 0.004875),
    Spec(4, 256, "lloyd"): (0.007077, 0.006569, 0.006434),
    Spec(8, 32, "q8"): (2.854e-05, 2.575e-05, 2.53e-05),
}


def relative_error(bits: int, group_size: int, fit: str = "search", mode: str = "affine") -> float:
    """Squared error over squared length of normal weights; RotorError where there is no such format or fit."""
    if fit not in FITS:
        raise RotorError(f"unknown fit {fit!r}; fits: {', '.join(FITS)}")
    spec = Spec(bits, group_size, mode)
    if mode in FIXED:
        return MODE_ERRORS[mode]
    return (ERRORS[bits, group_size] if mode == "affine" else OUR_ERRORS[spec])[FITS.index(fit)]


def measure(spec: Spec, fit: str, rows: int = ROWS, seed: int = SEED) -> float:
    """The same, measured on `rows` x COLUMNS weights."""
    w = mx.random.normal((rows, COLUMNS), key=mx.random.key(seed))
    error, norm = squared_error(w, fit_weights(w, spec, fit), spec)
    return error / norm


def print_tables() -> None:
    """ERRORS, MODE_ERRORS and OUR_ERRORS as source."""
    print("# (bits, group size): errors of " + ", ".join(FITS))
    print("ERRORS: dict[tuple[int, int], tuple[float, float, float]] = {")
    for bits in BITS:
        for size in GROUP_SIZES:
            print(f"    ({bits}, {size}): {_errors(Spec(bits, size))},")
    print("}\nMODE_ERRORS: dict[str, float] = {")
    for mode, (bits, size) in FIXED.items():
        print(f'    "{mode}": {measure(Spec(bits, size, mode), "fast"):.4g},')
    print("}\n# Our own modes, likewise. Codebooks are lengthened, which is error here: see `fit_lloyd`.")
    print("OUR_ERRORS: dict[Spec, tuple[float, float, float]] = {")
    for spec in our_specs():
        print(f'    Spec({spec.bits}, {spec.group_size}, "{spec.mode}"): {_errors(spec)},')
    print("}")


def our_specs() -> list[Spec]:
    """Every form of the modes MLX doesn't have."""
    return [Spec(bits, size, mode) for mode in OURS for bits in bits_of(mode) for size in sorted(sizes(mode))]


def _errors(spec: Spec) -> str:
    return f"({', '.join(f'{measure(spec, fit):.4g}' for fit in FITS)})"
