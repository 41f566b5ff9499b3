"""A small protocol with its own reference, a photograph, and a small CLIP with the real tokenizer."""

import json

import matplotlib
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from synthetic import ROWS, Pixels, pictures

from stepdistill.eval.features import Classifier
from stepdistill.eval.measure import load_view
from stepdistill.eval.networks import clip
from stepdistill.eval.protocol import load_protocol, protocol_path
from stepdistill.eval.references import build_reference, class_statistics


@pytest.fixture
def protocol_file(tmp_path):
    """fashion-v1 with a smaller reference and a classifier of random weights, unpinned, in a folder of its own."""
    torch.manual_seed(0)
    save_file(Classifier().state_dict(), tmp_path / "classifier.safetensors")
    stated = yaml.safe_load(protocol_path("fashion-v1").read_text())
    del stated["images"], stated["key"]
    stated |= {"id": "test-v1", "measurements": str(tmp_path / "measurements.json")}
    stated["reference"] |= {"file": str(tmp_path / "reference.safetensors"), "count": ROWS, "kept": {"enet": 30}}
    stated["reference"]["sha256"] = None
    stated["views"]["classifier"]["weights"] = {"file": str(tmp_path / "classifier.safetensors"), "sha256": None}
    stated["kid"] |= {"subsets": 4, "size": 20}
    path = tmp_path / "test-v1.yaml"
    path.write_text(yaml.safe_dump(stated, sort_keys=False))
    return path


@pytest.fixture
def instruments(protocol_file, tmp_path):
    """(the small protocol, its networks, what they see in its reference)."""
    protocol = load_protocol(protocol_file)
    networks = {"classifier": load_view(protocol.views["classifier"], tmp_path, "cpu"), "enet": Pixels()}
    out = protocol.reference.path()
    build_reference(*pictures(ROWS + 5, seed=0), out, protocol=protocol, networks=networks)
    return protocol, networks, {name: class_statistics(protocol.reference, name) for name in networks}


@pytest.fixture(scope="session")
def photo():
    """A real photograph, uint8 (3, 600, 512)."""
    path = f"{matplotlib.get_data_path()}/sample_data/grace_hopper.jpg"
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    path = tmp_path_factory.mktemp("clip") / "tiny-test.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(path)
    torch.manual_seed(0)
    return clip("tiny-test", None, prefix="A photo depicts ", crop="lanczos-64")
