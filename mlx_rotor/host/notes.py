"""What is kept on a model instance beside its parameters."""

from __future__ import annotations

from typing import Any


def noted(model: Any, name: str) -> Any:
    """What was noted on this very instance, or None."""
    return getattr(model, "__dict__", {}).get(name)


def note(model: Any, name: str, value: Any) -> None:
    """Straight into the instance: nn.Module's own attribute setting would keep it among the parameters."""
    object.__setattr__(model, name, value)
