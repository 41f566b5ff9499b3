"""Preprocessing and feature networks against the libraries whose numbers people publish, with random weights."""

import importlib.util
import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from stepdistill.errors import InputError
from stepdistill.eval.metrics import Moments, clip_score, frechet_distance
from stepdistill.eval.networks import Dino, clip, dino, feature_pass, inception, required
from stepdistill.eval.preprocess import crop, resize_clean, resize_tf1


def needs(module):
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed")


@pytest.fixture(scope="session")
def images(photo):
    """Real cut-outs and noise of three sizes, larger and smaller than 299 px."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (3, 40, 32), generator=generator, dtype=torch.uint8)
    return [photo, photo[:, 100:364, 50:314], noise]


def redrawn(network, seed=0):
    """Weights that keep activations of order one: stock ones let them fade through a hundred layers."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        fresh = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            parameter.copy_(fresh * math.sqrt(2 / parameter[0].numel()) if parameter.ndim > 1 else 1 + 0.1 * fresh)
    return network


@pytest.fixture(scope="session")
def tf1_inception():
    pytest.importorskip("torch_fidelity")
    made = inception(None, resize="tf1")
    redrawn(made.network)
    return made


@pytest.fixture(scope="session")
def tf1_rows(tf1_inception, images):
    return feature_pass(tf1_inception, images, batch=2)


def pattern(height, width):
    """A deterministic uint8 image with edges, ramps and saturated spots."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([(37 * x + 11 * y) % 256, 255 * ((x // 3 + y // 5) % 2), (x * y) % 256]).to(torch.uint8)


# clean-fid 0.1.35, build_resizer("clean") on pattern(40, 32) and pattern(400, 320): [channel, row, column] at
# (0, 0, 0), (1, 150, 77), (2, 298, 298), (0, 20, 250), (1, 33, 44), (2, 99, 201).
CLEAN_VECTORS = {
    (40, 32): [0.0, 80.01377, 193.41962, 223.50096, 255.0, 48.49503],
    (400, 320): [3.69155, 255.0, 104.33297, 227.72211, 155.66574, 189.34856],
}


@pytest.mark.parametrize("size", [(40, 32), (400, 320)])
def test_clean_resize_has_the_values_of_clean_fid(size):
    places = [(0, 0, 0), (1, 150, 77), (2, 298, 298), (0, 20, 250), (1, 33, 44), (2, 99, 201)]
    ours = resize_clean(pattern(*size), 299)
    assert [float(ours[place]) for place in places] == pytest.approx(CLEAN_VECTORS[size], rel=1e-6)


@needs("cleanfid")
@pytest.mark.filterwarnings("ignore")
def test_clean_resize_is_clean_fids_on_real_and_random_images(images):
    from cleanfid.resize import build_resizer

    for image in images:
        theirs = build_resizer("clean")(image.permute(1, 2, 0).numpy())
        assert torch.equal(resize_clean(image, 299), torch.from_numpy(theirs).permute(2, 0, 1))


@needs("torch_fidelity")
def test_tf1_resize_is_torch_fidelitys_on_real_and_random_images(images):
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as reference

    for image in images:
        theirs = reference(image[None].float(), size=(299, 299), align_corners=False)[0]
        assert (resize_tf1(image, 299) - theirs).abs().max() < 1e-3
    assert torch.equal(resize_tf1(images[0][:, :299, :299], 299), images[0][:, :299, :299].float())


def test_the_two_resizes_differ_where_an_image_shrinks(photo):
    assert (resize_clean(photo, 299) - resize_tf1(photo, 299)).abs().mean() > 1


def test_crops_are_the_middle_and_lanczos_is_pils(photo):
    assert torch.equal(crop(photo, "centre-299"), photo[:, 150:449, 106:405])
    square = Image.fromarray(photo[:, 44:556].permute(1, 2, 0).contiguous().numpy())
    expected = np.array(square.resize((256, 256), Image.Resampling.LANCZOS))
    assert torch.equal(crop(photo, "lanczos-256"), torch.from_numpy(expected).permute(2, 0, 1))
    assert crop(photo, "none") is photo
    with pytest.raises(InputError, match="at least 700 px, found 512x600"):
        crop(photo, "centre-700")
    with pytest.raises(InputError, match="expected none, centre-N or lanczos-N, found 'middle'"):
        crop(photo, "middle")


def test_inception_rows_are_torch_fidelitys(tf1_inception, tf1_rows, images):
    tf1_inception.network.features_list = ["2048", "logits_unbiased"]
    theirs, logits = (torch.cat(part) for part in zip(*(tf1_inception.network(i[None]) for i in images), strict=True))
    rows = tf1_rows["rows"]
    assert rows.shape == (3, 2048) and rows.std(0).mean() > 1e-3 * rows.abs().mean()
    assert (rows - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert (tf1_rows["logits"] - logits).abs().max() < 1e-4 * logits.abs().max()


@pytest.fixture(scope="session")
def two_sets(photo, images):
    """Real and fake images, four each: photographs' parts, and flipped, darkened or random ones."""
    real = [*images[:2], photo[:, :300, :200], photo[:, 250:400, 200:500]]
    return real, [images[2], photo.flip(1), photo[:, 100:500] // 2, photo[:, :200, 100:300].flip(0)]


def in_their_plane(sets):
    """Rows (n, d) in a basis of them all: distances are what they are in d columns, whose matrix roots take minutes."""
    plane = torch.linalg.qr(torch.cat(sets).double().T).Q
    return [rows.double() @ plane for rows in sets]


def test_fid_with_the_tf1_resize_is_torch_fidelitys(tf1_inception, two_sets):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    ours = [feature_pass(tf1_inception, images)["rows"] for images in two_sets]
    found = frechet_distance(*map(Moments.of, in_their_plane(ours)))
    tf1_inception.network.features_list = ["2048"]
    theirs = [torch.cat([tf1_inception.network(image[None])[0] for image in images]) for images in two_sets]
    stated = [fid_features_to_statistics(rows) for rows in in_their_plane(theirs)]
    expected = fid_statistics_to_metric(*stated, verbose=False)["frechet_inception_distance"]
    assert found == pytest.approx(expected, rel=1e-3) and found > 1


@needs("cleanfid")
@pytest.mark.filterwarnings("ignore")
def test_fid_with_the_clean_resize_is_clean_fids(tf1_inception, two_sets, tmp_path):
    from cleanfid.fid import frechet_distance as their_distance
    from cleanfid.fid import get_files_features

    network = type(tf1_inception)(tf1_inception.network, resize="clean")
    ours = [feature_pass(network, images)["rows"] for images in two_sets]
    found = frechet_distance(*map(Moments.of, in_their_plane(ours)))
    theirs = []
    for name, images in zip("ab", two_sets, strict=True):
        files = [str(tmp_path / f"{name}{i}.png") for i in range(len(images))]
        for file, image in zip(files, images, strict=True):
            Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file)
        settings = {"num_workers": 0, "batch_size": 2, "device": torch.device("cpu"), "verbose": False}
        theirs.append(torch.from_numpy(get_files_features(files, lambda x: network.rows(x)["rows"], **settings)))
    moments = [Moments.of(rows) for rows in in_their_plane(theirs)]
    expected = their_distance(*(part.numpy() for side in moments for part in (side.mean, side.cov)))
    assert found == pytest.approx(float(expected), rel=1e-3) and found > 1


