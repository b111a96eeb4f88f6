"""A model of how long counted operations take on Apple GPUs. Nothing here is a measurement of a kernel.

The model divides work by published throughput: cycles of each kind of operation, and bytes by memory bandwidth, both as
if every unit were always busy. It knows no occupancy, latency, registers, caches, issue conflicts or launch. So it says
which of two kernels has less to do, not how fast either is. Operations are those of all lanes; a lane that idles while
others of its simdgroup work costs as much as they do, so counts with idle lanes are the ones to give.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mlx_rotor.errors import RotorError

LANES = 128  # of a core: four schedulers, each an instruction of a 32-lane simdgroup a cycle

# Cycles of a scheduler for one instruction of a simdgroup, so of a lane's operation relative to an FMA.
# Measured on M1 and M2 by philipturner/metal-benchmarks (README, "Instruction Throughputs"); M3 and M4 are taken to be
# the same. Where it gives a range, the upper end.
MEASURED: Mapping[str, float] = {
    **dict.fromkeys(("fma", "float", "bitwise", "integer", "compare", "select"), 1.0),
    **dict.fromkeys(("multiply", "shift", "shift_left_dynamic", "extract", "bit_count", "convert"), 4.0),
    **{"shift_right_dynamic": 8.0, "integer64": 4.0, "multiply64": 16.0},
    **{"exp2": 4.0, "log2": 4.0, "divide": 6.0, "sqrt": 8.0, "rsqrt": 8.0, "sine": 14.3, "round": 8.2},
    **{"shuffle": 2.0, "shuffle_any": 32.0, "vote": 2.0, "matrix": 20.1},
    **{"reduction": 14.5, "quad_reduction": 6.8, "scan": 13.0},
}
# No figure is published for these: accesses and branches as one instruction to issue, halves as operands that other
# operations convert for nothing, bfloat as two moves, a quotient as an inverse, four products and conversions.
ASSUMED: Mapping[str, float] = {
    **dict.fromkeys(("branch", "barrier", "simdgroup_barrier", "atomic"), 1.0),
    **{
        f"{access}_{space}": 1.0
        for access in ("load", "store")
        for space in ("device", "constant", "table", "threadgroup", "thread", "generic")
    },
    **{"half": 0.0, "bfloat": 2.0, "integer_divide": 40.0, "integer64_divide": 160.0, "library": 40.0},
}
CYCLES: Mapping[str, float] = {**MEASURED, **ASSUMED}
# What the four wide pipelines do; all else goes to a second one, which works at the same time (same source).
WIDE_PIPELINES = frozenset(kind for kind, cycles in CYCLES.items() if cycles <= 1.0)


@dataclass(frozen=True)
class Device:
    """An Apple GPU: cores, clock in GHz, memory bandwidth in GB/s."""

    name: str
    cores: int
    clock: float
    bandwidth: float

    @property
    def fma_rate(self) -> float:
        """FMAs a second."""
        return self.cores * LANES * self.clock * 1e9

    @property
    def fma_per_byte(self) -> float:
        """FMAs in the time that a byte takes to come from memory."""
        return self.fma_rate / (self.bandwidth * 1e9)


# Cores and bandwidth are Apple's. Clocks: M1 Max and M2 from metal-benchmarks, M3 Ultra that of the M3 Max it is two
# of, as GPU databases list it; for M4 Max these disagree, and 15 FMAs a byte of bandwidth gives the one here.
DEVICES: Mapping[str, Device] = {
    d.name: d
    for d in (
        Device("M1 Max", 32, 1.296, 400),
        Device("M2 Pro", 19, 1.398, 200),
        Device("M3 Ultra", 80, 1.398, 819),
        Device("M4 Max", 40, 1.6, 546),
    )
}


@dataclass(frozen=True)
class Prediction:
    """Seconds, by the model. `arithmetic` has every operation after the other, `overlapped` both kinds of pipeline
    always busy at once, `memory` the bytes at full bandwidth."""

    arithmetic: float
    overlapped: float
    memory: float

    @property
    def seconds(self) -> float:
        """The slower of arithmetic, none of it overlapped, and memory."""
        return max(self.arithmetic, self.memory)

    @property
    def at_best(self) -> float:
        """The slower of overlapped arithmetic and memory."""
        return max(self.overlapped, self.memory)


def cycles(operations: Mapping[str, int]) -> dict[str, float]:
    """Kind -> cycles of one lane that its operations take. Raises RotorError for a kind that has no figure."""
    if unknown := sorted(set(operations) - set(CYCLES)):
        raise RotorError(f"no throughput figure for operations of kind {', '.join(unknown)}; known: {sorted(CYCLES)}")
    return {kind: n * CYCLES[kind] for kind, n in operations.items()}


def predict(operations: Mapping[str, int], bytes_moved: float, device: Device) -> Prediction:
    """The model's time for `operations` (kind -> operations of all lanes) and `bytes_moved` to and from memory.

    A model, not a measurement. Raises RotorError for a kind that has no figure.
    """
    spent = cycles(operations)
    wide = sum(spent[kind] for kind in spent if kind in WIDE_PIPELINES)
    other = sum(spent.values()) - wide
    issued = wide + sum(n for kind, n in operations.items() if kind not in WIDE_PIPELINES)
    return Prediction(
        arithmetic=(wide + other) / device.fma_rate,
        overlapped=max(other, issued) / device.fma_rate,
        memory=bytes_moved / (device.bandwidth * 1e9),
    )


def predicted_seconds(operations: Mapping[str, int], bytes_moved: float, device: Device) -> float:
    """The slower of arithmetic and memory: `predict(...).seconds`. A model, not a measurement."""
    return predict(operations, bytes_moved, device).seconds
