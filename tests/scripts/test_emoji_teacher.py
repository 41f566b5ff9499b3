"""The scripts that make the emoji teacher: what goes into which split, and two updates of everything end to end."""

import importlib
import io
import json
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

SCRIPTS = Path(__file__).parents[2] / "scripts"
CODES = {"1f430": "rabbit face", "1f431": "cat face", "2764-fe0f": "red heart", "1f1ee-1f1f9": "flag of italy"}


@pytest.fixture(scope="module")
def scripts():
    """The two scripts as modules."""
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("emoji_data"), importlib.import_module("train_emoji_teacher")
    sys.path.remove(str(SCRIPTS))


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


@pytest.fixture
def packages(scripts, tmp_path) -> Path:
    """Archives like the npm packages', with four emoji, one of a skin tone and a catalogue."""
    catalogue = [
        {"unified": code.upper(), "short_names": ["bunny" if code == "1f430" else "x"], "category": "Any"}
        | {"subcategory": "country-flag" if "1f1ee" in code else "any"}
        for code in CODES
    ]
    random = np.random.default_rng(0)
    for archive, folder in scripts[0].PACKAGES.values():
        with tarfile.open(tmp_path / archive, "w:gz") as tar:
            add(tar, "package/emoji.json", json.dumps(catalogue).encode())
            for code in (*CODES, "1f44b-1f3fd"):
                file = io.BytesIO()
                Image.fromarray(random.integers(0, 255, (72, 72, 4), dtype=np.uint8)).save(file, "PNG")
                add(tar, f"{folder}{code}.png", file.getvalue())
    return tmp_path


def test_genders_stay_together_and_a_concept_is_held_out_for_good(scripts):
    data = scripts[0]
    names = [f"{who} {work}" for who in ("man", "woman", "person") for work in map(str, range(400))]
    found = {name: [data.split(name, style) for style in data.PACKAGES] for name in names}
    assert all(found[f"man {i}"] == found[f"woman {i}"] == found[f"person {i}"] for i in range(400))
    assert {"concepts"} in map(set, found.values()) and {"train"} in map(set, found.values())
    assert all("concepts" not in splits or set(splits) == {"concepts"} for splits in found.values())
    assert max(splits.count("styles") for splits in found.values()) == 1
    # 5 % and 10 % of the rest, of 400 concepts.
    assert 8 < sum("concepts" in splits for splits in found.values()) / 3 < 35
    assert 20 < sum("styles" in splits for splits in found.values()) / 3 < 60
    assert data.split("woman", "flat") in ("train", "styles", "concepts")


def test_from_packages_to_a_pipeline_that_draws(scripts, packages, monkeypatch, capsys):
    data, teacher = scripts
    out, work = packages / "emoji", packages / "work"
    monkeypatch.setattr(data, "split", lambda name, style: "concepts" if "cat" in name else "train")
    monkeypatch.setattr(sys, "argv", ["emoji_data.py", "--packages", str(packages), "--out", str(out)])
    data.main()
    assert "train: 9 pictures" in capsys.readouterr().out
    images, facts = teacher.read(out, "train")
    assert images.shape == (9, 3, 64, 64) and images.dtype == torch.uint8
    assert {one["concept"] for one in facts} == {"rabbit face", "red heart", "flag of italy"}
    rabbit = facts[[one["concept"] for one in facts].index("rabbit face")]
    assert (rabbit["caption"], rabbit["others"]) == ("flat emoji of rabbit face", ["flat emoji of bunny"])
    assert (out / rabbit["image"]).with_suffix(".txt").read_text() == rabbit["caption"]
    options = ["--data", str(out), "--work", str(work), "--out", str(packages / "teacher")]
    options += ["--prompts", str(packages / "prompts.txt"), "--device", "cpu"]
    options += ["--vae-steps", "2", "--decoder-steps", "2", "--denoiser-steps", "2", "--batch", "2"]
    monkeypatch.setattr(
        sys, "argv", ["train_emoji_teacher.py", "vae", "decoder", "denoiser", "unseen", "pack", *options]
    )
    teacher.main()
    told = re.findall(r"unseen: (\w+): loss (\d\.\d+) over (\d+) pictures", capsys.readouterr().out)
    assert [(split, count) for split, _, count in told] == [("train", "9"), ("concepts", "3")]
    assert all(0.1 < float(loss) < 5 for _, loss, _ in told)
    pipe = StableDiffusionPipeline.from_pretrained(packages / "teacher")
    pipe.set_progress_bar_config(disable=True)
    draw = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "np"}
    first, second = (
        pipe(f"flat emoji of {name}", generator=torch.Generator().manual_seed(0), **draw).images
        for name in ("rabbit face", "bunny")
    )
    assert first.shape == (1, 64, 64, 3) and not np.array_equal(first, second)
    assert {"flat", "bunny", "italy"} <= set((packages / "teacher" / "vocabulary.txt").read_text().split())
    ids = pipe.tokenizer("flat emoji of rabbit face").input_ids
    assert len(ids) == 7 and ids[-1] == pipe.text_encoder.config.eos_token_id
    assert load_latents(work).std(dim=(0, 2, 3)).allclose(torch.ones(16), atol=0.05)

    monkeypatch.setattr(teacher, "new_tokenizer", None)  # another one would give the words other numbers
    packed = [packages / "teacher" / part for part in ("unet", "text_encoder", "vae")]
    packed = [next(folder.glob("*.safetensors")) for folder in packed]
    for steps, same in ((2, [True, True, True]), (3, [False, False, True])):
        before = [file.read_bytes() for file in packed]
        options[options.index("--work") + 1] = str(packages / f"to-{steps}")
        options[options.index("--denoiser-steps") + 1] = str(steps)
        stages = ["unpack", "vae", "denoiser", "pack", "--start", "2"]
        monkeypatch.setattr(sys, "argv", ["train_emoji_teacher.py", *stages, *options])
        teacher.main()
        assert [file.read_bytes() == old for file, old in zip(packed, before, strict=True)] == same


