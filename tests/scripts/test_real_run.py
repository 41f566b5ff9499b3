"""scripts/real_run.py from end to end on tiny pipelines of each base, and the page it writes."""

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from pipeline.tiny import tiny_sd, tiny_sd3

ROOT = Path(__file__).parents[2]
TINY = {"sd15": tiny_sd, "sd35-medium": tiny_sd3}


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import real_page
    import real_run

    return real_run, real_page


class Shrunk(torch.nn.Module):
    """Rows are images shrunk to 2 x 2."""

    features = 12

    def prepare(self, image):
        return torch.nn.functional.adaptive_avg_pool2d(image.expand(3, -1, -1).double(), 2)

    def rows(self, batch):
        return {"rows": batch.flatten(1).float(), "logits": batch.flatten(1).float()[:, :5]}

    def texts(self, prompts):
        return torch.stack([torch.full((12,), float(len(prompt))) for prompt in prompts])


@pytest.fixture
def protocol(tmp_path):
    """teacher-fid-5k-v1 in small, with a file in place of Inception's weights."""
    stated = yaml.safe_load((ROOT / "eval/quality/protocols/teacher-fid-5k-v1.yaml").read_text(encoding="utf-8"))
    view = stated["views"]["inception"]
    view |= {"metrics": ["fid", "kid"], "weights": {"file": "inception/w.pth", "sha256": None, "how": "none"}}
    stated |= {"teacher": {"steps": 2, "guidance": None}, "kid": {"subsets": 2, "size": 4, "seed": 0}}
    stated |= {"id": "tiny-v1", "samples": 16, "diversity": None}
    (tmp_path / "data" / "inception").mkdir(parents=True)
    (tmp_path / "data" / "inception" / "w.pth").write_bytes(b"weights")
    path = tmp_path / "tiny-v1.yaml"
    path.write_text(yaml.safe_dump(stated), encoding="utf-8")
    return path


def small(real_run, run):
    """The command line's choices that make the recipes of ``run`` small enough for a test."""
    sizes = "train={steps: 22, batch_size: 2, lr: 1.0e-4, checkpoint_every: 10, precision: fp32, tracker: none}"
    few = ["--set", "method.real_rows=8", "--set", "method.real_steps=2"]
    return [
        "--set",
        sizes,
        *few,
        "--set",
        "teacher.precision=fp32",
        "--samples",
        "16",
        "--hours",
        "1",
        "--offline",
        "--cpu",
    ]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("base", ["sd15", pytest.param("sd35-medium", marks=pytest.mark.slow)])
def test_a_real_run_on_a_tiny_pipeline(scripts, base, tmp_path, protocol, monkeypatch):
    real_run, _ = scripts
    monkeypatch.setattr(import_module("stepdistill.eval.bench.rows"), "load_view", lambda *_: Shrunk())
    monkeypatch.setattr(real_run, "CAPTIONS", 40)
    monkeypatch.setattr(real_run, "STEPS", (4,))
    TINY[base]().save_pretrained(tmp_path / "teacher")
    work, page = tmp_path / "work", tmp_path / "docs" / "real_results.md"
    page.parent.mkdir()
    places = ["--work", str(work), "--page", str(page), "--data", str(tmp_path / "data"), "--protocols", str(protocol)]
    command = ["--base", base, "--teacher", str(tmp_path / "teacher"), *small(real_run, work), *places]
    assert real_run.main(command) == 0
    text = page.read_text(encoding="utf-8")
    first, second = (student.name for student in real_run.STUDENTS[base])
    assert f"| {first} |" in text and f"| {second} |" in text and "tiny-v1" in text
    assert text.count("Not yet run") == 3 and (tmp_path / "docs" / "real_results" / f"{base}.png").is_file()
    trained = (work / "train.txt").read_text().splitlines()
    measured = (work / "data" / "prompts.txt").read_text().splitlines()
    assert len(trained) == 32 and len(measured) == 8 and not set(trained) & set(measured)


def test_the_hours_cut_the_steps(scripts, tmp_path, monkeypatch, capsys):
    real_run, _ = scripts
    monkeypatch.setattr(real_run, "timed_steps", lambda recipe: (2.0, 0.2))
    monkeypatch.setattr(real_run, "_affordable", lambda *_: 500)
    run = real_run.RealRun("sdxl", 1.0, tmp_path / "work", tmp_path, cpu=True)
    real_run.prepare_captions(run)
    changes = {student.name: [] for student in real_run.STUDENTS["sdxl"]}
    monkeypatch.setattr(real_run, "time", SimpleNamespace(perf_counter=lambda: began + 0.5))
    began = 100.0
    samples, sizes = real_run.decide(run, changes, began)
    # 70 % of an hour, less the moment since its start, for two students at two seconds a step.
    assert samples == 500 and [size.steps for size in sizes] == [629, 629]
    assert [size.updates for size in sizes] == [125, 125]
    assert "expect a worse student than the recipe's" in real_run.costs(run, samples, sizes)
    assert real_run.decide(run, {}, began) == (samples, sizes), "kept for a run that goes on"
    short = real_run.RealRun("sdxl", 0.01, tmp_path / "short", tmp_path, cpu=True)
    real_run.prepare_captions(short)
    with pytest.raises(real_run.InputError, match=r"--hours: expected 0\.\d+ or more"):
        real_run.decide(short, changes, began)


def test_a_machine_without_gpu_is_refused(scripts, tmp_path, capsys, monkeypatch):
    real_run, _ = scripts
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert real_run.main(["--base", "sdxl", "--hours", "1", "--work", str(tmp_path / "work")]) == 2
    assert "--cpu" in capsys.readouterr().err and not (tmp_path / "work").exists()


def test_the_page_is_that_of_the_stored_results(scripts):
    _, real_page = scripts
    assert real_page.PAGE.read_text(encoding="utf-8") == real_page.text(real_page.PAGE.with_suffix(""))
