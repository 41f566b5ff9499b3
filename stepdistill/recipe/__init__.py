"""The recipe: one YAML file that states a run completely.

    recipe = load("recipes/quickstart.yaml", ["train.steps=20"])
    recipe.to_yaml()            # resolved: every default written out; feeds back in unchanged

Paths in a recipe are relative to the folder the command is run in.
"""

from stepdistill.recipe.reader import load
from stepdistill.recipe.schema import Data, Recipe, Teacher, Train
from stepdistill.recipe.section import IPAdapter, Optimizer

__all__ = ["Data", "IPAdapter", "Optimizer", "Recipe", "Teacher", "Train", "load"]
