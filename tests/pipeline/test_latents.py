"""Images become latents that the pipeline's own decoding takes back, however it packs and scales them."""

import functools

import pytest
import torch
from diffusers import AutoencoderTiny

from pipeline.real_sizes import REAL_SIZES
from pipeline.tiny import redraw, tiny_sd
from pipeline.zoo import ZOO
from stepdistill.errors import InputError
from stepdistill.pipeline.components import patched
from stepdistill.pipeline.decode import decode
from stepdistill.pipeline.latents import decoder, encode_images, image_shape
from stepdistill.pipeline.layout import layout
from stepdistill.pipeline.sizes import trace_small
from stepdistill.pipeline.trace import trace


@pytest.mark.parametrize("name", ["sd", "flux", "qwen-image", "sana", "wan"])
def test_layouts(name):
    """One z is made of the latents: by the autoencoder's decoding of it, and back through its inverse."""
    traced = trace(ZOO[name].build(), ZOO[name].arguments)
    own = layout(traced)
    latents = torch.randn(2, *traced.latent_shape)
    torch.testing.assert_close(own.from_z(own.to_z(latents), traced.latent_shape), latents, rtol=1e-5, atol=1e-5)
    pixels = decoder(traced)(latents).detach()
    expected = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round()
    assert (decode(traced, latents).float() - expected).abs().max() <= 1
    if name == "wan":
        with pytest.raises(InputError, match="of one image"):
            encode_images(traced, torch.zeros(1, *_image(traced), dtype=torch.uint8))
        return
    images = torch.randint(0, 256, (3, *_image(traced)), dtype=torch.uint8)
    encoded = encode_images(traced, images)
    assert encoded.shape == (3, *traced.latent_shape)
    vae = traced.pipeline.vae
    with torch.no_grad():
        pixels = images / 127.5 - 1
        posterior = vae.encode(pixels.unsqueeze(2) if name == "qwen-image" else pixels)
    z = posterior.latent if name == "sana" else posterior.latent_dist.mean
    torch.testing.assert_close(own.to_z(encoded), z, rtol=1e-4, atol=1e-4)


def test_latents_of_the_tiny_autoencoder():
    """TAESD names what it makes of an image otherwise than every other autoencoder."""
    pipeline = tiny_sd()
    small = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    pipeline.register_modules(vae=redraw(AutoencoderTiny(**small, **blocks), 1))
    traced = trace(pipeline)
    images = torch.randint(0, 256, (3, *_image(traced)), dtype=torch.uint8)
    with torch.no_grad():
        expected = pipeline.vae.encode(images / 127.5 - 1).latents
    torch.testing.assert_close(layout(traced).to_z(encode_images(traced, images)), expected, rtol=1e-4, atol=1e-4)


def _image(traced) -> tuple[int, int, int]:
    channels, side = image_shape(traced)
    return channels, side, side


@pytest.mark.parametrize("teacher", REAL_SIZES)
def test_layouts_of_real_sizes(teacher):
    """Latents of real height and width are decoded in small batches; every probe is seen all the same."""
    exhibit = REAL_SIZES[teacher]
    traced = trace_small(exhibit.build(), exhibit.arguments)
    assert "x".join(map(str, traced.latent_shape)) == exhibit.title
    own, latents = layout(traced), torch.randn(1, *traced.latent_shape)
    torch.testing.assert_close(own.from_z(own.to_z(latents), traced.latent_shape), latents, rtol=1e-5, atol=1e-5)
    pixels = ((decoder(traced)(latents).detach() / 2 + 0.5).clamp(0, 1) * 255).round()
    assert (decode(traced, latents).float() - pixels).abs().max() <= 1
    images = torch.zeros(1, *_image(traced), dtype=torch.uint8)
    assert encode_images(traced, images).shape == (1, *traced.latent_shape)


def test_a_pipeline_that_decodes_image_by_image(monkeypatch):
    """The probes that are not in its first call of the autoencoder come in the next ones."""
    traced = trace(ZOO["sd"].build())
    expected, network = layout(traced), type(traced.pipeline)
    whole = network.__call__

    @functools.wraps(whole)
    def sliced(pipeline, *args, **kwargs):
        decoding = pipeline.vae.decode
        with patched(
            pipeline.vae,
            "decode",
            lambda z, **options: [torch.cat([decoding(row, **options)[0] for row in z.split(1)])],
        ):
            return whole(pipeline, *args, **kwargs)

    monkeypatch.setattr(network, "__call__", sliced)
    assert torch.equal(layout(traced).order, expected.order)


def test_pictures_of_a_pipeline_that_makes_arrays_alone(monkeypatch):
    """T2I adapters do, whatever ``output_type`` is."""
    traced = trace(tiny_sd())
    latents, whole = torch.randn(2, *traced.latent_shape), type(traced.pipeline).__call__
    expected = decode(traced, latents)

    @functools.wraps(whole)
    def arrays(pipeline, *args, **kwargs):
        return tuple(one.movedim(1, -1).numpy() for one in whole(pipeline, *args, **kwargs)[:1])

    monkeypatch.setattr(type(traced.pipeline), "__call__", arrays)
    assert torch.equal(decode(traced, latents), expected)


def test_a_decoder_that_fails_says_why():
    """Allegro's decodes in tiles alone, which have to be switched on."""
    traced = trace(tiny_sd())

    def decode_tiles(*_args, **_kwargs):
        raise NotImplementedError("Decoding without tiling has not been implemented yet.")

    with patched(traced.pipeline.vae, "decode", decode_tiles), pytest.raises(InputError, match="step: Decoding with"):
        decode(traced, torch.zeros(1, *traced.latent_shape))


def test_a_decoder_has_a_graph():
    traced = trace(ZOO["flux"].build(), ZOO["flux"].arguments)
    latents = torch.randn(1, *traced.latent_shape, requires_grad=True)
    decoder(traced)(latents).square().sum().backward()
    assert latents.grad.abs().max() > 0


def test_a_pipeline_without_autoencoder():
    traced = trace(ZOO["ddpm"].build())
    assert decoder(traced) is None and image_shape(traced) == (3, 8)
    with pytest.raises(InputError, match="no autoencoder"):
        encode_images(traced, torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
