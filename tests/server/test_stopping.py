"""Stop words in text that comes in pieces."""

from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm import server as stock

from mlx_rotor.server.stop_words import until_stop

END = 9


def response(text, reason=None, token=1):
    return stock.Response(text, token, 0.0, reason, ())


def said(responses):
    """What mlx_lm's handler makes of responses: (text, finish reason, tokens)."""
    responses = list(responses)
    assert all(r.finish_reason is None for r in responses[:-1])
    return "".join(r.text for r in responses if r.finish_reason != "stop"), responses[-1].finish_reason, len(responses)


def cut(text, words):
    """`text` up to the word that is complete first, character by character."""
    for end in range(1, len(text) + 1):
        if ending := [w for w in words if text[:end].endswith(w)]:
            return text[: end - max(map(len, ending))]
    return None


@settings(deadline=None, database=None)
@given(
    st.lists(st.text("ab\n", max_size=3), min_size=1, max_size=8),
    st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
    st.booleans(),
)
def test_text_ends_where_the_first_stop_word_begins(pieces, words, ends):
    responses = [response(p) for p in pieces]
    responses += [response("", "stop", END)] if ends else [response("a", "length")]
    whole = "".join(pieces) + ("" if ends else "a")
    text, reason, tokens = said(until_stop(iter(responses), words, {END}, str))
    wanted = cut(whole, words)
    assert text == (whole if wanted is None else wanted)
    assert reason == ("stop" if ends or wanted is not None else "length")
    # One more than were generated only where a first token holds both text and a stop word.
    assert tokens <= len(responses) + (wanted not in (None, "") and cut(pieces[0], words) is not None)


def test_a_word_that_mlx_lm_found_is_left_out_with_what_led_to_it():
    """In a batch the token that completes a word comes without its text."""
    responses = [response("xa"), response("b"), response("", "stop", 5)]
    assert said(until_stop(iter(responses), ["abc"], {END}, lambda t: "c"))[:2] == ("x", "stop")
    responses = [response("xa"), response("b"), response("c", "stop", 5)]
    assert said(until_stop(iter(responses), ["abc"], {END}, str))[:2] == ("x", "stop")
