"""Operations of a block of compiled code, by kind (operations.py), and those of a whole launch.

Counts are of lanes: an operation on a vector counts once a component, a 64-bit integer operation other than addition
and multiplication twice. Free, as on the GPU: register moves, widths of integers, addresses of array elements.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .ir import Function, Instruction, Type, functions, with_counters
from .operations import (
    BINARY,
    CONVERT,
    FREE,
    FUNCTIONS,
    IGNORED,
    REDUCED,
    REDUCTIONS,
    RUNTIME,
    RUNTIME_FREE,
    SHIFTS,
    VOTES,
    WIDE,
)
from .tools import CompileError

SPACES = {0: "thread", 1: "device", 2: "constant", 3: "threadgroup"}
LOAD_BYTES = 16  # at most, in one instruction
ENTRY = "__msl_entry"
COLLECTIVE = re.compile(r"_ZN5metal\d+(__msl_(?:ballot|ld|st|mload|mstore|mma)|(?:simd|quad)_[a-z_]+?)(?=I|E)(.*)")


@dataclass(frozen=True)
class Mix:
    """What one run through a block takes; `overhead` is the part that only makes addresses and branches."""

    operations: Counter[str]
    overhead: Counter[str]


def instrument(text: str) -> str:
    """The module `text` with a counter in every block that computes something, and a note of what each counts.

    Raises CompileError for an instruction of no known kind.
    """
    counted: dict[int, int] = {}
    mixes: list[list[dict[str, int]]] = []
    for function in functions(text):
        if COLLECTIVE.match(function.name):
            continue
        addresses = _only_addresses(function)
        for block in function.blocks:
            mix = _mix(function, block.instructions, addresses)
            if mix.operations:
                counted[block.counter_line] = len(mixes)
                mixes.append([mix.operations, mix.overhead])
    return with_counters(text, counted, json.dumps(mixes, separators=(",", ":")))


def summed(mixes: Iterable[tuple[Mapping[str, int], int]]) -> dict[str, int]:
    """Kind -> operations, of (what a block takes, how often it ran)."""
    found: Counter[str] = Counter()
    for mix, times in mixes:
        found.update({kind: n * times for kind, n in mix.items() if times})
    return dict(sorted(found.items()))


def _mix(function: Function, instructions: Sequence[Instruction], addresses: set[str]) -> Mix:
    mix = Mix(Counter(), Counter())
    for i in instructions:
        for kind, n in _kinds(function, i).items():
            if n:
                mix.operations[kind] += n
                if i.result in addresses or i.opcode in ("br", "switch"):
                    mix.overhead[kind] += n
    return mix


def _kinds(f: Function, i: Instruction) -> Mapping[str, int]:
    """Kind -> lane operations of one instruction."""
    op = i.opcode
    if op in FREE or _folded(f, i):
        return {}
    if op == "br":
        return {"branch": 1} if i.rest.startswith("i1 ") else {}
    if op == "switch":
        return {"branch": 1}
    if op == "call":
        return _call(f, i)
    if op in ("load", "store"):
        return _memory(f, i)
    first = i.types[0]
    n = first.lanes
    if op in BINARY:
        if op == "and" and _extracts(f, i):
            return {"extract": n * _words(first)}
        kind = BINARY[op]
        return {WIDE[kind]: n} if kind in WIDE and first.bits > 32 else {kind: n * _words(first)}
    if op in SHIFTS:
        dynamic = "shift_left_dynamic" if op == "shl" else "shift_right_dynamic"
        return {dynamic if "%" in i.last else "shift": n * _words(first)}
    if op == "fdiv":
        return {"rsqrt" if _inverse_root(f, i) else "divide": n}
    if op in ("icmp", "fcmp"):
        return {"compare": n * _words(first)}
    if op == "select":
        value = i.types[1]
        return {"bitwise" if value.name == "i1" else "select": value.lanes * _words(value)}
    if op in ("zext", "sext"):
        return {"select": n} if first.name == "i1" else {}
    if op in CONVERT:
        return {"select" if first.name == "i1" else "convert": n}
    if op in ("fptrunc", "fpext"):
        return {"bfloat" if "bfloat" in {t.name for t in i.types} else "half": n}
    raise CompileError(f"mode arithmetic knows no kind for the instruction {op} {i.rest}")


def _call(f: Function, i: Instruction) -> Mapping[str, int]:
    name = i.callee
    if name in RUNTIME:
        return {RUNTIME[name]: 1}
    if name in RUNTIME_FREE:
        return {}
    if collective := COLLECTIVE.match(name):
        return _collective(i, collective[1], collective[2])
    lanes = i.types[0].lanes if i.types and not i.rest.startswith("void") else 1
    if name.startswith("llvm."):
        plain = re.sub(r"(\.(v\d+)?(p\d+|[if]\d+|bf16))+$", "", name.removeprefix("llvm."))
        if plain.startswith(IGNORED):
            return {}
        if plain.startswith(("memcpy", "memmove", "memset")):
            return _copy(f, i, plain)
        if plain in ("fshl", "fshr"):
            amount = i.arguments.split(")")[0].rsplit(",", 1)[-1]
            return {"shift_right_dynamic" if "%" in amount else "shift": lanes * _words(i.types[0])}
        if plain.startswith("vector.reduce."):
            kind = REDUCED.get(plain.removeprefix("vector.reduce."), "select")
            return {kind: next(t.lanes for t in i.types if t.lanes > 1) - 1}
    else:
        plain = name.removesuffix("f")
    if plain in FUNCTIONS:
        return {kind: n * lanes for kind, n in FUNCTIONS[plain].items()}
    if name.startswith("_Z"):
        return {}  # a function of the kernel's own, counted where it is
    raise CompileError(f"mode arithmetic knows no kind for a call of {name}")


def _collective(i: Instruction, name: str, mangled: str) -> Mapping[str, int]:
    """One of include/msl_simd.h, msl_matrix.h or msl_atomic.h, by the name it has as a C++ function."""
    vector = re.match(r"IDv(\d+)_", mangled)
    n = int(vector[1]) if vector else 1
    group, _, what = name.partition("_")
    if name == "__msl_ld":
        return {"atomic": 1}
    if name == "__msl_st":  # of a read-modify-write only the read counts
        return {} if i.arguments.split(")")[0].endswith(" 1") else {"atomic": 1}
    if name == "__msl_mma":
        return {"matrix": 1}
    if name in ("__msl_mload", "__msl_mstore"):
        return {f"{name[7:]}_{'device' if 'global' in mangled else 'threadgroup'}": 1}
    if name == "__msl_ballot" or what in VOTES:
        return {"vote": 1}
    if what in REDUCTIONS:
        return {"reduction" if group == "simd" else "quad_reduction": n}
    if what.startswith("prefix"):
        return {"scan": n}
    if name == "simd_shuffle":
        lane = re.sub(r"<[^>]*>", "", i.arguments).split(",")[1]
        return {"shuffle_any" if "%" in lane else "shuffle": n}
    if what.startswith("shuffle_and_fill"):
        return {"shuffle": 2 * n}
    if what.startswith(("shuffle", "broadcast")):
        return {"shuffle": n}
    raise CompileError(f"mode arithmetic knows no kind for {name}")


def _memory(f: Function, i: Instruction) -> Mapping[str, int]:
    pointer = next(t for t in reversed(i.types) if t.name == "ptr")
    space = _space(f, i.operands[-1], pointer.space) if i.operands else "constant"
    value = i.types[0]
    times = -(-value.lanes * max(8, value.bits) // 8 // LOAD_BYTES)
    return {f"{i.opcode}_{space}": times} if space != "argument" else {}


def _copy(f: Function, i: Instruction, name: str) -> Mapping[str, int]:
    """A copy or a fill of known length, in accesses of 16 bytes."""
    found = re.search(r"i64 (\d+), i1", i.arguments)
    if not found:
        raise CompileError(f"mode arithmetic can't count a {name} of a length that is not constant")
    times = -(-int(found[1]) // LOAD_BYTES)
    pointers = re.findall(r"ptr(?: addrspace\((\d+)\))?[^,]*?([%@][\w.$-]+)[,)]", i.arguments)
    to, *source = [_space(f, value, int(space or 0)) for space, value in pointers]
    kinds = Counter({f"store_{to}": times})
    for space in source[:1]:
        kinds[f"load_{space}"] += times
    return kinds


def _space(f: Function, value: str, space: int, seen: frozenset[str] = frozenset()) -> str:
    """Where the pointer `value` points: a name of SPACES, `table` for a constant array, `argument` for what the
    entry point is called with (a GPU has it in registers), `generic` if it can't be told."""
    if value.startswith("@"):
        return "table"
    maker = f.made_by.get(value)
    if f.name == ENTRY and maker is None and space == 0:
        return "argument"
    if maker is None or value in seen or maker.opcode not in ("getelementptr", "addrspacecast", "phi", "select"):
        return SPACES.get(space, "generic")
    pointers = maker.operands[1:] if maker.opcode == "select" else maker.operands
    if maker.opcode in ("getelementptr", "addrspacecast"):
        pointers = maker.operands[:1]
    source = next((t.space for t in maker.types if t.name == "ptr"), space)
    found = {_space(f, pointer, source, seen | {value}) for pointer in pointers}
    return found.pop() if len(found) == 1 else SPACES.get(space, "generic")


