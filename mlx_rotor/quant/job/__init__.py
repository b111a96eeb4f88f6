"""A quantize job: carries out a plan through a fit into files, and goes on after whatever stopped it."""

from .run import GuideFactory, Result
from .start import check, commit_of, execute, finished

__all__ = ["GuideFactory", "Result", "check", "commit_of", "execute", "finished"]
