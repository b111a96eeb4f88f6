"""Requests that mlx_lm's server dies of or passes over are served or refused with a reason; the next one is served."""

import json
import socket
import urllib.error
import urllib.request

import openai
import pytest
from servers import running

from mlx_rotor.bundled import MODEL

HELLO = [{"role": "user", "content": "hello"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def post(server, path, body, **headers):
    """(status, answer) of a body that may be anything."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(server.root + path, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()


def health(server):
    with urllib.request.urlopen(server.root + "/health") as answer:
        return json.load(answer)


def chat(**more):
    return {"messages": HELLO, "max_tokens": 1, **more}


def text(**more):
    return {"prompt": "x", "max_tokens": 1, **more}


REFUSED = [
    (TEXT, text(prompt=""), "prompt", "empty"),
    (TEXT, text(prompt=[]), "prompt", "empty"),
    (TEXT, text(prompt=["a", ""]), "prompt", "empty"),
    (TEXT, text(prompt=[[1, 2], []]), "prompt", "empty"),
    (TEXT, text(prompt=["a", 5]), "prompt", "list of token ids"),
    (TEXT, text(prompt=[[[1]]]), "prompt", "list of token ids"),
    (TEXT, text(prompt=[3, -1]), "prompt", "list of token ids"),
    (TEXT, text(prompt=[3, 2048]), "prompt", "2047"),
    (TEXT, text(prompt=["a", "b"], stop=[5]), "stop", "token ids"),
    (TEXT, {"max_tokens": 1}, "prompt", "missing"),
    (TEXT, text(echo=True), "echo", "not supported"),
    (TEXT, text(suffix="end"), "suffix", "not supported"),
    (TEXT, text(best_of=2), "best_of", "not supported"),
    (TEXT, text(logprobs=3), "logprobs", "true or false"),
    (CHAT, chat(stop=5), "stop", "list of strings"),
    (CHAT, chat(stop=["a", 5]), "stop", "list of strings"),
    (CHAT, chat(logit_bias={"2048": 1}), "logit_bias", "2047"),
    (CHAT, chat(logit_bias={"-1": 1}), "logit_bias", "token ids"),
    (CHAT, chat(logit_bias={"1": "high"}), "logit_bias[1]", "number"),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', "temperature", "number"),
    (CHAT, chat(temperature="hot"), "temperature", "'hot'"),
    (CHAT, chat(temperature=1, xtc_probability=1, xtc_threshold=0.9), "xtc_threshold", "0.5"),
    (CHAT, chat(max_tokens=0), "max_tokens", "from 1"),
    (CHAT, chat(max_tokens=True), "max_tokens", "integer"),
    (CHAT, chat(top_logprobs=20), "top_logprobs", "11"),
    (CHAT, chat(stream="yes"), "stream", "true or false"),
    (CHAT, chat(stream_options=[]), "stream_options", "object"),
    (CHAT, chat(n=2), "n", "one choice"),
    (CHAT, chat(response_format={"type": "json_object"}), "response_format", "not supported"),
    (CHAT, chat(tool_choice="required"), "tool_choice", "not supported"),
    (CHAT, chat(tool_choice={"type": "function", "function": {"name": "f"}}), "tool_choice", "not supported"),
    (CHAT, chat(tools=["f"]), "tools[0]", "object"),
    (CHAT, chat(functions=[{"name": "f"}]), "functions", "use tools"),
    (CHAT, chat(messages=[]), "messages", "empty"),
    (CHAT, chat(messages=None), "messages", "missing"),
    (CHAT, chat(messages=["hello"]), "messages[0]", "object"),
    (CHAT, chat(messages=[{"content": "a"}]), "messages[0].role", "string"),
    (CHAT, chat(messages=[{"role": "user", "content": ["a"]}]), "messages[0].content[0]", "object"),
    (CHAT, chat(messages=[{"role": "user", "content": 5}]), "messages", "content"),
    (CHAT, chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]),
     "messages", "text"),
    (CHAT, chat(chat_template_kwargs=5), "chat_template_kwargs", "object"),
    (CHAT, chat(chat_template_kwargs={"tokenize": False}), "messages", "template"),
    (CHAT, b"{", None, "not JSON"),
    (CHAT, b"\xff", None, "not JSON"),
    (CHAT, b"[" * 100_000, None, "not JSON"),
    (CHAT, b"[1]", None, "JSON object"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "param", "says"), REFUSED, ids=lambda x: str(x)[:40])
def test_what_cannot_be_served_is_refused_and_the_next_is_served(served, path, body, param, says):
    for stream in (False, True):
        asked = body if isinstance(body, bytes) else {"stream": stream, **body}
        status, answer = post(served, path, asked)
        error = json.loads(answer)["error"]
        assert status == 400 and error["type"] == "invalid_request_error", answer
        assert error["param"] == param and says in error["message"], answer
    status, answer = post(served, CHAT, chat())
    assert status == 200 and json.loads(answer)["usage"]["completion_tokens"] == 1


SERVED = [
    (CHAT, chat(max_tokens=None, max_completion_tokens=2, temperature=None, top_p=None, stop=None, n=None, seed=None,
                logit_bias=None, stream=None, tools=None, tool_choice=None, response_format=None, model=None,
                stream_options=None, logprobs=None, top_logprobs=None, frequency_penalty=None, user=None)),
    (CHAT, chat(n=1, response_format={"type": "text"}, tool_choice="auto", parallel_tool_calls=True, user="me")),
    (CHAT, chat(temperature=1, top_k=100_000, top_p=0.9, min_p=0.01)),
    (CHAT, chat(temperature=1, xtc_probability=1, xtc_threshold=0, repetition_penalty=1.1, seed=-1)),
    (CHAT, chat(stop="", logit_bias={"5": -100, "2047": 1}, presence_penalty=1)),
    (CHAT, chat(messages=[{"role": "system", "content": None},
                          {"role": "user", "content": [{"type": "text", "text": "a"}]}])),
    (CHAT, chat(stream=True, stream_options={})),
    (CHAT, chat(stream=True, stream_options={"include_usage": None})),
    (TEXT, text(echo=False, best_of=1, suffix=None, logprobs=None)),
    (TEXT, text(prompt=[5])),
    (TEXT, text(prompt=[5], max_tokens=2.0)),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body"), SERVED, ids=lambda x: str(x)[:40])
def test_what_the_api_allows_is_served(served, path, body):
    status, answer = post(served, path, body)
    assert status == 200, answer
    assert answer.endswith("data: [DONE]\n\n") if body.get("stream") else json.loads(answer)["choices"]


@pytest.mark.parametrize("seed", [None, 1], ids=["batched", "alone"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_stop_words_need_not_be_tokens(served, seed, stream):
    ask = {"model": "default_model", "prompt": "import os\n", "max_tokens": 8, "temperature": 0, "seed": seed}
    whole = served.client.completions.create(**ask).choices[0].text
    for word in (whole[8:11], whole[7:12], whole[2:4], whole[-3:]):
        answer = served.client.completions.create(stop=["never", word], stream=stream, **ask)
        choices = [c for event in answer for c in event.choices] if stream else answer.choices
        assert "".join(c.text for c in choices) == whole[: whole.index(word)]
        assert choices[-1].finish_reason == "stop"


@pytest.mark.parametrize("seed", [None, 1], ids=["batched", "alone"])
def test_a_prompt_that_is_stored_whole_is_served(served, seed):
    """Prompt and completion, sent again as a prompt, are a stored sequence to the last token."""
    client = served.client
    ask = {"model": "default_model", "max_tokens": 3, "temperature": 0, "seed": seed}
    first = client.completions.create(prompt="import sys, os", **ask)
    longer = client.completions.create(prompt="import sys, os" + first.choices[0].text, **ask)
    again = client.completions.create(prompt="import sys, os" + first.choices[0].text, **ask)
    assert longer.choices[0].text == again.choices[0].text
    cached = again.usage.prompt_tokens_details.cached_tokens
    assert cached == again.usage.prompt_tokens - 1


def test_an_unknown_model_is_not_fetched(served):
    with pytest.raises(openai.NotFoundError, match="bundled/model") as caught:
        served.client.chat.completions.create(model="mlx-community/gpt-5", messages=HELLO)
    assert caught.value.code == "model_not_found"
    assert post(served, CHAT, chat())[0] == 200


def test_a_folder_here_is_served_in_turn_and_one_that_cannot_be_loaded_is_not(tmp_path, served):
    for folder, kind in (("same", "minimax_m2"), ("other", "no_such_type")):
        (tmp_path / folder).mkdir()
        for file in MODEL.iterdir():
            (tmp_path / folder / file.name).symlink_to(file)
        config = json.loads((MODEL / "config.json").read_text()) | {"model_type": kind}
        (tmp_path / folder / "config.json").unlink()
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
    usual = health(served)
    assert post(served, CHAT, chat(model=str(tmp_path / "same")))[0] == 200
    assert health(served) == usual | {"model": str(tmp_path / "same")}
    status, answer = post(served, CHAT, chat(model=str(tmp_path / "other")))
    assert status == 400 and "no_such_type" in answer
    assert post(served, CHAT, chat())[0] == 200
    assert health(served) == usual


def test_other_paths_and_bodies_are_refused_as_json(served):
    assert post(served, "/v1/embeddings", {}) == (404, post(served, "/v1/embeddings", {})[1])
    assert "/v1/chat/completions" in json.loads(post(served, "/v1/embeddings", {})[1])["error"]["message"]
    assert post(served, CHAT + "?beta=1", chat())[0] == 200
    status, answer = post(served, CHAT, chat(), **{"Content-Length": "x"})
    assert status == 400 and "Content-Length" in json.loads(answer)["error"]["message"]


def test_a_client_that_leaves_disturbs_nobody(served):
    host, port = served.root.removeprefix("http://").split(":")
    body = json.dumps(chat(stream=True, max_tokens=400)).encode()
    with socket.create_connection((host, int(port))) as s:
        s.sendall(b"POST %s HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (CHAT.encode(), len(body), body))
        assert s.recv(64).startswith(b"HTTP/1.0 200")
    assert post(served, CHAT, chat())[0] == 200


def test_stored_prompts_keep_within_their_bytes():
    with running("--kv", "exact", "--prompt-cache-bytes", "1000") as server:
        client = server.client
        for _ in range(2):
            r = client.completions.create(model="default_model", prompt="import sys", max_tokens=1)
            assert r.usage.prompt_tokens_details.cached_tokens == 0
