"""A finished checkpoint to a Hugging Face repository, through huggingface_hub."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RotorError
from ..experts import standalone
from ..host import kv_scales
from .check import check
from .check.section import ERROR
from .job.manifest import PROVENANCE
from .plan import decimal
from .source import COMPANIONS, INDEX

if TYPE_CHECKING:
    from huggingface_hub import HfApi

BESIDE = (standalone.NAME, kv_scales.FILE)  # where the weights' formats, or a calibration, have them
WANTED = ("config.json", INDEX, "model*.safetensors", PROVENANCE, "README.md", *BESIDE, *COMPANIONS)
LARGE = 50_000_000_000  # bytes from which one commit is too much for versions of the library that don't split it


def files(folder: Path) -> list[Path]:
    """What of a folder goes into the repository: the checkpoint's own files, sorted; no work files, no other's."""
    found = (path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return sorted(path for path in found if any(fnmatchcase(path.name, pattern) for pattern in WANTED))


def reserve(repo: str, *, private: bool | None = None, api: HfApi | None = None) -> str:
    """Makes the repository where it isn't there yet, so that a mistake shows before hours of work; its address.

    Raises:
        RotorError: no such name, no token, no right to write there, no connection.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as e:
        raise RotorError(f"--upload-repo {repo}: no repository's name: {_reason(e)}") from e
    if repo.count("/") != 1:
        raise RotorError(f"--upload-repo {repo}: give owner and name, as ORG/NAME")
    hub = api or HfApi()
    if not (hub.token or get_token()):
        raise RotorError(f"--upload-repo {repo}: no Hugging Face token here; run `hf auth login`, or set HF_TOKEN")
    try:
        return str(hub.create_repo(repo_id=repo, private=private, repo_type="model", exist_ok=True))
    except Exception as e:  # hub, HTTP and connection errors share no base class
        raise _failed(repo, e) from e


def upload(folder: str | Path, repo: str, *, private: bool | None = None, api: HfApi | None = None) -> str:
    """Uploads a checkpoint folder; the repository's address. Doing it again sends what isn't there yet.

    Args:
        private: of a repository that is made now; None is the owner's default.
        api: the hub; default is huggingface.co, or where HF_ENDPOINT says.

    Raises:
        RotorError: the folder has errors (see `check`) and nothing was sent, or as `reserve`.
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    errors = [f for f in check(folder) if f.severity == ERROR]
    if errors:
        more = f"; and {len(errors) - 1} more" if len(errors) > 1 else ""
        raise RotorError(
            f"{folder} is not uploaded: {errors[0]}{more}; `mlx_rotor quantize --check {folder}` lists everything"
        )
    hub = api or HfApi()
    address = reserve(repo, private=private, api=hub)
    wanted = files(folder)
    names = [path.name for path in wanted]
    size = sum(path.stat().st_size for path in wanted)
    try:
        if size > LARGE and hasattr(hub, "upload_large_folder"):
            hub.upload_large_folder(repo_id=repo, folder_path=folder, repo_type="model", allow_patterns=names)
        else:
            message = f"{len(names)} files, {decimal(size)}, by mlx_rotor"
            hub.upload_folder(
                repo_id=repo, folder_path=folder, repo_type="model", allow_patterns=names, commit_message=message
            )
    except Exception as e:
        raise _failed(repo, e) from e
    return address


def _failed(repo: str, e: Exception) -> RotorError:
    status = getattr(getattr(e, "response", None), "status_code", None)
    if status in (401, 403):
        what = "the token may not write there; `hf auth login` with one that may"
    elif status == 404:
        what = "no such owner, or none that the token may see"
    elif status is not None:
        what = "the hub refused"
    else:
        what = "the hub can't be reached, or HF_HUB_OFFLINE is set; the folder is whole: try again"
    return RotorError(f"--upload-repo {repo}: {what} ({_reason(e)})")


def _reason(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0]
