"""The generate command as a user types it, on a two-layer checkpoint."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx_lm.models import cache as stock

import mlx_rotor
from mlx_rotor.cli import command
from mlx_rotor.host import session

generate = importlib.import_module("mlx_rotor.generate")
KEYS = {
    "text", "prompt_tokens", "generation_tokens", "prompt_tps", "generation_tps", "peak_memory_gb", "kv_scheme",
    "kv_bytes", "kv_bytes_fp16", "layers_compressed", "layers_total", "fused_calls", "fallback_calls",
}  # fmt: skip
LONG = "import os\n" * 100


A_TOKEN = 2 * 2 * 64 * 2  # bytes in fp16 in two layers of one head of 64


@pytest.fixture
def call(small):
    """Runs the command on the two-layer checkpoint, unless the flags name another model."""

    def called(*argv):
        model = () if "--model" in argv else ("--model", small)
        return command.run(generate.main, [str(a) for a in (*model, *argv)])

    return called


@pytest.fixture
def as_json(call, capsys):
    """What the command prints with --json."""

    def told(*argv):
        capsys.readouterr()
        assert call(*argv, "--json") == 0
        return json.loads(capsys.readouterr().out)

    return told


def test_flags_and_defaults_are_mlx_lms():
    theirs = importlib.import_module("mlx_lm.generate").setup_arg_parser().parse_args([])
    ours = vars(generate._parser().parse_args([]))
    assert {k: ours[k] for k in vars(theirs)} == vars(theirs)


def test_json_has_every_figure(call, as_json, capsys):
    got = as_json("--ignore-chat-template", "-p", LONG, "-m", 12, "--kv", "turbo4v2")
    assert got.keys() >= KEYS
    assert got["kv_scheme"] == "turbo4v2" and got["layers_compressed"] == got["layers_total"] == 2
    assert got["generation_tokens"] == 12 and got["prompt_tokens"] > 200
    # mlx_lm runs one step ahead of the tokens it yields.
    assert got["fused_calls"] == 2 * (2 + 12) and got["fallback_calls"] == 0
    tokens = got["prompt_tokens"] + 12
    assert got["kv_bytes_fp16"] in [A_TOKEN * n for n in (tokens - 1, tokens)]
    assert 0 < got["kv_bytes"] < 2 * got["kv_bytes_fp16"]


def test_exact_is_stock(as_json, small):
    model, tokenizer = mlx_rotor.load(small)
    got = as_json("--ignore-chat-template", "-p", LONG, "-m", 12, "--kv", "exact")
    prompt = tokenizer.encode(LONG)
    assert got["text"] == importlib.import_module("mlx_lm").generate(model, tokenizer, prompt, max_tokens=12)
    assert got["kv_scheme"] == "exact" and got["layers_compressed"] == 0 and got["fused_calls"] == 0


def test_people_read_what_was_saved(call, as_json, capsys):
    assert call("-m", 4) == 0
    out = capsys.readouterr().out
    for part in ("K trellis4", "tokens-per-s", "MB held; too few tokens to compress", "2 of 2 ready", "0 fallen back"):
        assert part in out, part
    assert not re.search(r"\dx|packed", out), "no ratio and no calls on packed tokens where none was packed"
    assert call("--ignore-chat-template", "-p", LONG, "-m", 4, "--kv-ring", 32) == 0
    out = capsys.readouterr().out
    assert re.search(r"MB held; the same tokens in fp16: \d\.\d{3} MB \(\d\.\d\dx\)", out)
    assert "Layers: 2 of 2 compressed" in out and "12 on packed tokens, 0 on expanded ones" in out


def test_quiet_prints_the_text_alone(call, as_json, capsys):
    text = as_json("-m", 6)["text"]
    assert call("-m", 6, "--verbose", "false") == 0
    assert capsys.readouterr().out == text + "\n"


def test_cache_types_mean_the_scheme(call, as_json, capsys):
    got = as_json("-m", 1, "--cache-type-k", "turbo4", "--cache-type-v", "turbo3")
    assert got["kv_scheme"] == "turbo4v3"
    assert as_json("-m", 1, "--cache-type-k", "f16", "--cache-type-v", "f16")["kv_scheme"] == "exact"


def test_exact_parts_can_be_turned_off(call, as_json, capsys):
    flags = ("--kv-sinks", 0, "--kv-ring", 0, "--kv-protect-layers", 0)
    kept = as_json("--ignore-chat-template", "-p", LONG, "-m", 2)
    off = as_json("--ignore-chat-template", "-p", LONG, "-m", 2, *flags)
    assert off["kv_bytes"] < kept["kv_bytes_fp16"] / 2 < kept["kv_bytes"]


@pytest.mark.parametrize(
    ("flags", "scheme"),
    [(("--kv-bits", 8, "--quantized-kv-start", 0), "mlx_lm's own 8-bit"), (("--max-kv-size", 64), "exact")],
)
def test_mlx_lms_own_caches_keep_their_meaning(as_json, flags, scheme):
    got = as_json("-m", 8, *flags)
    assert got["kv_scheme"] == scheme and got["layers_compressed"] == 0
    assert got["kv_bytes_fp16"] == A_TOKEN * (got["prompt_tokens"] + got["generation_tokens"])


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--kv", "exact"], "KV cache exact: as was asked for"),
        (
            ["--max-kv-size", 50],
            "KV cache exact: --max-kv-size 50 leaves too few tokens to compress; from 512 on they are",
        ),
        (
            ["--kv-bits", 4],
            "KV cache mlx_lm's own 4-bit: --kv-bits 4 asks for mlx_lm's own quantized cache, from token 5000 on",
        ),
    ],
)
def test_an_exact_cache_says_why_in_the_first_line(call, capsys, flags, line):
    assert call("-m", 1, *flags) == 0
    assert capsys.readouterr().out.splitlines()[0] == line


def test_a_draft_model_changes_no_token(as_json, small):
    prompt = ("--ignore-chat-template", "-p", LONG, "-m", 12, "--kv", "turbo4")
    plain = as_json(*prompt)
    drafted = as_json(*prompt, "--draft-model", small)
    assert drafted["text"] == plain["text"] and drafted["layers_total"] == 2


def test_a_draft_model_with_another_vocabulary_is_refused(call, small, capsys, monkeypatch):
    real = session.load
    other = SimpleNamespace(vocab_size=7)
    monkeypatch.setattr(session, "load", lambda p, **k: (None, other) if p == "draft" else real(p, **k))
    assert call("--draft-model", "draft") == 1
    assert "7 tokens" in capsys.readouterr().err


def test_prompt_cache_files(call, as_json, small, capsys, tmp_path):
    model, tokenizer = mlx_rotor.load(small)
    plain = stock.make_prompt_cache(model)
    prefix = tokenizer.encode(LONG)
    mx.eval(model(mx.array([prefix]), cache=plain))
    metadata = {"model": str(small), "tokenizer_config": "{}"}
    stock.save_prompt_cache(str(tmp_path / "plain.safetensors"), plain, metadata)
    got = as_json("--prompt-cache-file", tmp_path / "plain.safetensors", "-m", 4, "--ignore-chat-template")
    assert got["layers_compressed"] == 2 and got["kv_bytes_fp16"] > A_TOKEN * len(prefix)

    packed = mlx_rotor.make_prompt_cache(model, "turbo4")
    mx.eval(model(mx.array([prefix]), cache=packed))
    stock.save_prompt_cache(str(tmp_path / "packed.safetensors"), packed, metadata)
    flags = ("--prompt-cache-file", tmp_path / "packed.safetensors", "-m", 4, "--ignore-chat-template")
    assert as_json(*flags, "--kv", "turbo4")["layers_compressed"] == 2
    for kv, says in (("turbo2", "wants K turbo"), ("exact", "compressed")):
        assert call(*flags, "--kv", kv) == 1 and says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--kv", "nope"], "turbo4v2"),
        (["--kv", "turbo2v4"], "fewer bits"),
        (["--kv", "turbo4", "--kv-bits", "8"], "--kv-bits"),
        (["--kv", "turbo4", "--max-kv-size", "64"], "--max-kv-size"),
        (["--kv-ring", "64", "--kv-bits", "8"], "--kv-bits"),
        (["--kv-bits", "8", "--max-kv-size", "64"], "--max-kv-size"),
        (["--max-kv-size", "4"], "--max-kv-size 4: must be more than the 4 first tokens"),
        (["--kv", ""], "unknown KV scheme ''"),
        (["--kv", "exact", "--kv-ring", "64", "--kv-sinks", "0"], "--kv-sinks, --kv-ring: all tokens are exact"),
        (["--cache-type-k", "", "--cache-type-v", "turbo4"], "both"),
        (["--kv", "turbo4", "--cache-type-k", "turbo4"], "one of them"),
        (["--cache-type-k", "turbo4"], "both"),
        (["--kv-ring", "-3"], "ring"),
        (["--max-tokens", "0"], "--max-tokens"),
        (["--model", "/no/such/folder"], "does not exist"),
        (["--chat-template-config", "{"], "JSON"),
        (["--ignore-chat-template", "-p", ""], "empty"),
        (["--prompt-cache-file", "/no/such.safetensors"], "prompt cache"),
    ],
)
def test_mistakes_are_one_line(call, argv, says, capsys):
    assert call(*argv) == 1
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ") and says in err and "\n" not in err


def test_an_empty_folder_is_no_model(call, tmp_path, capsys):
    assert call("--model", tmp_path) == 1
    assert "config.json" in capsys.readouterr().err


def test_ctrl_c_leaves_no_traceback(small):
    argv = [
        sys.executable,
        "-m",
        "mlx_rotor.generate",
        "--model",
        small,
        "--ignore-chat-template",
        "-p",
        LONG,
        "-m",
        "4000",
    ]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ})
    assert process.stdout.readline().startswith(b"KV cache")
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err and b"interrupted" in err
