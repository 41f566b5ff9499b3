"""What a recipe's ``data.conditions`` stands for."""

from stepdistill import assets
from stepdistill.data import images


def wanted(conditions: str | list[str], pictures: str | None) -> str | list[str]:
    """Classes, a file, or a list: of a shipped list its file, of captions those of ``pictures``, each once.

    Args:
        conditions: of the recipe; checked there. pictures: its ``data.images``.
    """
    if conditions == "captions":
        return images.captions(pictures)
    return str(assets.prompts(conditions)) if conditions in assets.prompt_lists() else conditions
