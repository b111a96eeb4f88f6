"""A tiny random model of every architecture in the installed mlx_lm. Run as a script, prints docs/architectures.md."""

import importlib
import pkgutil
import sys
import types
from functools import cache
from importlib.metadata import version

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
from mlx.utils import tree_map
from mlx_lm.models import cache as stock

import muse_spark_parts
from zoo_configs import BASE, config

EXCLUDED = {
    "olmo": "mlx_lm itself fails on a prompt of more than one token: it adds the mask's name to the scores",
}
CHUNKS = [7, 5, 1, 1, 4, 1, 1]


def module(model_type):
    """mlx_lm's module of that name. olmo's only asks whether a package that it makes no use of is there."""
    sys.modules.setdefault("hf_olmo", types.ModuleType("hf_olmo"))
    return importlib.import_module(f"mlx_lm.models.{model_type}")


@cache
def architectures():
    """Every module of mlx_lm.models that defines a Model."""
    names = [m.name for m in pkgutil.iter_modules(mlx_lm.models.__path__)]
    return tuple(sorted(name for name in names if hasattr(module(name), "Model")))


def _plain_linear(_, layer):
    """Puts an ordinary linear layer in place of each of bitnet's, which exist as Metal kernels only."""
    for name, child in layer.children().items():
        if type(child).__name__ == "BitLinear":
            setattr(layer, name, nn.Linear(child.in_features, child.out_features, bias=False))


def build(model_type, **changes):
    """A float32 model with seeded random numbers in every parameter, those that start as zeros or ones too."""
    mx.random.seed(3)
    arch = module(model_type)
    if model_type == "muse_spark":
        muse_spark_parts.put_into(arch)
    model = arch.Model(arch.ModelArgs.from_dict({**config(model_type), **changes}))
    if model_type == "phi3small":  # hides ids of a vocabulary of 100352
        model._dummy_tokenizer_ids = mx.array([BASE["vocab_size"] - 1])
    if model_type == "bitnet":
        model.apply_to_modules(_plain_linear)
    model.set_dtype(mx.float32)
    model.update(
        tree_map(
            lambda p: p + 0.05 * mx.random.normal(p.shape) if p.dtype == mx.float32 else p,
            model.parameters(),
        )
    )
    mx.eval(model.parameters())
    model.eval()
    return model


@cache
def model_of(model_type):
    """One model of each architecture for all tests."""
    return build(model_type)


def logits(model, caches, chunks=CHUNKS):
    """Of one token sequence that comes in chunks, [1, tokens, vocabulary]."""
    tokens = mx.array([[(5 * i * i + 3 * i + 1) % 61 for i in range(sum(chunks))]])
    out, at = [], 0
    for n in chunks:
        out.append(model(tokens[:, at : at + n], cache=caches))
        mx.eval(out[-1])
        at += n
    whole = mx.concatenate(out, axis=1)
    mx.eval(whole)  # another thread could not
    return whole


def worst(a, b):
    """The largest difference, by the largest logit. A logit that is no number in one and not the other is inf."""
    if not mx.array_equal(mx.isfinite(a), mx.isfinite(b)):
        return float("inf")
    a, b = (mx.where(mx.isfinite(x), x, 0) for x in (a, b))
    return (mx.abs(a - b).max() / mx.abs(b).max()).item()


# ------------------------------------------------------------ the table in docs/
HEAD = """\
# Architectures

What becomes of the layers of every architecture in mlx-lm {version} under any scheme of `--kv`.

**compressed** layers attend to packed tokens. The others keep mlx-lm's own cache; the startup line names them and why:

* **expanded**: attention computes with keys and values itself, which would have to be unpacked for every token.
* **latent**: multi-head latent attention. Its cache is small to begin with, and would have to be unpacked for every
  token too: {latent}.
* **index**: keys that choose which tokens are attended to.
* A sliding window of fewer than {shortest} tokens, such as gpt-oss's 128: little or nothing would be saved.
* Recurrent state (`ArraysCache`), attention in chunks (`ChunkedKVCache`) and caches of a model's own (`LayerCache`).

Tests run a small random model of each in float32 and hold the logits over compressed caches that lose nothing against
those over mlx-lm's, 3e-6 of the largest apart at most: attending to packed tokens, and with every layer expanded.

| architecture | full attention | sliding window | other caches |
|---|---|---|---|
"""
FOOT = """
Not run: {excluded}.

Made by `python tests/host/zoo.py > docs/architectures.md`; a test compares.
"""
# `python tests/host/latents.py 1024` on two cores of an AMD EPYC, mlx 0.32.4.
LATENT = "at 1024 tokens, 4-bit latents took 1.4 MB instead of 5.9, and a step 3.1 times as long"


def table():
    """The text of docs/architectures.md, from running every model."""
    from mlx_rotor.host import layers, probe
    from mlx_rotor.host.attachment import stock_cache
    from mlx_rotor.host.slots import slots

    words = {probe.FUSED: "compressed", probe.EXPANDED: "expanded", probe.LATENT: "latent", probe.INDEX: "index"}
    rows = []
    for name in architectures():
        if name in EXCLUDED:
            continue
        model = model_of(name)
        every, uses = slots(stock_cache(model)), probe.uses(model, stock_cache(model))
        cells = [f"`{name}`"]
        for kind in (stock.KVCache, stock.RotatingKVCache):
            cells.append(", ".join(sorted({words[uses[path]] for path, c in every.items() if type(c) is kind})))
        cells.append(", ".join(sorted({f"`{type(c).__name__}`" for path, c in every.items() if path not in uses})))
        rows.append("| " + " | ".join(cell or "–" for cell in cells) + " |")
    excluded = "; ".join(f"`{name}` ({why})" for name, why in EXCLUDED.items())
    head = HEAD.format(version=version("mlx-lm"), shortest=layers.SHORTEST_WINDOW, latent=LATENT)
    return head + "\n".join(rows) + "\n" + FOOT.format(excluded=excluded)


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    mx.disable_compile()
    sys.stdout.write(table())
