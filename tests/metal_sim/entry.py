"""The C entry point of a kernel: casts buffer addresses and thread indices to the kernel's parameters."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .tokens import Stream, closing, split

# Attribute -> components. The order is that of `Ids` in runtime/state.h.
INDICES = {
    **dict.fromkeys(("thread_position_in_grid", "threads_per_grid", "grid_size", "grid_origin"), 3),
    **dict.fromkeys(("thread_position_in_threadgroup", "threads_per_threadgroup"), 3),
    **dict.fromkeys(("dispatch_threads_per_threadgroup", "threadgroup_position_in_grid", "threadgroups_per_grid"), 3),
    **dict.fromkeys(("thread_index_in_threadgroup", "thread_index_in_simdgroup", "simdgroup_index_in_threadgroup"), 1),
    **dict.fromkeys(("simdgroups_per_threadgroup", "dispatch_simdgroups_per_threadgroup", "threads_per_simdgroup"), 1),
    **dict.fromkeys(("thread_execution_width", "thread_index_in_quadgroup", "quadgroup_index_in_threadgroup"), 1),
    **dict.fromkeys(("quadgroups_per_threadgroup", "dispatch_quadgroups_per_threadgroup"), 1),
}
ARGUMENTS = "__private ulong* b, __private msl_ids* t"


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel: its type, its name, and what stands in its [[...]]."""

    type: str
    name: str
    attribute: str


def entry_point(text: str, kernel: str, template_arguments: list[str]) -> str:
    """`__msl_entry` for `kernel` of Metal source `text`, to be put after the rewritten source.

    Raises KeyError if `text` has no such kernel, TypeError for a parameter that the simulator can't provide.
    """
    template, parameters = _parameters(text, kernel)
    arguments = ", ".join(_argument(p) for p in parameters)
    ids = "struct msl_ids { " + " ".join(f"uint {name}[{n}];" for name, n in INDICES.items()) + " };\n"
    extern = f'extern "C" void __msl_entry({ARGUMENTS})'
    if not template:
        return f"{ids}{extern} {{ {kernel}({arguments}); }}\n"
    declared = ", ".join(" ".join(part) for part in template)
    names = ", ".join(part[: part.index("=")][-1] if "=" in part else part[-1] for part in template)
    wrap = f"template <{declared}> MSL_FN void __msl_wrap({ARGUMENTS}) {{ {kernel}<{names}>({arguments}); }}\n"
    return f"{ids}{wrap}{extern} {{ __msl_wrap<{', '.join(template_arguments)}>(b, t); }}\n"


def _parameters(text: str, kernel: str) -> tuple[list[list[str]], list[Parameter]]:
    """Template parameters (tokens of each) and parameters of `kernel`."""
    s = Stream(text).solid
    for k in range(1, len(s) - 1):
        if s[k - 1] != "void" or s[k] != kernel or s[k + 1] != "(":
            continue
        j = k - 1
        while j >= 0 and s[j] not in (";", "}", "{", "template"):
            j -= 1
        template = split(s[j + 2 : closing(s, j + 1)]) if j >= 0 and s[j] == "template" else []
        return template, [_parameter(p) for p in split(s[k + 2 : closing(s, k + 1)])]
    raise KeyError(f"no kernel {kernel} in the source")


def _parameter(part: list[str]) -> Parameter:
    attribute = ""
    for k in range(len(part) - 1):
        if part[k : k + 2] == ["[", "["]:
            attribute = "".join(part[k + 2 :]).split("]]")[0]
            part = part[:k]
            break
    return Parameter(" ".join(part[:-1]), part[-1], attribute)


def _argument(p: Parameter) -> str:
    if buffer := re.match(r"buffer\((\d+)\)", p.attribute):
        address = f"b[{buffer[1]}]"
        return f"*({p.type[:-1].strip()}*){address}" if p.type.endswith("&") else f"({p.type}){address}"
    if p.attribute not in INDICES:
        raise TypeError(f"parameter {p.name}: [[{p.attribute}]] is not provided")
    plain = p.type.replace("const", "").strip()
    scalar, digit = re.match(r"(\w+?)([23]?)$", plain).groups()
    width = int(digit or 1)
    if width > INDICES[p.attribute]:
        raise TypeError(f"parameter {p.name}: [[{p.attribute}]] has {INDICES[p.attribute]} components, not {width}")
    parts = ", ".join(f"({scalar})t->{p.attribute}[{i}]" for i in range(width))
    return f"{plain}{{{parts}}}" if width > 1 else parts
