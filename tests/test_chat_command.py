"""The chat command as a user types it, on a two-layer checkpoint, and what it shares with mlx_lm.chat."""

import importlib
import io
import re
import sys

import pytest

from mlx_rotor.cli import command

chat = importlib.import_module("mlx_rotor.chat")
QUESTION = "What does this do? " + "import os; " * 40


@pytest.fixture
def talk(small, monkeypatch, capsys):
    """Types lines into a chat of few tokens a turn; returns what is shown, without colours, and the status."""

    def talked(*lines, flags=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        status = command.run(chat.main, ["--model", str(small), "--max-tokens", "4", *flags])
        return re.sub(r"[\x01\x02]|\x1b\[[0-9;]*[A-Za-z]", "", capsys.readouterr().out), status

    return talked


def test_flags_and_defaults_are_mlx_lms_but_for_the_model():
    theirs = vars(importlib.import_module("mlx_lm.chat").setup_arg_parser().parse_args([]))
    ours = vars(chat._parser().parse_args([]))
    assert {k: ours[k] for k in theirs} == theirs | {"model": None}
    assert {"kv", "kv_ring", "cache_type_k", "experts"} <= set(ours)


def test_it_answers_resets_helps_and_ends(talk):
    shown, status = talk("hi", "h", "r", "hi", "q", "never read")
    assert status == 0 and "mlx_rotor chat" in shown and "bye" in shown
    assert "KV cache trellis3: layers 0-1: K trellis4, V trellis4" in shown and "Experts: 2 layers" in shown
    assert shown.count("4 tokens ·") == 2 and "context cleared" in shown and shown.count("commands") == 2


def test_the_end_of_the_input_ends_it(talk):
    shown, status = talk("hi")
    assert status == 0 and shown.count("4 tokens ·") == 1 and "bye" in shown


def test_turns_share_one_compressed_cache_until_it_is_reset(talk, monkeypatch):
    made = []
    host = importlib.import_module("mlx_rotor.host.chat")
    real = host.make_prompt_cache
    monkeypatch.setattr(host, "make_prompt_cache", lambda *a, **k: made.append(real(*a, **k)) or made[-1])
    _, status = talk(QUESTION, "and this?", "r", "hi", flags=["--kv", "turbo4", "--kv-ring", "32"])
    first, second = [caches[0] for caches in made[1:]]  # the first list is only described
    assert status == 0 and first.offset > 150 > second.offset and first.body.length > 100
    assert first.codecs == ("turbo4", "turbo4") and first.counts.fallback == 0


def test_exact_and_limited_caches_say_why(talk):
    assert "KV cache exact: as was asked for" in talk("q", flags=["--kv", "exact"])[0]
    assert "KV cache exact: --max-kv-size 50 leaves too few tokens" in talk("q", flags=["--max-kv-size", "50"])[0]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--kv", "nope"], "unknown KV scheme 'nope'"),
        (["--model", "/no/such/folder"], "does not exist"),
        (["--experts", "fused"], "--experts fused can't be done"),
    ],
)
def test_mistakes_are_one_line(small, flags, says, capsys):
    model = () if "--model" in flags else ("--model", str(small))
    assert command.run(chat.main, [*model, *flags]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and says in err and err.count("\n") == 1
