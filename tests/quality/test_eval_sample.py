import numpy as np
import pytest

from mlx_rotor.bundled import held_out_text
from mlx_rotor.errors import RotorError
from mlx_rotor.quality import sample
from mlx_rotor.quality.needle import fact
from mlx_rotor.quality.sample import QUICK, THOROUGH, TINY, Size


@pytest.fixture(scope="module")
def tokenizer(bundled):
    return bundled[1]


def small(**given):
    return TINY.with_(**given)


def test_the_sample_is_the_same_every_time(tokenizer):
    one, two, other = (sample.draw(tokenizer, held_out_text(), small(seed=s), None) for s in (0, 0, 1))
    np.testing.assert_array_equal(one.windows, two.windows)
    assert one.needles == two.needles and one.chats == two.chats
    assert one.needles != other.needles and one.chats != other.chats


def test_windows_are_text_spread_evenly_without_overlap(tokenizer):
    tokens = list(range(1001))
    windows = sample.draw_windows(tokens, [], small(windows=4, window=100))
    assert windows.tolist() == [list(range(i * 250, i * 250 + 101)) for i in range(4)]
    full = sample.draw_windows(tokens, [], small(windows=10, window=100))
    assert full[:, 1:].reshape(-1).tolist() == list(range(1, 1001)), "each token is predicted once"


def test_windows_open_as_the_tokenizer_does():
    windows = sample.draw_windows(list(range(10, 300)), [7], small(windows=2, window=100))
    assert windows.shape == (2, 101)
    assert windows[:, :3].tolist() == [[7, 10, 11], [7, 154, 155]]


@pytest.mark.parametrize(
    ("tokens", "size", "says"),
    [
        (50, small(windows=1, window=100), "50 tokens, not enough for one of 100; 1 asked for"),
        (350, small(windows=4, window=100), "350 tokens, room for 3 of 100; 4 asked for"),
        (50, QUICK, "not enough for one of 512"),
    ],
)
def test_a_text_too_short(tokens, size, says):
    with pytest.raises(RotorError, match=says):
        sample.draw_windows(list(range(tokens)), [], size)


def test_a_preset_takes_what_the_text_has():
    assert len(sample.draw_windows(list(range(2000)), [], QUICK)) == 3


def test_needles_cover_lengths_and_depths(tokenizer):
    size = small(needles=12, lengths=(200, 300), depths=(0.0, 0.5, 1.0))
    trials = sample.draw(tokenizer, held_out_text(), size, None).needles
    cells = {}
    for t in trials:
        assert len(t.needle.prompt) + len(t.needle.answer) == t.length
        assert tokenizer.decode(t.needle.answer) == f" {t.needle.code}.\n"
        cells.setdefault((t.length, t.depth), []).append(t)
    assert {key: len(v) for key, v in cells.items()} == {(n, d): 2 for n in (200, 300) for d in (0.0, 0.5, 1.0)}


def test_a_needle_stands_at_its_depth(tokenizer):
    size = small(needles=9, lengths=(250,), depths=(0.0, 0.5, 1.0))
    at = {0.0: [], 0.5: [], 1.0: []}
    for t in sample.draw(tokenizer, held_out_text(), size, None).needles:
        text = tokenizer.decode(t.needle.prompt)
        name = text.rsplit("is the secret code for ", 1)[1].split("?")[0]
        assert fact(name, t.needle.code) in text
        at[t.depth].append(text.index(fact(name, t.needle.code)) / len(text))
    assert max(at[0.0]) < min(at[0.5]) <= max(at[0.5]) < min(at[1.0])


def test_needles_that_do_not_fit(tokenizer):
    with pytest.raises(RotorError, match="--needle-lengths 20: a needle of 20 tokens needs"):
        sample.draw(tokenizer, held_out_text(), small(lengths=(20,)), None)
    with pytest.raises(RotorError, match="needs a longer text than"):
        sample.draw(tokenizer, held_out_text()[:3000], small(windows=1, lengths=(1500,)), None)


def test_more_than_the_context(tokenizer):
    with pytest.raises(RotorError, match="256 tokens are more than the model's context of 200"):
        sample.draw(tokenizer, held_out_text(), small(), 200)
    with pytest.raises(RotorError, match="300 tokens are more"):
        sample.draw(tokenizer, held_out_text(), small(lengths=(300,)), 280)


def test_chats_only_for_the_tokenizer_they_were_made_for(tokenizer):
    class Plain:
        chat_template, has_chat_template, has_tool_calling = None, False, False

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def encode(self, *args, **kwargs):
            return tokenizer.encode(*args, **kwargs)

    assert len(sample.draw(tokenizer, held_out_text(), QUICK, None).chats) == QUICK.chats
    assert sample.draw(Plain(), held_out_text(), QUICK, None).chats == []
    with pytest.raises(RotorError, match="--chats needs a tokenizer whose chat template has tool calls"):
        sample.draw(Plain(), held_out_text(), QUICK.with_(chats=3), None)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"windows": 0}, "--windows 0: must be at least 1"),
        ({"needles": -1}, "--needles -1"),
        ({"chunk": 0}, "--chunk 0"),
        ({"depths": (0.5, 1.5)}, r"--depths 1\.5: a depth is between 0"),
        ({"lengths": ()}, "at least one of --needle-lengths"),
    ],
)
def test_bad_settings(given, says):
    with pytest.raises(RotorError, match=says):
        QUICK.with_(**given)


def test_presets_fit_the_bundled_text(tokenizer):
    for size in (QUICK, THOROUGH):
        drawn = sample.draw(tokenizer, held_out_text(), size, 8192)
        assert (len(drawn.windows), len(drawn.needles), len(drawn.chats)) == (size.windows, size.needles, size.chats)
        assert size.needles % (len(size.lengths) * len(size.depths)) == 0
    assert isinstance(THOROUGH, Size)
