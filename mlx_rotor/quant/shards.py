"""A plan's entries cut into weight files, and the bytes of those files."""

from __future__ import annotations

from collections.abc import Mapping

from .plan import Entry, Plan
from .safetensors_io import header_bytes

SHARD_BYTES = 4_000_000_000  # a weight file at most


def cut(plan: Plan, limit: int) -> dict[str, list[Entry]]:
    """The plan's entries, in order, by the name of the file they go to.

    A file holds at most `limit` bytes of tensors; a larger entry gets a file of its own.
    """
    parts: list[list[Entry]] = []
    used = 0
    for entry in plan.entries:
        if not parts or used + entry.nbytes > limit:
            parts.append([])
            used = 0
        parts[-1].append(entry)
        used += entry.nbytes
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": entries for i, entries in enumerate(parts, 1)}


def size(files: Mapping[str, list[Entry]]) -> int:
    """Bytes of the files of `cut`, headers included."""
    return sum(
        len(header_bytes(o for e in entries for o in e.outputs)) + sum(e.nbytes for e in entries)
        for entries in files.values()
    )


def file_bytes(plan: Plan, shard_bytes: int) -> int:
    """Bytes of the plan's weight files to the last one, headers included; index, config and tokenizer are not."""
    return size(cut(plan, shard_bytes))
