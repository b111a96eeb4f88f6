"""Sources of weights: a checkpoint folder, or a repository on the hub fetched file by file."""

from .checkpoint import COMPANIONS, FACTORS, INDEX, Checkpoint, companions, has_weights, is_repository, locate
from .origin import Folder, Source, open_folder, source_name

__all__ = [
    "COMPANIONS",
    "FACTORS",
    "INDEX",
    "Checkpoint",
    "Folder",
    "Source",
    "companions",
    "has_weights",
    "is_repository",
    "locate",
    "open_folder",
    "source_name",
]
