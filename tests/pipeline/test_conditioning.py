"""Conditions are the pipeline's own tensors, whichever way they are batched or stored."""

import functools

import pytest
import torch

from pipeline import tiny
from pipeline.toy import toy
from stepdistill.errors import InputError
from stepdistill.pipeline import conditioning
from stepdistill.pipeline.conditioning import class_count, class_names, encode, entries
from stepdistill.pipeline.trace import trace

PROMPTS = ["a red shoe", "rain", "two birds", "", "a bag"]


@functools.cache
def traced(name):
    return trace(getattr(tiny, name)())


@pytest.mark.parametrize(
    ("name", "encoders"),
    [
        ("tiny_dit", ()),
        ("tiny_sd", ("text_encoder",)),
        ("tiny_sd3", ("text_encoder", "text_encoder_2", "text_encoder_3")),
        ("tiny_flux", ("text_encoder", "text_encoder_2")),
    ],
)
def test_the_networks_that_make_conditions_are_known(name, encoders):
    assert traced(name).encoders == encoders


def test_class_conditions():
    result = traced("tiny_dit")
    encoded = encode(result, [3, 0, 7], None)
    assert encoded.labels == ("Dress", "T-shirt", "Sneaker")
    assert encoded.entries == (3, 0, 7)
    assert encoded.cond["class_labels"].tolist() == [3, 0, 7]
    assert encoded.null["class_labels"].tolist() == [1000]


def test_prompt_conditions_are_what_the_pipeline_encodes():
    result = traced("tiny_sd")
    encoded = encode(result, PROMPTS, None)
    cond, null = result.pipeline.encode_prompt(PROMPTS, torch.device("cpu"), 1, True, [""] * len(PROMPTS))
    assert torch.equal(encoded.cond["encoder_hidden_states"], cond)
    assert torch.equal(encoded.null["encoder_hidden_states"], null[:1])
    assert len(encoded) == 5 and encoded.labels == tuple(PROMPTS)


def test_several_encoders():
    result = traced("tiny_sd3")
    encoded = encode(result, PROMPTS[:2], None)
    with torch.no_grad():
        own = result.pipeline.encode_prompt(PROMPTS[:2], None, None, do_classifier_free_guidance=True)
    names = ("encoder_hidden_states", "encoder_hidden_states", "pooled_projections", "pooled_projections")
    for name, side, expected in zip(names, ("cond", "null") * 2, own, strict=True):
        rows = expected if side == "cond" else expected[:1]
        assert torch.equal(getattr(encoded, side)[name], rows), (name, side)


def test_a_pipeline_without_guidance_has_no_null():
    encoded = encode(traced("tiny_flux"), PROMPTS[:2], None)
    assert encoded.null is None
    assert encoded.batch(torch.tensor([1]))[1] is None
    assert not torch.equal(*encoded.cond["pooled_projections"])


@pytest.mark.parametrize("two_calls", [True, False])
def test_both_layouts_of_guidance(two_calls):
    encoded = encode(trace(toy(two_calls=two_calls)), [4, 2], None)
    assert encoded.cond["extra.what"].tolist() == [4, 2]
    assert encoded.null["extra.what"].tolist() == [10]


def test_the_chunk_does_not_matter(monkeypatch):
    whole = encode(traced("tiny_sd"), PROMPTS, None)
    monkeypatch.setattr(conditioning, "CHUNK", 2)
    parts = encode(traced("tiny_sd"), PROMPTS, None)
    name = "encoder_hidden_states"
    assert torch.allclose(whole.cond[name], parts.cond[name], atol=1e-6)
    assert torch.allclose(whole.null[name], parts.null[name], atol=1e-6)


def test_batches():
    encoded = encode(traced("tiny_sd"), PROMPTS, None)
    cond, null = encoded.batch(torch.tensor([4, 0, 4]))
    rows = encoded.cond["encoder_hidden_states"]
    assert torch.equal(cond["encoder_hidden_states"], rows[[4, 0, 4]])
    assert torch.equal(null["encoder_hidden_states"], rows[3:4].expand(3, -1, -1))
    there = encoded.to("meta")
    assert there.batch(torch.tensor([4, 0, 4]))[0]["encoder_hidden_states"].device.type == "meta"
    assert there.cond["encoder_hidden_states"].device.type == "cpu", "the rows stay in the host's memory"


