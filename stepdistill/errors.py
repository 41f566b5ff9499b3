"""The one exception that means "your input is wrong": the CLI prints it in one line and exits with 2."""


class InputError(ValueError):
    """Wrong input: a recipe, a path, a pipeline. The message says where, what was expected, what was found."""
