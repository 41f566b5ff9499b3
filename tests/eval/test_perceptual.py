"""LPIPS and preference scores, with random weights, against what their libraries give by hand."""

import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from stepdistill.errors import InputError
from stepdistill.eval.perceptual import (
    ALSO,
    Lpips,
    also_files,
    also_labels,
    check_also,
    hpsv2,
    image_reward,
    load_also,
    lpips_diversity,
    pick_score,
)

PROMPTS = ["an officer in uniform", "a cat"]


@pytest.fixture(scope="module")
def distance():
    pytest.importorskip("lpips")
    torch.manual_seed(0)
    return Lpips(None)


@pytest.fixture(scope="module")
def wide(photo):
    """Two images that are wider than high."""
    return torch.stack([photo[:, :200, :300], photo[:, 300:500, 100:400]])


def test_lpips_diversity_is_the_mean_over_pairs(distance, photo):
    images = torch.stack([photo[:, i : i + 64, 200:264] for i in (0, 100, 100)])
    scaled = images.float() / 127.5 - 1
    by_hand = [float(distance.network(scaled[i : i + 1], scaled[j : j + 1])) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert float(lpips_diversity(distance, images)) == pytest.approx(sum(by_hand) / 3, rel=1e-5)
    assert by_hand[0] > 0 and float(distance(images[1:2], images[2:3])) == 0.0
    grey = images[:2, :1, :32, :32]
    assert distance(grey, grey.flip(0)).shape == (2,)


def test_the_trunk_of_lpips_is_torchvisions_alexnet(distance, tmp_path):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(1)
    alexnet = models.alexnet()
    torch.save(alexnet.state_dict(), tmp_path / "alexnet.pth")
    stages = Lpips(tmp_path / "alexnet.pth").network.net
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(stages(x).relu5, alexnet.features[:12](x))
    with pytest.raises(InputError, match="does not exist"):
        load_also("lpips", tmp_path, "cpu")


def test_hpsv2_is_a_hundred_cosines_on_padded_squares(tiny_clip, wide, tmp_path):
    torch.save({"state_dict": tiny_clip.model.state_dict()}, tmp_path / "hps.pt")
    found = hpsv2(tmp_path / "hps.pt", arch="tiny-test")(wide, PROMPTS)
    open_clip = sys.modules["open_clip"]
    to_input = open_clip.image_transform(32, is_train=False)
    pixels = []
    for image in wide:
        square = Image.new("RGB", (32, 32))
        small = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((32, 21), Image.Resampling.BICUBIC)
        square.paste(small, (0, 5))
        pixels.append(to_input(square))
    with torch.no_grad():
        image, text, _ = tiny_clip.model(torch.stack(pixels), open_clip.tokenize(PROMPTS))
    assert found == pytest.approx(100 * (image * text).sum(1), abs=1e-2)
    assert found != pytest.approx(100 * (image * text.flip(0)).sum(1), abs=1.0)
    with pytest.raises(InputError, match=r"does not fit tiny-test"):
        torch.save({"state_dict": {"x": torch.zeros(1)}}, tmp_path / "other.pt")
        hpsv2(tmp_path / "other.pt", arch="tiny-test")


def test_pick_score_is_the_models_own_logit(wide, tmp_path):
    pytest.importorskip("open_clip")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=small | {"vocab_size": 49408}, vision_config=small | {"image_size": 32, "patch_size": 16}
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path / "pick")
    open_clip = sys.modules["open_clip"]
    transform = open_clip.image_transform(32, is_train=False)
    pixels = torch.stack([transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in wide])
    with torch.no_grad():
        output = model(input_ids=open_clip.tokenize(PROMPTS), pixel_values=pixels)
    cosines = F.cosine_similarity(output.image_embeds, output.text_embeds)
    found = pick_score(tmp_path / "pick")(wide, PROMPTS)
    assert found == pytest.approx(model.logit_scale.exp().detach() * cosines, rel=1e-4)
    assert float((found[0] - found[1]).abs()) > 1e-3
    with pytest.raises(InputError, match=r"nowhere: expected config\.json and model\.safetensors"):
        pick_score(tmp_path / "nowhere")


def test_image_reward_scores_a_picture_for_its_prompt_with_local_files_alone(wide, tmp_path, monkeypatch, capsys):
    """The package needs old ones of others: a module of its form stands for it."""
    loaded = {}

    class Model:
        def score(self, prompt, picture):
            return len(prompt) + picture.width / 1000

    def load(name, device, med_config):
        print("load checkpoint")
        names = sorted(path.name for path in Path("bert-base-uncased").iterdir())
        loaded.update(name=name, device=device, med_config=med_config, tokenizer=names)
        return Model()

    (tmp_path / "bert-base-uncased").mkdir()
    (tmp_path / "bert-base-uncased" / "vocab.txt").write_text("a")
    monkeypatch.setitem(sys.modules, "ImageReward", types.SimpleNamespace(load=load))
    score = image_reward(tmp_path / "w.pt", tmp_path / "med.json", tmp_path / "bert-base-uncased")
    assert loaded == {
        "name": str(tmp_path / "w.pt"),
        "device": "cpu",
        "med_config": str(tmp_path / "med.json"),
        "tokenizer": ["vocab.txt"],
    }
    assert score(wide, PROMPTS).tolist() == pytest.approx([21.3, 5.3])
    assert capsys.readouterr().out == ""


def test_a_name_that_does_not_exist_and_a_package_that_is_absent(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="also: expected some of lpips, imagereward, hpsv2, pickscore, found 'beauty'"):
        check_also(["lpips", "beauty"])
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    with pytest.raises(InputError, match="ImageReward: needs the package image-reward: pip install image-reward"):
        load_also("imagereward", tmp_path, "cpu")
    assert set(also_labels(ALSO)) == {"lpips_diversity", "lpips_teacher", "image_reward", "hpsv2", "pick_score"}
    assert all(spec.url or spec.hub for spec in also_files(ALSO))
