"""Requests read, without a server: what mlx_lm is handed, and that anything else is refused and nothing worse."""

import json
import string

import huggingface_hub.constants
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_rotor.bundled import MODEL
from mlx_rotor.server import catalog, fields
from mlx_rotor.server.catalog import Catalog
from mlx_rotor.server.reader import ONLY, Asked, OpenAIReader
from mlx_rotor.server.refusal import Refusal
from mlx_rotor.server.running import stock_parser

FIELDS = sorted(
    {*fields.NUMBERS, *fields.FLAGS, *fields.OBJECTS, *ONLY, "messages", "prompt", "tools", "stop", "logit_bias"}
    | {"model", "adapters", "draft_model", "parallel_tool_calls"}
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
WORDS = st.sampled_from(["role", "content", "type", "text", "function", "name", "user", "auto", "1", "include_usage"])
VALUES = st.recursive(
    SCALARS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def read(kind="chat", **body):
    body = {"messages": [{"role": "user", "content": "a"}]} | body if kind == "chat" else body
    return OpenAIReader(str(MODEL)).read(kind, json.dumps(body).encode())


@settings(max_examples=60, deadline=None, database=None)
@given(st.sampled_from(["chat", "text"]), st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4), st.booleans())
def test_anything_is_read_or_refused(kind, body, complete):
    if complete:
        body = {"messages": [{"role": "user", "content": "a"}], "prompt": "a"} | body
    try:
        asked = OpenAIReader(str(MODEL)).read(kind, json.dumps(body).encode())
    except Refusal as e:
        assert e.status in (400, 404) and e.message and json.dumps(e.body())
        return
    assert isinstance(asked, Asked) and None not in asked.body.values()
    assert json.loads(json.dumps(asked.body)) == asked.body
    for name, number in fields.NUMBERS.items():
        if name in asked.body and name != "seed":
            assert number.low <= asked.body[name] <= number.high


@settings(deadline=None, database=None)
@given(st.binary(max_size=40))
def test_bytes_are_read_or_refused(raw):
    with pytest.raises(Refusal):
        OpenAIReader(None).read("chat", raw)


def test_numbers_are_told_in_full():
    with pytest.raises(Refusal, match="max_tokens must be an integer from 1 to 2147483647, not 0"):
        read(max_tokens=0)
    with pytest.raises(Refusal, match=r"xtc_threshold must be a number from 0 to 0\.5, not 2"):
        read(xtc_threshold=2)


def test_half_a_character_is_refused():
    with pytest.raises(Refusal, match="surrogate"):
        OpenAIReader(str(MODEL)).read("text", rb'{"prompt": "a", "stop": ["\ud800"]}')
    assert OpenAIReader(str(MODEL)).read("text", rb'{"prompt": "\ud83d\ude00"}').prompts == ["\U0001f600"]


def test_reasoning_comes_back_under_both_names():
    for name in ("reasoning", "reasoning_content"):
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", name: "thought"}]
        message = read(messages=messages).body["messages"][1]
        assert message["reasoning"] == message["reasoning_content"] == "thought"


def test_a_seed_is_what_mlx_takes():
    assert read(seed=-1).body["seed"] == (1 << 64) - 1
    assert read(seed=7).body["seed"] == 7


def test_empty_stop_words_stop_nothing():
    assert read(stop=["", "x", ""]).body["stop"] == ["x"] and read(stop="").body["stop"] == []


@pytest.mark.parametrize("name", ["default_model", str(MODEL), MODEL.name, None])
def test_names_of_the_default_model(name):
    asked = read(**({} if name is None else {"model": name}))
    assert asked.body["model"] == "default_model" and asked.model == (name or str(MODEL.resolve()))


def test_a_folder_is_a_model_under_any_path_to_it(tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert {Catalog(None).resolve(p) for p in ("m", "./m", str(tmp_path / "m"))} == {str(tmp_path / "m")}


@pytest.mark.parametrize(
    "name", ["gpt-5", "", "a/b", "../../x", "~nobody/x", "a\0b", "x" * 5000, "/", string.printable]
)
def test_other_names_are_no_models(name):
    with pytest.raises(Refusal) as caught:
        Catalog(str(MODEL)).resolve(name)
    assert caught.value.status == 404 and str(MODEL.resolve()) in caught.value.message


def test_without_a_default_a_model_must_be_named():
    with pytest.raises(Refusal, match="no default model"):
        OpenAIReader(None).read("text", b'{"prompt": "a"}')
    assert stock_parser().parse_args([]).model is None


def test_adapters_are_looked_for_and_not_lost(tmp_path):
    with pytest.raises(Refusal, match="no adapters"):
        read(adapters=str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    asked = read(adapters=str(tmp_path))
    # Under the default's own name mlx_lm's server would overlook them.
    assert asked.body["model"] == str(MODEL.resolve()) and asked.body["adapters"] == str(tmp_path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hugging Face cache with one model in it, and one that was never finished."""
    for repo, files in (("whole", ["config.json", "tokenizer_config.json", "model.safetensors"]), ("part", [])):
        folder = tmp_path / f"models--me--{repo}"
        snapshot = folder / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0" * 40)
        for file in files:
            (folder / "blobs").mkdir(exist_ok=True)
            (folder / "blobs" / file).write_text("{}")
            (snapshot / file).symlink_to(folder / "blobs" / file)
    for module in (huggingface_hub.constants, huggingface_hub.file_download):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path), raising=False)
    scan = catalog.scan_cache_dir
    monkeypatch.setattr(catalog, "scan_cache_dir", lambda: scan(tmp_path))


def test_what_was_downloaded_is_listed_and_served(hub):
    models = Catalog(str(MODEL))
    assert [m["id"] for m in models.list()] == [str(MODEL.resolve()), "me/whole"]
    assert models.resolve("me/whole") == "me/whole"
    with pytest.raises(Refusal, match="me/whole"):
        models.resolve("me/part")


def test_no_hugging_face_folder_is_no_mistake(monkeypatch):
    def scan():
        raise catalog.CacheNotFound("none", "none")

    monkeypatch.setattr(catalog, "scan_cache_dir", scan)
    assert [m["id"] for m in Catalog(str(MODEL)).list()] == [str(MODEL.resolve())]
