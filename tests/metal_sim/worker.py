"""Runs dispatches, each in a process of its own: jobs on standard input, what happened on standard output, pickled.

The process that reads jobs forks for each, which takes a fraction of a new interpreter's start. It imports nothing of
the package, nor NumPy, and never runs a kernel itself.
"""

import ctypes
import json
import os
import pickle
import select
import signal
import sys
import time
import traceback

u32, u64 = ctypes.c_uint32, ctypes.c_uint64
MAX_FINDINGS = 64


class Finding(ctypes.Structure):
    """`Err` of runtime/state.h."""

    _fields_ = (
        *(("kind", u32), ("store", u32), ("pc", u64), ("other_pc", u64), ("offset", ctypes.c_int64)),
        *(("buffer", u32), ("size", u32), ("group", u32 * 3), ("thread", u32 * 3), ("other_thread", u32)),
        *(("count", u32), ("text", ctypes.c_char * 96)),
    )


class Access(ctypes.Structure):
    """`PcStat`: traffic of one instruction on one buffer."""

    _fields_ = (
        *(("pc", u64), ("buffer", u32), ("store", u32)),
        *((name, u64) for name in ("accesses", "bytes", "simd_accesses", "lines", "ideal_lines")),
    )


class BufferTraffic(ctypes.Structure):
    """`BufStat`."""

    _fields_ = tuple((n, u64) for n in ("loaded", "stored", "unique_lines", "group_lines", "unwritten"))


class Counts(ctypes.Structure):
    """`Stat`."""

    _fields_ = tuple(
        (name, u64)
        for name in (
            *("threads", "simd_operations", "threadgroup_barriers", "simdgroup_barriers"),
            *("threadgroup_loaded", "threadgroup_stored", "atomics", "threadgroup_bytes"),
        )
    )


class Launch(ctypes.Structure):
    """`Launch`."""

    _fields_ = (
        *(("entry", ctypes.c_void_p), ("buffers", ctypes.c_void_p), ("buffer_count", u32)),
        *(("grid", u32 * 3), ("threadgroup", u32 * 3), ("order", u32), ("seed", u32), ("check", u32), ("count", u32)),
        *(("constants_at", u64), ("constants_size", u64), ("flush_denormals", u32), ("blocks", u32)),
    )


def plain(structure: ctypes.Structure) -> dict:
    """The fields as numbers, tuples and text."""
    fields = {}
    for name, *_ in structure._fields_:
        value = getattr(structure, name)
        fields[name] = value.decode(errors="replace") if isinstance(value, bytes) else value
        if isinstance(value, ctypes.Array):
            fields[name] = tuple(value)
    return fields


def mapped(path: str) -> tuple[int, int]:
    """Lowest and highest address at which a library lies in this process."""
    with open("/proc/self/maps") as maps:
        ranges = [line.split()[0].split("-") for line in maps if path in line]
    return int(ranges[0][0], 16), int(ranges[-1][1], 16)


def counted(kernel: ctypes.CDLL) -> list[list[dict]]:
    """Of each block of code that counts its runs: what it takes, which part of that is overhead (see arithmetic.py)."""
    return json.loads(ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(kernel, "__msl_mixes"))))


def run(job: dict) -> dict:
    runtime = ctypes.CDLL(job["runtime"], mode=ctypes.RTLD_GLOBAL)
    runtime.msl_buffer.restype = u64
    runtime.msl_buffer.argtypes = [ctypes.c_char_p, u64, u32, u32, u32]
    runtime.msl_init()
    kernel = ctypes.CDLL(job["kernel"])
    low, high = mapped(job["kernel"])
    places = []
    for i, (name, size, data, writable, itemsize, offset) in enumerate(job["buffers"]):
        places.append(runtime.msl_buffer(name.encode(), max(size, 1), writable, itemsize, offset))
        if data is not None:
            ctypes.memmove(places[-1], data, size)
            if writable:
                runtime.msl_mark_init(i)
    addresses = (u64 * max(1, len(places)))(*places)
    blocks = counted(kernel) if job["blocks"] else []
    launch = Launch(
        entry=ctypes.cast(kernel.__msl_entry, ctypes.c_void_p).value,
        buffers=ctypes.addressof(addresses),
        buffer_count=len(places),
        constants_at=low,
        constants_size=high - low,
        blocks=len(blocks),
        **job["launch"],
    )
    start = time.perf_counter()
    runtime.msl_launch(ctypes.byref(launch))
    seconds = time.perf_counter() - start

    findings = (Finding * MAX_FINDINGS)()
    found = runtime.msl_errors(findings, MAX_FINDINGS)
    accesses = (Access * max(1, runtime.msl_pcs(None, 0)))()
    used = runtime.msl_pcs(accesses, len(accesses))
    counts, traffic = Counts(), (BufferTraffic * max(1, len(places)))()
    runtime.msl_stats(ctypes.byref(counts), traffic)
    lanes, simdgroups = ((u64 * max(1, len(blocks)))() for _ in range(2))
    runtime.msl_blocks(lanes, simdgroups)
    buffers = zip(places, job["buffers"], strict=True)
    return {
        "seconds": seconds,
        "base": low,
        "findings": [plain(f) for f in findings[:found]],
        "accesses": [plain(a) for a in accesses[:used] if a.accesses],
        "counts": plain(counts),
        "blocks": [(*mix, lanes[i], simdgroups[i]) for i, mix in enumerate(blocks)],
        "traffic": [plain(t) for t in traffic[: len(places)]],
        "outputs": [ctypes.string_at(at, size) for at, (_, size, _, writable, *_) in buffers if writable],
    }


def in_child(job: dict) -> tuple[str, object]:
    """Runs `job` in a fork: ("done", what happened), ("late", None), ("died", signal) or ("failed", traceback)."""
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(receive)
            try:
                said = pickle.dumps(("done", run(job)))
            except BaseException:
                said = pickle.dumps(("failed", traceback.format_exc()))
            with open(send, "wb") as pipe:
                pipe.write(said)
        finally:
            os._exit(0)
    os.close(send)
    said, until = bytearray(), time.monotonic() + job["timeout"]
    with open(receive, "rb", buffering=0) as pipe:
        while select.select([pipe], [], [], max(0.0, until - time.monotonic()))[0]:
            part = pipe.read(1 << 20)
            if not part:
                break
            said += part
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "late", None
    _, status = os.waitpid(child, 0)
    return pickle.loads(said) if said else ("died", os.WTERMSIG(status))


if __name__ == "__main__":
    while True:
        try:
            job = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        pickle.dump(in_child(job), sys.stdout.buffer)
        sys.stdout.buffer.flush()
