"""Nothing that is read runs: no pickle, no code from recipes under --safe or from folders, no markup in reports."""

import ast
import json
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi
from PIL import Image

from pipeline.tiny import save_dit, tiny_dit
from stepdistill import cli
from stepdistill.errors import InputError
from stepdistill.eval.pictures import training_plot
from stepdistill.eval.report import Report, Row
from stepdistill.exporting.export import export
from stepdistill.pipeline.convert import convert
from stepdistill.pipeline.load import load_pipeline
from stepdistill.recipe import load, yaml_lines
from stepdistill.training import checkpoint

ROOT = Path(__file__).parents[1]
FOLDERS = ("stepdistill", "kernels", "eval", "scripts")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "tempfile.mktemp", "torch.hub.load"}
# Each calls code of the user's that the recipe names, and says so before.
ALLOWED = {("find_method.py", "exec_module")}


def violations(source: str, name: str = "") -> list[str]:
    """What in a Python file would run or unpickle what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in PICKLES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PICKLES:
            found += [f"{node.module}.{alias.name}" for alias in node.names if not alias.name.endswith("Error")]
        elif isinstance(node, ast.Call):
            called, stated = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            last = called.rpartition(".")[2]
            found += [called] if called in CALLS else []
            found += [called] if last == "exec_module" and (name, last) not in ALLOWED else []
            found += [called] if last in ("extractall", "unpack_archive", "_load_from_bytes") else []
            if called == "torch.load" and stated.get("weights_only") != "True":
                found.append("torch.load without weights_only")
            if called.startswith("yaml.") and "load" in last and "safe" not in called.replace("unsafe", ""):
                found.append(called)
            for word in ("trust_remote_code", "shell", "allow_pickle"):
                found += [word] if stated.get(word, "False") != "False" else []
            if called.endswith("Pipeline.from_pretrained") or called.endswith("AutoModel.from_pretrained"):
                # A folder whose networks are built beforehand reads no weights.
                safe = stated.get("use_safetensors") == "True" or None in stated
                found += [] if safe else [f"{called} without use_safetensors"]
    return found


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "eval(text)",
        "exec(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "AutoModel.from_pretrained(name, use_safetensors=True, trust_remote_code=True)",
        "DiffusionPipeline.from_pretrained(name)",
        "spec.loader.exec_module(module)",
        "tar.extractall(folder)",
    ],
)
def test_the_scan_finds(line):
    assert len(violations(line)) == 1


def test_nothing_unpickles_evaluates_or_trusts():
    assert len(SOURCES) > 80
    found = {str(path.relative_to(ROOT)): violations(path.read_text(), path.name) for path in SOURCES}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    save_dit(tiny_dit(), folder)
    return folder


@pytest.fixture
def code(tmp_path) -> Path:
    """A Python file that leaves a trace when it is run."""
    file = tmp_path / "mine.py"
    file.write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "from stepdistill.methods import METHODS\nclass Mine(METHODS['sfd']):\n    pass\n"
    )
    return file


def recipe_with(method: str, teacher: Path, tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    tree = {
        "teacher": {"pipeline": str(teacher)},
        "student": {"steps": 2},
        "method": {"name": method},
        "train": {"steps": 1, "batch_size": 1, "lr": 1e-3},
        "output": str(tmp_path / "run"),
    }
    file.write_text(yaml_lines.dump(tree))
    return file


@pytest.mark.parametrize("more", [[], ["--dry-run"], ["--profile", "1"]])
def test_safe_refuses_python_code_and_runs_none_of_it(more, code, teacher, tmp_path, capsys):
    recipe = recipe_with(f"{code}:Mine", teacher, tmp_path)
    assert cli.run(["train", str(recipe), "--safe", *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {recipe}:") and "method.name: " in line and "which safe forbids" in line
    assert not (tmp_path / "ran").exists() and not (tmp_path / "run").exists()


def test_without_safe_the_console_says_that_code_runs_before_it_does(code, teacher, tmp_path, capsys):
    recipe = recipe_with(f"{code}:Mine", teacher, tmp_path)
    assert cli.run(["train", str(recipe), "--dry-run"]) == 0
    assert capsys.readouterr().err == f"the recipe names Python code, which runs now: {code}\n"
    assert (tmp_path / "ran").exists()
    code.write_text("1 / 0")
    assert cli.run(["train", str(recipe), "--dry-run"]) == 2
    announced, error = capsys.readouterr().err.splitlines()
    assert announced.endswith(str(code)) and "ZeroDivisionError" in error


def test_safe_holds_for_a_run_folder_too(code, teacher, tmp_path):
    """A folder from elsewhere may hold a recipe with code, to be exported or gone on with."""
    recipe = recipe_with(f"{code}:Mine", teacher, tmp_path)
    (tmp_path / "run").mkdir()
    recipe.rename(tmp_path / "run" / "recipe.yaml")
    (tmp_path / "run" / "metrics.jsonl").write_text("")  # a run that has begun
    with pytest.raises(InputError, match="which safe forbids"):
        export(tmp_path / "run", tmp_path / "out", safe=True)
    plain = recipe_with("sfd", teacher, tmp_path)
    assert cli.run(["train", str(plain), "--safe"]) == 2
    assert not (tmp_path / "ran").exists()


class Trap:
    """Unpickled, it leaves a trace."""

    def __init__(self, place: str):
        self.place = place

    def __reduce__(self):
        return open, (self.place, "w")


def test_pickled_weights_are_not_read(teacher, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(teacher)
    pipeline.save_pretrained(tmp_path / "pickled")
    weights = tmp_path / "pickled" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    weights.with_suffix(".bin").write_bytes(pickle.dumps(Trap(str(tmp_path / "ran"))))
    with pytest.raises(InputError, match=r"found only pickled ones \(\.bin\) in transformer; .* stepdistill convert"):
        load_pipeline(tmp_path / "pickled")
    with pytest.raises(InputError, match=r"transformer/diffusion_pytorch_model\.bin: expected pickled tensors alone"):
        convert(tmp_path / "pickled", tmp_path / "converted")
    assert not (tmp_path / "converted").exists()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("part", ["_class_name", "transformer"])
def test_code_in_a_pipelines_folder_is_not_run(part, teacher, tmp_path):
    folder = tmp_path / "coded"
    DiffusionPipeline.from_pretrained(teacher).save_pretrained(folder)
    index = folder / "model_index.json"
    facts = json.loads(index.read_text())
    index.write_text(json.dumps(facts | {part: ["own", "Own"]}))
    program = (
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "from diffusers import DiTPipeline, DiTTransformer2DModel\n"
        f"class Own({'DiTPipeline' if part == '_class_name' else 'DiTTransformer2DModel'}):\n    pass\n"
    )
    for place in (folder, folder / "transformer"):
        (place / "own.py").write_text(program)
    with pytest.raises(InputError, match="cannot be loaded"):
        load_pipeline(folder)
    assert not (tmp_path / "ran").exists()


def test_a_hub_id_is_loaded_at_the_recipes_revision(teacher, tmp_path, monkeypatch):
    asked = {}

    def download(place, **options):
        asked.update(options, place=place)
        raise OSError("no network")

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    monkeypatch.setattr(HfApi, "list_repo_files", lambda *_, **__: [])
    recipe = load(recipe_with("sfd", teacher, tmp_path), ["teacher.pipeline=owner/name", "teacher.revision=0a1b2c"])
    with pytest.raises(InputError):
        load_pipeline(recipe.teacher)
    assert asked.pop("local_files_only")  # the suite has no network
    assert asked == {"place": "owner/name", "revision": "0a1b2c", "variant": None, "use_safetensors": True}


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "inside/../../outside", "a/b/c", "..", ""])
def test_a_manifest_names_files_of_its_own_folder_only(name, tmp_path):
    (tmp_path / "outside").write_text("")
    path = checkpoint.save(tmp_path / "checkpoints", checkpoint.State(1, {"student": torch.nn.Linear(1, 1)}), keep=1)
    manifest = path / checkpoint.MANIFEST
    stated = json.loads(manifest.read_text())
    stated["sha256"][name] = checkpoint.sha256(tmp_path / "outside")
    manifest.write_text(json.dumps(stated))
    with pytest.raises(InputError, match="no valid manifest"):
        checkpoint.verify(path)


def test_reports_show_markup_as_text():
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)> $\\frac{$ \" '"
    row = Row(evil, "student", 1, 1, 1.0, 2, {"fid": 1.0}, {"seconds_per_image": 1.0})
    picture = Image.new("L", (2, 2))
    report = Report(
        protocol=evil,
        seed=0,
        command=evil,
        versions={evil: evil},
        device=evil,
        floor={"fid": 1.0},
        rows=[row],
        labels={"fid": evil},
        remarks=[evil],
        pictures=[(evil, picture)],
        strips=[(evil, picture)],
        worst=[(evil, picture)],
        training=[(evil, training_plot([{"step": step, f"student/loss/{evil}": 1.0} for step in (1, 2)]))],
    )
    page = report.to_html()
    assert "<script" not in page and "<img src=x" not in page
    assert page.count("&lt;script&gt;alert(1)") >= 10
