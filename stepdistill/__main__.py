"""``python -m stepdistill`` is the command ``stepdistill``."""

from stepdistill.cli import main

main()
