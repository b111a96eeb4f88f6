"""mlx_lm.server's model provider, with compressed caches attached to every model it loads."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import server as stock
from mlx_lm.models.cache import make_prompt_cache

from ..cache import Scheme
from ..errors import RotorError
from ..host import report, versions
from ..host.attachment import attach
from ..host.experts import AUTO, attach_experts, mode_of_draft
from ..host.kv_scales import came_from
from ..host.loading import explained, located, run_dtype
from ..host.report import ExpertReport
from ..kernels import backend


def kv_report(caches: Sequence[Any], scheme: Scheme | None, kv_bits: int | None) -> dict[str, Any]:
    """The KV cache in `/health`: scheme, backend, layers by codecs, windows, and why layers were left alone.

    Args:
        kv_bits: the bits that mlx_lm itself quantizes exact caches to, None for none.
    """
    layers = report.layers(caches)
    exact = "exact" if kv_bits is None else f"mlx_lm's {kv_bits} bits"
    compressed = [
        {"layers": at, "k": k, "v": v, "runs_as": report.runs_as(k, v)} for (k, v), at in layers.codecs.items()
    ]
    return {
        "scheme": scheme.name if scheme else exact,
        "backend": backend(),
        "sinks": scheme.sinks if scheme else None,
        "ring": scheme.ring if scheme else None,
        "compressed": compressed,
        "windows": [{"layers": at, "tokens": width} for width, at in layers.windows.items()],
        "left_alone": [{"layers": at, "why": why} for why, at in layers.reasons.items()],
    }


class Provider(stock.ModelProvider):
    """Loads models as mlx_lm.server does and attaches `scheme`, a class attribute, to each; None leaves them alone.

    Attributes:
        experts: a class attribute, the mode that `attach_experts` is given; expert_report: its report of the model.
        kv: `kv_report` of the loaded model, None while there is none.
        line: the same as a line of text.
        logits: the width of the model's output; token ids are below it.
    """

    scheme: Scheme | None = None
    experts: str = AUTO
    model: Any
    tokenizer: Any
    draft_model: Any
    model_key: Any

    def __init__(self, cli_args: argparse.Namespace) -> None:
        versions.check()
        if self.scheme is not None and cli_args.kv_bits is not None:
            raise RotorError("--kv-bits is mlx_lm's own cache and can't be combined with a compressed one; drop either")
        self.kv: dict[str, Any] | None = None
        self.expert_report: ExpertReport | None = None
        self.line, self.logits = "", 0
        super().__init__(cli_args)

    def reset(self) -> None:
        super().reset()
        self.kv, self.expert_report, self.line, self.logits = None, None, "", 0

    def load_default(self) -> None:
        if self.model is None:
            super().load_default()

    def _load(self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None) -> None:
        target = located(model_path)
        draft = located(draft_model_path) if draft_model_path is not None else None
        try:
            with explained(target):
                super()._load(target, adapter_path, draft)
            run_dtype(self.model)
            if Path(target).is_dir():
                came_from(self.model, target)
            if self.draft_model is not None:
                run_dtype(self.draft_model)
            if self.scheme is not None:
                attach(self.model, self.scheme)
            caches = make_prompt_cache(self.model)
            alone = self.draft_model is not None or self.cli_args.kv_bits is not None
            self.is_batchable = not alone and all(hasattr(c, "merge") for c in caches)
            self.kv = kv_report(caches, self.scheme, self.cli_args.kv_bits)
            self.line = report.describe(caches)
            # The shape is known without running the model.
            self.logits = self.model(mx.array([[0]])).shape[-1]
            self.expert_report = attach_experts(self.model, self.experts)
            if self.expert_report.layers:
                self.line += f"; experts: {self.expert_report.describe()}"
            if self.draft_model is not None:
                drafts = attach_experts(self.draft_model, mode_of_draft(self.experts))
                self.line += f"; the draft model's experts: {drafts.describe()}" if drafts.layers else ""
            self.model_key = (model_path, adapter_path, draft_model_path)
        except BaseException:
            # A model without the caches that were asked for must not stay for the next request.
            self.reset()
            raise
