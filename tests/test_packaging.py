"""What an installation holds: the mapped folders and the data, in a checkout and in a wheel."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import stepdistill.eval
import stepdistill.kernels
from stepdistill import assets

tomllib = pytest.importorskip("tomllib", reason="in the standard library from Python 3.11")

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def python(program: str, cwd: Path, *paths: Path) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_package_is_listed() -> None:
    mapped = SETTINGS["package-dir"]
    folders = {str(path.parent.relative_to(ROOT)) for path in (ROOT / "stepdistill").rglob("__init__.py")}
    folders |= {
        str(path.parent.relative_to(ROOT)) for top in ("kernels", "eval") for path in (ROOT / top).rglob("__init__.py")
    }
    listed = {mapped.get(name, name.replace(".", "/")) for name in SETTINGS["packages"]}
    assert folders | {"recipes", "assets"} == listed


def test_the_checkout_finds_everything() -> None:
    assert Path(stepdistill.kernels.__file__) == ROOT / "kernels" / "fused" / "__init__.py"
    assert Path(stepdistill.eval.__file__) == ROOT / "eval" / "quality" / "__init__.py"
    assert assets.root() == ROOT
    assert assets.recipe("quickstart") == assets.recipe("recipes/quickstart.yaml") == ROOT / "recipes/quickstart.yaml"
    assert "fashion-dit" in assets.teachers()
    with pytest.raises(ValueError, match="asset 'no/such': expected at"):
        assets.find("no/such")


def test_hugging_face_kernels_is_not_shadowed(tmp_path: Path) -> None:
    """From the root, on sys.path first, ``kernels`` is the installed package of that name."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("marker = 'hugging face'\n")
    program = "import kernels, importlib.util as u\nu.find_spec('stepdistill.kernels').origin\nprint(kernels.marker)"
    assert python(program, ROOT, ROOT, tmp_path).strip() == "hugging face"
    assert not (ROOT / "kernels" / "__init__.py").exists() and not (ROOT / "eval" / "__init__.py").exists()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built wheel, unpacked as pip would."""
    work = tmp_path_factory.mktemp("wheel")
    # From a copy: building writes into the source tree, and a left-over build folder would leak into the wheel.
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("stepdistill", "kernels", "eval", "recipes", "assets"):
        shutil.copytree(ROOT / name, work / "source" / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, work / "source" / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(work), str(work / "source")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(work / "site")
    return work / "site"


def test_the_wheel_holds_every_file(installed: Path) -> None:
    for source, target in (
        ("stepdistill", "stepdistill"),
        ("kernels/fused", "stepdistill/kernels"),
        ("eval/quality", "stepdistill/eval"),
        ("recipes", "stepdistill/_data/recipes"),
        ("assets/teachers", "stepdistill/_data/assets/teachers"),
        ("assets/students", "stepdistill/_data/assets/students"),
        ("assets/features", "stepdistill/_data/assets/features"),
    ):
        files = {path.relative_to(ROOT / source) for path in (ROOT / source).rglob("*") if path.is_file()}
        files = {path for path in files if "__pycache__" not in path.parts}
        assert {path for path in files if not (installed / target / path).is_file()} == set()
    assert sorted(path.name for path in installed.iterdir()) == ["stepdistill", "stepdistill-0.1.0.dist-info"]


def test_the_wheel_works_elsewhere(installed: Path, tmp_path: Path) -> None:
    program = (
        "import stepdistill.eval, stepdistill.kernels\n"
        "from stepdistill import assets, recipe\n"
        "print(stepdistill.__file__, stepdistill.eval.__file__, stepdistill.kernels.__file__, assets.root())\n"
        "assert assets.teachers() and recipe.load('quickstart') and recipe.load('sd15_sid')\n"
    )
    assert all(path.startswith(str(installed)) for path in python(program, tmp_path, installed).split())
