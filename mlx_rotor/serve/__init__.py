"""An OpenAI-compatible server: which requests are understood, which models are served, and what is refused."""

from .patching import patch_server

__all__ = ["patch_server"]
