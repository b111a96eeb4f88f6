"""The bundled model: MiniMax-M2's layout, its size, and that it does what its card says."""

import json
import random

import pytest

import mlx_rotor
from mlx_rotor.bundled import MODEL, held_out_text
from mlx_rotor.quality import chat, needle
from mlx_rotor.quant.safetensors_io import read_header

CONFIG = json.loads((MODEL / "config.json").read_text())
CARD = json.loads((MODEL / "training.json").read_text())


@pytest.fixture(scope="module")
def tensors():
    found = {}
    for file in sorted(MODEL.glob("*.safetensors")):
        for name, entry in read_header(file).items():
            found[name] = (entry.dtype, tuple(entry.shape), file.name)
    return found


def test_layout_is_minimax_m2s(tensors):
    assert CONFIG["architectures"] == ["MiniMaxM2ForCausalLM"] and CONFIG["model_type"] == "minimax_m2"
    assert CONFIG["quantization_config"]["weight_block_size"] == [128, 128]
    index = json.loads((MODEL / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for name, (_, _, file) in tensors.items()}
    assert len({file for _, _, file in tensors.values()}) > 1
    for name, (dtype, shape, _) in tensors.items():
        if name.endswith("_proj.weight") or (".experts." in name and name.endswith(".weight")):
            scale = tuple(-(-n // 128) for n in shape)
            assert dtype == "F8_E4M3" and tensors[f"{name}_scale_inv"][:2] == ("F32", scale), name
        elif name.endswith("e_score_correction_bias"):
            assert dtype == "F32", name
        elif not name.endswith("_scale_inv"):
            assert dtype == "BF16", name


def test_it_is_small():
    assert sum(f.stat().st_size for f in MODEL.rglob("*") if f.is_file()) <= 12_000_000


def test_its_card_holds_the_bars():
    trained, exported = CARD["float32"], CARD["fp8"]
    assert exported["windows"] >= 96 and exported["needles"] >= 60 and exported["chats"] >= 40
    assert exported["perplexity"] <= 10 and exported["perplexity"] <= 1.01 * trained["perplexity"]
    assert exported["needle"] >= 0.95 and exported["chat"] >= 0.9


@pytest.mark.nightly
def test_it_finds_needles(bundled):
    model, tokenizer = bundled
    rng = random.Random("bundled")
    filler = tokenizer.encode(held_out_text(), add_special_tokens=False, verbose=False)

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    found = 0
    for i in range(6):
        at = rng.randrange(len(filler) - 256)
        trial = needle.hide(encode, filler[at : at + 256], 256, rng, depth=(0.1, 0.5, 0.9)[i % 3])
        assert tokenizer.decode(trial.answer).strip() == f"{trial.code}."
        assert len(trial.prompt) + len(trial.answer) == 256
        found += needle.found(model, mlx_rotor.make_prompt_cache(model, "exact"), trial, 256)
    assert found >= 5


@pytest.mark.nightly
def test_it_calls_tools_and_answers(bundled):
    model, tokenizer = bundled
    right = 0
    for trial in chat.draw(tokenizer, 6, 5, []):
        cache = mlx_rotor.make_prompt_cache(model, "exact")
        said = list(chat.reply(model, cache, trial, tokenizer.eos_token_ids, 256))
        right += chat.right(trial.chat, tokenizer.decode(said), tokenizer)
    assert right >= 5


def test_thinking_is_kept_in_tool_turns_and_dropped_before_them(bundled):
    tokenizer = bundled[1]
    turn = chat.tool_answer(random.Random(0))
    whole = tokenizer.apply_chat_template(turn.messages, tools=turn.tools, tokenize=False)
    assert whole.count("<think>") == 2 and whole.count("<minimax:tool_call>") == 2  # one of them in the instructions
    later = [*turn.messages, {"role": "user", "content": "Thanks"}]
    again = tokenizer.apply_chat_template(later, tools=turn.tools, tokenize=False, add_generation_prompt=True)
    assert again.count("<think>") == 1 and again.endswith("]~b]ai\n<think>\n")
