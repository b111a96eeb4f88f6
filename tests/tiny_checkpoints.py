"""A tiny random MiniMax-M2 checkpoint with the bundled tokenizer, and a fake model that says what it is told."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.minimax import Model, ModelArgs

from mlx_rotor.bundled import MODEL


def write_checkpoint(folder, seed, vocab=2048):
    """A float32 checkpoint mlx_lm loads: 2 layers, 1 KV head of 128, random weights."""
    config = json.loads((MODEL / "config.json").read_text()) | {
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 4,
        "attn_type_list": [1, 1],
        "vocab_size": vocab,
        "max_position_embeddings": 512,
        "torch_dtype": "float32",
    }
    config.pop("quantization_config")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(MODEL / name, folder)
    model = Model(ModelArgs.from_dict(config))
    mx.random.seed(seed)
    # Wide enough that the random model's distributions differ from the uniform one.
    weights = {
        k: mx.random.normal(v.shape) * (0.3 if v.ndim > 1 else 0.1) + (1.0 if v.ndim == 1 else 0.0)
        for k, v in tree_flatten(model.parameters())
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Two random models, `a` and `b`, and `small` with a vocabulary of 2047."""
    root = tmp_path_factory.mktemp("models")
    return {
        "a": write_checkpoint(root / "a", 1),
        "b": write_checkpoint(root / "b", 2),
        "small": write_checkpoint(root / "small", 3, vocab=2047),
    }


class Tape:
    """A cache that only remembers which tokens it was fed, and in which portions."""

    def __init__(self):
        self.portions = []

    @property
    def tokens(self):
        return [t for portion in self.portions for t in portion]

    @property
    def state(self):
        return []


class Parrot:
    """A model whose greedy token after `script[:n]` is `script[n]`, whatever it was fed."""

    def __init__(self, script, vocab=64):
        self.script, self.vocab = script, vocab

    def __call__(self, ids, cache):
        before = len(cache[0].tokens)
        cache[0].portions.append(np.array(ids[0]).tolist())
        after = len(cache[0].tokens)
        following = [*self.script, *[0] * (after + 1 - len(self.script))][before + 1 : after + 1]
        return mx.array(np.eye(self.vocab, dtype=np.float32)[following])[None]


@pytest.fixture
def parrot():
    return Parrot


@pytest.fixture
def tape():
    return Tape
