"""FP8 checkpoints: E4M3 codes with one float32 factor a block, as DeepSeek-V3 and MiniMax-M2 store their linears."""

from __future__ import annotations

import mlx.core as mx

from ...errors import RotorError

NAN = 0x7F  # the only non-finite magnitude of E4M3 (OCP FP8, "fn" variant); it has no infinities


def dequantize(codes: mx.array, scale_inv: mx.array, block: tuple[int, int], name: str = "weight") -> mx.array:
    """Weights [M, N] float32 from E4M3 `codes` [M, N] uint8 and `scale_inv` [ceil(M/bm), ceil(N/bn)] float32.

    Each block of `block` = (bm, bn) codes is multiplied by its factor; the last row and column of blocks may be cut
    short. `name` is for errors.

    Raises:
        RotorError: NaN codes or factors that are not finite, by `name`; factors whose shape doesn't fit.
    """
    (rows, cols), (bm, bn) = codes.shape, block
    expected = (-(-rows // bm), -(-cols // bn))
    if tuple(scale_inv.shape) != expected:
        raise RotorError(f"{name}: scales of shape {tuple(scale_inv.shape)}, blocks of {bm}x{bn} need {expected}")
    # Checked on the codes: not every backend's conversion turns them into NaN.
    bad = mx.any((codes & NAN) == NAN)
    if (bad | ~mx.all(mx.isfinite(scale_inv))).item():
        raise RotorError(f"{name}: holds NaN or infinite values; the source checkpoint is damaged")
    factors = mx.repeat(scale_inv.astype(mx.float32), bn, axis=1)[:, :cols]
    values = mx.from_fp8(codes, dtype=mx.float32)
    if rows % bm == 0:
        return (values.reshape(-1, bm, cols) * factors[:, None, :]).reshape(rows, cols)
    return values * mx.repeat(factors, bm, axis=0)[:rows]
