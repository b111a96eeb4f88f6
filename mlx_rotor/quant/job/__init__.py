"""A quantize job: streams through a fit into files, keeps a journal, and goes on after whatever stopped it."""

from .run import GuideFactory, PlanFactory, Result
from .start import SHARD_BYTES, dry_run, finished, quantize

__all__ = ["SHARD_BYTES", "GuideFactory", "PlanFactory", "Result", "dry_run", "finished", "quantize"]
