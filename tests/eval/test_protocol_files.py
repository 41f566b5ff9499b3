"""What protocols state, and their files: missing, wrong, pinned, downloaded."""

import hashlib
import json

import huggingface_hub
import pytest
import torch
import yaml

from stepdistill.errors import InputError
from stepdistill.eval.files import content_sha256, obtain, read_prompts
from stepdistill.eval.metrics import standard_error
from stepdistill.eval.protocol import FileSpec, PromptSpec, load_protocol

FROZEN = {
    "adm50k-v1": "e4931297a21cc6dd",
    "coco10k-sdxl-dmd2-v1": "ee73879d1ab5ff15",
    "coco30k-gigagan-v1": "a0bcd59790e6c259",
    "coco5k-val17-v1": "0dfaad386b4f2956",
    "emoji-v1": "b65b9baf507413aa",
    "fashion-v1": "ca11eaf158fa30ae",
    "edm50k-v1/cifar10": "9095039b3b33d05b",
    "edm50k-v1/imagenet64": "531d5938cdd75107",
    "edm50k-v1/ffhq": "f438c9697d2ad04c",
    "edm50k-v1/afhq": "4db630e3257fb7f3",
    "mjhq30k-v1": "c180b928893250b7",
    "teacher-enet-v1": "5e070f711d16cad3",
    "teacher-clip-5k-v1": "da24a6056553e28c",
    "teacher-fid-5k-v1": "e98d40b526c08917",
}


@pytest.mark.parametrize("name", FROZEN)
def test_a_shipped_protocol_is_frozen(name):
    protocol = load_protocol(name)
    assert protocol.id == name
    assert protocol.digest[:16] == FROZEN[name]


def test_metrics_are_named_by_what_they_depend_on():
    labels = load_protocol("coco30k-gigagan-v1").titles(30_000)
    assert labels["fid"] == "FID@30000"
    assert labels["clip_score"] == "CLIP ViT-g-14/laion2b_s12b_b42k/A photo depicts"
    assert load_protocol("coco5k-val17-v1").titles(9)["clip_score"].endswith("no prefix")


def test_a_reference_must_be_chosen_where_there_are_several():
    with pytest.raises(InputError, match="edm50k-v1/ and one of cifar10, imagenet64, ffhq, afhq, found 'edm50k-v1'"):
        load_protocol("edm50k-v1")
    with pytest.raises(InputError, match=r"expected one of .*coco30k-gigagan-v1.*, found 'coco30k'"):
        load_protocol("coco30k")


def test_offline_says_every_missing_file_and_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("used the network"))
    specs = [
        FileSpec(file="net/weights.pth", sha256=None, url="https://example.org/w.pth"),
        FileSpec(file="images", sha256=None, how="unpack images.zip into DATA/images"),
    ]
    with pytest.raises(InputError) as caught:
        obtain(specs, tmp_path, offline=True)
    assert f"curl -L --create-dirs -o {tmp_path}/net/weights.pth https://example.org/w.pth" in str(caught.value)
    assert f"{tmp_path}/images is missing; get it: unpack images.zip into {tmp_path}/images" in str(caught.value)
    with pytest.raises(InputError, match="images is missing"):
        obtain(specs, tmp_path, offline=False)


def test_a_missing_file_with_a_link_is_downloaded_once(tmp_path, monkeypatch):
    asked = []

    def download(url, path, progress):
        asked.append(url)
        with open(path, "wb") as file:
            file.write(b"weights")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    expected = hashlib.sha256(b"weights").hexdigest()
    spec = FileSpec(file="net/w.pth", sha256=expected[:8], url="https://example.org/w.pth")
    assert obtain([spec, spec], tmp_path, offline=False) == {"net/w.pth": expected}
    assert obtain([spec], tmp_path, offline=True) == {"net/w.pth": expected}
    assert asked == ["https://example.org/w.pth"]
    (tmp_path / "net" / "w.pth").write_bytes(b"others")
    with pytest.raises(InputError, match=rf"w\.pth: SHA-256 is \w+, pinned is {expected[:8]}"):
        obtain([spec], tmp_path, offline=True)


