"""Rules of Metal that C++ for OpenCL does not have, read off clang's warnings and its dump of the syntax tree."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from . import build, tools

FOREIGN = ("LambdaExpr", "CXXNewExpr", "GotoStmt", "CXXThrowExpr", "CXXTryStmt", "CXXDynamicCastExpr")
NODE = re.compile(rf"\b((?:ParmVar|Var|Field)Decl|CStyleCastExpr|{'|'.join(FOREIGN)})\b.*?<([^>]*)>(.*)")
PLACE = re.compile(
    rf"{re.escape(build.KERNEL_FILE)}:(\d+):\d+|\bline:(\d+):\d+|(?:<|, |> )([^\s<>,:]+\.(?:h|clcpp)):(\d+):\d+"
)
FLAGS = ["-fsyntax-only", "-Wconversion", "-Wno-sign-conversion", "-Wno-implicit-int-conversion"]
# A function, and whether the compiler made it: a copy constructor takes a reference that nobody wrote.
FUNCTION = re.compile(r"\b(?:Function|CXXMethod|CXXConstructor|CXXDestructor|CXXConversion)Decl\b(.*)")
RULED = ("ParmVarDecl", "VarDecl", "FieldDecl", "CStyleCastExpr", *FOREIGN)
PLACED = ("line:", f"{build.KERNEL_FILE}:", ".h:", ".clcpp:")
DUMP = ["-Xclang", "-ast-dump", "-fno-color-diagnostics"]


def lint(text: str, last_line: int, written: int = 0) -> list[tuple[int, str]]:
    """(line, what is wrong) in rewritten source `text`; lines after `last_line` are the simulator's own.

    Of texts that are equal in their first `written` characters, and behind these but for the digits of numbers, such as
    template arguments, only one is looked at.
    """

    def make(path: Path) -> None:
        (path.parent / build.KERNEL_FILE).write_text(text)
        command = [*tools.clang(), *build.front_end("fast"), *FLAGS, *DUMP, build.KERNEL_FILE]
        said = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=False)
        path.write_text(json.dumps([*_messages(said.stderr), *_nodes(said.stdout)]))

    same = text[:written] + re.sub(r"\d+", "0", text[written:])
    key = f"lint {Path(__file__).read_text()}\n{build.front_end('fast')}\n{same}"
    found = json.loads(build.kept(key, ".json", make).read_text())
    return list(dict.fromkeys((line, message) for line, message in found if line <= last_line))


def _messages(stderr: str) -> list[tuple[int, str]]:
    found = []
    for line, kind, message in re.findall(r"^[^\n:]*:(\d+):\d+: (error|warning): ([^\n]*)", stderr, re.MULTILINE):
        to_bfloat = "to '__bf16'" in message or re.search(r"to '(\w+ )?bfloat", message)
        if kind == "error":
            found.append((int(line), message))
        elif to_bfloat or ("'__bf16'" in message and "half" in message):
            found.append((int(line), f"Metal converts nothing to bfloat, nor bfloat to half, by itself: {message}"))
    return found


def _nodes(dump: str) -> list[tuple[int, str]]:
    """Rules on the syntax tree. The dump names a file or line only where it changes."""
    found = []
    line, ours, generated = 0, False, False
    for text in dump.splitlines():
        # Most lines match nothing, and to look for a part of them is quicker than to match.
        if ("Decl 0x" in text) and (function := FUNCTION.search(text)):
            generated = " implicit " in function[1]
        placed = any(part in text for part in PLACED)
        for in_kernel, same_file, other, other_line in PLACE.findall(text) if placed else ():
            if in_kernel:
                line, ours = int(in_kernel), True
            elif same_file and ours:
                line = int(same_file)
            elif other:
                ours = other.endswith(build.KERNEL_FILE)
                line = int(other_line) if ours else line
        node = NODE.search(text) if ours and any(kind in text for kind in RULED) else None
        if node and not (generated and node[1] == "ParmVarDecl") and (message := _rule(node[1], node[3])):
            found.append((line, message))
    return found


def _rule(node: str, rest: str) -> str | None:
    types = re.findall(r"'([^']*)'", rest)
    kind = types[0] if types else ""
    if node in FOREIGN:
        return f"{node} is not Metal"
    if node == "CStyleCastExpr":
        bits = "<BitCast>" in rest and "ext_vector_type" in rest + kind and "*" not in kind
        return f"C-style cast between vectors: clang keeps the bits, Metal converts: '{kind}'" if bits else None
    if "__generic" in kind and "implicit" not in rest and " this" not in rest:
        return f"pointer or reference without an address space: '{kind}'"
    if node == "VarDecl" and "__global" in re.split(r"[*&]", kind)[-1]:
        return f"program-scope and static variables must be 'constant': '{kind}'"
    return None
