"""A checkpoint's tokenizer without its model.

From a user's words and images to what the model takes in, by mlx_lm's own rules.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_tokenizer

from ..errors import RotorError
from .loading import explained


def tokenizer(folder: str | Path) -> Any:
    """mlx_lm's tokenizer of a checkpoint folder.

    Raises:
        RotorError: there is none, or it can't be read.
    """
    with explained(str(folder)):
        return load_tokenizer(Path(folder))


@dataclass(frozen=True)
class Prompt:
    """tokens: ids; embeddings: [len(tokens), hidden] where images stand among them, else None."""

    tokens: list[int]
    embeddings: mx.array | None = None


def render(
    tokenizer: Any,
    text: str,
    *,
    system: str | None = None,
    prefill: str | None = None,
    template_config: str | None = None,
    after_cache: bool = False,
) -> str:
    """`text` as a user's turn in the tokenizer's chat template; `after_cache` leaves out what stands before it.

    Raises:
        RotorError: `template_config` is no JSON object, or the template fails.
    """
    try:
        config = json.loads(template_config or "{}")
    except json.JSONDecodeError as e:
        raise RotorError(f"--chat-template-config is not JSON: {e}") from e
    if not isinstance(config, dict):
        raise RotorError('--chat-template-config must be a JSON object such as {"enable_thinking": false}')

    def whole(content: str) -> str:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": content})
        messages += [{"role": "assistant", "content": prefill}] if prefill is not None else []
        return templated(
            tokenizer,
            messages,
            tokenize=False,
            continue_final_message=prefill is not None,
            add_generation_prompt=prefill is None,
            **config,
        )

    rendered = whole(text)
    if not after_cache:
        return rendered
    before, found, _ = whole("<query>").partition("<query>")
    if not found:
        raise RotorError("the chat template of this model leaves out what a user says; use --ignore-chat-template")
    return rendered[len(before) :]


def templated(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> Any:
    """`messages` in the tokenizer's chat template: text, or with mlx_lm's default `tokenize=True` token ids.

    Raises:
        RotorError: the template fails.
    """
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as e:  # a template is a program of the model's, which may raise anything
        raise RotorError(f"the chat template of this model fails: {e or type(e).__name__}") from e


def encode(tokenizer: Any, text: str, *, rendered: bool) -> Prompt:
    """A rendered template carries its own special tokens.

    Raises:
        RotorError: nothing to encode.
    """
    tokens = tokenizer.encode(text, add_special_tokens=not rendered)
    if not tokens:
        raise RotorError("the prompt is empty")
    return Prompt(tokens)


def encode_with_images(
    model: Any, config: dict[str, Any], tokenizer: Any, text: str, files: list[str], *, rendered: bool
) -> Prompt:
    """As `encode`, with image files at the prompt's image placeholders.

    Raises:
        RotorError: the model takes no images, or a file is none.
    """
    processor = importlib.import_module("mlx_lm.generate").load_processor(model, config)
    if processor is None:
        raise RotorError("this model takes no images; leave out --image")
    try:
        from PIL import Image

        images = [np.asarray(Image.open(f).convert("RGB")) for f in files]
    except ImportError as e:
        raise RotorError("--image needs Pillow; run: pip install pillow") from e
    except OSError as e:
        raise RotorError(f"can't read an image: {e}") from e
    text, pixels = processor(text, images=images)
    tokens = encode(tokenizer, text, rendered=rendered).tokens
    embeddings = model.embed_inputs(mx.array(tokens), pixel_values=pixels)
    mx.eval(embeddings)
    return Prompt(tokens, embeddings)