def test_the_first_use_of_an_open_file_pins_it(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"a")
    (tmp_path / "prompts.txt").write_text("a cat")
    (tmp_path / "w.pth").write_bytes(b"w")
    weights = FileSpec(file="w.pth", sha256=hashlib.sha256(b"w").hexdigest())
    prompts = PromptSpec(file="prompts.txt", sha256=None, count=None)
    specs = [FileSpec(file="images", sha256=None), weights, prompts]
    found = obtain(specs, tmp_path, offline=True)
    # What the protocol pins need not be pinned again, and a list of the user's own may change.
    assert yaml.safe_load((tmp_path / "pins.yaml").read_text()) == {"images": found["images"]}
    (tmp_path / "prompts.txt").write_text("a dog")
    assert obtain(specs, tmp_path, offline=True)["images"] == found["images"]
    (folder / "b.png").write_bytes(b"b")
    with pytest.raises(InputError, match=r"images: SHA-256 is \w+, pinned is \w+ \(in .*pins\.yaml\)"):
        obtain(specs, tmp_path, offline=True)


def test_a_folder_comes_from_the_hub(tmp_path, monkeypatch):
    def download(repository, local_dir, allow_patterns):
        assert (repository, allow_patterns) == ("owner/net", ["config.json", "model.safetensors"])
        (local_dir / ".cache").mkdir(parents=True)
        (local_dir / ".cache" / "when").write_text(str(local_dir))
        (local_dir / "config.json").write_text("{}")

    spec = FileSpec(file="net", sha256=None, hub="owner/net")
    with pytest.raises(InputError) as caught:
        obtain([spec], tmp_path, offline=True)
    assert f"hf download owner/net config.json model.safetensors --local-dir {tmp_path}/net" in str(caught.value)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = obtain([spec], tmp_path, offline=False)
    # What the hub notes beside the files is not of them.
    (tmp_path / "net" / ".cache" / "when").write_text("later")
    assert obtain([spec], tmp_path, offline=True) == found
    (tmp_path / "other").mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError("no net")))
    with pytest.raises(InputError, match=r"owner/net cannot be downloaded: no net"):
        obtain([spec], tmp_path / "other", offline=False)


def test_a_folders_hash_sees_names_and_contents(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(b"1")
    same = content_sha256(tmp_path / "a")
    assert content_sha256(tmp_path / "b") == same
    (tmp_path / "b" / "1.png").rename(tmp_path / "b" / "2.png")
    assert content_sha256(tmp_path / "b") != same


def test_prompts_are_read_from_text_coco_and_mjhq(tmp_path):
    (tmp_path / "a.txt").write_text("a cat\n\n a dog \n")
    assert read_prompts(tmp_path / "a.txt", 2) == ["a cat", "a dog"]
    coco = [{"image_id": 7, "id": 2, "caption": "late"}, {"image_id": 7, "id": 1, "caption": "first\n"}]
    coco += [{"image_id": 3, "id": 9, "caption": "other"}]
    (tmp_path / "coco.json").write_text(json.dumps({"images": [], "annotations": coco}))
    assert read_prompts(tmp_path / "coco.json", 2) == ["other", "first"]
    (tmp_path / "mjhq.json").write_text(json.dumps({"k1": {"prompt": "p1"}, "k0": {"prompt": "p0"}}))
    assert read_prompts(tmp_path / "mjhq.json", None) == ["p1", "p0"]
    with pytest.raises(InputError, match=r"a\.txt: expected 3 prompts, found 2"):
        read_prompts(tmp_path / "a.txt", 3)
    (tmp_path / "bad.json").write_text('["p"]')
    with pytest.raises(InputError, match=r"bad\.json: expected COCO captions or entries with a prompt"):
        read_prompts(tmp_path / "bad.json", None)


def test_classes_in_equal_numbers_are_no_part_of_the_error():
    """Values that differ by class alone, and by class little: with the classes fixed only the latter counts."""
    classes = torch.arange(400) % 10
    within = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = []

    def mean(index):
        seen.append(classes[index].bincount().tolist())
        return float((100 * classes + within)[index].mean())

    found = standard_error(mean, 400, resamples=400, strata=classes)
    spread = torch.stack([within[classes == number].var(correction=0) for number in range(10)]).mean()
    assert found == pytest.approx(float(spread.sqrt()) / 20, rel=0.1)
    assert all(counts == [40] * 10 for counts in seen)
    assert standard_error(mean, 400, resamples=400) > 10 * found


def test_standard_error_of_a_mean_is_the_textbooks():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = standard_error(lambda index: float(values[index].mean()), 400, resamples=400)
    assert found == pytest.approx(float(values.std()) / 20, rel=0.1)
    assert found == standard_error(lambda index: float(values[index].mean()), 400, resamples=400)
    with pytest.raises(ValueError, match="at least 2 rows and 2 resamples, found 1 and 20"):
        standard_error(lambda index: 0.0, 1)
