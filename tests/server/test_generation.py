"""The generation thread on the bundled model outlives what goes wrong in it; mlx_lm.server, patched and unpatched."""

import threading

import pytest
from mlx_lm import server as stock
from servers import running

import mlx_rotor
from mlx_rotor.bundled import MODEL
from mlx_rotor.errors import RotorError
from mlx_rotor.server.generator import Generator, PromptCache, lenient
from mlx_rotor.server.refusal import Refusal, Unanswered
from mlx_rotor.server.running import provider_class, stock_parser


class Stored:
    """A cache as the prompt store sees one, of `length` tokens."""

    nbytes = 1

    def __init__(self, length, trims):
        self.length, self.trims = length, trims

    def is_trimmable(self):
        return self.trims

    def trim(self, n):
        self.length -= n
        return n


@pytest.mark.parametrize("trims", [True, False])
def test_a_stored_prompt_always_leaves_a_token_to_run(trims):
    store = PromptCache()
    for length in (4, 6) if not trims else (6,):
        store.insert_cache("m", list(range(length)), [Stored(length, trims)])
    cache, rest = store.fetch_nearest_cache("m", list(range(6)))
    assert rest == ([5] if trims else [4, 5]) and cache[0].length == 6 - len(rest)
    cache, rest = store.fetch_nearest_cache("m", list(range(8)))
    assert rest == [6, 7] and cache[0].length == 6


def test_arguments_that_break_a_parser_are_passed_on_as_strings():
    def parser(text, tools):
        if tools:
            raise OverflowError
        return text

    assert lenient(parser)("x", [1]) == "x"
    with pytest.raises(ValueError):
        lenient(lambda text, tools: int(text))("x", [1])


@pytest.fixture
def generator():
    generator = Generator(provider_class(None)(stock_parser().parse_args(["--model", str(MODEL)])), PromptCache())
    generator.loaded.wait()
    yield generator
    generator.stop_and_join()


def request(prompt="import os", tokens=2):
    args = stock.GenerationArguments(
        model=stock.ModelDescription("default_model", "default_model", None),
        sampling=stock.SamplingArguments(0, 1.0, 0, 0.0, 0.0, 0.1),
        logits=stock.LogitsProcessorArguments(None, 0, 20, 0, 20, 0, 20),
        stop_words=[], max_tokens=tokens, num_draft_tokens=3, logprobs=False, top_logprobs=-1, seed=None,
        chat_template_kwargs=None,
    )  # fmt: skip
    return stock.CompletionRequest("text", prompt, [], None, None), args


def test_a_failure_costs_the_requests_in_flight_and_no_other(generator, monkeypatch, caplog):
    broken = threading.Event()
    keep = generator.prompt_cache.insert_cache

    def insert_cache(*args, **kwargs):
        if generator._taken == 2 and not broken.is_set():
            broken.set()
            raise RuntimeError("out of memory")
        keep(*args, **kwargs)

    monkeypatch.setattr(generator.prompt_cache, "insert_cache", insert_cache)
    long, short = generator.generate(*request("def f(", 2000)), generator.generate(*request())
    for _, responses in (long, short):
        with pytest.raises(Refusal, match="out of memory"):
            for _ in responses:
                pass
    assert "generation failed" in caplog.text and generator.is_healthy
    _, responses = generator.generate(*request())
    assert len([r for r in responses if r is not None]) == 2


def test_what_cannot_be_generated_is_said_before_it_begins(generator):
    with pytest.raises(Unanswered) as caught:
        generator.generate(*request(""))
    assert caught.value.refusal.status == 400


def test_a_default_model_that_cannot_be_loaded_is_the_servers_failure(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    generator = Generator(provider_class(None)(stock_parser().parse_args(["--model", str(tmp_path)])), PromptCache())
    generator.loaded.wait()
    assert isinstance(generator.failure, RotorError) and not generator.is_healthy
    generator.stop_and_join()


def test_mlx_lms_own_main_serves_compressed():
    code = "import mlx_rotor, mlx_lm.server; mlx_rotor.patch_server('turbo3', ring=16); mlx_lm.server.main()"
    with running("--model", MODEL, module=("-c", code), level="INFO") as server:
        assert "turbo3" in server.line and "requests are batched" in server.line
        ask = {"model": "default_model", "prompt": "import os\n" * 12, "max_tokens": 3, "temperature": 0}
        first, again = (server.client.completions.create(**ask) for _ in range(2))
        assert first.choices[0].text == again.choices[0].text
        assert again.usage.prompt_tokens_details.cached_tokens > 20


def test_a_patch_is_taken_away_again():
    before = stock.ModelProvider, stock.run
    patch = mlx_rotor.patch_server("turbo4v2")
    assert stock.ModelProvider.scheme.name == "turbo4v2" and issubclass(stock.ModelProvider, before[0])
    patch.undo()
    patch.undo()
    assert (stock.ModelProvider, stock.run) == before
    with mlx_rotor.patch_server("exact"):
        assert stock.ModelProvider.scheme is None and stock.run is not before[1]
    assert (stock.ModelProvider, stock.run) == before
    with pytest.raises(RotorError, match="nope"):
        mlx_rotor.patch_server("nope")
    assert (stock.ModelProvider, stock.run) == before


def test_two_quantized_caches_contradict_each_other():
    args = stock_parser().parse_args(["--model", str(MODEL), "--kv-bits", "4"])
    with mlx_rotor.patch_server("turbo4"), pytest.raises(RotorError, match="--kv-bits"):
        stock.ModelProvider(args)
