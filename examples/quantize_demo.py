"""Sizes of the bundled model under every shipped policy, then quantized under a policy of one's own.

    python examples/quantize_demo.py OUT

OUT loads in stock mlx_lm: `mlx_lm.generate --model OUT --prompt "Hello"`.
"""

import sys

from mlx_rotor import bundled
from mlx_rotor.errors import RotorError
from mlx_rotor.quant import Recipe, policy, quantize
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
    try:
        print(f"{name}: {Recipe(policy.load(name)).plan(read_config(bundled.MODEL)).total()}")
    except RotorError as e:  # a size that is solved for may be too small for this model
        print(f"{name}: {e}")

result = quantize(bundled.MODEL, sys.argv[1], policy.parse(MINE, "mine"))
print(f"mine: {result.plan.total()}, in {result.seconds:.1f} s")
print("relative error:", ", ".join(f"{role} {error:.1%}" for role, error in result.errors.items() if error))
