"""ERNIE 4.5's mixtures of experts: DeepSeek's names, softmax or sigmoid scores without a bias."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.nn as nn

from .deepseek import ARCHITECTURE as DEEPSEEK
from .router import Block, Choice, Routing, add_shared, gate
from .tree import MLP

ARCHITECTURE = replace(
    DEEPSEEK,
    model_types=("ernie4_5_moe",),
    drop=(*DEEPSEEK.drop, "model.mtp_*.**", MLP + "moe_statics.e_score_correction_bias"),
)


def _choice(block: Any) -> Choice:
    scores: Any = "softmax" if isinstance(block.gate_act, nn.Softmax) else "sigmoid"
    return Choice(Routing(scores, True, floor=1e-12, upcast=True, precise=False), block.k)


ROUTERS = (Block("ernie4_5_moe.Ernie4_5_MoeMLP", "05cbd2b7f59c", _choice, gate, cast=True, finish=add_shared),)
