import json
from pathlib import Path

import pytest

from mlx_rotor import models
from mlx_rotor.errors import RotorError
from mlx_rotor.models import minimax_m2
from mlx_rotor.quant.roles import ROLES

CONFIG = json.loads((Path(__file__).parents[2] / "examples" / "minimax_m27" / "config.json").read_text())


def test_every_architecture_file_is_found_and_complete():
    assert {"minimax", "minimax_m2"} <= set(models.supported())
    for model_type in models.supported():
        arch = models.lookup({"model_type": model_type})
        assert model_type in arch.model_types
        assert {t.role for t in arch.tensors} <= ROLES.keys()
        for tensor in arch.tensors:
            assert tensor.layered == ROLES[tensor.role].layered or tensor.role == "norm"


def test_both_names_of_minimax_are_one_architecture():
    assert models.lookup({"model_type": "minimax"}) is models.lookup(CONFIG) is minimax_m2.ARCHITECTURE


@pytest.mark.parametrize("config", [{}, {"model_type": "llama"}, {"model_type": None}, {"model_type": ["minimax"]}])
def test_an_unsupported_model_lists_the_supported_ones(config):
    with pytest.raises(RotorError, match=r"unsupported model_type .*; supported: .*minimax, minimax_m2"):
        models.lookup(config)


def test_dimensions_are_the_published_ones():
    dims = minimax_m2.dims(CONFIG)
    assert (dims["q"], dims["kv"], dims["inter"], dims["experts"], dims["layers"]) == (6144, 1024, 1536, 256, 62)
    assert dims["untied"] == dims["qk_norm"] == 1
    assert minimax_m2.dims(CONFIG | {"head_dim": None})["q"] == 3072
    assert minimax_m2.dims(CONFIG | {"tie_word_embeddings": True})["untied"] == 0


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_local_experts", "vocab_size"])
@pytest.mark.parametrize("value", [None, 0, -1, "8", 2.0, True])
def test_a_dimension_that_is_none_is_an_error_that_names_it(key, value):
    with pytest.raises(RotorError, match=f"config.json: '{key}' must be a positive integer"):
        minimax_m2.dims(CONFIG | {key: value})


def test_shared_experts_are_refused():
    with pytest.raises(RotorError, match="shared experts"):
        minimax_m2.dims(CONFIG | {"shared_intermediate_size": 1536})
