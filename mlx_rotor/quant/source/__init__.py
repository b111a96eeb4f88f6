"""Where weights come from: a checkpoint folder, or a repository on the hub fetched file by file."""

from .checkpoint import COMPANIONS, FACTORS, INDEX, Checkpoint, companions, has_weights, is_repository, locate

__all__ = ["COMPANIONS", "FACTORS", "INDEX", "Checkpoint", "companions", "has_weights", "is_repository", "locate"]
