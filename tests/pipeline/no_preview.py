"""A stand-in for a run's previews, which would take as long as the rest."""

from typing import Any


class NoPreview:
    """Draws nothing."""

    pictured = False

    def __init__(self, *_: Any):
        pass

    def write(self, *_: Any) -> dict[str, float]:
        """No drift."""
        return {}
