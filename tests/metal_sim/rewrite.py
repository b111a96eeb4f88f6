"""Metal source to clang's C++ for OpenCL, line for line.

Most of the difference between the languages is macros (include/msl_core.h). What macros can't say is done here:
vectors built from a template name, address spaces behind member functions, variables in threadgroup memory, attributes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from .tokens import Stream, closing, split

Constants = Mapping[str | int, bool | int | float]


def rewrite(text: str, constants: Constants | None = None, lenient: bool = False) -> str:
    """The text that clang compiles, with the same line numbers.

    `constants` are the values of function constants, by name or index (default 0). `lenient` also takes
    `const thread T&` parameters that bind to values in other address spaces, which MLX's own files have.
    """
    stream = Stream(_attributes(text, constants or {}))
    _vector_constructors(stream)
    _member_spaces(stream, lenient)
    _threadgroup_variables(stream)
    return stream.text()


def _attributes(text: str, constants: Constants) -> str:
    """Function constants become values; attributes that clang refuses are blanked."""

    def constant(match: re.Match[str]) -> str:
        declaration, name, number = match.groups()
        value = constants.get(name, constants.get(int(number), 0) if number.isdigit() else 0)
        return f"{declaration}{name} = {str(value).lower() if isinstance(value, bool) else value};"

    def blank(match: re.Match[str]) -> str:
        return "\\\n" * match[0].count("\\\n") or "\n" * match[0].count("\n")

    declared = r"((?:constant|STEEL_CONST)\s+\w+\s+)(\w+)\s*\[\[\s*function_constant\((\w+)\)\s*\]\]\s*;"
    text = re.sub(declared, constant, text)
    text = re.sub(r"\[\[\s*host_name\([^\]]*\)\s*\]\]", blank, text)
    return re.sub(r"\[\[\s*kernel\s*\]\]", "", text)


def _vector_constructors(stream: Stream) -> None:
    """`vec<T, 4>(...)` to a helper's call; named vector types are macros."""
    s = stream.solid
    for k in range(len(s) - 1):
        if s[k] != "vec" or s[k + 1] != "<":
            continue
        end = closing(s, k + 1)
        if end < 0 or s[end] != ">" or s[end + 1 : end + 2] != ["("]:
            continue
        start = k - 2 if k >= 2 and s[k - 2 : k] == ["metal", "::"] else k
        if start and s[start - 1] == "operator":
            continue
        stream.replace(start, "::msl::make<" + s[start])
        stream.replace(end, "> >")


def _member_spaces(stream: Stream, lenient: bool) -> None:
    """Address spaces behind a member function's parameters, as OpenCL spells them."""
    s = stream.solid
    for k in range(1, len(s) - 1):
        if lenient and s[k - 1 : k + 1] == ["const", "thread"]:
            j = k + 1
            while j < len(s) and s[j] not in ("&", "*", ",", ")", ";", "="):
                j += 1
            if s[j : j + 1] == ["&"]:
                stream.replace(k, "")
        if s[k] == "constant" and s[k + 1] in (":", "{", ";") and s[k - 1] == ")":
            stream.replace(k, "__constant")
        if s[k] == "thread" and s[k + 1] in (":", "{", ";", "requires"):
            behind = s[k - 1] == ")" or s[k - 2 : k] == [")", "const"]
            if behind and _runs_on_temporaries(s, k):
                stream.replace(k, "")


def _runs_on_temporaries(s: list[str], k: int) -> bool:
    """Whether the member function before `s[k]` is a constructor or an operator: OpenCL keeps those generic."""
    j = k - 1 if s[k - 1] == ")" else k - 2
    depth = 0
    while j >= 0:
        depth += (s[j] == ")") - (s[j] == "(")
        if depth == 0:
            break
        j -= 1
    for q in range(j - 1, -1, -1):
        if s[q] == "operator":
            return True
        if s[q] in (";", "{", "}") or q < j - 6:
            break
    return s[j - 2] in (";", "{", "}", ":", "METAL_FUNC", "constexpr", "explicit", ">", "inline", ")")


def _threadgroup_variables(stream: Stream) -> None:
    """`threadgroup T x[n];` in a function to a reference into the arena that the runtime watches."""
    s = stream.solid
    k = 0
    while k < len(s):
        begins = k == 0 or s[k - 1] in (";", "{", "}", "static", "]")
        if s[k] == "threadgroup" and begins:
            end, body = _declaration(s, k)
            declared = _declarators(body) if end else []
            if declared:
                stream.replace(k, "".join(f"MSL_TG(__COUNTER__, {decl}, {name});" for decl, name in declared))
                for j in range(k + 1, end + 1):
                    stream.replace(j, "")
                k = end
        k += 1


def _declaration(s: list[str], k: int) -> tuple[int, list[str]]:
    """(index of the `;`, tokens without it) of the variable declared at `s[k]`; (0, []) for anything else."""
    j = k + 1
    while j < len(s) and s[j] not in (";", "{"):
        j += 1
    body = s[k + 1 : j]
    if j < len(s) and s[j] == "{" and s[j - 1] == "=":  # Metal leaves threadgroup memory undefined all the same
        body, j = body[:-1], closing(s, j) + 1
    if j >= len(s) or s[j] != ";" or body[:1] == ["("]:
        return 0, []
    depth = 0
    for token in body:
        depth += (token in "([<") - (token in ")]>")
        if depth == 0 and token in ("*", "&", "=", "&&"):
            return 0, []
    return j, body


def _declarators(body: list[str]) -> list[tuple[str, str]]:
    """`T a[3], b` -> [("T a__tgt [ 3 ]", "a"), ("T b__tgt", "b")]; empty if it is no such declaration."""
    found: list[tuple[str, str]] = []
    base = ""
    for part in split(body):
        depth, name_end = 0, len(part)
        for q, token in enumerate(part):
            depth += (token == "<") - (token == ">")
            if token == "[" and depth == 0:
                name_end = q
                break
        if name_end == 0 or not part[name_end - 1].isidentifier():
            return []
        name = part[name_end - 1]
        base = base or " ".join(part[: name_end - 1])
        if not base:
            return []
        found.append((f"{base} {name}__tgt {' '.join(part[name_end:])}", name))
    return found
