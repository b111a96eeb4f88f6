"""Metal source to PTX: the simulator's rewriting and headers, clang's NVPTX target, own headers for what differs.

A kernel becomes one entry, `msl_kernel`, whose parameters are the addresses of its buffers.
"""

from __future__ import annotations

import math
import re
import shutil
from functools import cache
from pathlib import Path

from metal_sim import CompileError, ToolsMissing, build, tools
from metal_sim.entry import entry_point
from metal_sim.rewrite import Constants, rewrite

from . import toolkit

ENTRY = "msl_kernel"
INCLUDE = Path(__file__).parent / "include"
PRELUDE = f'#include "msl_names.h"\n{build.PRELUDE}'
MAX_SHARED = 32 * 1024  # bytes of threadgroup memory that Metal allows
NEWEST = 90  # PTX for this GPU runs on all later ones
Size = tuple[int, int, int]
FLAGS = [
    *("-target", "nvptx64-nvidia-cuda", "-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc", "-O3", "-w", "-S"),
    # As for the simulator, and what this target has to be told that it can do.
    *("-Xclang", "-cl-ext=-cl_khr_fp64,-__opencl_c_fp64,+cl_khr_fp16,+__opencl_c_generic_address_space"),
    *("-Xclang", "-cl-ext=+__opencl_c_program_scope_global_variables"),
    # Everything inlined, and loops unrolled where they index registers: neither has a call or a stack on this GPU.
    *("-mllvm", "-inline-threshold=100000", "-mllvm", "-unroll-threshold=800"),
    "-cl-fp32-correctly-rounded-divide-sqrt",
    # A toolkit that clang finds by itself would set the version of PTX, which an older driver may not know.
    *("--cuda-path=/nonexistent", "--cuda-feature=+ptx78", "-nogpulib"),
]


def architecture(major: int, minor: int) -> str:
    """The `arch` for a GPU of compute capability `major`.`minor`. Raises ValueError for one too old for bfloat."""
    if major < 8:
        raise ValueError(f"compute capability {major}.{minor}: bfloat needs 8.0 (Ampere) or later")
    return f"sm_{min(10 * major + minor, NEWEST)}"


def ptx(
    text: str,
    kernel: str,
    template_arguments: list[str],
    arch: str = "sm_80",
    *,
    threadgroup: Size | None = None,
    grid: Size | None = None,
    constants: Constants | None = None,
    before: str = "",
    lenient: bool = False,
) -> str:
    """PTX of `kernel` in Metal source `text`.

    `threadgroup` is the launch's, from which the assembler knows how many registers a thread may have. `grid`, in
    threads, makes the code that one grid's own: it is needed where the grid ends inside a threadgroup. `constants`,
    `before` and `lenient` are as in `metal_sim.run_file` and `rewrite`. What is compiled is kept.

    Raises:
        CompileError: for Metal that clang refuses, and more than 32 KiB of threadgroup memory.
        ToolsMissing: where clang is missing, or libdevice and the kernel calls a function of it.
    """
    entry = entry_point(text, kernel, template_arguments)
    # Called from one place: inlined there, it is not compiled twice.
    text = re.sub(rf"\bvoid\s+{kernel}\s*\(", lambda found: f"static MSL_FN {found[0]}", text)
    full = f"{before}{rewrite(text, constants, lenient)}\n{_entry(entry, grid)}"
    flags = [*FLAGS, f"-march={arch}", f"-I{headers()}", "-include", "prelude.h"]
    if grid or (threadgroup and math.prod(threadgroup) % 32):
        flags.append("-DMSL_PARTIAL")
    flags += [f"-DMSL_GRID_{axis}={n}" for axis, n in zip("xyz", grid or (), strict=bool(grid))]
    if library := toolkit.libdevice():
        flags += ["-Xclang", "-mlink-builtin-bitcode", "-Xclang", str(library)]

    def make(path: Path) -> None:
        (path.parent / build.KERNEL_FILE).write_text(full)
        tools.compile([*tools.clang(), *flags, build.KERNEL_FILE, "-o", str(path)], path.parent)

    return _finished(build.kept(f"ptx {full}\n{flags}", ".ptx", make).read_text(), threadgroup)


@cache
def headers() -> Path:
    """A folder with the simulator's headers, in which those of `include` stand in for theirs of the same name."""
    ours = sorted(INCLUDE.iterdir())

    def make(folder: Path) -> None:
        shutil.copytree(build.headers(), folder)
        for path in ours:
            shutil.copyfile(path, folder / path.name)
        (folder / "prelude.h").write_text(PRELUDE)

    return build.kept("\n".join([PRELUDE, str(build.headers()), *(path.read_text() for path in ours)]), "", make)


