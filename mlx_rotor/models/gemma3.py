"""Gemma 3's text models: Llama's names, and embeddings that serve as the head unless the checkpoint has one."""

from __future__ import annotations

from dataclasses import replace

from .llama import ARCHITECTURE as LLAMA

ARCHITECTURE = replace(LLAMA, model_types=("gemma3_text",), optional=("lm_head.weight",))
