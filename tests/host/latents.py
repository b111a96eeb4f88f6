"""What compressing the latents of multi-head latent attention would cost: prints step times, memory and errors.

Two layers of DeepSeek-V3's latent shape (512 numbers and 64 with RoPE a token), float32. The codec takes both sides.
Arguments: numbers of tokens, multiples of 256.
"""

import sys
import time

import mlx.core as mx
from mlx_lm.models import cache as stock

from mlx_rotor.cache import parse
from mlx_rotor.host import attention, report
from mlx_rotor.host.layers import compress
from zoo import build

SHAPE = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "kv_lora_rank": 512,
    "q_lora_rank": 256,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "n_routed_experts": None,
    "max_position_embeddings": 8192,
}
STEPS = 12


def measure(model, caches, tokens, context):
    """(milliseconds of the fastest step, MB that a step holds for a while, MB of the caches, logits of all steps)."""
    for at in range(0, context, 256):
        mx.eval(model(tokens[:, at : at + 256], cache=caches))
    times, logits, step_mb = [], [], 0.0
    for at in range(context, context + STEPS):
        mx.clear_cache()
        mx.reset_peak_memory()
        held, start = mx.get_active_memory(), time.perf_counter()
        logits.append(model(tokens[:, at : at + 1], cache=caches))
        mx.eval(logits[-1])
        times.append(time.perf_counter() - start)
        step_mb = max(step_mb, (mx.get_peak_memory() - held) / 1e6)
    return 1e3 * min(times), step_mb, report.kv_bytes(caches) / 1e6, mx.concatenate(logits, axis=1)


def main(contexts):
    mx.set_default_device(mx.cpu)
    model = build("deepseek_v3", **SHAPE)
    attention.install()
    for context in contexts:
        tokens = mx.random.randint(0, 64, (1, context + STEPS))
        plain = measure(model, stock.make_prompt_cache(model), tokens, context)
        packed = measure(
            model, compress(stock.make_prompt_cache(model), parse("turbo4", protect_layers=0)), tokens, context
        )
        p, q = (mx.log(mx.softmax(run[3], axis=-1)) for run in (plain, packed))
        kl = (mx.exp(p) * (p - q)).sum(-1).mean().item()
        for name, (ms, step, kv, _) in (("exact", plain), ("turbo4", packed)):
            print(f"{context} tokens, {name}: step {ms:.1f} ms, {step:.1f} MB while it runs, cache {kv:.1f} MB")
        print(f"{context} tokens: {packed[0] / plain[0]:.1f} times as long, KL to exact {kl:.1e}")


if __name__ == "__main__":
    main([int(a) for a in sys.argv[1:]] or [512, 1024])
