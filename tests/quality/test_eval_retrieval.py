"""Needle and chat scoring on models whose answers are known."""

import random

import pytest

from mlx_rotor.quality import chat
from mlx_rotor.quality.model import log_probabilities, prefill, step
from mlx_rotor.quality.needle import Needle, found

PROMPT, ANSWER = [5, 6, 7, 8, 9, 10, 11], [20, 21, 22]
TRIAL = Needle(PROMPT, ANSWER, "x", 0.5)


def test_a_needle_found(parrot, tape):
    cache = [tape()]
    assert found(parrot(PROMPT + ANSWER), cache, TRIAL, chunk=3)
    # The prompt in chunks, the answer token by token, the last one not needed.
    assert cache[0].portions == [[5, 6, 7], [8, 9, 10], [11], [20], [21]]


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_one_wrong_token_is_a_needle_missed(parrot, tape, wrong):
    said = list(ANSWER)
    said[wrong] += 1
    cache = [tape()]
    assert not found(parrot(PROMPT + said), cache, TRIAL, chunk=3)
    assert cache[0].tokens == PROMPT + ANSWER[:wrong], "nothing is fed after the first mistake"


def test_prefill_says_what_follows_the_last_token(parrot, tape):
    for chunk in (1, 2, 7, 100):
        assert prefill(parrot(PROMPT + ANSWER), [tape()], PROMPT, chunk) == 20
    with pytest.raises(ValueError, match="empty prompt"):
        prefill(parrot([1]), [tape()], [], 4)
    assert step(parrot([3, 4]), [tape()], 9) == 4


def test_a_reply_ends_at_a_stop_token_or_the_limit(parrot, tape, monkeypatch):
    trial = chat.ChatTrial(chat.recall(random.Random(0)), PROMPT)
    said = list(chat.reply(parrot([*PROMPT, 30, 31, 3, 40]), [tape()], trial, {3}, 4))
    assert said == [30, 31]
    monkeypatch.setattr(chat, "REPLY_LIMIT", 2)
    assert list(chat.reply(parrot([*PROMPT, 30, 31, 32, 3]), [tape()], trial, {3}, 4)) == [30, 31]


@pytest.fixture(scope="module")
def tokenizer(bundled):
    return bundled[1]


def own_reply(tokenizer, made):
    """What the template has the assistant say in the chat's own last message, after the opening of its turn."""
    render = tokenizer.apply_chat_template
    whole = render(made.messages, tools=made.tools, tokenize=False)
    opening = render(made.prompt, tools=made.tools, tokenize=False, add_generation_prompt=True)
    assert whole.startswith(opening)
    return whole[len(opening) :].removesuffix("[e~[\n")


@pytest.mark.parametrize("kind", [chat.recall, chat.tool_call, chat.tool_answer])
def test_the_expected_reply_is_right(tokenizer, kind):
    for seed in range(5):
        made = kind(random.Random(seed))
        assert chat.right(made, own_reply(tokenizer, made), tokenizer)


def test_wrong_answers_are_wrong(tokenizer):
    made = chat.recall(random.Random(1))
    good = own_reply(tokenizer, made)
    thought, answer = good.split("</think>")
    assert made.expected in thought and made.expected in answer
    for bad in (
        thought + "</think>" + answer.replace(made.expected, made.expected[:-1]),
        good + " Or 99999.",
        thought,
        f"{thought}</think>",
        "",
    ):
        assert not chat.right(made, bad, tokenizer), bad


def test_wrong_tool_calls_are_wrong(tokenizer):
    made = chat.tool_call(random.Random(1))
    good = own_reply(tokenizer, made)
    name = made.messages[-1]["tool_calls"][0]["function"]["arguments"]["name"]
    for old, new in (
        (f">{name}<", ">nobody<"),
        ('invoke name="lookup"', 'invoke name="find"'),
        ('parameter name="name"', 'parameter name="key"'),
        ("</minimax:tool_call>", ""),
        ("<minimax:tool_call>", ""),
        ("</think>", ""),
        ("<invoke", "<call"),
    ):
        bad = good.replace(old, new)
        assert bad != good
        assert not chat.right(made, bad, tokenizer), bad


def test_chats_take_turns_and_some_recall_over_a_distance(tokenizer):
    trials = chat.draw(tokenizer, 12, 0, tokenizer.encode("import os\nprint(os.sep)\n" * 400))
    assert [t.chat.kind for t in trials] == ["recall", "tool_call", "tool_answer"] * 4
    long = [len(t.prompt) > 256 for t in trials[::3]]
    assert long == [True, False, True, False]


def test_log_probabilities_are_float32_and_normalised():
    import mlx.core as mx
    import numpy as np

    x = mx.random.normal((5, 100)) * 20
    for dtype in (mx.float32, mx.bfloat16):
        got = log_probabilities(x.astype(dtype))
        assert got.dtype == np.float32
        np.testing.assert_allclose(np.exp(got.astype(np.float64)).sum(axis=1), 1, rtol=1e-5)
