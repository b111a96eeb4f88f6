"""Architectures run layer by layer give what mlx_lm's own forward gives, and those that can't are refused."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchGLU

import zoo
from mlx_rotor.errors import RotorError
from mlx_rotor.host.layerwise import Layerwise
from mlx_rotor.host.streamed import StreamedExperts, by_expert

LENGTH = 20
# Plain, mixtures with and without biases, latent attention, masks by layer, recurrence, a wrapped model, positions as
# an argument, a class asked for.
RUN = ["llama", "gemma3_text", "minimax", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next", "glm4_moe"]
RUN += ["kimi_k25", "ministral3", "falcon_h1", "olmo_hybrid", "llama4"]
REFUSED = {
    "gemma4_text": "not enough values",
    "gemma3n": "another array beside hidden states",
    "hunyuan": "not enough values",
    "rwkv7": "not enough values",
}


class Held:
    """Parameters of a model in memory, and which were asked for."""

    def __init__(self, model):
        self.parameters, self.asked = dict(tree_flatten(model.parameters())), []

    def names(self):
        return self.parameters.keys()

    def whole(self, name):
        self.asked.append(name)
        return self.parameters[name]

    def part(self, name, expert):
        self.asked.append(name)
        return self.parameters[name][expert]


def tokens():
    return mx.array([[(5 * i * i + 3 * i + 1 + 7 * b) % 61 for i in range(LENGTH)] for b in range(3)])


@pytest.mark.parametrize("model_type", RUN)
def test_the_logits_are_mlx_lms(model_type):
    model = zoo.model_of(model_type)
    walk = Layerwise(zoo.config(model_type), Held(model), LENGTH)
    hidden = walk.embed(tokens())
    for number in range(walk.layers):
        with walk.layer(number) as layer:
            # In two chunks, as long texts are.
            hidden = mx.concatenate([layer(hidden[:2]), layer(hidden[2:])])
    with walk.end() as run:
        logits = run(hidden)
        mx.eval(logits)
    assert zoo.worst(logits, model(tokens())) <= 1e-5


@pytest.mark.parametrize("model_type", REFUSED)
def test_layers_that_pass_more_than_hidden_states_are_refused(model_type):
    with pytest.raises(RotorError, match=REFUSED[model_type]):
        Layerwise(zoo.config(model_type), Held(zoo.model_of(model_type)), LENGTH)


def test_only_what_is_needed_is_read():
    held = Held(zoo.model_of("minimax"))
    walk = Layerwise(zoo.config("minimax"), held, LENGTH)
    assert held.asked == []
    hidden = walk.embed(tokens())
    assert "model.embed_tokens.weight" in held.asked and "lm_head.weight" not in held.asked
    held.asked.clear()
    with walk.layer(1) as layer:
        assert held.asked and not any("switch_mlp" in name for name in held.asked)
        layer(hidden)
    assert all(name.startswith("model.layers.1.") for name in held.asked)
    held.asked.clear()
    with walk.end():
        assert sorted(held.asked) == ["lm_head.weight", "model.norm.weight"]


def test_a_tied_embedding_is_read_for_logits():
    held = Held(zoo.build("llama", tie_word_embeddings=True))
    walk = Layerwise({**zoo.config("llama"), "tie_word_embeddings": True}, held, LENGTH)
    with walk.end():
        assert "model.embed_tokens.weight" in held.asked


def test_a_head_that_the_source_ties_to_the_embeddings_is_dropped():
    model, held = zoo.model_of("gemma3_text"), Held(zoo.model_of("gemma3_text"))
    del held.parameters["lm_head.weight"]
    walk = Layerwise(zoo.config("gemma3_text"), held, LENGTH)
    hidden = mx.random.normal((1, LENGTH, 64))
    with walk.end() as run:
        logits = run(hidden)
        assert mx.allclose(logits, model.model.embed_tokens.as_linear(model.model.norm(hidden)), atol=1e-4)


def test_everything_is_put_back():
    walk = Layerwise(zoo.config("minimax"), Held(zoo.model_of("minimax")), LENGTH)
    before = [(path, id(module)) for path, module in walk.model.named_modules()]
    weights = {name: id(array) for name, array in tree_flatten(walk.model.parameters())}
    hidden = walk.embed(tokens())
    name = "model.layers.0.self_attn.q_proj"
    with walk.layer(0, lambda *_: None, (name,)) as layer:
        layer(hidden)
    assert [(path, id(module)) for path, module in walk.model.named_modules()] == before
    assert {n: id(array) for n, array in tree_flatten(walk.model.parameters())} == weights


def test_a_watch_sees_the_inputs():
    model = zoo.model_of("minimax")
    walk = Layerwise(zoo.config("minimax"), Held(model), LENGTH)
    hidden, seen = walk.embed(tokens()), {}
    names = tuple(f"model.layers.0.self_attn.{x}_proj" for x in "qo")
    with walk.layer(0, seen.__setitem__, names) as layer:
        layer(hidden)
    first = model.model.layers[0]
    assert mx.allclose(seen[names[0]], first.input_layernorm(hidden), atol=1e-6)
    assert set(seen) == set(names)


def test_a_parameter_of_another_shape_is_refused():
    held = Held(zoo.model_of("llama"))
    held.parameters["model.layers.0.self_attn.q_proj.weight"] = mx.zeros((3, 3))
    walk = Layerwise(zoo.config("llama"), held, LENGTH)
    with pytest.raises(RotorError, match=r"q_proj.weight has shape \[3, 3\]"), walk.layer(0):
        pass


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 5), (40,)])
def test_streamed_experts_are_a_switch(bias, shape):
    mx.random.seed(1)
    switch = SwitchGLU(16, 24, 6, bias=bias)
    if bias:
        for name in ("gate_proj", "up_proj", "down_proj"):
            switch[name].bias = mx.random.normal(switch[name].bias.shape)
    streamed = StreamedExperts(switch, lambda name, expert: switch[name].weight[expert])
    x, indices = mx.random.normal((*shape, 16)), mx.random.randint(0, 5, (*shape, 3))
    assert mx.allclose(streamed(x, indices), switch(x, indices), atol=1e-5)


def test_rows_are_grouped_by_expert():
    chosen = np.array([[2, 0], [0, 5], [2, 0]])
    assert [(e, s.tolist()) for e, s in by_expert(chosen)] == [(0, [1, 2, 5]), (2, [0, 4]), (5, [3])]


def test_stand_ins_answer_for_their_layers():
    walk = Layerwise(zoo.config("olmo_hybrid"), Held(zoo.model_of("olmo_hybrid")), LENGTH)
    masks = [named.get("mask") for _, named in walk._calls]
    assert masks[:2] == [None, None] and masks[2] == "causal"
    assert walk.linear("lm_head") and not walk.linear("model.norm")
    assert isinstance(walk.model.lm_head, nn.Linear)
