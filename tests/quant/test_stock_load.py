"""The output in stock mlx_lm, in a process that can't import mlx_rotor."""

import json
import subprocess
import sys

import pytest
from quantizing import quantize

from mlx_rotor.bundled import MODEL
from mlx_rotor.quant.policy import load

READER = """
import json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mlx_rotor":
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
try:
    import mlx_rotor
except ImportError:
    pass
else:
    raise SystemExit("mlx_rotor is not blocked")

import mlx_lm
from mlx.utils import tree_flatten

model, tokenizer = mlx_lm.load(sys.argv[1])
text = mlx_lm.generate(model, tokenizer, "def main(args):", max_tokens=8)
modules = {n: [m.bits, m.group_size, m.mode] for n, m in model.named_modules() if hasattr(m, "bits")}
dtypes = {n: str(v.dtype) for n, v in tree_flatten(model.parameters())}
print(json.dumps({"text": text, "modules": modules, "dtypes": dtypes}))
"""


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """The bundled model under Config-I, and what stock mlx_lm makes of it."""
    out = tmp_path_factory.mktemp("stock") / "out"
    result = quantize(MODEL, out, load("config-i"), shard_bytes=3_000_000)
    assert len(result.files) > 1
    done = subprocess.run([sys.executable, "-c", READER, str(out)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return result.plan, json.loads(done.stdout.splitlines()[-1])


def test_stock_mlx_lm_loads_and_generates(read):
    assert read[1]["text"]


def test_every_module_has_the_bits_of_the_plan(read):
    plan, found = read
    expected = {e.module: [e.spec.bits, e.spec.group_size, e.spec.mode] for e in plan.entries if e.spec}
    assert found["modules"] == expected
    assert {bits for bits, _, _ in expected.values()} == {2, 3, 4, 8}


def test_the_router_stays_unquantized_and_its_bias_float32(read):
    plan, found = read
    for layer in range(plan.layers):
        moe = f"model.layers.{layer}.block_sparse_moe"
        assert found["dtypes"][f"{moe}.gate.weight"] == "mlx.core.bfloat16"
        assert f"{moe}.gate.scales" not in found["dtypes"]
        assert found["dtypes"][f"{moe}.e_score_correction_bias"] == "mlx.core.float32"


def test_everything_else_is_bf16_or_packed(read):
    kinds = {}
    for name, dtype in read[1]["dtypes"].items():
        if not name.endswith("e_score_correction_bias"):
            kinds.setdefault(dtype.removeprefix("mlx.core."), set()).add(name.rsplit(".", 1)[1])
    assert kinds == {"bfloat16": {"weight", "scales", "biases"}, "uint32": {"weight"}}
