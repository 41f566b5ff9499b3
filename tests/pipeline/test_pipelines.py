"""Every pipeline of the zoo goes all the way: traced, distilled with all weights and as LoRA, exported, sampled.

What was found is the table of docs/pipelines.md.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.no_preview import NoPreview
from pipeline.zoo import ZOO, Exhibit
from stepdistill.pipeline import stock_call
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.pipeline.trace import Trace, trace
from stepdistill.run import train

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "pipelines.md"
PROMPTS = ["a red shoe", "two birds on a wire"]
CHECKED = 2
METHODS: dict[str, dict[str, Any]] = {
    "full": {"name": "dmd2", "critic_steps": 1},  # multistep consistency sampling
    "lora": {"name": "sfd", "substeps": 2},  # DDIM, Euler on flows
}
FOUND: dict[str, str] = {}


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[torch.Tensor]:
    """The images of each export's stock call, which is made in this process: a new one takes longer than the rest."""
    images = []

    def call_here(request: dict[str, Any]) -> dict[str, torch.Tensor]:
        asked, answered = tmp_path / "request.json", tmp_path / "result.safetensors"
        asked.write_text(json.dumps(request), encoding="utf-8")
        stock_call.main(str(asked), str(answered))
        result = load_file(answered)
        images.append(result["images"])
        return result

    monkeypatch.setattr("stepdistill.exporting.check.call_elsewhere", call_here)
    monkeypatch.setattr("stepdistill.exporting.check.CHECKED", CHECKED)
    monkeypatch.setattr("stepdistill.training.between_steps.Preview", NoPreview)
    return images


def recipe(exhibit: Exhibit, entry: str, folder: Path, how: str) -> dict[str, Any]:
    return {
        "teacher": {
            "pipeline": str(folder / "teacher"),
            "guidance": {"scale": exhibit.guidance},
            "arguments": exhibit.arguments,
        },
        "student": {"steps": 2, "train": how, "rank": 2},
        "data": {"conditions": PROMPTS if entry == "prompt" else "classes"},
        "method": METHODS["full" if exhibit.only_renoise else how],
        "train": {"steps": 2, "batch_size": 2, "lr": 1e-3, "preview_every": 100, "log_every": 1, "tracker": "none"},
        "report": {"samples": 0},
        "output": str(folder / how),
    }


@pytest.mark.parametrize("name", ZOO)
def test_from_pipeline_to_pipeline(name, tmp_path, sampled, monkeypatch):
    exhibit = ZOO[name]
    pipeline = exhibit.build()
    traced = trace(pipeline, exhibit.arguments)
    assert traced.self_test_error <= 1e-5
    cells = [exhibit.title, *described(traced), "yes"]
    save_pipeline(pipeline, tmp_path / "teacher")
    for how in METHODS:
        run = train(recipe(exhibit, traced.entry, tmp_path, how))
        logged = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        assert run.step == 2 and max(line["student/grad_norm"] for line in logged) > 0
        form = json.loads((run.folder / "export" / "stepdistill.json").read_text())["form"]
        cells.append({"full": "yes", "lora": f"yes, out as a {'LoRA' if form == 'lora' else 'whole pipeline'}"}[how])
        # To ask the teacher once is enough.
        monkeypatch.setattr("stepdistill.run.check_conventions", lambda _session: None)
    assert len(sampled) == 2
    for images in sampled:
        assert len(images) == CHECKED and images.isfinite().all() and images.std() > 0
    FOUND[name] = "| " + " | ".join([*cells, "yes", "yes", "yes"]) + " |"


@pytest.mark.parametrize("method", [{"name": "w-embed"}, {"name": "gft"}, {"name": "lcm", "w_min": 1.0, "w_max": 3.0}])
def test_a_scale_is_learned_beside_sizes(method, tmp_path, sampled):
    """PixArt-Alpha of 1024 px embeds height and width, two rows a sample, by the class that embeds the time."""
    exhibit = ZOO["pixart-alpha"]
    save_pipeline(exhibit.build(), tmp_path / "teacher")
    real = {"real": "teacher", "real_rows": 2, "real_steps": 2}
    run = train(recipe(exhibit, "prompt", tmp_path, "full") | {"method": method | real})
    logged = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert run.step == 2 and max(line["student/grad_norm"] for line in logged) > 0
    assert sampled[0].isfinite().all()


def described(traced: Trace) -> list[str]:
    """The class, what the network emits, and how the pipeline guides."""
    spec, guidance = traced.denoiser.spec, traced.guidance
    output = {"identity": "", "negated": ", negated", "first_half": ", beside a variance"}[spec.output]
    ways = {"none": "none", "batched": "doubled batch", "two_calls": "two calls", "embedded": "an input of the network"}
    rule = ", w = scale + 1" if guidance.shift else ", keeps the norm" if spec.norm_axis else ""
    return [f"`{type(traced.pipeline).__name__}`", traced.denoiser.kind + output, ways[guidance.kind] + rule]


def test_the_page_shows_what_was_found():
    table = PAGE.read_text(encoding="utf-8").partition("\n\n| pipeline |")[2].partition("\n\n")[0]
    rows = table.splitlines()[2:]
    listed = {row.split(" | ")[0].removeprefix("| "): row for row in rows}
    assert list(listed) == [exhibit.title for exhibit in ZOO.values()]
    for name, row in FOUND.items():
        assert listed[ZOO[name].title] == row
