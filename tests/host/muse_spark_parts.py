"""muse_spark has Metal kernels over bfloat16 around ordinary attention: here are its parts as float32 operations."""

import mlx.core as mx


class _Float32:
    """mlx.core, with float32 under the name of bfloat16."""

    bfloat16 = mx.float32

    def __getattr__(self, name):
        return getattr(mx, name)


def qk_norm(qkvg, *, n_heads, n_kv_heads, head_dim, eps, query_scale):
    heads = qkvg[..., : (n_heads + n_kv_heads) * head_dim].reshape(*qkvg.shape[:-1], -1, head_dim)
    heads = mx.fast.rms_norm(heads, None, eps)
    return query_scale * heads[..., :n_heads, :], heads[..., n_heads:, :]


def qk_norm_rope(qkvg, *, rope_base, offset, **norm):
    def rope(x):
        turned = mx.fast.rope(x.swapaxes(1, 2), x.shape[-1], traditional=True, base=rope_base, scale=1.0, offset=offset)
        return turned.swapaxes(1, 2)

    return [rope(x) for x in qk_norm(qkvg, **norm)]


def expert_routing(logits, expert_bias, *, top_k, multiplier, score_eps, route_scale):
    scores = mx.sigmoid(multiplier * logits)
    experts = mx.argsort(-(scores + expert_bias), axis=-1)[..., :top_k]
    chosen = mx.take_along_axis(scores, experts, axis=-1)
    return experts, route_scale * chosen / (chosen.sum(-1, keepdims=True) + score_eps)


def norm_add_norm(branch, stream, *, alpha, beta, post_weight, post_eps, next_norm):
    scaled = branch if post_weight is None else branch * post_weight
    stream = alpha * stream + beta * mx.fast.rms_norm(scaled, None, post_eps)
    return stream, None if next_norm is None else next_norm(stream)


def post_expert_norm_combine(experts, weights, *, norm_weight, eps):
    return (weights[..., None] * mx.fast.rms_norm(experts * norm_weight, None, eps)).sum(-2)


def rms_norm_sigmoid_gate(x, gate, *, eps):
    return mx.fast.rms_norm(x, None, eps).swapaxes(1, 2).reshape(gate.shape) * mx.sigmoid(gate)


PARTS = (qk_norm, qk_norm_rope, expert_routing, norm_add_norm, post_expert_norm_combine, rms_norm_sigmoid_gate)


def put_into(module):
    """Replaces the kernels' names in mlx_lm's module."""
    module.mx = _Float32()
    for part in PARTS:
        setattr(module, part.__name__, part)
