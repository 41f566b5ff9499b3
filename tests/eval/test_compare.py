"""The comparison of methods: what is trained, measured and merged, what follows from the rows, tables and plot."""

import copy
import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from comparison import FAMILIES, choices, conclude, first_table, page, plot, short_table, students
from synthetic import ROWS, hasty, pictures

from pipeline.tiny import save_dit, tiny_dit
from stepdistill import assets, recipe
from stepdistill.errors import InputError
from stepdistill.eval.measure import load_view
from stepdistill.eval.names import METRICS
from stepdistill.eval.protocol import load_protocol
from stepdistill.eval.references import build_reference
from stepdistill.eval.report import between_markers, read_report
from stepdistill.methods import METHODS

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare.py"
SMALL = ["--samples", "20", "--networks", "classifier"]


def load_script():
    spec = importlib.util.spec_from_file_location("compare", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    sys.modules["compare"] = script
    spec.loader.exec_module(script)
    return script


@pytest.fixture(scope="module")
def script():
    return load_script()


@pytest.fixture
def place(protocol_file, tmp_path, monkeypatch):
    """A tiny teacher, a small protocol and two recipes: (folder, arguments of the script that use them)."""
    save_dit(tiny_dit(), tmp_path / "teacher")
    hasty(protocol_file, steps=3)
    protocol = load_protocol(protocol_file)
    networks = {"classifier": load_view(protocol.views["classifier"], tmp_path, "cpu")}
    build_reference(*pictures(ROWS, seed=0), protocol.reference.path(), protocol=protocol, networks=networks)
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    for name, method, steps in (("walk", {"name": "sfd", "substeps": 1}, 2), ("match", {"name": "dmd2"}, 1)):
        tree = {
            "teacher": {"pipeline": str(tmp_path / "teacher"), "guidance": {"scale": 2.0}},
            "student": {"steps": steps},
            "method": method,
            "train": {"steps": 2, "batch_size": 4, "lr": 1e-3, "log_every": 1, "preview_every": 9, "tracker": "none"},
            "export": {"check": "off"},  # a process of its own for each
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    options = [
        "--protocol",
        str(protocol_file),
        "--out",
        str(tmp_path / "all.json"),
        "--runs",
        str(tmp_path / "runs"),
        *SMALL,
    ]
    return tmp_path, options


@pytest.fixture
def run(script, place, monkeypatch):
    """``run("walk", ..., options)``: the script in this process, with a hasty teacher; returns the exit code."""
    folder, options = place
    monkeypatch.setattr(script, "NFES", (1, 2))
    monkeypatch.setattr(script, "spawn", lambda task, arguments, cores: 0 if script.work(task, arguments) else 1)

    def call(*names, more=()):
        methods = [str(folder / f"{name}.yaml") for name in names]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--methods", *methods, *options, *more])
        return script.main()

    return call


def rows_of(folder, name="all.json"):
    return json.loads((folder / name).read_text())["rows"]


def test_pieces_are_merged_finished_runs_are_kept_and_rows_say_what_they_cost(run, place, script, monkeypatch):
    folder, _ = place
    assert run("walk") == 0
    content = json.loads((folder / "all.json").read_text())
    assert [(row["name"], row["role"]) for row in content["rows"]][:2] == [
        ("teacher w=2", "teacher"),
        ("teacher w=1", "teacher"),
    ]
    assert sum(row["role"] == "solver" for row in content["rows"]) == 3 + 6
    students = [row for row in content["rows"] if row["role"] == "student"]
    assert [row["name"] for row in students] == ["walk@1", "walk@2"]
    network = sum(p.numel() for p in tiny_dit().transformer.parameters())
    one = students[0]["training"]
    assert {key: one[key] for key in ("recipe", "method", "seed", "steps", "train_steps", "trainable_parameters")} == {
        "recipe": "walk", "method": "sfd", "seed": 0, "steps": 2, "train_steps": 2, "trainable_parameters": network,
    }  # fmt: skip
    # Each of 2 training steps: 2 teacher steps of 2 passes, 2 student steps, 4 rows each.
    assert one["evaluations"] == 2 * 4 * (2 * 2 + 2)
    # Measured and drawn after either step, which costs no evaluations; the student is that of its end all the same.
    assert [at for at, _ in one["curve"]] == [one["evaluations"] // 2, one["evaluations"]]
    assert len({fd for _, fd in one["curve"]}) == 2 and not list(
        (folder / "runs" / "walk-seed0" / "best").glob("step*")
    )
    assert one["peak_memory_mib"] > 10 and one["seconds"] > 0
    assert read_report(folder / "all.json").rows[-1].name == "walk@2"
    assert (folder / "all.png").is_file()

    monkeypatch.setattr(script, "train", lambda *_: pytest.fail("trained again"))
    before = rows_of(folder)
    assert run("walk") == 0
    strip = lambda rows: [{**row, "cached": True, "cost": 0} for row in rows]  # noqa: E731
    assert strip(rows_of(folder)) == strip(before)


@pytest.fixture
def _students_only(script, monkeypatch):
    """No rows of the teacher and of solvers, which the first test measures."""
    monkeypatch.setattr(script, "references", lambda *_: [])


def test_seeds_failures_and_changed_recipes(_students_only, run, place, script, monkeypatch):
    folder, _ = place
    assert run("walk", "match", more=["--seeds", "0", "1"]) == 0
    content = json.loads((folder / "all.json").read_text())
    pairs = [(row["name"], row["training"]["seed"]) for row in content["rows"] if row["role"] == "student"]
    assert pairs == [(name, seed) for name in ("walk@1", "walk@2", "match@1", "match@2") for seed in (0, 1)]
    entry = next(one for one in content["seeds"] if one["name"] == "match@1")
    fds = [row["metrics"]["fd_classifier"] for row in content["rows"] if row["name"] == "match@1"]
    assert entry["seeds"] == [0, 1] and fds[0] != fds[1]
    assert entry["mean"]["fd_classifier"] == pytest.approx(sum(fds) / 2)
    assert entry["std"]["fd_classifier"] == pytest.approx(abs(fds[0] - fds[1]) / 2**0.5)

    path = folder / "match.yaml"
    path.write_text(path.read_text().replace("lr: 0.001", "lr: 0.002"))
    assert run("match") == 0
    assert (folder / "runs" / "match-seed0.previous-1").is_dir()
    changed = [row["metrics"]["fd_classifier"] for row in rows_of(folder) if row["name"] == "match@1"]
    assert changed[0] != fds[0] and changed[1] == fds[1]

    def diverge(*_):
        raise script.NonFiniteError("student loss term 'dm' is nan at step 2")

    path.write_text(path.read_text().replace("lr: 0.002", "lr: 9.0"))
    original = script.train
    monkeypatch.setattr(script, "train", diverge)
    assert run("match") == 1
    content = json.loads((folder / "all.json").read_text())
    assert content["failures"] == [
        {
            "name": "match",
            "recipe": "match",
            "seed": 0,
            "error": "NonFiniteError: student loss term 'dm' is nan at step 2",
        }
    ]
    assert len([row for row in content["rows"] if row["role"] == "student"]) == 8
    assert "student loss term 'dm' is nan" in page(content)
    path.write_text(path.read_text().replace("lr: 9.0", "lr: 0.002"))
    monkeypatch.setattr(script, "train", original)
    assert run("match") == 0 and json.loads((folder / "all.json").read_text())["failures"] == []


def test_an_interrupted_run_is_not_measured_and_goes_on(_students_only, run, place, monkeypatch):
    folder, _ = place
    monkeypatch.setattr("stepdistill.training.trainer.Trainer.run", lambda self, start: (1, True))
    assert run("walk") == 0
    assert not any(row["role"] == "student" for row in rows_of(folder))


def test_a_task_runs_in_a_process_of_its_own(_students_only, place, script, monkeypatch):
    folder, options = place
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--methods", str(folder / "match.yaml"), *options, "--jobs", "2"])
    assert script.main() == 0, (folder / "runs" / "match-seed0.log").read_text()
    assert [row["name"] for row in rows_of(folder)] == [f"match@{nfe}" for nfe in (1, 2, 4, 8)]
    assert "step 2/2" in (folder / "runs" / "match-seed0.log").read_text()


def test_other_protocols_samples_and_budgets_are_not_mixed(_students_only, run, place):
    folder, _ = place
    (folder / "all.json").write_text(json.dumps({"protocol": "test-v1", "samples": 20, "budget": 10.0}))
    with pytest.raises(InputError, match=r"holds a comparison with budget 10\.0, found 1\.0"):
        run("walk")


def test_names_budget_and_what_is_unknown(script, tmp_path, monkeypatch):
    arguments = script.argparse.Namespace(methods=["dmd2"], seeds=[0, 3], samples=1000, budget=1.0, runs=tmp_path)
    tasks = script.planned(arguments)
    assert {task.seed for task in tasks} == {0, 3} and {task.recipe.method.name for task in tasks} == {"dmd2"}
    several = sum(recipe.load(name).method.name == "dmd2" for name in assets.recipes() if name.startswith("fashion_"))
    assert len(tasks) == 2 * several and ("dmd2_1step" in {task.name for task in tasks}) == (several > 1)
    arguments.budget = 10.0
    (task, *_) = [task for task in script.planned(arguments) if task.name == "dmd2"]
    shipped = recipe.load("fashion_dmd2")
    factor = 10 * script.SHORTER.get("fashion_dmd2", 1)
    assert task.recipe.train.steps == factor * shipped.train.steps and task.run.name == "dmd2-seed0-x10"
    assert task.recipe.method.critic_warmup == factor * shipped.method.critic_warmup
    assert task.recipe.method.critic_steps == shipped.method.critic_steps
    arguments.methods = ["recipes/fashion_pg.yaml", str(assets.recipe("fashion_w_embed"))]
    monkeypatch.chdir(assets.root())
    assert {task.name for task in script.planned(arguments)} == {"pg-sb", "w-embed"}
    arguments.methods = ["dmd2", "magic"]
    with pytest.raises(InputError, match=r"--methods: expected some of .*dmd2.*, found 'magic'"):
        script.planned(arguments)


def test_every_phase_of_every_method_grows_with_the_budget(script):
    fields = {key: field for method in METHODS.values() for key, field in method.Config.model_fields.items()}
    counts = re.compile(r"first steps|steps until|updates of|training steps")
    said = {key for key, field in fields.items() if field.annotation is int and counts.search(field.description)}
    assert said == set(script.PHASES)


def test_every_method_is_of_one_family():
    listed = [name for methods in FAMILIES.values() for name in methods]
    assert sorted(listed) == sorted(METHODS)


def a_row(name, role, steps, fd, guidance=1.0, seed=0, trained=None, method="dmd2"):
    row = {
        "name": name, "role": role, "steps": steps, "nfe": steps * (2 if guidance != 1 else 1), "guidance": guidance,
        "samples": 1000, "metrics": dict.fromkeys(METRICS, 0.5) | {"fd_classifier": fd, "diversity_classifier": 2 * fd},
        "cost": {}, "cached": False, "diagnostics": {},
    }  # fmt: skip
    if role == "student":
        row["training"] = {
            "recipe": f"fashion_{method}", "method": method, "seed": seed, "steps": trained or steps, "train_steps": 9,
            "evaluations": 150_000, "trainable_parameters": 3_500_000, "seconds": 1.0, "peak_memory_mib": 800.0,
        }  # fmt: skip
    return row


def a_comparison(*students):
    teachers = [a_row("t w=1.5", "teacher", 50, 4.0, 1.5), a_row("t w=1", "teacher", 50, 6.0)]
    solvers = [
        a_row("UniPC", "solver", 4, 8.0),
        a_row("DDIM", "solver", 4, 9.0),
        a_row("UniPC w=1.5", "solver", 2, 20.0, 1.5),
    ]
    solvers += [a_row("UniPC", "solver", 1, 104.0), a_row("UniPC", "solver", 8, 3.0)]
    content = {
        "schema": 1, "protocol": "fashion-v1", "samples": 1000, "budget": 1.0, "seed": 0, "command": "c",
        "versions": {"torch": "2"}, "device": "cpu", "floor": dict.fromkeys(METRICS, 0.5), "failures": [],
    }  # fmt: skip
    return content | {"rows": copy.deepcopy([*students, *solvers, *teachers[::-1]])}


STUDENTS = (
    a_row("dmd2@1", "student", 1, 54.0, trained=4),
    a_row("dmd2@4", "student", 4, 4.2),
    a_row("dmd2@8", "student", 8, 4.0, trained=4),
    a_row("lcm@4", "student", 4, 5.0, method="lcm"),
    a_row("lcm@4", "student", 4, 5.6, seed=1, method="lcm"),
    a_row("agd@25", "student", 25, 9.0, trained=50, method="agd"),
    a_row("agd@50", "student", 50, 4.3, method="agd"),
)


def test_gaps_ratios_and_bars_are_the_arithmetic_of_their_definitions():
    content = conclude(a_comparison(*STUDENTS), {"lcm@4": "too few steps"})
    assert [row["name"] for row in content["rows"][:2]] == ["t w=1.5", "t w=1"]
    found = {(row["name"], row["training"]["seed"]): row for row in content["rows"] if row["role"] == "student"}
    first, fourth = found["dmd2@1", 0], found["dmd2@4", 0]
    # The best solver has 104 at NFE 1, 8 at NFE 4, and at NFE 8 is better than the teacher: there is no gap.
    assert first["gap_closed"] == pytest.approx(0.5) and first["bars"] == []
    assert fourth["gap_closed"] == pytest.approx(0.95) and fourth["ratio"] == pytest.approx(1.05)
    assert [(bar["value"], bar["passed"]) for bar in fourth["bars"]] == [(pytest.approx(0.95), True)]
    assert found["dmd2@8", 0]["gap_closed"] is None
    # Seeds are judged by their mean, 5.3.
    assert [bar["value"] for bar in found["lcm@4", 1]["bars"]] == [pytest.approx(2.7 / 4)]
    assert found["lcm@4", 0]["bars"][0]["passed"] is False and found["lcm@4", 0]["note"] == "too few steps"
    assert found["agd@25", 0]["bars"] == [] and found["agd@50", 0]["bars"][0]["value"] == pytest.approx(4.3 / 4)
    assert found["agd@50", 0]["bars"][0]["passed"] is True
    best = {bar["name"]: (bar["value"], bar["passed"]) for bar in content["bars"]}
    assert best == {"dmd2@1": (pytest.approx(13.5), False), "dmd2@4": (pytest.approx(1.05), False)}
    assert conclude(content, {}) is content  # from its own output again
    assert next(row["name"] for row in content["rows"] if row["role"] == "student") == "lcm@4"


def test_tables_and_plot_show_what_was_found():
    content = a_comparison(*STUDENTS)
    # Of lcm one seed has never been so low; dmd2 had been before it got worse.
    curves = {
        ("dmd2@4", 0): [[50_000, 7.0], [80_000, 5.5], [90_000, 5.6], [150_000, 4.2]],
        ("lcm@4", 0): [[150_000, 5.0]],
        ("lcm@4", 1): [[150_000, 5.6]],
    }
    for row in students(content["rows"]):
        row["training"] |= {"curve": curves.get((row["name"], row["training"]["seed"]), [])}
    content = conclude(content, {"lcm@4": "too few steps"})
    lines = [line.strip("|").split("|") for line in short_table(content).splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    cells = {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}
    assert next(iter(cells)) == "" and cells["t w=1.5, 50 steps"][:2] == ["100", "4.00"]
    assert cells["best stock solver"][2:6] == ["104.00", "–", "8.00", "3.00"]
    assert cells["**dmd2**"][:6] == ["4", "**4.20**", "54.00", "–", "4.20", "4.00"]
    # The teacher's diversity is 8.
    assert cells["**dmd2**"][-6:] == ["1.050", "95 %", "150 k", "80 k", "3.50 M", "met"]
    assert (cells["**lcm**"][-3], cells["**agd**"][-3]) == ("not reached", "–")
    assert cells["**lcm**"][1] == "**5.30 ± 0.42**" and cells["**agd**"][:2] == ["50", "**4.30**"]
    first = [line.strip("| ").split(" | ")[:3] for line in first_table(content).splitlines()[2:]]
    assert ["best stock solver", "4", "8.00"] in first and [
        "**best student**: [dmd2](docs/methods.md)",
        "4",
        "4.20",
    ] in first
    lines = [line.strip("| ").split(" | ") for line in choices(content, ["lcm"]).splitlines()[2:]]
    assert [line[:2] for line in lines] == [[str(nfe), images] for nfe in (1, 2, 4, 8) for images in ("none", "yes")]
    assert lines[4][2].startswith("dmd2: 4.20, ") and lines[5][2].startswith("lcm: 5.30 ± 0.42, ")
    text = page(content)
    assert "- **lcm@4**: too few steps" in text and "## Consistency" in text and "## Guidance" in text
    assert "best at 1 step: FD at most 1.5x the teacher's: **missed** by dmd2@1, 13.50x" in text
    assert "| lcm@4 | 2 | 5.30 ± 0.42 |" in text
    assert "yet" not in text
    failed = {"name": "x", "recipe": "y", "seed": 2, "error": "z"}
    text = page(content, [a_comparison(*STUDENTS) | {"budget": 0.1, "failures": [failed]}])
    assert "## With 0.1 times the budget" in text and "**Failed**: x (y, seed 2): z" in text
    assert "| lcm@4 | 5.00 | 5.60 |" in text and "| dmd2@4 | 4.20 | – |" in text and "| dmd2@1 | 54.00" not in text
    missing = page(content | {"failures": [failed]}, listed=["dmd2", "x", "ect", "lcm"])
    assert re.findall(r"\*\*(\S+)\*\* is not measured yet: `(.*)`", missing) == [
        ("ect", "python scripts/compare.py --methods ect")
    ]
    image = plot(content)
    assert image.width > 1000 and len(image.getcolors(1 << 24)) > 4
    assert plot(conclude(a_comparison(), {})).width > 100


def test_a_table_is_put_between_its_markers_or_nowhere(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("a\n<!-- b -->\nold\n<!-- e -->\nz\n")
    between_markers(path, "<!-- b -->", "<!-- e -->", "new")
    assert path.read_text() == "a\n<!-- b -->\nnew\n<!-- e -->\nz\n"
    with pytest.raises(InputError, match="no such place"):
        between_markers(path, "<!-- x -->", "<!-- e -->", "new")


def test_readme_and_page_show_what_is_stored(script):
    content = json.loads(script.default_out().read_text(encoding="utf-8"))
    names = ("README.md", "docs/comparison.md", "docs/choosing.md")
    readme, page, choosing = pages = [(assets.root() / name).read_text(encoding="utf-8") for name in names]
    assert all(text.count(script.BEGIN) == text.count(script.END) == 1 for text in pages)
    assert first_table(content) in readme and short_table(content) in page
    tasks = script.planned(SimpleNamespace(methods=[], samples=1000, budget=1, seeds=[0], runs=Path("runs")))
    assert choices(content, [task.name for task in tasks if task.recipe.data.images is not None]) in choosing


def test_wrong_input_from_the_shell(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--methods", "magic"])
    with pytest.raises(SystemExit, match="error: --methods: expected some of"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
