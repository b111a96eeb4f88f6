"""Layers in formats MLX does not have, split over machines by MLX's own functions."""

import json
import os
import socket
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import pytest
from encoded_models import LLOYD, MIXED, distance, random_parts, write
from mlx.nn.layers import distributed
from mlx_lm import utils
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear

from mlx_rotor.errors import RotorError
from mlx_rotor.experts import layers
from mlx_rotor.experts.sharding import RotorShardedToAllLinear

SPECS = [("lloyd", 2, 64), ("lloyd", 3, 128), ("lloyd", 4, 256), ("iq4_nl", 4, 16), ("iq4_nl", 4, 32), ("q8", 8, 32)]


class Group:
    """A machine's place among others that don't run."""

    def __init__(self, rank, size=2):
        self.place = rank, size

    def rank(self):
        return self.place[0]

    def size(self):
        return self.place[1]


def filled(stock, spec, name="model.layers.3.down_proj"):
    layer = layers.of(stock, *spec, name=name)
    *lead, columns = stock.weight.shape
    parts = random_parts(layer.format, lead, columns)
    for kind, part in zip(("weight", *layer.format.beside), parts, strict=True):
        layer[kind] = part
    if "bias" in stock:
        layer.bias = mx.random.normal(stock.bias.shape, key=mx.random.key(5))
    return layer


def normal(*shape):
    return mx.random.normal(shape, key=mx.random.key(1))


def close(a, b):
    return a.shape == b.shape and distance(a, b) < 1e-5


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("segments", [1, 2, [0.25]])
def test_machines_with_a_part_of_the_rows_have_the_rows_together(spec, segments):
    layer, x = filled(nn.Linear(512, 16), spec), normal(3, 512)
    parts = [distributed.shard_linear(layer, "all-to-sharded", segments=segments, group=Group(r)) for r in (0, 1)]
    assert all(type(part) is layers.RotorLinear and part["weight"].shape[0] == 8 for part in parts)
    cuts = {1: [], 2: [8]}.get(segments, [4]) if isinstance(segments, int) else [4]
    halves = [mx.split(whole, 2, axis=-1) for whole in mx.split(layer(x), cuts, axis=-1)]
    for rank, part in enumerate(parts):
        assert close(part(x), mx.concatenate([half[rank] for half in halves], axis=-1))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_machines_with_a_part_of_the_columns_sum_to_the_whole(monkeypatch, spec, bias):
    layer, x = filled(nn.Linear(512, 16, bias=bias), spec), normal(3, 512)
    parts = [distributed.shard_linear(layer, "sharded-to-all", group=Group(r)) for r in (0, 1)]
    assert all(type(part) is RotorShardedToAllLinear and part.columns == 256 for part in parts)
    halves, sums = mx.split(x, 2, axis=-1), []

    def all_sum(value, group):
        sums.append((group.rank(), value))
        return sum(value for _, value in sums[-2:])

    monkeypatch.setattr(mx.distributed, "all_sum", all_sum)
    outs = [part(half) for part, half in zip(parts, halves, strict=True)]
    assert [rank for rank, _ in sums] == [0, 1]
    assert close(outs[1], layer(x))
    assert layers.packed_of(parts[0]) is None


def test_segments_of_columns_are_split_each_on_its_own(monkeypatch):
    layer, x = filled(nn.Linear(1024, 16), ("lloyd", 3, 128)), normal(3, 1024)
    monkeypatch.setattr(mx.distributed, "all_sum", lambda value, group: value)
    for segments, cuts in ((2, [512]), ([0.25], [256])):
        parts = [distributed.shard_linear(layer, "sharded-to-all", segments=segments, group=Group(r)) for r in (0, 1)]
        pieces = [mx.split(piece, 2, axis=-1) for piece in mx.split(x, cuts, axis=-1)]
        outs = [part(mx.concatenate([p[r] for p in pieces], axis=-1)) for r, part in enumerate(parts)]
        assert close(outs[0] + outs[1] - layer.bias, layer(x))
    with pytest.raises(RotorError, match=r"segments of packed columns are fractions of them, not \[512\]"):
        distributed.shard_linear(layer, "sharded-to-all", segments=[512], group=Group(0))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_experts_are_split_in_place(spec):
    whole = SwitchGLU(512, 512, 3)
    for name in ("gate_proj", "up_proj", "down_proj"):
        whole[name] = filled(whole[name], spec)
    x, indices = normal(1, 5, 512), mx.random.randint(0, 3, (1, 5, 2), key=mx.random.key(4))
    outs = []
    for rank in (0, 1):
        part = SwitchGLU(512, 512, 3)
        for name in ("gate_proj", "up_proj", "down_proj"):
            part[name] = filled(part[name], spec)
            how = "sharded-to-all" if name == "down_proj" else "all-to-sharded"
            distributed.shard_inplace(part[name], how, group=Group(rank))
        assert (part.gate_proj.output_dims, part.down_proj.input_dims) == (256, 256)
        outs.append(part(x, indices))
    assert close(outs[0] + outs[1], whole(x, indices))


