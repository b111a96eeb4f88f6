"""A weight format is one file and one header, and a policy is one TOML: each added to a copy of the product."""

import json
import shutil

import mlx.core as mx
import pytest

from scratch import ROOT, run_in, scratch

# 16 whole levels from -8 to 7 times a float16 scale a group of 32: llama.cpp's Q4_0.
FORMAT = '''
"""Q4_0: scale · (code - 8), one float16 scale a group of 32."""

from collections.abc import Sequence
from typing import ClassVar

import mlx.core as mx

from ...fit.scaled import Effort
from ...fit.search import WHOLE
from .base import Efforts, Errors, ScaledFormat, codes

ZERO = 8  # the code of 0


def decode(parts: Sequence[mx.array], columns: int, bits: int, group_size: int) -> mx.array:
    words, scales = parts
    levels = codes(words, bits) - ZERO
    grouped = levels.reshape(*words.shape[:-1], -1, group_size) * scales.astype(mx.float32)[..., None]
    return grouped.reshape(*words.shape[:-1], columns)


class Levels:
    bits, most = 4, 7.0

    def nearest(self, x: mx.array) -> mx.array:
        return (mx.clip(x, -ZERO, ZERO - 1) + WHOLE) - WHOLE

    def codes(self, levels: mx.array) -> mx.array:
        return (levels + ZERO).astype(mx.uint32)

    def covering(self, low: mx.array, high: mx.array) -> tuple[mx.array, ...]:
        return (mx.maximum(-low, high) / (ZERO - 1),)


class Q4(ScaledFormat):
    mode = "q4"
    all_bits, group_sizes = (4,), (32,)
    header = "q4.h"
    decoder = staticmethod(decode)
    errors: ClassVar[Errors] = {(4, 32): (0.009378, 0.007446, 0.007359)}
    levels = Levels()
    efforts: ClassVar[Efforts] = {
        "fast": None,
        "search": Effort((1.0, 0.9, 0.8), 2, (1.0,)),
        "best": Effort(tuple(1.04 - 0.02 * i for i in range(24)), 3, (1 - 2**-10, 1.0, 1 + 2**-10)),
    }

    def metal(self, element: str) -> str:
        return f"Q4Weights<{self.group_size}, {element}>"
'''
POLICY = """
description = "Experts in a format of one's own"
[[rule]]
roles = ["router", "router.bias", "norm"]
keep = true
[[rule]]
roles = ["expert.*"]
mode = "q4"
[[rule]]
roles = ["*"]
bits = 8
"""
QUANTIZE = """
import mlx.core as mx
mx.set_default_device(mx.cpu)
from mlx_rotor.quantize import main
for flags in (["--policy", "mine", "--out", "out"], ["--check", "out"]):
    assert main(flags) == 0, flags
"""
ERRORS = """
from mlx_rotor.quant.fit import FITS, measure, relative_error
from mlx_rotor.quant.spec import Spec
for fit in FITS:
    print(relative_error(4, 32, fit, "q4"), measure(Spec(4, 32, "q4"), fit, rows=128, seed=1))
"""
LOGITS = """
import sys
if {alone}: sys.modules["mlx_rotor"] = None
else: import mlx_rotor
import mlx.core as mx
mx.set_default_device(mx.cpu)
from pathlib import Path
from mlx_lm import utils
model, _ = utils.load_model(Path("out"), trust_remote_code=True)
mx.save("{file}", model(mx.array([[5, 3, 200, 17, 90, 1]])).astype(mx.float32))
print(type(model.model.layers[0].block_sparse_moe.switch_mlp.gate_proj).__module__)
"""


def with_format(folder, text=FORMAT):
    (folder / "mlx_rotor" / "experts" / "formats" / "q4.py").write_text(text)
    header = (ROOT / "kernels_metal" / "weight" / "q8.h").read_text()
    for old, new in (
        ("Q8", "Q4"),
        ("BITS = 8", "BITS = 4"),
        ("columns / 4)", "columns / 8)"),
        ("Codes<8>", "Codes<4>"),
        ("128.0f", "8.0f"),
    ):
        assert old in header
        header = header.replace(old, new)
    (folder / "kernels_metal" / "weight" / "q4.h").write_text(header)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The product with one more format and one more policy, and a checkpoint that it made by both."""
    folder = with_format(scratch(tmp_path_factory.mktemp("format")))
    (folder / "mlx_rotor" / "quant" / "policies" / "mine.toml").write_text(POLICY)
    said = run_in(folder, QUANTIZE)
    return folder, said


def test_a_policy_is_one_file(made):
    folder, said = made
    assert "Experts in a format of one's own" in said
    provenance = json.loads((folder / "out" / "mlx_rotor.json").read_text())
    assert provenance["policy"]["name"] == "mine"


def test_a_weight_format_is_one_file_and_one_header(made):
    folder, _ = made
    for file, alone in (("alone", True), ("installed", False)):
        module = run_in(folder, LOGITS.format(file=file, alone=alone)).split()[-1]
        assert module == ("custom_model" if alone else "mlx_rotor.experts.layers")
    alone, installed = (mx.load(str(folder / f"{file}.npy")) for file in ("alone", "installed"))
    assert mx.abs(alone - installed).max() < 1e-2 * mx.abs(installed).max()
    carried = (folder / "out" / "mlx_rotor_formats.py").read_text()
    assert "def decode_q4(" in carried and "Q4_ZERO = 8" in carried and "decode_q8" not in carried


def test_the_errors_of_a_format_are_those_of_its_file(made):
    folder, _ = made
    pairs = [line.split() for line in run_in(folder, ERRORS).splitlines()]
    assert [float(stated) for stated, _ in pairs] == [0.009378, 0.007446, 0.007359]
    for stated, measured in pairs:
        assert float(measured) == pytest.approx(float(stated), rel=0.02)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("    errors: ClassVar[Errors] = {(4, 32): (0.009378, 0.007446, 0.007359)}\n", "", "Q4 lacks errors"),
        ("{(4, 32): (0.009378", "{(4, 16): (0.009378", r"differ in (4, 16), (4, 32)"),
        ("    decoder = staticmethod(decode)\n", "", "Q4 lacks decoder"),
        ("    def metal(", "    def metals(", "Q4 lacks metal"),
        ('"q4.h"', '"other.h"', "there is no kernels_metal/weight/other.h"),
        ("ZERO = 8  #", "ZERO = mx.array(8)  #", "its decoder uses ZERO"),
        ("class Q4(ScaledFormat)", "class Q4", "has one subclass of Format, this has 0"),
    ],
)
def test_a_format_that_lacks_a_part_is_refused_when_formats_are_loaded(tmp_path, old, new, says):
    assert old in FORMAT
    folder = tmp_path / "package"
    (folder / "kernels_metal").mkdir(parents=True)
    shutil.copytree(ROOT / "kernels_metal" / "weight", folder / "kernels_metal" / "weight")
    for name in ("kernels", "fit", "experts/formats"):
        shutil.copytree(
            ROOT / "mlx_rotor" / name, folder / "mlx_rotor" / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("errors.py", "files.py"):
        shutil.copy(ROOT / "mlx_rotor" / name, folder / "mlx_rotor")
    for name in ("__init__.py", "experts/__init__.py"):
        (folder / "mlx_rotor" / name).write_text("")
    with_format(folder, FORMAT.replace(old, new))
    code = "from mlx_rotor.errors import RotorError\nfrom mlx_rotor.experts import formats\n"
    said = run_in(folder, code + "try: print(formats.modes())\nexcept RotorError as e: print(e)")
    assert says in said and "q4" in said
