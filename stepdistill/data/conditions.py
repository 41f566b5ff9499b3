"""What a recipe's ``data.conditions`` stands for."""

from stepdistill import assets
from stepdistill.data import images
from stepdistill.data.forms import form
from stepdistill.recipe import Data


def wanted(data: Data, aloud: bool = True) -> str | list[str]:
    """ "classes", a file with a prompt a line, or a list: captions each once; of a shipped list its file.

    Args:
        data: of the recipe; checked there. aloud: say how many samples were rejected.
    """
    conditions = data.conditions
    if conditions == "captions":
        return images.captions(data, aloud=aloud)
    if isinstance(conditions, list) or conditions == "classes":
        return conditions
    if conditions in assets.prompt_lists():
        return str(assets.prompts(conditions))
    return conditions if form(conditions) == "text" else images.captions(data, "conditions", aloud)
