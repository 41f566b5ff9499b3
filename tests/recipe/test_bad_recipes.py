"""Every mistake in a recipe gives one line that points at it, and exit code 2."""

from pathlib import Path

import pytest

from stepdistill import cli

GOOD = """\
# A recipe.
teacher:
  pipeline: {teacher}
  guidance:
    scale: 1.5
student:
  steps: 4
data:
  conditions: classes
method:
  name: sfd
  substeps: 3
train:
  steps: 60
  batch_size: 64
  lr: 2.0e-4
report:
  samples: 0
"""

# what is replaced in GOOD, by what, and what the line must say after the file's name
TEXTS = {
    "unknown key": ("steps: 60", "stepz: 60", ":14: train.stepz: unknown key; did you mean 'steps'?"),
    "unknown section": ("report:", "reprot:", ":17: reprot: unknown key; did you mean 'report'?"),
    "key of another section": ("\nreport:", "\nlr: 1\nreport:", ":17: lr: unknown key; did you mean 'train.lr'?"),
    "unknown key far from any": (
        "lr: 2.0e-4",
        "lr: 1\n  zzz: 1",
        ":17: train.zzz: unknown key; expected one of steps,",
    ),
    "unknown nested key": ("scale: 1.5", "scal: 1.5", ":5: teacher.guidance.scal: unknown key; did you mean 'scale'?"),
    "unknown method key": (
        "substeps: 3",
        "sub_steps: 3",
        ":12: method.sub_steps: unknown key of method sfd; did you mean 'substeps'?",
    ),
    "reversed times": (
        "name: sfd\n  substeps: 3",
        "name: dmd2\n  t_min: 0.9\n  t_max: 0.5",
        "method: expected t_min not above t_max, got 0.9 and 0.5",
    ),
    "word for a number": ("lr: 2.0e-4", "lr: fast", ":16: train.lr: expected a positive number, found 'fast'"),
    "negative number": ("lr: 2.0e-4", "lr: -1", ":16: train.lr: expected a positive number, found -1"),
    "infinite number": ("lr: 2.0e-4", "lr: .inf", ":16: train.lr: expected a positive number, found inf"),
    "fraction for a count": ("steps: 60", "steps: 1.5", ":14: train.steps: expected a positive integer, found 1.5"),
    "truth for a count": ("steps: 60", "steps: true", ":14: train.steps: expected a positive integer, found true"),
    "text for a count": ("steps: 60", "steps: '60'", ":14: train.steps: expected a positive integer, found '60'"),
    "neither all nor nothing": (
        "steps: 60",
        "steps: 60\n  gradient_checkpointing: elementwize",
        ":15: train.gradient_checkpointing: expected true or false or 'elementwise', found 'elementwize'",
    ),
    "an adapter whose sum is rounded": (
        "steps: 4\n",
        "steps: 4\n  train: lora\n  quantize: nf4\n",
        ":8: student.train: expected 'full' beside student.quantize; under an adapter it is teacher.quantize",
    ),
    "two roundings": (
        "steps: 4\n",
        "steps: 4\n  quantize: int8\nexport: {dtype: bf16}\n",
        ":9: export.dtype: expected 'fp32' beside student.quantize",
    ),
    "a group that is none": (
        "conditions: classes",
        "conditions: classes\n  groups: 2\n  group: 2",
        ":11: data.group: expected a number below data.groups (2), found 2",
    ),
    "groups of what is not stored": (
        "conditions: classes",
        "conditions: classes\n  groups: 2\n  encode: live",
        ":11: data.encode: expected 'store' beside data.groups, found 'live'",
    ),
    "a group beside pictures of all": (
        "conditions: classes",
        "conditions: classes\n  groups: 2\nevaluation: {every: 10, metric: fd_enet}",
        ":11: evaluation.metric: expected teacher_kid_enet or teacher_fd_enet beside data.groups",
    ),
    "what the compiler chooses": (
        "steps: 60",
        "steps: 60\n  compile: true\n  gradient_checkpointing: elementwise",
        ":16: train.gradient_checkpointing: expected true or false beside train.compile, which chooses itself",
    ),
    "nothing for a count": ("steps: 60", "steps:", ":14: train.steps: expected a positive integer, found null"),
    "wrong type in method": ("substeps: 3", "substeps: many", ":12: method.substeps: expected an integer from 1 up"),
    "no students of 0 steps": ("steps: 4", "steps: 0", ":7: student.steps: expected an integer from 1 to 100, found 0"),
    "impossible step count": (
        "steps: 4",
        "steps: 999",
        ":7: student.steps: expected an integer from 1 to 100, found 999",
    ),
    "negative guidance": (
        "scale: 1.5",
        "scale: -2",
        ":5: teacher.guidance.scale: expected a number from 0 up, found -2",
    ),
    "a size of one number": (
        "steps: 60",
        "steps: 60\n  sizes: [[64, 64], [48]]",
        ":15: train.sizes.1: expected a list of 2, each a positive integer",
    ),
    "one size twice": ("steps: 60", "steps: 60\n  sizes: [[64, 64], [64, 64]]", ":15: train.sizes: expected different"),
    "probabilities of other sizes": (
        "steps: 60",
        "steps: 60\n  sizes: [[64, 64], [48, 80]]\n  size_probabilities: [0.5, 0.6]",
        ":16: train.size_probabilities: expected a number for each of train.sizes (2), with a sum of 1",
    ),
    "a size in two places": (
        "student:\n  steps: 4\ndata:\n  conditions: classes\nmethod:\n  name: sfd\n  substeps: 3\ntrain:\n",
        "  arguments: {height: 64}\nstudent:\n  steps: 4\nmethod:\n  name: sfd\ntrain:\n  sizes: [[64, 64]]\n",
        ":6: teacher.arguments.height: expected none beside train.sizes, found 64",
    ),
    "interval upside down": (
        "scale: 1.5",
        "interval: [0.8, 0.2]",
        ":5: teacher.guidance.interval: expected [low, high] with 0 <= low < high <= 1, found [0.8, 0.2]",
    ),
    "momentum without a path": (
        "scale: 1.5",
        "rule: apg\n    momentum: -0.5",
        ":6: teacher.guidance.momentum: expected 0, as a training sample has no step before it;",
    ),
    "a number of apg alone": (
        "scale: 1.5",
        "norm: 15",
        ":5: teacher.guidance.norm: expected 0 for rule cfg, only apg has it, found 15",
    ),
    "method with guidance of its own": (
        "    scale: 1.5\nstudent:\n  steps: 4\ndata:\n  conditions: classes\nmethod:\n  name: sfd\n  substeps: 3",
        "    rescale: 0.7\nstudent:\n  steps: 4\nmethod:\n  name: decoupled-dmd",
        ":5: teacher.guidance.rescale: expected 0.0 for decoupled-dmd, which forms guidance itself, found 0.7",
    ),
    "missing key": ("  lr: 2.0e-4\n", "", ":13: train.lr: missing; expected a positive number"),
    "missing section": ("student:\n  steps: 4\n", "", ": student: missing; expected a section with the keys steps,"),
    "scalar for a section": (
        "train:\n  steps: 60\n  batch_size: 64\n  lr: 2.0e-4",
        "train: 60",
        ":13: train: expected a section with the keys steps, batch_size,",
    ),
    "empty section": (
        "  name: sfd\n  substeps: 3\n",
        "",
        ":10: method: expected a section with the keys name, found null",
    ),
    "unknown choice": (
        "steps: 4",
        "steps: 4\n  train: lroa",
        ":8: student.train: expected one of 'full', 'lora', found",
    ),
    "captions of no images": (
        "conditions: classes",
        "conditions: captions",
        ":9: data.conditions: expected data.images beside 'captions', found null",
    ),
    "unknown list of prompts": (
        "conditions: classes",
        "conditions: everday",
        ":9: data.conditions: expected 'classes', 'captions', 'emoji', 'everyday', a list, a .txt or a folder, "
        ".jsonl, .csv, .tar, .parquet or .arrow, a pattern or URL of these, or hub:OWNER/NAME, found",
    ),
    "no rank": ("steps: 4", "steps: 4\n  rank: 0", ":8: student.rank: expected a positive integer, found 0"),
    "unknown names of a LoRA's layers": (
        "report:",
        "export:\n  keys: a1111\nreport:",
        ":18: export.keys: expected one of 'diffusers', 'kohya', found 'a1111'",
    ),
    "names of a LoRA's layers without a LoRA": (
        "report:",
        "export:\n  keys: kohya\nreport:",
        ":18: export.keys: expected 'diffusers' for a student that is exported whole, found 'kohya'",
    ),
    "unknown method": (
        "name: sfd",
        "name: diff_instruct",
        " or FILE.py:CLASS, found 'diff_instruct'; did you mean 'diff-instruct'?",
    ),
    "method from a missing file": (
        "name: sfd",
        "name: no.py:Mine",
        ":11: method.name: expected FILE.py:CLASS, found no",
    ),
    "method without its images": (
        "name: sfd\n  substeps: 3",
        "name: tcd",
        ":11: method.name: tcd trains on real images",
    ),
    "divergence without its ratio": (
        "name: sfd\n  substeps: 3",
        "name: dmd2\n  divergence: neyman",
        ":12: method.divergence: expected 'reverse-kl', or method.gan_weight above 0, whose head estimates the",
    ),
    "range that descends": (
        "name: sfd\n  substeps: 3",
        "name: vsd\n  guidance_range: [5, 2]",
        ":12: method.guidance_range: expected the lower end first, found [5, 2]",
    ),
    "no loss at all": (
        "name: sfd\n  substeps: 3",
        "name: dmd2\n  dm_weight: 0",
        "method: expected dm_weight or gan_weight above 0, got 0 for both",
    ),
    "chain of several steps": (
        "name: sfd\n  substeps: 3",
        "name: emd",
        ":7: student.steps: expected 1 for emd, whose chain starts from pure noise, found 4",
    ),
    "steps beyond the solver's": (
        "conditions: classes\nmethod:\n  name: sfd\n  substeps: 3",
        "images: fashion-mnist\nmethod:\n  name: tcd\n  solver_steps: 3",
        ":7: student.steps: expected at most method.solver_steps (3), found 4",
    ),
    "steps beyond the stock scheduler's": (
        "steps: 4\ndata:\n  conditions: classes\nmethod:\n  name: sfd\n  substeps: 3",
        "steps: 51\ndata:\n  images: fashion-mnist\nmethod:\n  name: tcd\n  solver_steps: 100",
        ":7: student.steps: expected at most 50, what the stock TCDScheduler takes, found 51",
    ),
    "teacher of no such name": (
        "pipeline: {teacher}",
        "pipeline: nothing-like-this",
        ":3: teacher.pipeline: expected an embedded teacher",
    ),
    "teacher that is no pipeline": ("pipeline: {teacher}", "pipeline: {empty}", "found no model_index.json in"),
    "no such prompts file": (
        "conditions: classes",
        "conditions: no.txt",
        ":9: data.conditions: expected 'classes', 'c",
    ),
    "no prompts": ("conditions: classes", "conditions: []", ":9: data.conditions: expected at least one prompt"),
    "number for a prompt": (
        "conditions: classes",
        "conditions: [a, 5]",
        ":9: data.conditions: expected text or a list",
    ),
    "LoRA without a file": (
        "  guidance:",
        "  loras: [{scale: 1.0}]\n  guidance:",
        ":4: teacher.loras.0.file: missing; expected text that is not empty",
    ),
    "LoRA that is not there": (
        "  guidance:",
        "  loras: [none.safetensors]\n  guidance:",
        ":4: teacher.loras.0.file: expected a .safetensors file, found nothing at none.safetensors",
    ),
    "scale of a LoRA in words": (
        "  guidance:",
        "  loras: [{file: a.safetensors, scale: half}]\n  guidance:",
        ":4: teacher.loras.0.scale: expected a number, found 'half'",
    ),
    "unknown key of a LoRA": (
        "  guidance:",
        "  loras: [{file: a.safetensors, weight: 1}]\n  guidance:",
        ":4: teacher.loras.0.weight: unknown key; expected one of file, scale, component",
    ),
    "LoRAs that are no list": (
        "  guidance:",
        "  loras: {file: a.safetensors}\n  guidance:",
        ":4: teacher.loras: expected a list, each a section with the keys file, scale, component, found",
    ),
    "config of a folder": (
        "  guidance:",
        "  config: some/where\n  guidance:",
        ":4: teacher.config: expected null for a pipeline that is no checkpoint file, found 'some/where'",
    ),
    "textual inversion in a pickle": (
        "  guidance:",
        "  embeddings: [a.pt]\n  guidance:",
        ":4: teacher.embeddings.0.file: expected a .safetensors file, found nothing at a.pt",
    ),
    "no such autoencoder": (
        "  guidance:",
        "  vae: ./none\n  guidance:",
        ":4: teacher.vae: expected a folder, a .safetensors file or a hub id, found nothing at ./none",
    ),
    "no such images": (
        "conditions: classes",
        "images: no/images",
        ":9: data.images: expected 'fashion-mnist', a folder, .jsonl, .csv, .tar, .parquet or .arrow, a pattern",
    ),
    "images in a text file": (
        "conditions: classes",
        "images: {file}",
        ".tar, .parquet or .arrow, a pattern or URL of these, or hub:OWNER/NAME, found a text file at",
    ),
    "endless samples": (
        "conditions: classes",
        "images: hub:owner/name",
        ":9: data.images: expected data.limit beside it, the number of samples to be streamed, found null",
    ),
    "everything rejected": (
        "conditions: classes",
        "max_rejected: 2",
        ":9: data.max_rejected: expected a number from 0 to 1, found 2",
    ),
    "a part of images that there are not": (
        "conditions: classes",
        "conditions: classes\n  crop: random",
        ":10: data.crop: expected center without real images, found 'random'",
    ),
    "encoding during training beside a compiled network": (
        "conditions: classes\nmethod:\n  name: sfd\n  substeps: 3\ntrain:",
        "conditions: classes\n  encode: live\nmethod:\n  name: sfd\n  substeps: 3\ntrain:\n  compile: true",
        ":10: data.encode: expected 'store' beside train.compile, found 'live'",
    ),
    "no such start": ("steps: 4", "steps: 4\n  init: no/run", ":8: student.init: expected a run folder or an exported"),
    "accumulation": (
        "lr: 2.0e-4",
        "lr: 2.0e-4\n  accumulation: 5",
        ":17: train.accumulation: expected a divisor of train.batch_size (64), found 5",
    ),
    "one beta": (
        "lr: 2.0e-4",
        "lr: 1\n  betas: [0.9]",
        ":17: train.betas: expected a list of 2, each a number from 0 to below 1, found [0.9]",
    ),
    "beta of 1": (
        "lr: 2.0e-4",
        "lr: 1\n  betas: [0.9, 1]",
        ":17: train.betas.1: expected a number from 0 to below 1, found 1",
    ),
    "warm-up longer than the run": (
        "lr: 2.0e-4",
        "lr: 1\n  lr_warmup: 61",
        ":17: train.lr_warmup: expected at most train",
    ),
    "report at 0 steps": ("samples: 0", "steps: [4, 0]", ":18: report.steps.1: expected a positive integer, found 0"),
    "unknown network": (
        "samples: 0",
        "networks:\n  - enett",
        ":19: report.networks.0: expected one of 'classifier', 'e",
    ),
    "yes is not true": ("samples: 0", "solvers: yes", ":18: report.solvers: expected true or false, found 'yes'"),
    "misspelt resume": (
        "\nreport:",
        "\nresume: atuo\nreport:",
        ":17: resume: expected auto, never or an existing folder",
    ),
    "output that is a file": (
        "\nreport:",
        "\noutput: {file}\nreport:",
        ":17: output: expected a folder, found a file at",
    ),
    "duplicate key": ("lr: 2.0e-4", "lr: 1\n  lr: 2", ":17: train.lr: duplicate key; first given on line 16"),
    "tab": (
        "  steps: 60",
        "\tsteps: 60",
        ":14: not valid YAML: while scanning for the next token, found character '\\t' that cannot start any token",
    ),
    "unclosed bracket": ("samples: 0", "steps: [1", "not valid YAML: while parsing a flow sequence, expected"),
    "alias": ("samples: 0", "samples: *n", ":18: not valid YAML: aliases are not supported"),
    "python object": (
        "samples: 0",
        "samples: !!python/name:os.system x",
        ":18: tag tag:yaml.org,2002:python/name:os.s",
    ),
    "number as a key": ("samples: 0", "7: 0", ":18: expected text as a key, found 7"),
    "two documents": (
        "\nreport:",
        "\n---\nreport:",
        "not valid YAML: expected a single document in the stream, but found another document",
    ),
    "a list": (GOOD, "- 1\n", ":1: expected a section with the keys teacher, student,"),
    "an empty file": (GOOD, "# nothing\n", ":1: expected a section with the keys teacher, student,"),
}

