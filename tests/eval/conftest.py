"""A small protocol with its own reference, a photograph, and a small CLIP with the real tokenizer."""

import json

import matplotlib
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from synthetic import ROWS, Pixels, pictures, reference_file

from stepdistill.eval.features import Classifier
from stepdistill.eval.networks import clip
from stepdistill.eval.protocol import (
    Instruments,
    build_reference,
    load_networks,
    load_protocol,
    load_reference,
    protocol_path,
)


@pytest.fixture
def protocol_file(tmp_path):
    """fashion-v1 with a smaller reference and a classifier of random weights, unpinned, in a folder of its own."""
    torch.manual_seed(0)
    save_file(Classifier().state_dict(), tmp_path / "classifier.safetensors")
    stated = yaml.safe_load(protocol_path("fashion-v1").read_text())
    stated["id"] = "test-v1"
    stated["data"] = None
    stated["measurements"] = str(tmp_path / "measurements.json")
    stated["reference"] |= {"file": str(tmp_path / "reference.safetensors"), "rows": ROWS, "enet_rows": 30}
    stated["reference"]["sha256"] = None
    stated["networks"]["classifier"] |= {"weights": str(tmp_path / "classifier.safetensors"), "sha256": None}
    stated["kid"] |= {"subsets": 4, "size": 20}
    path = tmp_path / "test-v1.yaml"
    path.write_text(yaml.safe_dump(stated, sort_keys=False))
    return path


@pytest.fixture
def instruments(protocol_file):
    protocol = load_protocol(protocol_file)
    networks = load_networks(protocol, ["classifier"]) | {"enet": Pixels()}
    build_reference(*pictures(ROWS + 5, seed=0), reference_file(protocol), protocol=protocol, networks=networks)
    return Instruments(protocol, networks, load_reference(protocol))


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
