"""What a recipe's ``data.conditions`` stands for."""

from stepdistill import assets
from stepdistill.data import images
from stepdistill.data.forms import form
from stepdistill.recipe import Data


def wanted(data: Data, aloud: bool = True) -> tuple[str | list[str], list[images.Pictures] | None]:
    """ "classes", a file with a prompt a line, or a list: captions each once; of a shipped list its file.

    Where ``data.arguments`` gives each sample pictures of its own: every caption, and the pictures of each.

    Args:
        data: of the recipe; checked there.
        aloud: say how many samples were rejected.
    """
    conditions = data.conditions
    key = "images" if conditions == "captions" else "conditions"
    if data.arguments:
        return images.requests(data, key, aloud)
    if isinstance(conditions, list) or conditions == "classes":
        return conditions, None
    if conditions in assets.prompt_lists():
        return str(assets.prompts(conditions)), None
    if conditions != "captions" and form(conditions) == "text":
        return conditions, None
    return images.captions(data, key, aloud), None