OVERRIDES = {
    "train.stepz=3": "override 'train.stepz=3': train.stepz: unknown key; did you mean 'steps'?",
    "trian.steps=3": "override 'trian.steps=3': trian: unknown key; did you mean 'train'?",
    "train.lr=fast": "override 'train.lr=fast': train.lr: expected a positive number, found 'fast'",
    "train.lr=": "override 'train.lr=': train.lr: expected a positive number, found null",
    "train.lr": "override 'train.lr': expected dotted.key=value, such as train.steps=20",
    "=3": "override '=3': expected dotted.key=value, such as train.steps=20",
    "train.lr.max=1": "override 'train.lr.max=1': expected a section at train.lr, found 0.0002",
    "report.steps=[1": "override 'report.steps=[1': not valid YAML: while parsing a flow sequence, expected",
    "method.name=tcd": ":12: method.substeps: unknown key of method tcd; did you mean 'solver_steps'?",
}


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """Paths that the table names: an (apparent) pipeline, an empty folder, a file."""
    places = {"teacher": tmp_path / "pipeline", "empty": tmp_path / "empty", "file": tmp_path / "file"}
    places["teacher"].mkdir()
    (places["teacher"] / "model_index.json").write_text("{}")
    places["empty"].mkdir()
    places["file"].write_text("")
    return places


