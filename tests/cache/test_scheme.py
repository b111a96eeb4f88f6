import pytest

from mlx_rotor import RotorError
from mlx_rotor.cache import Scheme, parse


@pytest.mark.parametrize(
    ("text", "k", "v"),
    [
        ("turbo3", "turbo3", "turbo3"),
        ("turbo4v2", "turbo4", "turbo2"),
        ("k=turbo4,v=turbo3", "turbo4", "turbo3"),
        ("v=turbo2, k=turbo3", "turbo3", "turbo2"),
        ("trellis3", "trellis3", "trellis3"),
        ("rotor4v3", "rotor4", "rotor3"),
        ("k=trellis4,v=iso3", "trellis4", "iso3"),
    ],
)
def test_names(text, k, v):
    scheme = parse(text)
    assert (scheme.k, scheme.v, scheme.sinks, scheme.ring, scheme.protect_layers) == (k, v, 4, 128, 2)
    assert parse(scheme.name) == scheme


def test_exact_is_no_scheme():
    assert parse("exact") is None


def test_parts_override_defaults():
    scheme = parse("turbo3", sinks=0, ring=64, protect_layers=0)
    assert (scheme.sinks, scheme.ring, scheme.protect_layers) == (0, 64, 0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nope", "turbo4v2, k=turbo4,v=iso3, or a calibration"),
        ("turbo9", "unknown KV scheme"),
        ("turbo4v9", "unknown KV scheme"),
        ("", "unknown KV scheme"),
        ("turbo2v4", "fewer bits"),
        ("k=turbo2,v=turbo3", "k=turbo3"),
        ("k=turbo4", "both sides"),
        ("k=turbo4,v=turbo2,x=1", "both sides"),
        ("k=turbo4,k=turbo2", "both sides"),
        ("k=turbo4,v=q8", "unknown codec 'q8'"),
    ],
)
def test_a_wrong_scheme_says_what_would_work(text, says):
    with pytest.raises(RotorError, match=says):
        parse(text)


def test_negative_parts_are_refused():
    with pytest.raises(RotorError, match="ring"):
        parse("turbo4", ring=-1)


def test_end_layers_are_one_step_up():
    scheme = parse("turbo4v2")
    assert [scheme.codecs(i, 6) for i in range(6)] == (
        [("turbo4", "turbo3")] * 2 + [("turbo4", "turbo2")] * 2 + [("turbo4", "turbo3")] * 2
    )
    assert {parse("turbo3", protect_layers=0).codecs(i, 6) for i in range(6)} == {("turbo3", "turbo3")}


def test_a_foreign_codec_has_no_family():
    assert Scheme("raw32", "raw32").codecs(0, 4) == ("raw32", "raw32")