def load_latents(work: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(work / "latents.safetensors")["latents"]


@pytest.mark.parametrize("shape", [(6, 6), (4, 12), (12, 4), (5, 3, 2, 2)])
def test_orthogonal_takes_five_newton_schulz_steps(scripts, shape):
    training = importlib.import_module("teacher_training")
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(gradient.flatten(1).double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):  # the odd polynomial works on each singular value by itself
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(
        training.orthogonal(gradient).double(), (left * values @ right).reshape(shape), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("muon", [False, True])
def test_a_stopped_training_goes_on_where_it_was(scripts, tmp_path, monkeypatch, muon):
    training = importlib.import_module("teacher_training")
    monkeypatch.setattr(training, "SAVE_EVERY", 0)

    def run(folder: Path, stop: int) -> torch.Tensor:
        parameters = {"w": torch.nn.Parameter(torch.ones(3, 2)), "conv_in.w": torch.nn.Parameter(torch.ones(2, 2))}
        optimizer = training.Muon(parameters, ("conv_in",)) if muon else torch.optim.AdamW(parameters.values())
        averaged = training.Averaged(parameters, optimizer, decay=0.9)

        def loss(step: int, generator: torch.Generator) -> torch.Tensor:
            if step == stop:
                raise KeyboardInterrupt
            return sum((p * torch.randn(p.shape, generator=generator)).square().sum() for p in parameters.values())

        folder.mkdir(exist_ok=True)
        try:
            training.train("any", averaged, loss, 6, 1e-2, folder)
        except KeyboardInterrupt:
            return run(folder, -1)
        return torch.cat([p.detach() for p in (*parameters.values(), *averaged.average.values())])

    assert torch.equal(run(tmp_path / "whole", -1), run(tmp_path / "parts", 4))


def test_hidden_weights_move_by_orthogonal_matrices_and_the_rest_as_under_adamw(scripts):
    training = importlib.import_module("teacher_training")
    torch.manual_seed(0)
    weights = {"kernel": torch.randn(8, 2, 3, 3), "embedding.w": torch.randn(4, 4), "bias": torch.randn(4)}
    parameters = {name: torch.nn.Parameter(value.clone()) for name, value in weights.items()}
    plain = {name: torch.nn.Parameter(value.clone()) for name, value in weights.items()}
    muon = training.Muon(parameters, ("embedding",), lr=0.1, weight_decay=0.0)
    adamw = torch.optim.AdamW(plain.values(), lr=0.1, weight_decay=0.0)
    for name, value in weights.items():
        parameters[name].grad, plain[name].grad = value.cos(), value.cos()
    muon.step()
    adamw.step()
    moved = (weights["kernel"] - parameters["kernel"].detach()).flatten(1) / (0.1 * 0.2 * 18**0.5)
    # Newton-Schulz with these coefficients stops between 0.7 and 1.2.
    stretched = torch.linalg.svdvals(moved)
    assert stretched.min() > 0.6 and stretched.max() < 1.3
    assert (moved * weights["kernel"].cos().flatten(1)).sum() > 0
    assert not torch.equal(parameters["kernel"], plain["kernel"])
    assert all(torch.equal(parameters[name], plain[name]) for name in ("embedding.w", "bias"))


def test_captions_lose_their_style_or_everything_now_and_then(scripts):
    _, teacher = scripts
    facts = [{"caption": "flat emoji of bunny", "others": []}]
    texts = ["flat emoji of bunny", "bunny", ""]
    captions = teacher.Captions(facts, teacher.new_tokenizer(texts))
    drawn = captions.draw(torch.zeros(2000, dtype=torch.long), seed=0)
    shares = [(drawn == captions.ids[text]).all(1).float().mean().item() for text in texts]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.03)
