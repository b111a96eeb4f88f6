"""Jobs as tests start them: a policy, a recipe or a plan, with the fit and the size of shards as arguments."""

from mlx_rotor.quant import Plan, Recipe, job, making
from mlx_rotor.quant.shards import SHARD_BYTES
from mlx_rotor.quant.source import open_folder


def quantize(model, out, how, *, fit="search", shard_bytes=SHARD_BYTES, **options):
    if isinstance(how, Plan):
        return job.execute(open_folder(model), out, how, fit=fit, shard_bytes=shard_bytes, **options)
    recipe = how if isinstance(how, Recipe) else Recipe(how, fit=fit, shard_bytes=shard_bytes)
    return making.quantize(model, out, recipe, **options)
