"""The text that a model reads while its inputs are measured, as token sequences of one length."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...bundled import calibration_text
from ...errors import RotorError
from ...host.prompting import tokenizer

# Second moments of K inputs want a multiple of K rows: 196,608 tokens for 3072 inputs, 16,384 for 256.
TOKENS_PER_INPUT = 64
LENGTH = 2048
# How config.json spells the hidden size and the longest sequence.
HIDDEN = ("hidden_size", "d_model", "n_embd", "dim", "model_dim")
CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")


def read(path: str | Path) -> str:
    """A text file, or the "text" of every line of a `.jsonl` file, blank lines between.

    Raises:
        RotorError: not readable as UTF-8 text, or a line that is no JSON object with a "text".
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise RotorError(f"--calibration {path}: not readable as UTF-8 text: {e}") from e
    if path.suffix not in (".jsonl", ".ndjson"):
        return text
    parts = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            part = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as e:
            raise RotorError(f'--calibration {path}, line {number}: expected a JSON object with a "text"') from e
        if not isinstance(part, str):
            raise RotorError(f'--calibration {path}, line {number}: "text" is no string')
        parts.append(part)
    return "\n\n".join(parts)


def default_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """(sequences, tokens in each) for a model of this config.json: 96 of 2048 for a hidden size of 3072."""
    inner = config.get("text_config")
    config = {**config, **inner} if isinstance(inner, Mapping) else config
    hidden = next((int(config[key]) for key in HIDDEN if isinstance(config.get(key), int)), 4096)
    context = next((int(config[key]) for key in CONTEXT if isinstance(config.get(key), int)), LENGTH)
    length = min(LENGTH, max(256, hidden), context)
    return max(1, min(TOKENS_PER_INPUT * hidden, 96 * LENGTH) // length), length


def prepare(
    folder: str | Path,
    config: Mapping[str, Any],
    path: str | Path | None = None,
    count: int | None = None,
    length: int | None = None,
) -> np.ndarray:
    """int32 [sequences, length]: a text file, or the bundled text, in the tokens of the checkpoint in `folder`; of the
    default size where none is given.

    Raises:
        RotorError: as `read` and `sequences`; no tokenizer there.
    """
    usual = default_size(config)
    text = calibration_text() if path is None else read(path)
    return sequences(tokenizer(folder), text, count or usual[0], length or usual[1])


def sequences(words: Any, text: str, count: int, length: int) -> np.ndarray:
    """int32 [count or fewer, length]: pieces of `text` in the tokens of the tokenizer `words`. They don't overlap, are
    spread evenly, and each stands behind the token a text begins with; fewer where the text has no room for `count`.

    Raises:
        RotorError: a size that is no size, or a text too short for one sequence.
    """
    if count < 1 or length < 2:
        raise RotorError(f"calibration on {count} sequences of {length} tokens: at least 1 of 2")
    tokens = words.encode(text, add_special_tokens=False, verbose=False)
    first = [t for t in words.encode("") if t == words.bos_token_id][:1]
    need = length - len(first)
    count = min(count, len(tokens) // need)
    if not count:
        raise RotorError(f"the calibration text has {len(tokens)} tokens, too few for one sequence of {length}")
    stride = len(tokens) // count
    rows = [[*first, *tokens[i * stride : i * stride + need]] for i in range(count)]
    return np.array(rows, np.int32)
