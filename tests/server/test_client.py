"""The server as a program sees it that uses OpenAI's client."""

import json
import random
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from servers import KV, running

from mlx_rotor.bundled import held_out_text
from mlx_rotor.quality.chat import LOOKUP_TOOL, recall, tool_call

TOKENS = 8


def chats():
    """Eight chats that ask for codes, given long enough ago to be packed."""
    rng = random.Random("chats")
    text = held_out_text()
    return [{"messages": recall(rng, text[700 * i : 700 * i + 30 * (i % 3)]).prompt} for i in range(8)]


def as_client(messages):
    """Messages as a client sends them: calls with ids and arguments in a string, answers that name the call."""
    out = []
    for message in messages:
        message = dict(message)
        if "tool_calls" in message:
            called = [call["function"] for call in message["tool_calls"]]
            message["tool_calls"] = [
                {"id": f"c{i}", "type": "function", "function": f | {"arguments": json.dumps(f["arguments"])}}
                for i, f in enumerate(called)
            ]
        if message["role"] == "tool":
            message["tool_call_id"] = "c0"
        out.append(message)
    return out


def ask(client, chat, *, stream=False, **more):
    """(reasoning, content, cached tokens) of the answer."""
    options = {"model": "default_model", "max_tokens": TOKENS, "temperature": 0, **chat, **more}
    if not stream:
        r = client.chat.completions.create(**options)
        said = r.choices[0].message
        assert r.usage.completion_tokens == TOKENS or r.choices[0].finish_reason in ("stop", "tool_calls")
        return getattr(said, "reasoning_content", None), said.content, r.usage.prompt_tokens_details.cached_tokens
    reasoning, content, cached = "", "", None
    for event in client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options):
        for choice in event.choices:
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            content += choice.delta.content or ""
        if event.usage:
            cached = event.usage.prompt_tokens_details.cached_tokens
    return reasoning or None, content or None, cached


def at_once(client, streamed):
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda c, s: ask(client, c, stream=s), chats(), streamed))


def test_eight_at_once_say_what_each_says_alone_and_are_remembered(served):
    client = served.client
    first = at_once(client, [i % 2 == 0 for i in range(8)])
    again = at_once(client, [i % 2 == 1 for i in range(8)])
    assert [r[:2] for r in again] == [r[:2] for r in first]
    assert all(r[2] > 20 for r in again), again
    with running(*KV, "--decode-concurrency", 1, "--prompt-concurrency", 1, "--prompt-cache-size", 0) as alone:
        one_by_one = [ask(alone.client, chat) for chat in chats()[:2]]
    assert all(r[2] == 0 for r in one_by_one)
    assert [r[:2] for r in first[:2]] == [r[:2] for r in one_by_one]
    assert all(r[0] for r in first)


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called(served, stream):
    chat = tool_call(random.Random(1))
    options = {"model": "default_model", "messages": as_client(chat.prompt), "tools": chat.tools, "max_tokens": 96}
    answer = served.client.chat.completions.create(temperature=0, tool_choice="auto", stream=stream, **options)
    if stream:
        choices = [c for event in answer for c in event.choices]
        calls = [c for choice in choices for c in choice.delta.tool_calls or []]
        thought = "".join(getattr(c.delta, "reasoning", None) or "" for c in choices)
        reason = choices[-1].finish_reason
    else:
        calls, reason = answer.choices[0].message.tool_calls, answer.choices[0].finish_reason
        thought = answer.choices[0].message.reasoning
        assert answer.choices[0].message.reasoning_content == thought
    wanted = chat.messages[-1]["tool_calls"][0]["function"]
    assert [(c.function.name, json.loads(c.function.arguments)) for c in calls] == [("lookup", wanted["arguments"])]
    assert reason == "tool_calls" and calls[0].id and "lookup tool" in thought


def test_a_developer_is_a_system_to_a_template_that_knows_none(served):
    def usage(role):
        messages = [{"role": role, "content": "Be brief."}, {"role": "user", "content": "hello"}]
        return served.client.chat.completions.create(model="default_model", messages=messages, max_tokens=1).usage

    first, again = usage("system"), usage("developer")
    # The very same tokens: all but the last are found again.
    assert again.prompt_tokens_details.cached_tokens == again.prompt_tokens - 1 == first.prompt_tokens - 1
    assert first.prompt_tokens_details.cached_tokens < first.prompt_tokens - 5


def test_no_tool_is_shown_under_none(served):
    chat = {"messages": as_client(tool_call(random.Random(1)).prompt)}
    shown = ask(served.client, chat, tools=[LOOKUP_TOOL])
    hidden = ask(served.client, chat, tools=[LOOKUP_TOOL], tool_choice="none")
    assert hidden[:2] == ask(served.client, chat)[:2] != shown[:2]


def test_completions_of_every_form_of_prompt(served, bundled):
    client, prompts = served.client, ["import os\n", "def f(x):"]
    tokens = [bundled[1].encode(p) for p in prompts]

    def texts(prompt, **more):
        r = client.completions.create(model="default_model", prompt=prompt, max_tokens=6, temperature=0, **more)
        return [(c.index, c.text) for c in r.choices], r.usage

    one = [texts(p)[0][0][1] for p in prompts]
    wanted = list(enumerate(one))
    assert texts(tokens[0])[0] == wanted[:1]
    both, usage = texts(prompts)
    assert both == wanted and usage.completion_tokens == 12 and usage.prompt_tokens == sum(map(len, tokens))
    assert texts(tokens)[0] == wanted
    streamed = {0: "", 1: ""}
    for event in client.completions.create(model="default_model", prompt=prompts, max_tokens=6, stream=True):
        for choice in event.choices:
            streamed[choice.index] += choice.text
    assert streamed == dict(wanted)


def test_raw_completions_keep_what_looks_like_reasoning(served):
    r = served.client.completions.create(model="default_model", prompt="]~b]ai\n", max_tokens=8, temperature=0)
    assert r.usage.completion_tokens == 8 and r.choices[0].text


def test_models_are_listed_and_found(served):
    listed = served.client.models.list().data
    assert listed[0].id.endswith("bundled/model")
    assert served.client.models.retrieve(listed[0].id).id == listed[0].id
    r = served.client.chat.completions.create(
        model=listed[0].id, max_tokens=1, messages=[{"role": "user", "content": "hi"}]
    )
    assert r.model == listed[0].id
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-5'"):
        served.client.models.retrieve("gpt-5")


def test_health_says_what_each_layer_uses(served):
    with urllib.request.urlopen(f"{served.root}/health") as answer:
        health = json.load(answer)
    assert health["status"] == "ok" and health["batching"] is True and health["kv"]["backend"] == "reference"
    layers = [i for part in health["kv"]["compressed"] + health["kv"]["left_alone"] for i in part["layers"]]
    assert sorted(layers) == list(range(8))
    assert health["kv"]["scheme"] == KV[1]
    if KV[1] == "turbo4":
        assert health["kv"]["ring"] == 16 and health["kv"]["compressed"][0]["k"] == "turbo4"
