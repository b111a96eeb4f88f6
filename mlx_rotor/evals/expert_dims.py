"""Dimensions of expert layers of models that people run, and what formats their three projections are measured in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Dims:
    """A layer of experts: `chosen` of `experts`, each `hidden` to `intermediate` and back."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    chosen: int

    def shapes(self) -> Iterator[tuple[int, int]]:
        """Rows and columns of gate, up and down."""
        yield from ((self.intermediate, self.hidden), (self.intermediate, self.hidden))
        yield (self.hidden, self.intermediate)


Triple = Sequence[tuple[str, int, int]]  # mode, bits and group size of gate, up and down

MINIMAX = Dims("MiniMax-M2.7", 3072, 1536, 256, 8)
QWEN3 = Dims("Qwen3-30B-A3B", 2048, 768, 128, 8)
GPT_OSS = Dims("gpt-oss-20b", 2880, 2880, 32, 4)
MIXTRAL = Dims("Mixtral-8x7B", 4096, 14336, 8, 2)
DEMO = Dims("bundled model", 256, 64, 16, 2)

AFFINE_2_3 = (("affine", 2, 64), ("affine", 2, 64), ("affine", 3, 64))
AFFINE_3, AFFINE_4 = (("affine", 3, 64),) * 3, (("affine", 4, 64),) * 3
LLOYD_2_3 = (("lloyd", 2, 256), ("lloyd", 2, 256), ("lloyd", 3, 256))
LLOYD_3_4 = (("lloyd", 3, 256), ("lloyd", 3, 256), ("lloyd", 4, 256))
IQ4_NL = (("iq4_nl", 4, 16),) * 3
