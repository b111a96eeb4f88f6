"""transformers' MiniMaxM2 in PyTorch: float32, eager attention, experts one by one. Knows nothing of mlx."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from traces import LayerTrace, Trace
from transformers import MiniMaxM2ForCausalLM
from transformers.utils import logging


class Oracle:
    """A checkpoint as transformers runs it. Raises ValueError where it does not read every tensor."""

    def __init__(self, folder: Path) -> None:
        logging.disable_progress_bar()
        self.model, told = MiniMaxM2ForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
        if wrong := {kind: names for kind, names in told.items() if names}:
            raise ValueError(f"{folder} is not what transformers reads: {wrong}")
        self.model.eval()
        torch.set_num_threads(1)  # more spin where other processes are at work

    @torch.no_grad()
    def trace(self, tokens: np.ndarray) -> Trace:
        """Of tokens [T]."""
        seen: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] = {}
        hooks = []
        for i, layer in enumerate(self.model.model.layers):
            for name, module in (("attention", layer.self_attn), ("experts", layer.mlp), ("layer", layer)):

                def keep(_: Any, given: Any, named: Any, out: Any, key: tuple[int, str] = (i, name)) -> None:
                    entered = given[0] if given else named["hidden_states"]
                    seen[key] = entered[0], (out[0] if isinstance(out, tuple) else out)[0]

                hooks.append(module.register_forward_hook(keep, with_kwargs=True))
        try:
            logits = self.model(torch.from_numpy(tokens)[None], use_cache=False).logits[0]
        finally:
            for hook in hooks:
                hook.remove()
        arrays = {key: tuple(x.numpy() for x in pair) for key, pair in seen.items()}
        layers = range(len(self.model.model.layers))
        return Trace(
            tuple(LayerTrace(arrays[i, "attention"], arrays[i, "experts"], arrays[i, "layer"][1]) for i in layers),
            logits.numpy(),
        )

    @torch.no_grad()
    def route(self, layer: int, hidden: np.ndarray, router: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(weights, margin) that `layer` routes hidden states [T, D] with, with router weights [E, D] of one's own.

        weights [T, E]: 0 for experts that are not chosen. margin [T]: how much the last expert chosen has over the
        first that isn't, in the scores that decide.
        """
        block = self.model.model.layers[layer].mlp
        kept = block.gate.weight.data
        try:
            if router is not None:
                block.gate.weight.data = torch.from_numpy(router)
            logits, weights, chosen = block.gate(torch.from_numpy(hidden), block.e_score_correction_bias)
        finally:
            block.gate.weight.data = kept
        ranked = (logits.sigmoid() + block.e_score_correction_bias).sort(dim=-1, descending=True).values
        margin = ranked[:, block.top_k - 1] - ranked[:, block.top_k]
        return torch.zeros_like(logits).scatter(1, chosen, weights).numpy(), margin.numpy()

    @torch.no_grad()
    def greedy(self, tokens: np.ndarray, steps: int) -> tuple[list[int], float]:
        """(the next `steps` tokens, the least lead that one of them had over the second likeliest, in logits)."""
        made = self.model.generate(
            torch.from_numpy(tokens)[None],
            max_new_tokens=steps,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        two = torch.stack(made.logits)[:, 0].topk(2).values
        return made.sequences[0, len(tokens) :].tolist(), float((two[:, 0] - two[:, 1]).min())