def _entry(simulated: str, grid: Size | None) -> str:
    """Text of the entry, around the simulator's own `simulated`: indices come from the GPU's registers.

    With a `grid`, threads outside of it end at once.
    """
    buffers = 1 + max((int(n) for n in re.findall(r"\bb\[(\d+)\]", simulated)), default=0)
    simulated = simulated.replace('extern "C" void __msl_entry', "static MSL_FN void __msl_entry")
    per_axis = [
        f"    t.{name}[{i}] = {value.replace('AXIS', axis)};"
        for i, axis in enumerate("xyz")
        for name, value in {
            "thread_position_in_threadgroup": "MSL_SREG(tid, AXIS)",
            "threadgroup_position_in_grid": "MSL_SREG(ctaid, AXIS)",
            "thread_position_in_grid": "MSL_SREG(ctaid, AXIS) * MSL_SREG(ntid, AXIS) + MSL_SREG(tid, AXIS)",
            "threads_per_threadgroup": "MSL_GROUP(AXIS)",
            "dispatch_threads_per_threadgroup": "MSL_SREG(ntid, AXIS)",
            "threadgroups_per_grid": "MSL_SREG(nctaid, AXIS)",
            "threads_per_grid": "MSL_GRID(AXIS)",
            "grid_size": "MSL_GRID(AXIS)",
            "grid_origin": "0",
        }.items()
    ]
    asked = "(MSL_SREG(ntid, x) * MSL_SREG(ntid, y) * MSL_SREG(ntid, z)"
    alone = [
        f"    t.{name}[0] = {value};"
        for name, value in {
            "thread_index_in_threadgroup": "__msl_index()",
            "thread_index_in_simdgroup": "__msl_index() & 31",
            "simdgroup_index_in_threadgroup": "__msl_index() >> 5",
            "simdgroups_per_threadgroup": "(__msl_threads() + 31) / 32",
            "dispatch_simdgroups_per_threadgroup": f"{asked} + 31) / 32",
            "threads_per_simdgroup": "32",
            "thread_execution_width": "32",
            "thread_index_in_quadgroup": "__msl_index() & 3",
            "quadgroup_index_in_threadgroup": "__msl_index() >> 2",
            "quadgroups_per_threadgroup": "(__msl_threads() + 3) / 4",
            "dispatch_quadgroups_per_threadgroup": f"{asked} + 3) / 4",
        }.items()
    ]
    outside = " || ".join(f"t.thread_position_in_grid[{i}] >= MSL_GRID({axis})" for i, axis in enumerate("xyz"))
    body = [
        f"    __private ulong b[{buffers}] = {{{', '.join(f'b{i}' for i in range(buffers))}}};",
        "    __private msl_ids t;",
        *(*per_axis, *alone),
        f"    if ({outside}) return;" if grid else "",
        "    __msl_entry(b, &t);",
    ]
    parameters = ", ".join(f"ulong b{i}" for i in range(buffers))
    head = f'extern "C" __attribute__((nvptx_kernel)) void {ENTRY}({parameters}) {{'
    return "\n".join([simulated.rstrip(), head, *body, "}\n"])


def _finished(text: str, threadgroup: Size | None) -> str:
    """What clang wrote, with threadgroup memory and the launch's size declared, and `constant` where buffers can be."""
    needed = sorted(set(re.findall(r"// msl_tg (\d+) (\d+) (\d+)", text)))
    if (used := sum(int(size) for _, size, _ in needed)) > MAX_SHARED:
        raise CompileError(f"{used} bytes of threadgroup memory: Metal has {MAX_SHARED}")
    if missing := sorted(set(re.findall(r"\.extern \.func.*?\b(\w+)\n?\(", text, re.DOTALL))):
        raise ToolsMissing(f"{', '.join(missing)}: NVIDIA's {toolkit.LIBDEVICE} has them; {toolkit.INSTALL}")
    # Metal's constant memory is any buffer's; the GPU's own holds nothing but what a module declares.
    text = re.sub(r"\.const\b", ".global", text)
    shared = "".join(f".shared .align {align} .b8 msl_tg_{n}[{size}];\n" for n, size, align in needed)
    text = re.sub(r"^\.address_size 64\n", lambda found: f"{found[0]}\n{shared}", text, count=1, flags=re.MULTILINE)
    if threadgroup:
        limit = f".maxntid {', '.join(map(str, threadgroup))}\n"
        text = re.sub(
            rf"\.entry {ENTRY}\(.*?\)[^\n]*\n", lambda found: found[0] + limit, text, count=1, flags=re.DOTALL
        )
    return text
