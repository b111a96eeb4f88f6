"""The shape of the tree: import direction, who may know mlx_lm's insides, file size, what the docs speak of.

Each rule is a function of a folder that returns its violations, so that it is also run over a tree that breaks it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "mlx_rotor"

# Every folder may import those before it and no other; commands may import all. `fit` is array maths on weights, of
# which each format in `experts` makes its own fit.
ORDER = [
    "kernels", "codec", "cache", "fit", "experts", "bundled", "models", "host", "memory", "quant", "quality",
    "calibration", "bench", "diagnose", "server", "cli",
]  # fmt: skip
TIERS = {folder: tier for tier, folder in enumerate(ORDER)}
COMMAND = len(ORDER)
TOP = ("errors", "files", "tables")  # files beside the commands that every folder may import
PUBLIC_MLX_LM = {"__version__", "batch_generate", "convert", "generate", "load", "stream_generate"}
# What the server stands on: mlx_lm's own server, and its functions on prompt caches.
SERVER_MLX_LM = [["mlx_lm", "server"], ["mlx_lm", "models", "cache"]]
MAX_LINES = 500
SIZED = {".py", ".h", ".metal", ".toml"}
PROSE = {".py", ".md", ".h", ".metal", ".toml", ".jinja"}
FOREIGN_PATH = re.compile(r"\.\./shared|(?<![\w.~])/(?:work|tmp)/")


def sources(folder: Path, suffixes: set[str]) -> list[Path]:
    """Files below `folder` (or `folder` itself) with one of `suffixes`, sorted."""
    found = [folder] if folder.is_file() else folder.rglob("*")
    return sorted(f for f in found if f.suffix in suffixes and f.is_file())


def unit_of(parts: list[str]) -> str:
    """The part of the package a dotted path lies in: a sub-package, `errors`, or "commands"."""
    if "__main__" in parts or len(parts) < 2:
        return "commands"
    if parts[1] in TOP or parts[1] in TIERS:
        return parts[1]
    return "commands"


def imports(tree: ast.Module, module: list[str]) -> Iterator[tuple[int, list[str], list[str]]]:
    """(line, absolute dotted path of a module, name taken from it or nothing) of everything a module imports.

    `module` is its own dotted path, ending in `__init__` for a package. Imports through importlib count.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.split("."), []
        elif isinstance(node, ast.ImportFrom):
            base = module[: len(module) - node.level] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            for alias in node.names:
                yield node.lineno, base, [alias.name]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value.split("."), []


def dotted(path: Path, root: Path) -> list[str]:
    return list(path.relative_to(root).with_suffix("").parts)


def may_import(importer: str, target: str) -> bool:
    if target in (*TOP, importer) or importer == "commands":
        return True
    if importer in TOP:
        return False
    return TIERS.get(target, COMMAND) <= TIERS[importer]


def upward_imports(root: Path) -> list[str]:
    bad = []
    for file in sources(root / PACKAGE, {".py"}):
        module = dotted(file, root)
        importer = unit_of(module)
        for line, path, name in imports(ast.parse(file.read_text(encoding="utf-8")), module):
            target = path + name
            if target[0] != PACKAGE or target == [PACKAGE, "__version__"]:
                continue
            if not may_import(importer, unit_of(target)):
                bad.append(f"{file.relative_to(root)}:{line}: {importer} imports {'.'.join(target)}")
    return bad


def circles(root: Path) -> list[str]:
    """Files of the package that import each other, in the function bodies too: each circle once, as "a -> b -> a"."""
    known = {".".join(dotted(file, root)).removesuffix(".__init__"): file for file in sources(root / PACKAGE, {".py"})}
    edges: dict[str, set[str]] = {}
    for name, file in known.items():
        taken = {
            target
            for _, path, attribute in imports(ast.parse(file.read_text(encoding="utf-8")), dotted(file, root))
            for target in [".".join(path + attribute), ".".join(path)]
            if target in known
        }
        # `from . import x` of a file x: only x is meant, not the package that holds it.
        edges[name] = {t for t in taken if not any(other.startswith(t + ".") for other in taken)} - {name, PACKAGE}
    return rounds(edges)


def folder_circles(root: Path) -> list[str]:
    """Folders inside one folder of the package whose files import each other's, as "a -> b -> a"."""
    edges: dict[str, set[str]] = {}
    for file in sources(root / PACKAGE, {".py"}):
        module = dotted(file, root)
        if len(module) < 4:
            continue
        own = ".".join(module[:3])
        taken = (path + name for _, path, name in imports(ast.parse(file.read_text(encoding="utf-8")), module))
        inside = {".".join(path[:3]) for path in taken if path[:2] == module[:2]}
        edges.setdefault(own, set()).update(i for i in inside if i != own and (root / i.replace(".", "/")).is_dir())
    return rounds({name: {t for t in taken if t in edges} for name, taken in edges.items()})


def rounds(edges: dict[str, set[str]]) -> list[str]:
    """Each circle of a graph once, as "a -> b -> a"."""
    found, done = [], set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append(" -> ".join([*path[path.index(name) :], name]))
        elif name not in done:
            for target in sorted(edges[name]):
                visit(target, [*path, name])
            done.add(name)

    for name in sorted(edges):
        visit(name, [])
    return found


