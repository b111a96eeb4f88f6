"""Names other packages use for their caches: recipes for a model's list."""

import mlx.core as mx
import pytest
from mlx_lm.models import cache as stock

import mlx_rotor
from mlx_rotor import RotorError
from tiny_models import tiny


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        (mlx_rotor.IsoQuantCache(bits=4), "iso4"),
        (mlx_rotor.IsoQuantCache(bits=3, mode="full"), "isofull3"),
        (mlx_rotor.PlanarQuantCache(bits=2), "planar2"),
        (mlx_rotor.RotorQuantCache(bits=3), "rotor3"),
        (mlx_rotor.TurboQuantCache(k_bits=4, v_bits=2), "turbo4v2"),
    ],
)
def test_a_recipe_makes_a_models_list(recipe, name):
    model = tiny("llama")
    caches = recipe(model)
    assert recipe.name == name and len(caches) == 3
    k, v = mlx_rotor.cache.parse(name).codecs(0, 3)
    assert all(c.codecs == (k, v) for c in caches)  # three layers: all of them are at an end
    mx.eval(model(mx.array([[1, 2, 3]]), cache=caches))
    assert caches[0].offset == 3
    mlx_rotor.attach(model, recipe)
    assert stock.make_prompt_cache(model)[1].codecs == (k, v)


def test_parts_of_a_scheme_pass_through():
    recipe = mlx_rotor.IsoQuantCache(bits=3, sinks=2, ring=16, protect_layers=0, centre=False)
    assert (recipe.sinks, recipe.ring, recipe.protect_layers, recipe.centre) == (2, 16, 0, False)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: mlx_rotor.IsoQuantCache(bits=5), "iso5"),
        (lambda: mlx_rotor.IsoQuantCache(mode="half"), "fast and full"),
        (lambda: mlx_rotor.TurboQuantCache(k_bits=2, v_bits=4), "fewer bits"),
        (lambda: mlx_rotor.RotorQuantCache(group=3), "no part of a scheme: group"),
    ],
)
def test_what_there_is_not_is_named(make, says):
    with pytest.raises(RotorError, match=says):
        make()
