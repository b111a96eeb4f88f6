"""The report of a dispatch: findings in words, traffic by buffer and by line of source."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from .arithmetic import summed
from .build import KERNEL_FILE

LINE_BYTES = 128
SIMDGROUP = 32  # lanes
OUT_OF_BOUNDS, WILD, RACE_THREADGROUP, RACE_DEVICE, UNINITIALISED, MISALIGNED = range(1, 7)
READ_ONLY, EXITED_LANES, UNWRITTEN = 13, 10, 16
KINDS = {
    OUT_OF_BOUNDS: "out of bounds",
    WILD: "wild pointer",
    RACE_THREADGROUP: "race on threadgroup memory",
    RACE_DEVICE: "race on device memory",
    UNINITIALISED: "uninitialised threadgroup memory read",
    MISALIGNED: "misaligned access",
    7: "divergent threadgroup barrier",
    8: "threadgroup barrier after some threads returned",
    9: "simdgroup operation under divergence",
    EXITED_LANES: "simdgroup operation after lanes returned",
    11: "shuffle from an inactive lane",
    12: "more than 32 KiB of threadgroup memory",
    READ_ONLY: "write to a read-only buffer",
    14: "stack overflow",
    15: "undefined behaviour",
    UNWRITTEN: "unwritten output read",
}
UNKNOWN_LINE = "an unknown line" if shutil.which("addr2line") else "an unknown line (addr2line of binutils names it)"
Label = Callable[[int], str]


@dataclass(frozen=True)
class Traffic:
    """Bytes between one buffer and the kernel.

    `unique` is what must move once, `per_group` the sum over threadgroups of what each must move once (traffic behind
    a perfect first-level cache), both in whole 128-byte lines; `unwritten` are bytes of an output nobody wrote.
    """

    loaded: int
    stored: int
    unique: int
    per_group: int
    unwritten: int


@dataclass(frozen=True)
class Access:
    """Loads or stores of one buffer by one line of source, taken by simdgroup.

    `lines` counts the 128-byte lines its `simd_accesses` touched, `ideal_lines` those they had to.
    """

    where: str
    buffer: str
    store: bool
    bytes: int
    simd_accesses: int
    lines: int
    ideal_lines: int


@dataclass(frozen=True)
class Report:
    """One dispatch. `errors` are bugs; `notes` are legal on some GPUs only. Both say what, where and which thread.

    `operations`, in mode arithmetic: kind of operation -> how many lanes did one; `overhead` is the part of them that
    only makes addresses and branches. `issued` counts 32 lanes for each simdgroup that did one, idle lanes and all:
    where lanes part, as often as the lane that did most. operations.py has the kinds.
    """

    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    buffers: dict[str, Traffic] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    operations: dict[str, int] = field(default_factory=dict)
    overhead: dict[str, int] = field(default_factory=dict)
    issued: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    name_accesses: Callable[[], list[Access]] = list

    @cached_property
    def accesses(self) -> list[Access]:
        """Most bytes first. They are named when they are asked for, which takes a run of addr2line."""
        return self.name_accesses()

    def findings(self) -> list[str]:
        """Everything to object to: errors, notes, and outputs that were not written whole."""
        unwritten = {name: t.unwritten for name, t in self.buffers.items() if t.unwritten}
        return [*self.errors, *self.notes, *(f"unwritten bytes of {name}: {n}" for name, n in unwritten.items())]

    def line_use(self, buffers: Collection[str] | None = None) -> float:
        """Lines that had to be touched over lines touched: 1.0 is fully coalesced. `buffers`: only these."""
        counted = [a for a in self.accesses if buffers is None or a.buffer in buffers]
        return sum(a.ideal_lines for a in counted) / max(1, sum(a.lines for a in counted))


def make_report(happened: dict, library: Path, buffers: Sequence[tuple[str, int]], label: Label) -> Report:
    """The worker's result in words. `buffers`: (name, bytes) of each; `label` names a line of the compiled text."""
    base = happened["base"]
    places = _places(library, {f[key] for f in happened["findings"] for key in ("pc", "other_pc")}, base, label)
    names = [name for name, _ in buffers]
    blocks = happened["blocks"]
    words = [(f["kind"], _in_words(f, buffers, places, label)) for f in happened["findings"]]
    return Report(
        errors=[text for kind, text in words if kind != EXITED_LANES],
        notes=[text for kind, text in words if kind == EXITED_LANES],
        buffers={
            name: Traffic(
                t["loaded"], t["stored"], t["unique_lines"] * LINE_BYTES, t["group_lines"] * LINE_BYTES, t["unwritten"]
            )
            for name, t in zip(names, happened["traffic"], strict=True)
        },
        counts=happened["counts"],
        operations=summed((mix, lanes) for mix, _, lanes, _ in blocks),
        overhead=summed((part, lanes) for _, part, lanes, _ in blocks),
        issued=summed((mix, SIMDGROUP * times) for mix, _, _, times in blocks),
        seconds=happened["seconds"],
        name_accesses=lambda: _accesses(happened["accesses"], names, library, base, label),
    )


