"""Dense transformers with Llama's names: those in the checkpoint are the module tree's."""

from __future__ import annotations

from .architecture import Architecture, Tensor
from .tree import MLP, TRANSFORMER, UNUSED

ARCHITECTURE = Architecture(
    model_types=(
        *(
            "llama",
            "mistral",
            "ministral3",
            "qwen2",
            "qwen3",
            "glm",
            "glm4",
            "gemma",
            "gemma2",
            "phi3",
            "cohere",
            "cohere2",
        ),
        *(
            "olmo2",
            "olmo3",
            "granite",
            "ernie4_5",
            "exaone4",
            "helium",
            "hunyuan_v1_dense",
            "internlm3",
            "mimo",
            "minicpm",
        ),
        *(
            "nanbeige",
            "nemotron",
            "nemotron-nas",
            "seed_oss",
            "smollm3",
            "stablelm",
            "starcoder2",
            "telechat3",
            "iquestcoder",
            "xverse",
        ),
    ),
    tensors=(
        *TRANSFORMER,
        # Starcoder2's
        Tensor("mlp.up", MLP + "c_fc.weight"),
        Tensor("mlp.down", MLP + "c_proj.weight"),
        Tensor("bias", MLP + "c_*.bias"),
    ),
    drop=UNUSED,
)
