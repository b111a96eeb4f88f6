"""A checkpoint made in one direction: the source is opened, the recipe resolves to a plan, and a job carries it out."""

from __future__ import annotations

from pathlib import Path

from ..errors import RotorError
from . import job
from .events import Progress
from .job import GuideFactory, Result
from .job.workplace import check_disk, occupied
from .plan import read_config
from .policy import Policy
from .recipe import Progress as Steps
from .recipe import Recipe
from .source import Source, is_repository, locate, open_folder


def quantize(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | Policy,
    *,
    guide: GuideFactory | None = None,
    workers: int | None = None,
    resume: bool = False,
    stream_source: bool = False,
    progress: Progress | None = None,
    steps: Steps | None = None,
) -> Result:
    """Quantizes a checkpoint folder or a Hugging Face repository into the new or empty folder `out`.

    The output is MLX safetensors that stock mlx_lm loads. A job that was stopped goes on with `resume`, to files that
    are equal to the byte to those of a job that nothing stopped.

    Args:
        model: a folder, or a repository as ORG/NAME.
        recipe: what decides the bits and the fit; a policy alone is `Recipe(policy)`, fitted without calibration.
        guide: in place of the recipe's own.
        workers: threads; by the machine where none are given.
        stream_source: fetches a repository's files one at a time and deletes each after its last use.
        progress: called with the job's events.
        steps: called with (what, done, total) while sensitivities and inputs are measured.

    Returns:
        The plan, the files, and the relative error of every role's weights.

    Raises:
        RotorError: bad input, no room, a file that can't be read or written, a source that changed, or with
            `resume` a job that isn't this one.

    Example:
        >>> from mlx_rotor.quant import Recipe, policy, quantize
        >>> quantize("Qwen/Qwen3-30B-A3B", "out", Recipe(policy.load("config-i"), calibration="bundled"))
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe(recipe)
    out = Path(out)
    job.check(out, recipe.fit, recipe.shard_bytes, workers, resume)
    if stream_source and not is_repository(model):
        raise RotorError(f"--stream-source deletes what it has fetched; {model} is a local folder, which is kept")
    if is_repository(model):
        # Sizes follow from config.json alone: a full disk shows before the weights are fetched.
        early = recipe.plan(read_config(locate(model, config_only=True)))
        check_disk(out, early.nbytes - occupied(out.glob("*.safetensors*")))
    source = _opened(model, out, stream_source)
    try:
        plan = recipe.resolve(source, steps)
    except BaseException:
        source.close()
        raise
    return job.execute(
        source,
        out,
        plan,
        fit=recipe.fit,
        guide=guide or recipe.guide(steps),
        shard_bytes=recipe.shard_bytes,
        workers=workers,
        resume=resume,
        progress=progress,
    )


def _opened(model: str | Path, out: Path, stream_source: bool) -> Source:
    if not stream_source:
        return open_folder(model)
    from .source.hub import open_repository  # huggingface_hub takes a second to import

    return open_repository(str(model), job.commit_of(out))