def test_inception_with_a_clean_resize_sees_unrounded_pixels(tf1_inception, images):
    prepared = type(tf1_inception)(tf1_inception.network, crop="lanczos-256", resize="clean").prepare(images[0])
    assert torch.equal(prepared, resize_clean(crop(images[0], "lanczos-256"), 299))
    patch = type(tf1_inception)(tf1_inception.network, crop="centre-299", resize="none")
    assert torch.equal(patch.prepare(images[0]), crop(images[0], "centre-299").float())
    with pytest.raises(InputError, match="crops of 299 px, found"):
        type(tf1_inception)(tf1_inception.network, resize="none").prepare(images[0])


@needs("torch_fidelity")
def test_weights_that_are_absent_or_of_another_network_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"inception\.pth does not exist"):
        inception(tmp_path / "inception.pth")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "inception.pth")
    with pytest.raises(InputError, match="does not fit Inceptionv3"):
        inception(tmp_path / "inception.pth")


def test_clip_score_is_open_clips_by_hand(tiny_clip, photo):
    import open_clip

    prompts = ["an officer in uniform", "a cat " * 100]
    pictures = [photo, photo.flip(2)]
    tokens = open_clip.tokenize([f"A photo depicts {prompt}" for prompt in prompts])
    transform = open_clip.image_transform(32, is_train=False)
    prepared = [
        transform(Image.fromarray(crop(p, "lanczos-64").permute(1, 2, 0).contiguous().numpy())) for p in pictures
    ]
    with torch.no_grad():
        image, text, _ = tiny_clip.model(torch.stack(prepared), tokens)
    rows, texts = feature_pass(tiny_clip, pictures)["rows"], tiny_clip.texts(prompts)
    assert rows.shape == texts.shape == (2, 16)
    assert clip_score(rows, texts) == pytest.approx(float((image * text).sum(1).mean()), rel=1e-5)
    tiny_clip.prefix = ""
    assert clip_score(rows, tiny_clip.texts(prompts)) != pytest.approx(clip_score(rows, texts), rel=1e-3)


def test_an_unknown_clip_is_refused(tiny_clip):
    with pytest.raises(InputError, match="such as ViT-g-14, found 'ViT-G/14'"):
        clip("ViT-G/14", None)


def test_dino_rows_are_the_class_token_of_transformers(tmp_path, photo):
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path / "dino")
    network = dino(tmp_path / "dino")
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (resize_clean(photo, 224).permute(1, 2, 0) / 255 - mean) / deviation
    expected = network.model(x.permute(2, 0, 1)[None]).pooler_output
    assert torch.allclose(feature_pass(network, [photo])["rows"], expected, atol=1e-5)
    assert isinstance(network, Dino) and network.features == 16
    with pytest.raises(InputError, match=r"nowhere: expected config\.json and model\.safetensors"):
        dino(tmp_path / "nowhere")


def test_a_feature_pass_does_not_depend_on_its_batch(tiny_clip, images):
    whole = feature_pass(tiny_clip, images)["rows"]
    assert torch.allclose(feature_pass(tiny_clip, iter(images), batch=1)["rows"], whole, atol=1e-5)
    assert feature_pass(tiny_clip, []) == {}


def test_a_missing_package_is_named_and_a_broken_one_is_told_from_it(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="a metric: needs the package no-such-package: pip install no-such-package"):
        required("no_such_module", "no-such-package", "a metric")
    (tmp_path / "broken_module.py").write_text("from math import no_such_name")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"a metric: the package broken cannot be imported: .*no_such_name"):
        required("broken_module", "broken", "a metric")
