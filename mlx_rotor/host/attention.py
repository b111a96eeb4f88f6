"""The one wrapped function: `mx.fast.scaled_dot_product_attention` recognises views and attends to packed tokens.

Every model of mlx_lm reaches this function through the `mx.fast` module at call time, so the order of imports does not
matter, and ordinary arrays go straight to MLX's own.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..cache.view import paired

# MLX's own function, without the wrapper.
stock = mx.fast.scaled_dot_product_attention


def _attention(q: mx.array, k: mx.array, v: mx.array, *args: Any, **kwargs: Any) -> mx.array:
    handle = paired(k, v)
    if handle is None or args or kwargs.get("stream") is not None or "scale" not in kwargs:
        return stock(q, k, v, *args, **kwargs)
    return handle.attend(q, kwargs["scale"], kwargs.get("mask"), kwargs.get("sinks"))


_attention.__doc__ = stock.__doc__


def install() -> None:
    """Puts the wrapper in place; again does nothing."""
    mx.fast.scaled_dot_product_attention = _attention


def uninstall() -> None:
    """Puts MLX's own function back. Views still attend correctly, by evaluating to dequantized arrays."""
    mx.fast.scaled_dot_product_attention = stock


def installed() -> bool:
    return mx.fast.scaled_dot_product_attention is _attention
