"""A traced pipeline at another size: what depends on it is recorded again, and sizes that it has not are refused."""

import pytest
import torch

from pipeline import tiny, zoo
from pipeline.real_sizes import REAL_SIZES
from pipeline.zoo import ZOO
from stepdistill.errors import InputError
from stepdistill.pipeline import sizes
from stepdistill.pipeline.call import TraceError
from stepdistill.pipeline.compare import same
from stepdistill.pipeline.conditioning import encode
from stepdistill.pipeline.live import live
from stepdistill.pipeline.sizes import at_size, conditioning_at, multiple, noise_shape, trace_small
from stepdistill.pipeline.trace import trace

PROMPTS = ("a red shoe", "rain on a long street", "cat", "two dogs")
MULTIPLES = {"sdxl": 8, "flux": 4, "pixart-alpha": 8, "z-image": 4}
"""What each of these stand-ins takes as height and width, by its patches or by what its call checks."""


@pytest.mark.parametrize("name", MULTIPLES)
def test_one_step_at_a_size_shows_what_a_whole_trace_of_it_does(name):
    exhibit = ZOO[name]
    pipeline = exhibit.build()
    traced = trace(pipeline, exhibit.arguments)
    sized, whole = at_size(traced, (16, 24)), trace(pipeline, exhibit.arguments | {"height": 16, "width": 24})
    assert sized.latent_shape == whole.latent_shape != traced.latent_shape
    assert (sized.conditioning, sized.arguments) == (whole.conditioning, whole.arguments)
    ours, theirs = sized.denoiser, whole.denoiser
    assert vars(ours.schedule).get("shift") == vars(theirs.schedule).get("shift")
    assert ours.spec.constants.keys() == theirs.spec.constants.keys()
    assert all(same(value, theirs.spec.constants[key]) for key, value in ours.spec.constants.items())


@pytest.mark.parametrize("name", MULTIPLES)
def test_a_size_that_it_has_not_is_refused_with_the_multiples_it_takes(name):
    exhibit = ZOO[name]
    traced = trace(exhibit.build(), exhibit.arguments)
    assert multiple(traced) == MULTIPLES[name]
    with pytest.raises(InputError, match=f"size: .* 18x16 .height x width.*multiples of {MULTIPLES[name]}$"):
        at_size(traced, (18, 16))


def test_a_pipeline_of_one_size_is_refused():
    with pytest.raises(InputError, match=r"train\.sizes: DiTPipeline takes no height and no width"):
        at_size(trace(tiny.tiny_dit()), (16, 16), "train.sizes")


def test_conditions_at_a_size_share_the_prompts_and_differ_in_the_size():
    base = trace(zoo.sdxl())
    sized, conditioning = at_size(base, (16, 24)), encode(base, PROMPTS)
    found, expected = conditioning_at(sized, base, conditioning), encode(sized, PROMPTS)
    for ours, theirs in zip(found.batch(torch.tensor([3, 1])), expected.batch(torch.tensor([3, 1])), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    text = "encoder_hidden_states"
    assert found.cond[text] is conditioning.cond[text]
    times = "added_cond_kwargs.time_ids"
    assert found.cond[times][2].tolist() == [16, 24, 0, 0, 16, 24] != conditioning.cond[times][2].tolist()
    # Where nothing is kept, the encoding of each batch is that of the size.
    later, _ = conditioning_at(sized, base, live(base, PROMPTS)).batch(torch.tensor([3, 1]))
    assert all(same(value, found.batch(torch.tensor([3, 1]))[0][name]) for name, value in later.items())


def calls_at(network, shape: tuple[int, ...]) -> list[int]:
    """Filled with the number of samples of each call with samples of this shape."""
    seen = []

    def count(_module, args, kwargs):
        samples = [one for one in (*args, *kwargs.values()) if torch.is_tensor(one) and one.shape[1:] == shape]
        seen.extend(len(one) for one in samples)

    network.register_forward_pre_hook(count, with_kwargs=True)
    return seen


@pytest.mark.parametrize("teacher", ["stabilityai/stable-diffusion-xl-base-1.0", "black-forest-labs/FLUX.1-dev"])
def test_a_large_pipeline_is_traced_at_a_small_size_and_confirmed_by_one_step_at_its_own(teacher):
    exhibit = REAL_SIZES[teacher]
    pipeline = exhibit.build()
    whole = trace(pipeline, exhibit.arguments)
    large = calls_at(whole.network, whole.latent_shape)
    found = trace_small(pipeline, exhibit.arguments)
    assert large == [1, 1]  # the pipeline's own step, and ours
    assert found.summary() | {"self_test_error": 0} == whole.summary() | {"self_test_error": 0}
    assert (found.guidance.kind, found.arguments) == (whole.guidance.kind, whole.arguments)
    ours, theirs = found.denoiser.spec, whole.denoiser.spec
    assert ours.constants.keys() == theirs.constants.keys()
    assert all(same(value, theirs.constants[key]) for key, value in ours.constants.items())


def test_a_video_is_traced_with_few_frames():
    pipeline, arguments = ZOO["wan"].build(), {"num_frames": 33, "height": 64, "width": 64}
    whole, found = trace(pipeline, arguments), trace_small(pipeline, arguments)
    assert noise_shape(pipeline, PROMPTS[:1], arguments, 1)[1:] == whole.latent_shape
    assert found.summary() | {"self_test_error": 0} == whole.summary() | {"self_test_error": 0}
    assert found.arguments == arguments


def test_where_no_small_size_serves_the_own_one_is_traced(monkeypatch):
    exhibit = ZOO["sdxl"]
    pipeline = exhibit.build()
    monkeypatch.setattr(sizes, "LARGE", 10)
    monkeypatch.setattr(sizes, "SMALL_SIZES", ((17, 19),))
    found, whole = trace_small(pipeline, exhibit.arguments), trace(pipeline, exhibit.arguments)
    assert found.summary() == whole.summary()


def test_what_is_refused_is_not_traced_at_every_small_size(monkeypatch):
    exhibit, sizes_tried = ZOO["sdxl"], []

    def refused(_pipeline, arguments):
        sizes_tried.append(arguments.get("height"))
        raise TraceError("guidance", "three passes")

    monkeypatch.setattr(sizes, "LARGE", 10)
    monkeypatch.setattr(sizes, "trace", refused)
    with pytest.raises(TraceError, match="three passes"):
        trace_small(exhibit.build(), {})
    assert sizes_tried == [64, None]
