"""A small protocol with its own reference, in a folder of its own."""

import pytest
import torch
import yaml
from safetensors.torch import save_file
from synthetic import ROWS, Pixels, pictures, reference_file

from stepdistill.eval.features import Classifier
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
