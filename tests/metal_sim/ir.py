"""LLVM's text form: functions, blocks and instructions of a module, and a counter at the start of each block."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

NAME = r'[%@](?:[\w.$-]+|"[^"]*")'
DEFINE = re.compile(rf"define .*?({NAME})\(")
LABEL = re.compile(r'(?:[\w.$-]+|"[^"]*"):')
INSTRUCTION = re.compile(rf"(?:({NAME}) = )?(?:(?:tail|musttail|notail) )?([a-z]\w*)(?: (.*))?$")
TYPE = re.compile(r"(?:<(\d+) x )?\b(i\d+|half|bfloat|float|double|ptr\b(?: addrspace\((\d+)\))?)")
FLAGS = re.compile(
    r"^(?:(?:nuw|nsw|exact|disjoint|nneg|samesign|inbounds|volatile|fast|nnan|ninf|nsz|arcp|contract|afn|reassoc) )+"
)
COUNTERS = "__msl_counters"  # the runtime's: the running lane's counters
NOTE = "__msl_mixes"  # what a module exports, read by worker.py


@dataclass(frozen=True)
class Type:
    """Of a value: `lanes` components of `name`, and the address space of a pointer."""

    name: str
    lanes: int = 1
    space: int = 0

    @property
    def bits(self) -> int:
        """Of one component."""
        widths = {"half": 16, "bfloat": 16, "float": 32, "double": 64}
        return widths.get(self.name) or (64 if self.name == "ptr" else int(self.name[1:]))


@dataclass(frozen=True, eq=False)
class Instruction:
    """`result` = `opcode` `rest`; `result` is empty where there is none."""

    result: str
    opcode: str
    rest: str

    @cached_property
    def operands(self) -> list[str]:
        """Names of the values it uses, as often as it does. Labels are none."""
        if self.opcode == "phi":
            return re.findall(rf"\[ ({NAME}),", self.rest)
        return re.findall(NAME, re.sub(rf"label {NAME}", "", self.rest))

    @cached_property
    def types(self) -> list[Type]:
        """The types named, in order: of a binary operation its operands', of a conversion from and to."""
        found = TYPE.finditer(re.sub(NAME, "", FLAGS.sub("", self.rest)))
        return [Type(m[2].split(" ")[0], int(m[1] or 1), int(m[3] or 0)) for m in found]

    @cached_property
    def last(self) -> str:
        """The second operand of a binary operation as written: a value's name or a constant."""
        text = re.split(r", ![a-z]", self.rest)[0]
        depth = 0
        for i in range(len(text) - 1, -1, -1):
            depth += (text[i] in ")>]") - (text[i] in "(<[")
            if text[i] == "," and depth == 0:
                return text[i + 1 :].strip()
        return text

    @cached_property
    def callee(self) -> str:
        """Name of the function a call calls, without @; empty if it is a pointer."""
        found = re.search(r'@([\w.$-]+|"[^"]*")\(', self.rest)
        return found[1].strip('"') if found and self.opcode == "call" else ""

    @cached_property
    def arguments(self) -> str:
        """What stands between a call's parentheses, and after."""
        return self.rest.split(f"@{self.callee}(", 1)[-1]


@dataclass
class Block:
    """A basic block: where in the module's lines a counter can stand, and its instructions."""

    counter_line: int = 0
    instructions: list[Instruction] = field(default_factory=list)


@dataclass
class Function:
    """A function that the module defines."""

    name: str
    blocks: list[Block] = field(default_factory=list)

    @cached_property
    def made_by(self) -> dict[str, Instruction]:
        return {i.result: i for block in self.blocks for i in block.instructions if i.result}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Value -> the instructions that use it, as often as they do."""
        found: dict[str, list[Instruction]] = {}
        for block in self.blocks:
            for i in block.instructions:
                for operand in i.operands:
                    found.setdefault(operand, []).append(i)
        return found


def functions(text: str) -> list[Function]:
    """The functions a module defines. Raises ValueError for a line that is no instruction."""
    found: list[Function] = []
    inside = switch = False
    for number, line in enumerate(text.splitlines()):
        if not inside:
            if defined := DEFINE.match(line):
                found.append(Function(defined[1].strip('@"'), [Block(number + 1)]))
                inside = line.endswith("{")
            continue
        code = line.strip()
        if code == "}":
            inside = False
        elif switch:
            switch = "]" not in code
        elif LABEL.match(line):
            found[-1].blocks.append(Block(number + 1))
        elif code and not code.startswith((";", "#dbg")):
            read = INSTRUCTION.match(code)
            if not read:
                raise ValueError(f"line {number + 1} of the module is no instruction: {line}")
            block = found[-1].blocks[-1]
            block.instructions.append(Instruction(read[1] or "", read[2], read[3] or ""))
            if read[2] == "phi":
                block.counter_line = number + 1
            switch = read[2] == "switch" and code.endswith("[")
    return found


def with_counters(text: str, counted: Mapping[int, int], note: str) -> str:
    """The module with `counted`: line before which counter number n goes up by one. It exports `note`."""
    lines: list[str] = []
    for number, line in enumerate(text.splitlines()):
        if (n := counted.get(number)) is not None:
            lines += [
                f"  %msl.lane{n} = call ptr @{COUNTERS}()",
                f"  %msl.at{n} = getelementptr i64, ptr %msl.lane{n}, i64 {n}",
                f"  %msl.before{n} = load i64, ptr %msl.at{n}",
                f"  %msl.after{n} = add i64 %msl.before{n}, 1",
                f"  store i64 %msl.after{n}, ptr %msl.at{n}",
            ]
        # a counter is memory: no function is free of side effects any more
        lines.append(re.sub(r"\bmemory\([^)]*\)", "", line) if line.startswith(("attributes ", "define ")) else line)
    data = note.encode() + b"\0"
    string = "".join(chr(c) if 32 <= c < 127 and c not in b'"\\' else f"\\{c:02x}" for c in data)
    lines.append(f"declare ptr @{COUNTERS}()")
    lines.append(f'@{NOTE} = constant [{len(data)} x i8] c"{string}"')
    return "\n".join(lines) + "\n"
