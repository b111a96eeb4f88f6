"""The wheel: built from this tree, installed elsewhere, run from another directory."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import mlx_rotor
from mlx_rotor.kernels import metal

ROOT = Path(__file__).resolve().parents[1]
MODEL_BYTES = 12_000_000


def python(*arguments: str, cwd: Path, path: Path | None = None) -> str:
    """Runs this interpreter, with only `path` on PYTHONPATH; returns stdout, or fails with everything it printed."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    missing = [name for name in ("build", "hatchling") if importlib.util.find_spec(name) is None]
    assert not missing, f"not installed: {missing}; pip install -e '.[test]'"
    folder = tmp_path_factory.mktemp("wheel")
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT), cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder that holds the installed wheel and nothing else; its dependencies come from this environment."""
    folder = tmp_path_factory.mktemp("installed")
    command = ["pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder), str(wheel)]
    python("-m", *command, cwd=folder)
    return folder


def contents(wheel: Path) -> dict[str, int]:
    """Bytes of every file in the wheel by its path."""
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: entry.file_size for entry in archive.infolist() if not entry.is_dir()}


def test_the_wheel_holds_the_package_the_kernels_and_nothing_else(wheel):
    shipped = {
        f"mlx_rotor/{file.relative_to(base)}": file
        for base, folder in ((ROOT / "mlx_rotor", ROOT / "mlx_rotor"), (ROOT, ROOT / "kernels_metal"))
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and file.name != ".DS_Store"
    }
    in_wheel = {name for name in contents(wheel) if ".dist-info/" not in name}
    assert in_wheel == set(shipped)
    assert {"mlx_rotor/py.typed", "mlx_rotor/kernels_metal/attention/decode.h"} <= in_wheel


def test_the_wheel_holds_its_licences(wheel):
    licences = {name.split("/licenses/")[1] for name in contents(wheel) if "/licenses/" in name}
    assert licences == {"LICENSE", "NOTICE"}


OPTIONAL = ("plots", "images")  # extras of which a part of the product needs a package
NAMES = {"PIL": "pillow"}  # modules whose package has another name


def imported() -> dict[str, str]:
    """Top-level module -> a file of the product that imports it."""
    found = {}
    for file in (ROOT / "mlx_rotor").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                modules = [node.module]
            found |= {module.partition(".")[0]: str(file.relative_to(ROOT)) for module in modules}
    return found


def declared(project: dict, extras: tuple[str, ...] = ()) -> set[str]:
    """Names of the packages that are needed, as pip compares them."""
    needs = [*project["dependencies"], *(need for extra in extras for need in project["optional-dependencies"][extra])]
    return {re.match(r"[\w.-]+", need)[0].lower().replace("_", "-") for need in needs}


def test_everything_that_is_imported_is_declared_and_needed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    foreign = {m: file for m, file in imported().items() if m not in sys.stdlib_module_names and m != "mlx_rotor"}
    used = {NAMES.get(module, module).lower().replace("_", "-"): file for module, file in foreign.items()}
    missing = used.keys() - declared(project, OPTIONAL)
    assert not missing, f"not declared in pyproject.toml: {[(name, used[name]) for name in sorted(missing)]}"
    assert declared(project) <= used.keys(), "declared and never imported"


def test_the_bundled_model_is_whole_and_small(wheel):
    prefix = "mlx_rotor/bundled/model/"
    sizes = {name.removeprefix(prefix): size for name, size in contents(wheel).items() if name.startswith(prefix)}
    with zipfile.ZipFile(wheel) as archive:
        shards = set(json.loads(archive.read(prefix + "model.safetensors.index.json"))["weight_map"].values())
    assert len(shards) > 1
    assert shards == {name for name in sizes if name.endswith(".safetensors")}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(sizes)
    assert sum(sizes.values()) <= MODEL_BYTES


def test_the_installed_command_runs_elsewhere(installed, tmp_path):
    expected = f"mlx_rotor {mlx_rotor.__version__}\n"
    assert python("-m", "mlx_rotor", "--version", cwd=tmp_path, path=installed) == expected
    assert python(str(installed / "bin" / "mlx_rotor"), "--version", cwd=tmp_path, path=installed) == expected


def test_the_installed_package_reads_its_own_kernels(installed, tmp_path):
    code = """
import json, mlx_rotor
from mlx_rotor.kernels import metal as source
digests = {name: source.load(name).digest for name in source.names()}
print(json.dumps([mlx_rotor.__file__, str(source.root()), digests]))
"""
    package, root, digests = json.loads(python("-c", code, cwd=tmp_path, path=installed))
    assert Path(package) == installed / "mlx_rotor" / "__init__.py"
    assert Path(root) == installed / "mlx_rotor" / "kernels_metal"
    assert digests == {name: metal.load(name).digest for name in metal.names()}
