"""Greedy divergence against whole greedy generations, and its figures."""

import mlx.core as mx
import numpy as np
import pytest

import mlx_rotor
from mlx_rotor.errors import RotorError
from mlx_rotor.quality import greedy
from mlx_rotor.quality.greedy import Greedy
from mlx_rotor.quality.sample import TINY, draw_prompts


class Rows:
    """Says after n tokens what `script` [rows, length] has at n - prompt, in every row; counts what it is fed."""

    def __init__(self, script, prompt, vocab=32):
        self.script, self.prompt, self.vocab, self.fed = np.array(script), prompt, vocab, 0

    def __call__(self, ids, cache):
        rows, n = ids.shape
        cache[0].append(np.array(ids))
        self.fed += n
        held = sum(part.shape[1] for part in cache[0])
        said = np.zeros((rows, n), dtype=int)
        if held - self.prompt < self.script.shape[1] and held >= self.prompt:
            said[:, -1] = self.script[:rows, held - self.prompt]
        return mx.array(np.eye(self.vocab, dtype=np.float32)[said])


class Kept(list):
    state = ()


REFERENCE = np.array([[1, 2, 3, 4, 5, 6], [7, 8, 9, 1, 2, 3]])


@pytest.mark.parametrize(
    ("said", "same", "fed"),
    [
        (REFERENCE, (6, 6), 5),
        ([[1, 2, 3, 4, 5, 6], [7, 8, 0, 1, 2, 3]], (6, 2), 5),
        ([[0, 2, 3, 4, 5, 6], [7, 8, 9, 1, 2, 0]], (0, 5), 5),
        ([[1, 0, 3, 4, 5, 6], [7, 8, 0, 1, 2, 3]], (1, 2), 2),
    ],
)
def test_the_first_difference_of_each_row(said, same, fed):
    model, caches = Rows(said, prompt=4), []

    def new():
        caches.append(Kept())
        return [caches[-1]]

    advanced = []
    found = greedy.follow(model, new, np.zeros((2, 4), int), REFERENCE, 3, advanced.append)
    assert found.same == same
    assert model.fed == 4 + fed, "a batch ends when every row has differed"
    assert [p.shape[1] for p in caches[0]] == [3, 1] + [1] * fed
    for i, part in enumerate(caches[0][2:]):
        np.testing.assert_array_equal(part[:, 0], REFERENCE[:, i], err_msg="the reference's tokens are fed")
    assert sum(advanced) == 2 * (4 + 6)


def test_batches_are_even_and_small():
    assert [s.stop - s.start for s in greedy._batches(17)] == [6, 6, 5]
    assert [(s.start, s.stop) for s in greedy._batches(8)] == [(0, 8)]
    assert list(greedy._batches(0)) == []


def test_it_is_what_greedy_generation_row_by_row_gives(checkpoints):
    model, _ = mlx_rotor.load(str(checkpoints["a"]))
    prompts = np.array([[i * 7 + j * 3 % 50 for j in range(40)] for i in range(3)])

    def generate(kv, prompt, n):
        cache = mlx_rotor.make_prompt_cache(model, kv, sinks=0, ring=4)
        token = mx.argmax(model(mx.array(prompt)[None], cache=cache)[0, -1])
        out = []
        for _ in range(n):
            out.append(token.item())
            token = mx.argmax(model(token[None, None], cache=cache)[0, -1])
        return out

    def new(kv):
        return lambda: mlx_rotor.make_prompt_cache(model, kv, sinks=0, ring=4)

    said = greedy.continuations(model, new("exact"), prompts, 40, lambda n: None, limit=12)
    assert said.tolist() == [generate("exact", p, 12) for p in prompts.tolist()]
    found = greedy.follow(model, new("turbo2"), prompts, said, 40, lambda n: None)
    for same, expected, prompt in zip(found.same, said.tolist(), prompts.tolist(), strict=True):
        other = generate("turbo2", prompt, 12)
        assert same == next((i for i in range(12) if other[i] != expected[i]), 12)
    assert min(found.same) < 12, "two bits without protection show in a random model"
    assert greedy.follow(model, new("exact"), prompts, said, 40, lambda n: None).same == (12, 12, 12)


def test_figures():
    found = Greedy((10, 30, 256, 256))
    assert (found.mean.value, found.median) == (138, 143)
    assert found.mean.se == pytest.approx(np.std([10, 30, 256, 256], ddof=1) / 2)
    assert str(found.never) == "2/4"
    assert Greedy((256, 256)).mean.se is None, "no error from prompts that are all alike"
    assert Greedy((3,)).mean.se is None


def test_loops_are_counted():
    loop = [9, 8, 7, 6, 1, 2, 3, 1, 2, 3, 1, 2]
    once = [9, 8, 7, 6, 5, 4, 1, 2, 3, 4, 1, 2]
    assert greedy.repeating(np.array([loop, once, [5] * 12, list(range(12))])) == 2
    assert greedy.repeating(np.zeros((0, 12), int)) == 0


def test_prompts_are_spread_and_open_as_the_tokenizer_does():
    prompts = greedy.draw_prompts(list(range(2000)), [1999], 4)
    assert prompts.shape == (4, greedy.PROMPT)
    assert prompts[:, 0].tolist() == [1999] * 4 and prompts[:, 1].tolist() == [0, 500, 1000, 1500]
    assert greedy.draw_prompts(list(range(700)), [], 4).shape == (2, greedy.PROMPT)
    assert greedy.draw_prompts([1, 2], [], 4).shape == (0, greedy.PROMPT)
    assert len(draw_prompts(list(range(700)), [], TINY)) == 0
    with pytest.raises(RotorError, match="room for 2 prompts of 256 tokens; 3 asked for"):
        draw_prompts(list(range(700)), [], TINY.with_(greedy=3))
