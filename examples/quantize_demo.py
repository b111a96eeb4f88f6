"""Sizes of the bundled model under every shipped policy, then quantized under a policy of one's own.

    python examples/quantize_demo.py OUT

OUT loads in stock mlx_lm: `mlx_lm.generate --model OUT --prompt "Hello"`.
"""

import sys

from mlx_rotor import demo
from mlx_rotor.quant import make_plan, policy, quantize
from mlx_rotor.quant.plan import read_config

MINE = """
[[rule]]
roles = ["router", "router.bias", "norm"]
keep = true

[[rule]]
roles = ["expert.*"]
bits = 3

[[rule]]
roles = ["embed", "head", "attn.*"]
bits = 6
group_size = 32
"""

for name in policy.shipped():
    print(f"{name}: {make_plan(read_config(demo.MODEL), policy.load(name)).total()}")

result = quantize(demo.MODEL, sys.argv[1], policy.parse(MINE, "mine"))
print(f"mine: {result.plan.total()}, in {result.seconds:.1f} s")
print("relative error:", ", ".join(f"{role} {error:.1%}" for role, error in result.errors.items() if error))
