"""The notebook in docs/examples: its cells run in order in one process, with a shorter run; no outputs are stored."""

import ast
import json

from pipeline import checkpoints
from short_samples import short_report
from stepdistill.pipeline.folder import save_pipeline
from test_docs import ROOT
from test_docs_words import MOST_WORDS, sentences

NOTEBOOK = ROOT / "docs" / "examples" / "quickstart.ipynb"
SHORTER = [
    *("train.steps=2", "train.batch_size=4", "method.regression_steps=1", "method.critic_warmup=0"),
    *("report.samples=4", "report.steps=[4]", "report.solvers=false", "train.tracker=none"),
]


def cells(kind: str) -> list[dict]:
    stored = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (stored["nbformat"], stored["nbformat_minor"]) == (4, 5)
    return [cell for cell in stored["cells"] if cell["cell_type"] == kind]


def run(source: str, names: dict) -> object:
    """Run a cell; returns the value of its last line, as a notebook shows it."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, str(NOTEBOOK), "exec"), names)
    return eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names) if last else None


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short_report(monkeypatch)
    save_pipeline(checkpoints.tiny_sdxl(), tmp_path / "sdxl")
    names, shown = {}, {}
    for cell in cells("code"):
        tags = cell["metadata"].get("tags", ())
        if "install" in tags:
            continue
        shown[cell["id"]] = run("".join(cell["source"]), names)
        if "parameters" in tags:
            names |= {"settings": SHORTER, "sdxl_settings": ["teacher.pipeline=sdxl", "teacher.precision=fp32"]}
    assert "stepdistill sample" in shown["train"]._repr_html_()
    assert len(shown["teacher"].images) == len(shown["student"].images) == 10
    assert (shown["teacher"].nfe, shown["student"].nfe) == (100, 4)
    assert "<table" in shown["report"]._repr_html_()
    assert "fits 24 GiB" in capsys.readouterr().out


def test_the_notebook_stores_no_outputs_and_speaks_plainly():
    code = cells("code")
    assert len(code) < 10 and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    words = [sentence for cell in cells("markdown") for sentence in sentences("".join(cell["source"]))]
    assert words and [one for one in words if len(one.split()) > MOST_WORDS] == []