def _accesses(found: list[dict], names: Sequence[str], library: Path, base: int, label: Label) -> list[Access]:
    """What instructions did, summed by line of source."""
    places = _places(library, {a["pc"] for a in found}, base, label)
    lines: dict[tuple[str, str, bool], list[int]] = {}
    for a in found:
        name = names[a["buffer"]] if a["buffer"] < len(names) else "threadgroup"
        total = lines.setdefault((places.get(a["pc"], UNKNOWN_LINE), name, bool(a["store"])), [0, 0, 0, 0])
        for i, key in enumerate(("bytes", "simd_accesses", "lines", "ideal_lines")):
            total[i] += a[key]
    return [Access(*key, *total) for key, total in sorted(lines.items(), key=lambda item: -item[1][2])]


def _in_words(f: dict, buffers: Sequence[tuple[str, int]], places: Mapping[int, str], label: Label) -> str:
    kind, text = f["kind"], KINDS[f["kind"]]
    access = f"{'store' if f['store'] else 'load'} of {f['size']} B at byte {f['offset']}"
    if f["buffer"] < len(buffers):
        name, size = buffers[f["buffer"]]
        text += f": {access} of '{name}' ({size} B)"
    elif kind in (OUT_OF_BOUNDS, RACE_THREADGROUP, UNINITIALISED, MISALIGNED, WILD):
        text += f": {access} of '{f['text']}'"
    elif f["text"]:
        text += ": " + re.sub(rf"{re.escape(KERNEL_FILE)}:(\d+):\d+", lambda m: label(int(m[1])), f["text"])
    if kind in (RACE_THREADGROUP, RACE_DEVICE):
        text += f", against thread {f['other_thread']}" + (
            f" at {places.get(f['other_pc'], UNKNOWN_LINE)}" if f["other_pc"] else ""
        )
    at = f" at {places.get(f['pc'], UNKNOWN_LINE)}" if f["pc"] else ""
    times = f", {f['count']} times" if f["count"] > 1 else ""
    return f"{text}{at}, thread {f['thread']} of threadgroup {f['group']}{times}"


def _places(library: Path, pcs: Collection[int], base: int, label: Label) -> dict[int, str]:
    """Instruction behind which `library`, loaded at `base`, was left -> line of source, the innermost that is not the
    simulator's own. Needs addr2line."""
    addresses = {pc - 1 - base: pc for pc in sorted(pcs) if pc}
    if not addresses or not (tool := shutil.which("addr2line")):
        return {}
    command = [tool, "-e", str(library), "-f", "-i", "-a", *map(hex, addresses)]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found: dict[int, str] = {}
    for block in re.split(r"^(?=0x)", said, flags=re.MULTILINE)[1:]:
        address, *rest = block.splitlines()
        for place in rest[1::2]:
            file, _, line = place.split(" (")[0].rpartition("/")[2].rpartition(":")
            if line.isdigit() and not file.startswith(("msl_", "metal_")):
                pc = addresses[int(address, 16)]
                found[pc] = label(int(line)) if file == KERNEL_FILE else f"{file}:{line}"
                break
    return found
