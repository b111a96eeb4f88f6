"""Prompt-cache files of mlx_lm, plain or compressed, under the scheme the user asked for."""

from __future__ import annotations

from typing import Any

from mlx_lm.models import cache as stock

from ..cache import RotorCache, Scheme
from ..errors import RotorError
from .attachment import compress, register


def load_prompt_cache(path: str, scheme: Scheme | None) -> tuple[list[Any], dict[str, Any]]:
    """(caches, metadata) of a file `mlx_lm cache_prompt` or this package wrote.

    Plain caches are compressed to `scheme`; compressed ones must already be of it.

    Raises:
        RotorError: an unreadable file, or one compressed to another scheme.
    """
    register()
    try:
        caches, metadata = stock.load_prompt_cache(path, return_metadata=True)
    except (OSError, RuntimeError, ValueError, KeyError, IndexError) as e:
        raise RotorError(f"can't read the prompt cache {path}: {str(e) or type(e).__name__}") from e
    ours = [(i, c) for i, c in enumerate(caches) if isinstance(c, RotorCache)]
    if ours and scheme is None:
        raise RotorError(f"the prompt cache {path} is compressed; leave out --kv exact, or make a plain one")
    for nth, (i, c) in enumerate(ours):
        assert scheme is not None
        held, wanted = (c.body_k.codec_name, c.body_v.codec_name), scheme.codecs(nth, len(ours))
        if held != wanted or (c.sinks, c.ring) != (scheme.sinks, scheme.ring):
            raise RotorError(
                f"the prompt cache {path} holds layer {i} as K {held[0]}, V {held[1]}, {c.sinks} sinks, ring {c.ring}; "
                f"{scheme.name} wants K {wanted[0]}, V {wanted[1]}, {scheme.sinks} sinks, ring {scheme.ring}"
            )
    if scheme is None or ours:
        return caches, metadata
    return compress(caches, scheme), metadata
