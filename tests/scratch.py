"""A copy of the product in a folder of a test's own: where a test adds a file, and sees the product take it up."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = (".safetensors", ".gz")  # of the bundled model: linked, as copies take time and room


def scratch(tmp_path: Path) -> Path:
    """Copies `mlx_rotor/` and `kernels_metal/` into a folder below `tmp_path`, and returns that folder."""
    folder = tmp_path / "scratch"

    def copied(source: str, target: str) -> None:
        if source.endswith(DATA):
            os.symlink(source, target)
        else:
            shutil.copyfile(source, target)

    for name in ("mlx_rotor", "kernels_metal"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored, copy_function=copied)
    return folder


def run_in(folder: Path, code: str, **environment: str) -> str:
    """Runs Python `code` in `folder`, whose packages it imports, and returns what it prints.

    The suite's own modules can be imported too, `metal_sim` among them. `environment`: variables to set. A status
    other than 0 fails the test and shows what the code wrote.
    """
    path = os.pathsep.join(map(str, (folder, ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return done.stdout