def mentions_of_tests(root: Path) -> list[str]:
    """Imports and paths of the test suite in the product, which is installed without it."""
    pattern = re.compile(r"\btests\b[/.\"']|import tests|metal_sim")
    return [
        f"{file.relative_to(root)}:{number}: {line.strip()}"
        for file in sources(root / PACKAGE, {".py"})
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]


def private_mlx_lm(root: Path) -> list[str]:
    """Names of mlx_lm's insides outside host/: submodules, and attributes its `__init__` does not export."""
    bad = []
    for file in sources(root / PACKAGE, {".py"}) + sources(root / "examples", {".py"}):
        module = dotted(file, root)
        if module[:2] == [PACKAGE, "host"]:
            continue
        server = module[:2] == [PACKAGE, "server"]
        tree = ast.parse(file.read_text(encoding="utf-8"))
        used = [(line, path, name) for line, path, name in imports(tree, module) if path[:1] == ["mlx_lm"]]
        aliases = {
            alias.asname or "mlx_lm"
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
            if alias.name == "mlx_lm"
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
                used.append((node.lineno, ["mlx_lm"], [node.attr]))
        for line, path, name in used:
            if server and (path + name in SERVER_MLX_LM or path in SERVER_MLX_LM):
                continue
            if len(path) > 1 or not PUBLIC_MLX_LM.issuperset(name):
                what = ".".join(path + name)
                bad.append(f"{file.relative_to(root)}:{line}: {what} is mlx_lm's own; only host/ may use it")
    return bad


def unknown_folders(root: Path) -> list[str]:
    return [
        f"{PACKAGE}/{folder.name}/: the design has no such folder"
        for folder in sorted((root / PACKAGE).iterdir())
        if folder.is_dir() and folder.name != "__pycache__" and folder.name not in TIERS
    ]


def long_files(root: Path) -> list[str]:
    bad = []
    for folder in (PACKAGE, "kernels_metal", "tests", "examples"):
        for file in sources(root / folder, SIZED):
            lines = len(file.read_text(encoding="utf-8").splitlines())
            if lines > MAX_LINES:
                bad.append(f"{file.relative_to(root)}: {lines} lines, {MAX_LINES} at most: split it by idea")
    return bad


def foreign_paths(root: Path) -> list[str]:
    """Paths of a workplace in what users read: the product speaks of itself alone."""
    bad = []
    for name in (PACKAGE, "kernels_metal", "examples", "docs", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for file in sources(root / name, PROSE):
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                if found := FOREIGN_PATH.search(line):
                    bad.append(f"{file.relative_to(root)}:{number}: {found[0]}")
    return bad


def odd_words(root: Path) -> list[str]:
    """Words for which the field has others, and module docstrings that begin with a question word."""
    other = re.compile(r"\b(twins?|sight|verdicts on|(take|takes|taken|taking) off|allotment)\b", re.IGNORECASE)
    bad = []
    for file in sources(root / PACKAGE, {".py"}) + sources(root / "kernels_metal", PROSE):
        text = file.read_text(encoding="utf-8")
        bad += [
            f"{file.relative_to(root)}:{number}: {found[0]}"
            for number, line in enumerate(text.splitlines(), 1)
            if (found := other.search(line))
        ]
        first = (ast.get_docstring(ast.parse(text)) or "").partition(" ")[0] if file.suffix == ".py" else ""
        if first in ("What", "How", "Which", "Where", "Whether"):
            bad.append(f"{file.relative_to(root)}:1: begins with {first!r}: say what the module does")
    return bad


RULES = [
    odd_words,
    upward_imports,
    circles,
    folder_circles,
    mentions_of_tests,
    private_mlx_lm,
    unknown_folders,
    long_files,
    foreign_paths,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_tree_keeps_the_rule(rule):
    found = rule(ROOT)
    assert not found, "\n".join(found)


def test_the_rules_see_the_whole_tree():
    packages = {f.name for f in (ROOT / PACKAGE).iterdir() if (f / "__init__.py").is_file()}
    assert set(ORDER) <= packages
    reached = {unit_of(dotted(f, ROOT)) for f in sources(ROOT / PACKAGE, {".py"})}
    assert packages | {"errors", "commands"} <= reached


@pytest.mark.parametrize(
    ("path", "text", "reported"),
    [
        ("codec/a.py", "from ..cache import rows", "codec imports mlx_rotor.cache.rows"),
        ("codec/a.py", "from .. import cache", "codec imports mlx_rotor.cache"),
        ("codec/deep/a.py", "from ...host.x import y", "codec imports mlx_rotor.host.x.y"),
        ("codec/__init__.py", "from ..quant import plan", "codec imports mlx_rotor.quant.plan"),
        ("kernels/a.py", "import mlx_rotor.codec.base", "kernels imports mlx_rotor.codec.base"),
        ("kernels/a.py", "def f():\n    from mlx_rotor import codec", "a.py:2: kernels imports mlx_rotor.codec"),
        ("cache/a.py", "import importlib\nimportlib.import_module('mlx_rotor.host')", "cache imports mlx_rotor.host"),
        ("host/a.py", "from ..generate import main", "host imports mlx_rotor.generate.main"),
        ("host/a.py", "from .. import load", "host imports mlx_rotor.load"),
        ("quant/a.py", "from ..cli.command import run", "quant imports mlx_rotor.cli.command.run"),
        ("quant/a.py", "from ..demo import main", "quant imports mlx_rotor.demo.main"),
        ("models/a.py", "from ..host.routers import known", "models imports mlx_rotor.host.routers.known"),
        ("models/a.py", "from ..quant.selectors import Role", "models imports mlx_rotor.quant.selectors.Role"),
        ("experts/a.py", "from ..models import lookup", "experts imports mlx_rotor.models.lookup"),
        ("errors.py", "from .codec import get", "errors imports mlx_rotor.codec.get"),
    ],
)
def test_an_upward_import_is_reported(tmp_path, path, text, reported):
    found = upward_imports(tree(tmp_path, {path: text}))
    assert len(found) == 1 and found[0].endswith(reported), found


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("generate.py", "from .host import attach\nfrom .cli.command import run\nfrom .bundled import MODEL"),
        ("models/a.py", "from ..kernels.experts.routing import Routing"),
        ("host/a.py", "from ..models import routers"),
        ("quant/a.py", "from ..host import attach\nfrom ..memory import plan\nfrom ..models import minimax"),
        ("cache/a.py", "from ..codec import get\nfrom ..kernels import attend\nfrom . import rows"),
        ("quant/a.py", "from .. import __version__\nfrom ..errors import RotorError"),
        ("demo.py", "from .cli.command import run\nfrom .generate import main"),
    ],
)
def test_a_downward_import_is_not_reported(tmp_path, path, text):
    assert upward_imports(tree(tmp_path, {path: text})) == []


@pytest.mark.parametrize(
    "text",
    [
        "from mlx_lm.models.cache import KVCache",
        "import mlx_lm.utils",
        "from mlx_lm import utils",
        "import mlx_lm\nmlx_lm.models",
        "import mlx_lm as host\nhost.utils.load_model",
        "from importlib import import_module\nimport_module('mlx_lm.generate')",
    ],
)
def test_a_private_name_of_mlx_lm_is_reported(tmp_path, text):
    assert len(private_mlx_lm(tree(tmp_path, {"quality/a.py": text}))) == 1
    assert private_mlx_lm(tree(tmp_path, {"quality/a.py": "", "host/a.py": text})) == []


def test_only_the_server_may_use_mlx_lms_server(tmp_path):
    text = "from mlx_lm import server as stock"
    assert len(private_mlx_lm(tree(tmp_path, {"quality/a.py": text}))) == 1
    assert private_mlx_lm(tree(tmp_path, {"quality/a.py": "", "server/a.py": text})) == []


def test_a_public_name_of_mlx_lm_is_not_reported(tmp_path):
    text = "import mlx_lm\nfrom mlx_lm import generate, load, stream_generate\nmlx_lm.load('x')\nmlx_lm.__version__"
    assert private_mlx_lm(tree(tmp_path, {"quality/a.py": text})) == []


def test_folders_that_import_each_other_are_reported(tmp_path):
    files = {"quant/job/a.py": "from ..source import x", "quant/source/x.py": "", "quant/source/y.py": ""}
    assert folder_circles(tree(tmp_path, files)) == []
    found = folder_circles(tree(tmp_path, {"quant/source/y.py": "def f():\n    from ..job.a import g"}))
    assert found == ["mlx_rotor.quant.job -> mlx_rotor.quant.source -> mlx_rotor.quant.job"]


def test_the_other_rules_report_what_breaks_them(tmp_path):
    just_right, too_long = "#\n" * MAX_LINES, "#\n" * (MAX_LINES + 1)
    root = tree(tmp_path, {"codec/fits.py": just_right, "codec/long.py": too_long, "extras/a.py": ""})
    assert [line.split(":")[0] for line in long_files(root)] == ["mlx_rotor/codec/long.py"]
    assert unknown_folders(root) == ["mlx_rotor/extras/: the design has no such folder"]
    (root / "README.md").write_text("see ../shared/x\nsee /work/x or\n(/tmp/x)\nsee frame/work/x and ~/tmp/x\n")
    assert foreign_paths(root) == ["README.md:1: ../shared", "README.md:2: /work/", "README.md:3: /tmp/"]


def test_odd_words_are_reported(tmp_path):
    root = tree(tmp_path, {"codec/a.py": '"""How a code is packed."""\n', "codec/b.py": "x = 1  # taken off first\n"})
    assert [line.split(": ")[1] for line in odd_words(root)] == ["begins with 'How'", "taken off"]


def tree(root: Path, files: dict[str, str]) -> Path:
    """A tree of the package with just `files`, by their path inside it."""
    for name, text in files.items():
        path = root / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root
