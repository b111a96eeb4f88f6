"""A recipe: all that decides a checkpoint's bits in one value, that is policy, budget, fit and calibration.

A recipe resolves to a `Plan` before anything runs, and says what a job fits by; `job` carries the plan out.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import RotorError
from . import budget, calibrate
from .budget import sensitivity
from .budget.sensitivity import Sensitivities
from .calibrate import Calibration, text
from .calibrate.imatrix import Imatrix
from .calibrate.measure import LENGTH, TOKENS
from .folding import proof as fold_check
from .folding.scales import feeding
from .folding.search import ScaleFolding
from .guide import Guide
from .job import GuideFactory
from .plan import Plan, make_plan, read_config
from .policy import Policy
from .shards import SHARD_BYTES
from .source import Checkpoint, Source, has_weights, is_repository, locate
from .spec import BUNDLED, FOLDINGS, Budget

PROOF = 64  # tokens that scale folding is proved on

Progress = Callable[[str, int, int], None]  # what runs, steps done, steps in all


@dataclass(frozen=True)
class Recipe:
    """All that a checkpoint is made by.

    Attributes:
        policy: which weights get which spec.
        fit: fast, search or best; a policy's rule may say otherwise.
        budget: the size that bits are solved for; None: the policy's own, or its rules as they stand.
        sensitivities: file with the cost of each weight's bits; measured and written if it isn't there and there is a
            calibration text. None: the prior.
        calibration: BUNDLED, or a text file; empty: none.
        sequences, length: of the text: how many sequences, of how many tokens each; None: by the model's size.
        imatrix: llama.cpp's importance matrix, in place of a calibration.
        scale_folding: of FOLDINGS: whose inputs are evened out before the fit, exactly.
        rescale: bring experts whose intermediate values overflow float16 back into its range, exactly.
        shard_bytes: of a weight file at most.

    Example:
        >>> recipe = Recipe(policy.load("rotor"), budget=Budget(bits_per_weight=3.5), calibration="bundled")
        >>> recipe.plan(read_config(folder)).total()
    """

    policy: Policy
    fit: str = "search"
    budget: Budget | None = None
    sensitivities: Path | None = None
    calibration: str = ""
    sequences: int | None = None
    length: int | None = None
    imatrix: Path | None = None
    scale_folding: tuple[str, ...] = ()
    rescale: bool = False
    shard_bytes: int = SHARD_BYTES

    def __post_init__(self) -> None:
        """Raises RotorError where parts of it contradict each other, or one would do nothing."""
        guided = bool(self.calibration or self.imatrix)
        if self.calibration and self.imatrix:
            raise RotorError("--calibration and --imatrix both say what inputs are like: give one of them")
        if self.fit == "fast" and guided and not (self.calibration and self.sensitivities):
            raise RotorError("--fit fast goes by the weights alone: calibrate with --fit search or best")
        sized = self.sequences is not None or self.length is not None
        if sized and (not self.calibration or self.fit == "fast"):
            raise RotorError(
                "--calibration-sequences and --calibration-length say how much a fit is calibrated on: give"
                " --calibration, and --fit search or best"
            )
        if unknown := sorted(set(self.scale_folding) - set(FOLDINGS)):
            raise RotorError(f"--fold {unknown[0]}: there is {', '.join(FOLDINGS)}")
        if (self.scale_folding or self.rescale) and self.fit == "fast":
            raise RotorError("--fold and --rescale-overflows go by the inputs: use --fit search or best")
        if self.scale_folding and not guided:
            raise RotorError("--fold goes by the inputs' sizes: give --calibration or --imatrix")
        if self.rescale and not self.calibration:
            raise RotorError("--rescale-overflows goes by the largest inputs: give --calibration")
        if self.sensitivities is not None and self.target is None:
            raise RotorError(
                "--sensitivities choose bits for a size: give --target-size, --target-bpw, --memory 128GB, or a policy"
                " with a [budget]"
            )

    @property
    def target(self) -> Budget | None:
        """What bits are solved for."""
        return self.budget or self.policy.budget

    @property
    def guided(self) -> bool:
        """Whether the fit goes by inputs."""
        return self.fit != "fast" and bool(self.calibration or self.imatrix)

    def notes(self, plan: Plan) -> list[str]:
        """What the policy asks for that this recipe can't do, one sentence each, for people."""
        found = []
        missing = "--calibration or --imatrix" + (" and --fit search or best" if self.fit == "fast" else "")
        if plan.policy.awq and not self.guided:
            found.append(
                f"policy {plan.policy.name} evens out what experts read (AWQ), by the inputs' sizes: left out without"
                f" {missing}"
            )
        elif plan.policy.awq and not feeding(plan.entries):
            found.append(
                f"policy {plan.policy.name} evens out what experts read (AWQ): left out, no normalization that feeds"
                " this model's experts is known"
            )
        if plan.policy.kv and not (self.guided and self.calibration):
            found.append(
                f"policy {plan.policy.name} has calibrated {plan.policy.kv} KV scales written beside the weights: left"
                " out without --calibration"
            )
        return found

    def check_files(self, *, measuring: bool = True) -> None:
        """RotorError for what can be known of the files to read before any work; `measuring`: sensitivities that aren't
        there yet are going to be."""
        if self._text and not text.read(self._text).strip():
            raise RotorError(f"--calibration {self._text}: holds no text")
        if self.imatrix is not None and not self.imatrix.is_file():
            raise RotorError(f"--imatrix {self.imatrix}: no such file")
        path = self.sensitivities
        if path is None or path.is_file():
            return
        if not self.calibration:
            raise RotorError(f"--sensitivities {path}: no such file; with --calibration it is measured and written")
        if not measuring:
            raise RotorError(f"--sensitivities {path}: no such file yet, and --dry-run doesn't measure; leave it out")
        if path.exists() or not os.access(path.absolute().parent, os.W_OK):
            raise RotorError(f"--sensitivities {path}: can't be written; give a file where one can be")

    def plan(self, config: Mapping[str, Any], dtypes: Mapping[str, str] | None = None) -> Plan:
        """The plan from config.json alone; solved for the target where there is one, by sensitivities that are there.

        Args:
            config: the parsed config.json of the source.
            dtypes: source tensor name -> safetensors dtype, where headers are at hand.

        Raises:
            RotorError: as `make_plan`, `sensitivity.read` and `budget.solve`.
        """
        plan = make_plan(config, self.policy, dtypes)
        return plan if self.target is None else self._solved(plan, self._known(plan))

    def resolve(self, source: Source, progress: Progress | None = None) -> Plan:
        """The plan for a job on an opened source.

        Sensitivities that a budget is solved by and whose file isn't there yet are measured on the source first, and
        written. The source's headers are then held against the plan.

        Raises:
            RotorError: as `plan`, `calibrate.measure` and `Checkpoint.verify`.
        """
        config, checkpoint = read_config(source.folder), source.checkpoint
        plan = make_plan(config, self.policy, checkpoint.dtypes)
        if self.target is not None:
            path = self.sensitivities
            if path is not None and not path.exists():
                try:
                    self._measured(plan, source, config, progress).write(path)
                    shutil.rmtree(self._measuring)
                except OSError as e:
                    raise RotorError(
                        f"--sensitivities {path}: {e.strerror or e}; give a file where one can be written"
                    ) from e
            plan = self._solved(plan, self._known(plan))
        checkpoint.verify(plan)
        return plan

    def _solved(self, plan: Plan, costs: Sensitivities) -> Plan:
        assert self.target is not None
        return budget.solve(plan, self.target.bytes_for(plan.parameters), costs, shard_bytes=self.shard_bytes)

    def _known(self, plan: Plan) -> Sensitivities:
        """From the file if it is there, else the prior. RotorError as `sensitivity.read`."""
        if self.sensitivities is not None and self.sensitivities.exists():
            return sensitivity.read(self.sensitivities, plan)
        return sensitivity.prior(plan, self.fit)

    @property
    def _measuring(self) -> Path:
        """Where a measurement works; one that was stopped goes on in it."""
        assert self.sensitivities is not None
        return self.sensitivities.absolute().with_name(f"{self.sensitivities.name}.work")

    def _measured(
        self, plan: Plan, source: Source, config: Mapping[str, Any], progress: Progress | None
    ) -> Sensitivities:
        self.check_files()
        source.checkpoint.verify(plan)
        named = progress and (lambda what, *steps: progress(f"measuring sensitivities, {what}", *steps))
        tokens = calibrate.prepare(source.folder, config, self._text, max(1, TOKENS // LENGTH), LENGTH)
        identity = json.dumps(source.identity, sort_keys=True)
        return calibrate.measure(
            config,
            source.checkpoint,
            plan,
            tokens,
            self._measuring,
            source=self._source,
            fit=self.fit,
            identity=hashlib.sha256(identity.encode()).hexdigest(),
            progress=named,
        )

    def guide(self, progress: Progress | None = None) -> GuideFactory | None:
        """What a job fits by; None where that is the weights alone.

        What it returns raises RotorError: as `Calibration`, `Imatrix`, `ScaleFolding`, `fold_check.prove`.
        """
        if not self.guided:
            return None

        named = progress and (lambda what, *steps: progress(f"calibrating, {what}", *steps))

        def made(checkpoint: Checkpoint, plan: Plan, work: Path) -> Guide:
            config = read_config(checkpoint.folder)
            folder = work / "calibration"
            guide = self._statistics(checkpoint, plan, config, folder, named)
            awq = plan.policy.awq  # a plan that is compared with has its own
            if not (self.scale_folding or self.rescale or awq):
                return guide
            norms, downs, kind = "norms" in self.scale_folding, "downs" in self.scale_folding, str(config["model_type"])
            folding = ScaleFolding(
                guide, plan, kind, self.fit, folder, norms=norms, downs=downs, rescale=self.rescale, awq=awq
            )
            tokens = calibrate.prepare(checkpoint.folder, config, None, 1, PROOF)
            fold_check.prove(folding, config, plan, checkpoint, tokens)
            return folding

        return made

    def _statistics(
        self, checkpoint: Checkpoint, plan: Plan, config: Mapping[str, Any], folder: Path, progress: Progress | None
    ) -> Guide:
        if self.imatrix is not None:
            return Imatrix(self.imatrix, plan, checkpoint)
        tokens = calibrate.prepare(checkpoint.folder, config, self._text, self.sequences, self.length)
        return Calibration(config, checkpoint, plan, tokens, folder, kv=plan.policy.kv, progress=progress)

    @property
    def _source(self) -> str:
        """What the metadata calls the calibration text."""
        return self.calibration if self._text is None else Path(self._text).name

    @property
    def _text(self) -> str | None:
        """A file; None: the bundled text, or none."""
        return None if self.calibration in ("", BUNDLED) else self.calibration


def dry_run(model: str | Path, recipe: Recipe) -> tuple[Plan, int | None]:
    """The plan for a model, and the source's bytes where its weights are in a local folder (they are then checked).

    Nothing is written or measured, and of a repository only config.json is fetched.

    Raises:
        RotorError: as `Recipe.plan`, `Checkpoint.open` and `Checkpoint.verify`.
    """
    folder = locate(model, config_only=True)
    config = read_config(folder)
    if is_repository(model) or not has_weights(folder):
        return recipe.plan(config), None
    stats = {path.name: path.stat() for path in folder.iterdir()}
    checkpoint = _opened(folder, tuple(sorted((name, s.st_size, s.st_mtime_ns) for name, s in stats.items())))
    made = recipe.plan(config, checkpoint.dtypes)
    checkpoint.verify(made)
    return made, checkpoint.nbytes


@lru_cache(maxsize=1)
def _opened(folder: Path, _: tuple[tuple[str, int, int], ...]) -> Checkpoint:
    """With files of these names, sizes and times. Kept, as several plans are made for one model: 96,000 tensors in 130
    files take two seconds to open."""
    return Checkpoint.open(folder, read_config(folder))