def test_the_cache_gives_the_same_and_spares_the_encoders(tmp_path, monkeypatch):
    result = traced("tiny_sd")
    first, kept = encode(result, PROMPTS, tmp_path), encode(result, PROMPTS)
    (folder,) = tmp_path.iterdir()
    assert set(first.store.index["names"]) == {"cond/encoder_hidden_states", "null/encoder_hidden_states"}
    assert first.store.folder == folder and len(first.null["encoder_hidden_states"]) == 1

    def no_run(*_args, **_options):
        raise AssertionError("the pipeline ran although its conditions are cached")

    monkeypatch.setattr("stepdistill.pipeline.trace.Trace.observe", no_run)
    again = encode(result, PROMPTS, tmp_path)
    assert again.labels == first.labels and again.entries == first.entries
    for side in ("cond", "null"):
        stored, made = (getattr(one, side)["encoder_hidden_states"][:] for one in (again, first))
        assert torch.equal(stored, made) and torch.equal(stored, getattr(kept, side)["encoder_hidden_states"])
    with pytest.raises(AssertionError):
        encode(result, PROMPTS[:2], tmp_path)


def test_other_weights_are_another_cache_file(tmp_path):
    result = trace(tiny.tiny_sd())
    first = encode(result, PROMPTS, tmp_path)
    tiny.redraw(result.pipeline.text_encoder, 99)
    second = encode(result, PROMPTS, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    rows = [one.cond["encoder_hidden_states"][:] for one in (first, second)]
    assert not torch.allclose(*rows)
    # The denoiser's weights have no part in it.
    tiny.redraw(result.pipeline.unet, 99)
    encode(result, PROMPTS, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_classes_have_names():
    result = traced("tiny_dit")
    assert class_names(result) == tiny.CLASSES and class_count(result) == 10
    assert class_count(traced("tiny_sd")) == 0
    pipeline = tiny.tiny_dit()
    pipeline.labels = {}
    assert class_count(trace(pipeline)) == 1000


def test_entries_from_what_a_person_wrote(tmp_path):
    classes, prompts = traced("tiny_dit"), traced("tiny_sd")
    assert entries(classes, "classes") == list(range(10))
    assert entries(classes, ["Bag", "3", 9, "bag"]) == [8, 3, 9, 8]
    assert entries(prompts, ["a", "b"]) == ["a", "b"]
    (tmp_path / "prompts.txt").write_text("a red shoe\n\n  rain \n", encoding="utf-8")
    assert entries(prompts, str(tmp_path / "prompts.txt")) == ["a red shoe", "rain"]


def test_wrong_entries_are_refused():
    classes, prompts = traced("tiny_dit"), traced("tiny_sd")
    for wanted, pipeline, reason in (
        ("classes", prompts, r"expected prompts for this pipeline .--prompt .* found 'classes', the default"),
        ("nowhere.txt", prompts, "no file nowhere.txt"),
        ([], prompts, "found none"),
        (["Sneeker"], classes, "did you mean 'Sneaker'"),
        (["10"], classes, "from 0 to 9"),
    ):
        with pytest.raises(InputError, match=reason):
            entries(pipeline, wanted)
    for wrong, pipeline, reason in (
        ([], classes, "found none"),
        ([10], classes, "from 0 to 9"),
        (["Bag"], classes, "class number"),
        ([3], prompts, "a prompt"),
    ):
        with pytest.raises(InputError, match=reason):
            encode(pipeline, wrong, None)


def test_what_is_drawn_for_every_row_is_kept_for_each_entry(tmp_path):
    """Latents of a picture that are drawn for the conditional rows and again for the unconditional ones."""
    noise = torch.randn(8, generator=torch.Generator().manual_seed(0))
    traced = trace(toy(two_calls=False, bias=lambda _step, count: 0.5 + 0.1 * noise[:count]))
    assert traced.guidance.drawn == {"extra.bias"}
    for cache in (None, tmp_path):
        encoded = encode(traced, [1, 2, 3], cache)
        cond, null = encoded.batch(torch.tensor([0, 2]))
        torch.testing.assert_close(cond["extra.bias"], 0.5 + 0.1 * noise[[0, 2]])
        torch.testing.assert_close(null["extra.bias"], 0.5 + 0.1 * noise[[3, 5]])
        assert null["extra.what"].tolist() == [10, 10]