@pytest.mark.parametrize(
    ("columns", "machines", "said"),
    [
        (
            768,
            2,
            "a part of 384 for each of 2 machines of its 768 columns .* 256; columns can be split over 3 machines",
        ),
        (1536, 4, "a part of 384 .* its 1536 columns .* columns can be split over 2, 3, 6 machines"),
        (1280, 3, "a part of 426.667 for each of 3 machines of its 1280 columns .* over 5 machines"),
        (256, 2, "a part of 128 .* columns can't be split"),
    ],
)
def test_a_split_inside_a_group_is_refused(columns, machines, said):
    linear, experts = filled(nn.Linear(columns, 12), LLOYD), filled(SwitchLinear(columns, 12, 2), LLOYD)
    parent = nn.Sequential(nn.RMSNorm(columns), experts)
    group, path = Group(0, machines), "^model.layers.3.down_proj: "
    with pytest.raises(RotorError, match=path + said):
        distributed.shard_linear(linear, "sharded-to-all", group=group)
    for module in (experts, parent.layers[1]):
        with pytest.raises(RotorError, match=path + said):
            distributed.shard_inplace(module, "sharded-to-all", group=group)
    with pytest.raises(RotorError, match=path + said):
        distributed.shard_inplace(parent, lambda name, _: -1 if name.startswith("layers.1.") else None, group=group)
    assert experts["weight"].shape[-1] == columns * 2 // 32  # as it was


def test_a_split_by_mlxs_own_function_is_found_when_the_layer_is_used():
    """As in a model of mlx_lm that was imported before this package."""
    from mlx_rotor.host.formats import stock_shard_inplace

    layer = filled(SwitchLinear(768, 12, 2), LLOYD)
    stock_shard_inplace(layer, "sharded-to-all", group=Group(0))
    with pytest.raises(
        RotorError, match="a part of 384 of its 768 columns is no whole number of lloyd's groups of 256"
    ):
        layer(normal(1, 1, 384), mx.array([0]))


def test_mlxs_own_layers_are_split_as_ever():
    x = normal(2, 256)
    for layer in (nn.Linear(256, 8), nn.QuantizedLinear(256, 8, group_size=32, bits=4)):
        rows = distributed.shard_linear(layer, "all-to-sharded", group=Group(1))
        assert close(rows(x), layer(x)[:, 4:])
        columns = distributed.shard_linear(layer, "sharded-to-all", group=Group(0))
        assert isinstance(columns, distributed.ShardedToAllLinear | distributed.QuantizedShardedToAllLinear)
        distributed.shard_inplace(layer, "all-to-sharded", group=Group(1))
        assert close(layer(x), rows(x))


MACHINE = """
import sys
import mlx.core as mx
mx.set_default_device(mx.cpu)
import mlx_rotor
from mlx_lm.utils import sharded_load
group = mx.distributed.init(strict=True, backend="ring")
assert group.size() == 2
for path in sys.argv[1:]:
    model, tokenizer = sharded_load(path, None, group)
    print(model.layers[1].self_attn.o_proj.columns)
    logits = model(mx.array([list(range(3, 43))]))
    mx.eval(logits)
    if group.rank() == 1:
        mx.save_safetensors(path + "/logits.safetensors", {"logits": logits})
"""


def machines(folder, paths):
    """Runs MACHINE on two; [(output, errors, exit status)]."""
    sockets = [socket.socket() for _ in range(2)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{s.getsockname()[1]}"] for s in sockets]))
    for s in sockets:
        s.close()
    running = [
        subprocess.Popen(
            [sys.executable, "-c", MACHINE, *map(str, paths)],
            env={**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        return [(*process.communicate(timeout=120), process.returncode) for process in running]
    finally:
        for process in running:
            process.kill()


def test_two_machines_have_the_logits_of_one(tmp_path):
    names = ("minimax", "gpt_oss", "deepseek_v3")
    references = {tmp_path / name: write(tmp_path / name, name, tokenizer=True, vocab_size=2048) for name in names}
    for out, errors, status in machines(tmp_path, references):
        assert status == 0, errors
        assert out.split() == ["128"] * len(names)
    for path, reference in references.items():
        logits = mx.load(str(path / "logits.safetensors"))["logits"]
        assert distance(logits, reference(mx.array([list(range(3, 43))]))) < 1e-4


def test_a_model_that_cannot_be_split_says_where(tmp_path):
    write(tmp_path, specs={**MIXED, "down_proj": LLOYD}, num_hidden_layers=1)
    model, _ = utils.load_model(tmp_path)
    path = r"model\.layers\.0\.block_sparse_moe\.switch_mlp\.down_proj"
    with pytest.raises(RotorError, match=f"^{path}: a part of 128 for each of 2 machines of its 256 columns"):
        model.shard(Group(0))
