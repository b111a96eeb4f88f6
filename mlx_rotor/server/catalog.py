"""The names by which models can be asked for. Nothing is downloaded because a request names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import scan_cache_dir, try_to_load_from_cache
from huggingface_hub.errors import CacheNotFound, HFValidationError

from .fields import shown
from .refusal import Refusal

DEFAULT_NAME = "default_model"
NEEDED = ("config.json", "tokenizer_config.json")


class Catalog:
    """The default model, folders here, and what the Hugging Face cache already holds.

    Args:
        default: what `--model` names, a folder or a repository; None where the server has no default.
    """

    def __init__(self, default: str | None) -> None:
        folder = Path(default).expanduser() if default else None
        self.default = default
        self.id = str(folder.resolve()) if folder is not None and folder.is_dir() else default
        self.names = {n for n in (DEFAULT_NAME, default, self.id, folder and folder.name) if n}

    def name(self, asked: str | None) -> str:
        """The name that answers give the model that `asked` names."""
        return asked or self.id or DEFAULT_NAME

    def resolve(self, asked: str | None, *, param: str = "model", adapted: bool = False) -> str:
        """The name by which mlx_lm's server is asked for the model.

        Args:
            param: the field that asks.
            adapted: the request names an adapter, which mlx_lm's server ignores under the default model's name.

        Raises:
            Refusal: 404 that lists what is served.
        """
        if asked is None or asked in self.names:
            if self.id is None:
                raise Refusal(f"this server has no default model; {self._served()}", param=param)
            return self.id if adapted else DEFAULT_NAME
        if folder := folder_with("config.json", asked):
            return folder
        if _downloaded(asked):
            return asked
        raise Refusal(
            f"there is no model {shown(asked)} here; {self._served()}",
            param=param,
            status=404,
            code="model_not_found",
        )

    def _served(self) -> str:
        ids = [m["id"] for m in self.list()]
        return f"served: {', '.join(ids)}" if ids else "name a local model folder"

    def list(self) -> list[dict[str, Any]]:
        """Models in the form of OpenAI's list, the default first."""
        ids = [self.id] if self.id else []
        try:
            repos = sorted(scan_cache_dir().repos, key=lambda repo: repo.repo_id)
        except CacheNotFound:
            repos = []
        for repo in repos:
            if repo.repo_type != "model" or "main" not in repo.refs or repo.repo_id in ids:
                continue
            files = {f.file_name for f in repo.refs["main"].files}
            if files.issuperset(NEEDED) and any(f.endswith(".safetensors") for f in files):
                ids.append(repo.repo_id)
        return [{"id": i, "object": "model", "owned_by": "local"} for i in ids]


def folder_with(file: str, name: str) -> str | None:
    """The folder here that `name` is a path of, if it holds `file`."""
    try:
        folder = Path(name).expanduser()
        return str(folder.resolve()) if (folder / file).is_file() else None
    except (OSError, ValueError, RuntimeError):  # no path on any file system
        return None


def _downloaded(repo: str) -> bool:
    try:
        return all(isinstance(try_to_load_from_cache(repo, name), str) for name in NEEDED)
    except (HFValidationError, OSError, ValueError):
        return False
