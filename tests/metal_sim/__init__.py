"""A Metal GPU for tests: runs MLX kernels on an x86-64 Linux machine, watches them, counts their traffic.

Clang compiles the Metal source as C++ for OpenCL, whose address spaces are Metal's; a runtime runs every GPU thread as
a fiber and sees every load and store. README.md says what it finds and what it can't know.
"""

from .dispatch import Buffer, KernelError, Options
from .kernel import Kernel, Result, bits, from_bits, mlx_source, run_file
from .report import Access, Report, Traffic
from .tools import SUPPORTED, UNSUPPORTED, CompileError, ToolsMissing

__all__ = [
    "SUPPORTED",
    "UNSUPPORTED",
    "Access",
    "Buffer",
    "CompileError",
    "Kernel",
    "KernelError",
    "Options",
    "Report",
    "Result",
    "ToolsMissing",
    "Traffic",
    "bits",
    "from_bits",
    "mlx_source",
    "run_file",
]
