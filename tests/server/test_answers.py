"""Answers whose text is given: reasoning and tool calls as MiniMax's models write them, whatever the pieces."""

import contextlib
import json
import threading
from functools import partial
from http.server import ThreadingHTTPServer

import openai
import pytest
from mlx_lm import server as stock

from mlx_rotor.bundled import MODEL
from mlx_rotor.server.choices import ChoicesHandler
from mlx_rotor.server.generator import Generator, PromptCache
from mlx_rotor.server.reader import OpenAIReader
from mlx_rotor.server.running import provider_class, stock_parser


def parameters(**types):
    return {"type": "object", "properties": {k: {"type": v} for k, v in types.items()}}


TOOLS = [
    {"type": "function", "function": {"name": "lookup", "parameters": parameters(name="string", limit="integer")}},
    {"type": "function", "function": {"name": "scale", "parameters": parameters(by="number", deep="boolean")}},
]


def call(name, /, **arguments):
    body = "".join(f'<parameter name="{k}">{v}</parameter>\n' for k, v in arguments.items())
    return f'<invoke name="{name}">\n{body}</invoke>\n'


def calls(*each):
    return "<minimax:tool_call>\n" + "".join(each) + "</minimax:tool_call>"


class Given(Generator):
    """Generates `text`, `size` characters at a time, in a turn that the template has opened with <think>."""

    def __init__(self, tokenizer, text, size, ends="stop"):
        self.tokenizer, self.text, self.size, self.ends = tokenizer, text, size, ends
        args = stock_parser().parse_args(["--model", str(MODEL)])
        super().__init__(provider_class(None)(args), PromptCache())

    def _run_generate(self):
        while not self._stop:
            request = self._next_request(0.02)
            if request is None:
                continue
            queue, _, args = request
            machine = stock.make_text_state_machine(self.tokenizer, args.stop_words)
            queue.put(stock.GenerationContext(True, True, self.tokenizer.tool_parser, machine, "reasoning", [1], 0))
            pieces = [self.text[i : i + self.size] for i in range(0, len(self.text), self.size)]
            last = [("", self.ends)] if self.ends == "stop" else [(pieces.pop(), self.ends)]
            for piece, reason in [(p, None) for p in pieces] + last:
                queue.put(stock.Response(piece, 5, 0.0, reason, ()))
            queue.put(None)


@contextlib.contextmanager
def given(tokenizer, text, size=7, **more):
    generator = Given(tokenizer, text, size, **more)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(ChoicesHandler, generator, OpenAIReader(str(MODEL))))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="none", max_retries=0)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        generator.stop_and_join()


def answer(client, stream, **more):
    """(reasoning, content, [(name, arguments)], finish reason), and that both names of reasoning agree."""
    ask = {"model": "default_model", "messages": [{"role": "user", "content": "a"}], "tools": TOOLS, **more}
    if not stream:
        choice = client.chat.completions.create(**ask).choices[0]
        parts, reason = [choice.message], choice.finish_reason
    else:
        events = list(client.chat.completions.create(stream=True, **ask))
        parts, reason = [e.choices[0].delta for e in events], events[-1].choices[0].finish_reason
    thought = "".join(getattr(p, "reasoning_content", None) or "" for p in parts)
    assert thought == "".join(getattr(p, "reasoning", None) or "" for p in parts)
    found = [t for p in parts for t in p.tool_calls or []]
    assert len({t.id for t in found}) == len(found)
    made = [(t.function.name, json.loads(t.function.arguments)) for t in found]
    return thought, "".join(p.content or "" for p in parts), made, reason


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_reasoning_text_and_parallel_typed_calls(bundled, stream, size):
    text = "Look it up.\n</think>\n\nOne moment.\n" + calls(
        call("lookup", name="Ada <b>", limit=3), call("scale", by=2.5, deep="true")
    )
    with given(bundled[1], text, size) as client:
        thought, said, made, reason = answer(client, stream)
    assert thought == "Look it up.\n" and said.strip() == "One moment."
    assert made == [("lookup", {"name": "Ada <b>", "limit": 3}), ("scale", {"by": 2.5, "deep": True})]
    assert reason == "tool_calls"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_an_argument_that_is_no_number_arrives_as_written(bundled, stream):
    with given(bundled[1], "</think>" + calls(call("scale", by="inf"))) as client:
        assert answer(client, stream)[2] == [("scale", {"by": "inf"})]
        assert answer(client, stream)[2] == [("scale", {"by": "inf"})]


def test_a_call_cut_short_is_no_call(bundled):
    with given(bundled[1], "</think>text" + calls(call("scale", by=1))[:40], ends="length") as client:
        _, said, made, reason = answer(client, False)
    assert (said, made, reason) == ("text", [], "length")


def test_text_without_marks_is_all_reasoning(bundled):
    with given(bundled[1], "still thinking", ends="length") as client:
        assert answer(client, True) == ("still thinking", "", [], "length")


def test_raw_completions_are_text_as_it_comes(bundled):
    text = "a</think>b" + calls(call("scale", by=1)) + "<think>c"
    with given(bundled[1], text) as client:
        assert client.completions.create(model="default_model", prompt="x").choices[0].text == text
        streamed = client.completions.create(model="default_model", prompt=["x", "y"], stream=True)
        parts = {0: "", 1: ""}
        for event in streamed:
            parts[event.choices[0].index] += event.choices[0].text
        assert parts == {0: text, 1: text}
