"""Encoders whose work is done take no memory, and answer all the same."""

import pytest
import torch

from pipeline import tiny
from stepdistill.pipeline import encoders
from stepdistill.pipeline.decode import decode
from stepdistill.pipeline.encoders import release_encoders
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.pipeline.load import load_pipeline
from stepdistill.pipeline.trace import Trace, trace

CPU = torch.device("cpu")


@pytest.fixture
def traced(tmp_path) -> Trace:
    save_pipeline(tiny.tiny_sd3(), tmp_path)
    return trace(load_pipeline(tmp_path))


def test_released_encoders_are_read_again_for_a_call_and_remember_its_answer(traced, monkeypatch):
    latents = torch.randn(2, *traced.latent_shape, generator=torch.Generator().manual_seed(0))
    images, reads = decode(traced, latents), []
    networks = [getattr(traced.pipeline, name) for name in traced.encoders]
    with torch.no_grad():
        before = [network(torch.tensor([[0, 5, 6, 1]]), output_hidden_states=True) for network in networks]
    load = encoders.load_network
    monkeypatch.setattr(encoders, "load_network", lambda *given: reads.append(given[1].name) or load(*given))
    release_encoders(traced, CPU)
    held = {weight.untyped_storage().nbytes() for network in networks for weight in network.parameters()}
    assert held == {4} and {network.device for network in networks} == {CPU}
    for _ in range(2):
        after = [network(torch.tensor([[0, 5, 6, 1]]), output_hidden_states=True) for network in networks]
        assert [type(one) for one in after] == [type(one) for one in before]
        assert all(torch.equal(a[0], b[0]) for a, b in zip(after, before, strict=True))
        assert torch.equal(decode(traced, latents), images)
    assert sorted(reads) == sorted(2 * list(traced.encoders))


@pytest.mark.parametrize("files", [True, False])
def test_answers_go_where_the_pipeline_is(traced, files):
    """A device without data stands for the accelerator; without files the encoders stay in the host's memory."""
    if not files:
        del traced.pipeline.loaded_from
    release_encoders(traced, torch.device("meta"))
    for network in [getattr(traced.pipeline, name) for name in traced.encoders]:
        found = network(torch.tensor([[0, 5, 6, 1]]), output_hidden_states=True)
        assert found[0].device == found.hidden_states[-1].device == torch.device("meta")
        assert network.device == CPU and all(weight.nbytes > 4 for weight in network.parameters())


@pytest.mark.gpu
def test_released_encoders_decode_as_before(traced):
    traced.pipeline.to("cuda")
    latents = torch.randn(2, *traced.latent_shape, generator=torch.Generator().manual_seed(0))
    images = decode(traced, latents)
    release_encoders(traced, torch.device("cuda"))
    assert torch.equal(decode(traced, latents), images)
