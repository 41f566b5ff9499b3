"""The two exceptions that speak to the user: the command line prints each in one line, without a traceback."""


class InputError(ValueError):
    """Wrong input: a recipe, a path, a pipeline. The message says where, what was expected, what was found. Exit 2."""


class RunError(RuntimeError):
    """What stops a run that was right: numbers, memory, disk. What was saved before is whole. Exit 1."""