def fails(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """Run a command that must fail with exit code 2 and one line; returns the line."""
    code = cli.run(arguments)
    printed = capsys.readouterr()
    assert code == 2, printed
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
    assert "Traceback" not in printed.err and "pydantic" not in printed.err
    return printed.err


@pytest.mark.parametrize("mistake", TEXTS)
def test_bad_text(mistake: str, tmp_path: Path, places: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    old, new, message = TEXTS[mistake]
    assert GOOD.count(old) >= 1
    text = GOOD.replace(old, new, 1)
    for name, path in places.items():
        text = text.replace(f"{{{name}}}", str(path))
    recipe = tmp_path / "mistake.yaml"
    recipe.write_text(text)
    line = fails(["train", str(recipe)], capsys)
    assert line.startswith(f"error: {recipe}:")
    assert message in line


@pytest.mark.parametrize("override", OVERRIDES)
def test_bad_override(override: str, tmp_path: Path, places: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    recipe = tmp_path / "good.yaml"
    recipe.write_text(GOOD.format(**places))
    assert OVERRIDES[override] in fails(["train", str(recipe), override], capsys)


def test_the_good_one_is_good(tmp_path: Path, places: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    recipe = tmp_path / "good.yaml"
    recipe.write_text(GOOD.format(**places))
    assert cli.run(["train", str(recipe), "output=", "--dry-run"]) == 0
    assert "output: runs/good" in capsys.readouterr().out


def test_missing_file(capsys: pytest.CaptureFixture) -> None:
    assert "expected a recipe file or the name of a shipped recipe" in fails(["train", "no/such.yaml"], capsys)


@pytest.mark.parametrize(
    ("typed", "first"),
    [
        ("sdxl", "sdxl_dmd2_lora"),
        ("flux", "flux_dev_dmd2_lora"),
        ("ladd sdxl", "sdxl_ladd"),
        ("quikstart", "quickstart"),
    ],
)
def test_a_part_of_a_name_suggests_the_likeliest_recipe(typed: str, first: str, capsys: pytest.CaptureFixture) -> None:
    line = fails(["train", typed], capsys)
    assert f"did you mean '{first}'?" in line and len(line) < 300


def test_misspelt_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "quickstart.yaml").write_text("")
    assert f"did you mean '{tmp_path}/quickstart.yaml'?" in fails(["train", f"{tmp_path}/quickstrat.yaml"], capsys)


def test_folder_for_a_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "recipe.yaml").write_text("")
    line = fails(["train", str(tmp_path)], capsys)
    assert f"{tmp_path}: expected a recipe file, found a folder; did you mean {tmp_path}/recipe.yaml?" in line


def test_not_text(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe = tmp_path / "binary.yaml"
    recipe.write_bytes(b"\xff\xfe\x00")
    assert f"{recipe}: expected UTF-8 text, found byte 0xff" in fails(["train", str(recipe)], capsys)


def test_method_file_that_does_not_import(
    tmp_path: Path, places: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    method = tmp_path / "mine.py"
    method.write_text("import no_such_module\n")
    recipe = tmp_path / "good.yaml"
    recipe.write_text(GOOD.format(**places))
    assert cli.run(["train", str(recipe), f"method={{name: '{method}:Mine'}}"]) == 2
    announced, line = capsys.readouterr().err.splitlines()
    assert announced == f"the recipe names Python code, which runs now: {method}" and line.startswith("error: ")
    assert "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'" in line


def test_teacher_that_cannot_be_traced(tmp_path: Path, places: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    recipe = tmp_path / "good.yaml"
    recipe.write_text(GOOD.format(**places))
    assert cli.run(["train", str(recipe), f"output={tmp_path / 'run'}"]) == 2
    # What it was doing, then the error.
    *doing, line = capsys.readouterr().err.splitlines()
    assert [one.partition(" ")[0] for one in doing] == ["loading"] * 2
    assert line.startswith("error: ") and str(places["teacher"]) in line
