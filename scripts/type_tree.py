"""Lay the package out as it is installed, for tools that read code: build/types/stepdistill, of links.

    python scripts/type_tree.py && ty check

kernels/ and eval/ lie beside the package and are installed inside it (pyproject.toml, tool.setuptools.package-dir),
which type checkers and editors do not know. ty and pyright are pointed to build/types (pyproject.toml).
"""

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACES = {
    "stepdistill": "stepdistill",
    "kernels/fused": "stepdistill/kernels",
    "eval/quality": "stepdistill/eval",
    "eval/bench": "stepdistill/eval/bench",
}


def lay_out(tree: Path) -> None:
    """Make ``tree`` anew: folders, and in them links to the files, which such tools follow."""
    shutil.rmtree(tree, ignore_errors=True)
    for folder, package in PLACES.items():
        for file in (ROOT / folder).rglob("*.py"):
            link = tree / package / file.relative_to(ROOT / folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)


if __name__ == "__main__":
    lay_out(ROOT / "build" / "types")