def _words(t: Type) -> int:
    """32-bit operations that one of a component takes."""
    return 1 if t.name in ("half", "bfloat", "float", "double") else -(-t.bits // 32)


def _once(f: Function, i: Instruction) -> Instruction | None:
    """The instruction that uses `i`'s result, if there is one and it uses it once."""
    users = f.users.get(i.result, [])
    return users[0] if len(users) == 1 else None


def _folded(f: Function, i: Instruction) -> bool:
    """Whether another instruction's count includes this: a comparison in a select, a shift in a bit field's extraction,
    a root in its inverse, the mask of a shift's amount, which OpenCL adds."""
    if i.opcode == "and" and i.last in ("31", "63"):
        return all(user.opcode in SHIFTS and user.last == i.result for user in f.users.get(i.result, ()))
    user = _once(f, i)
    if user is None:
        return False
    if i.opcode in ("icmp", "fcmp"):
        logical = user.opcode == "select" and user.types[1].name == "i1"
        return user.opcode in ("select", "zext", "sext", "uitofp") and user.operands[0] == i.result and not logical
    if i.opcode == "lshr":
        return user.opcode == "and" and _extracts(f, user)
    return i.callee.startswith("llvm.sqrt") and _inverse_root(f, user)


def _extracts(f: Function, i: Instruction) -> bool:
    """`x >> constant & mask`, one instruction on the GPU if the mask is all ones from the lowest bit."""
    constant = re.fullmatch(r"(?:splat \(i\d+ )?(\d+)\)?", i.last)
    maker = f.made_by.get(i.operands[0])
    if i.opcode != "and" or not constant or maker is None or maker.opcode != "lshr" or "%" in maker.last:
        return False
    mask = int(constant[1])
    return mask & (mask + 1) == 0 and _once(f, maker) is i


def _inverse_root(f: Function, i: Instruction) -> bool:
    one = i.opcode == "fdiv" and len(i.operands) == 1 and re.search(r"1\.0+e\+00|0x?H?3C00", i.rest)
    maker = f.made_by.get(i.operands[0]) if one else None
    return maker is not None and maker.callee.startswith("llvm.sqrt") and _once(f, maker) is i


def _only_addresses(f: Function) -> set[str]:
    """Integers whose values reach addresses, conditions of branches and each other, and nothing else."""
    passing = {"phi", "zext", "sext", "trunc", "icmp", "select", "freeze", "shl", "lshr", "ashr", "extractelement"}
    passing |= {"insertelement", *(op for op, kind in BINARY.items() if kind != "float")}
    ends = {"getelementptr", "inttoptr", "br", "switch", "load"}
    found = {name for name, i in f.made_by.items() if i.opcode in passing and f.users.get(name)}
    found = {name for name in found if not _is_float(f.made_by[name])}

    def stays(name: str) -> bool:
        return all(user.opcode in ends or user.result in found for user in f.users[name])

    while gone := {name for name in found if not stays(name)}:
        found -= gone
    return found


def _is_float(i: Instruction) -> bool:
    kind = i.types[1 if i.opcode == "select" and len(i.types) > 1 else 0].name
    return kind in ("half", "bfloat", "float", "double")
