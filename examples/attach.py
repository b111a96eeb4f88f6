"""mlx_lm's own generate, through a compressed KV cache.

python examples/attach.py [MODEL]        # the bundled model by default
"""

import sys

from mlx_lm import generate

import mlx_rotor
from mlx_rotor.host import report

model, tokenizer = mlx_rotor.load(sys.argv[1] if len(sys.argv) > 1 else None)
prompt = tokenizer.encode("import os\nimport sys\n\n\ndef main():\n" * 40)

# One cache, handed over by hand.
cache = mlx_rotor.make_prompt_cache(model, "turbo3")
print(generate(model, tokenizer, prompt, max_tokens=10, prompt_cache=cache))
held, fp16 = report.kv_bytes(cache), report.kv_bytes_fp16(cache)
print(f"{report.describe(cache)}\n{held / 1e6:.3f} MB held, {100 * held / fp16:.0f}% of fp16's")

# Or attached: every cache mlx_lm makes for this model is compressed, until it is detached.
mlx_rotor.attach(model, kv="turbo4v2")
print(generate(model, tokenizer, prompt, max_tokens=10))
mlx_rotor.detach(model)
