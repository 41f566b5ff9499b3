"""Captions of a folder of pictures: the files that trainers write beside them, and what counts where some lack one."""

import json
from pathlib import Path

import fsspec
import pytest
from PIL import Image

from data.loaded import loaded
from stepdistill.data import folders, images, sources
from stepdistill.errors import InputError
from stepdistill.eval.files import read_prompts
from stepdistill.files import read_json, read_text
from stepdistill.recipe import Data


@pytest.fixture
def place(tmp_path):
    """A folder to be filled: name -> text of a file, or None for a picture."""

    def filled(files: dict[str, str | None]) -> Data:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if text is None:
                Image.new("RGB", (8, 8), (255, 0, 0)).save(path, {"jfif": "JPEG"}.get(path.suffix[1:]))
            else:
                path.write_text(text, encoding="utf-8")
        return Data(images=str(tmp_path), max_rejected=0.9)

    return filled


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("0.txt", "a red shoe"),
        ("0.TXT", "\ufeffa red shoe\n"),
        ("0.caption", "a red shoe"),
        ("0.json", '{"caption": "a red shoe", "score": 1}'),
    ],
)
@pytest.mark.parametrize("inside", ["", "10_mydog/"])
def test_captions_lie_beside_their_pictures(name, text, inside, place):
    data = place({f"{inside}0.png": None, f"{inside}{name}": text})
    assert loaded(data, 3, 8)[1] == images.captions(data) == ["a red shoe"]


def test_the_first_ending_counts_unless_another_is_named(place):
    data = place(
        {"0.png": None, "0.txt": "text", "0.caption": "caption", "0.tags": "tags", "0.json": '{"long": "json"}'}
    )
    assert images.captions(data) == ["text"]
    assert images.captions(data.model_copy(update={"caption_key": "tags"})) == ["tags"]
    for name in ("0.txt", "0.caption"):
        (Path(data.images) / name).unlink()
    assert images.captions(data.model_copy(update={"caption_key": "long"})) == ["json"]


def test_captions_from_folder_names_are_said(place, capsys):
    data = place({"10_mydog/0.png": None, "10_mydog/1.png": None, "cats/0.png": None, "cats/0.json": '{"id": 3}'})
    (Path(data.images) / "cats").rename(Path(data.images) / "10_cat")
    assert loaded(data, 3, 8)[1] == ["cat", "mydog", "mydog"]
    said = capsys.readouterr().err
    assert said == "data.images: captions come from folder names: 3 of 3 (10_cat, 10_mydog)\n"


def test_kohyas_repeats_are_proportions_of_the_pictures(place, capsys):
    data = place({"6_a b/0.png": None, "6_a b/0.caption": "a shoe", "4_c/0.png": None, "4_c/1.png": None})
    expected = ["c", "c", "a shoe", "c", "c", "a shoe", "a shoe"]
    assert loaded(data, 3, 8)[1] == expected and sources.count(data.images, None) == 7
    assert f"data.images: {folders.REPEATED}: 7 of 7 (4_c, 6_a b)" in capsys.readouterr().err
    assert images.captions(data) == ["c", "a shoe"]
    assert sources.count(data.images, 3) == 3


def test_kohyas_folders_may_be_at_a_url(place):
    data, files = (
        place({"6_a b/0.png": None, "6_a b/0.caption": "a shoe", "3_c/0.png": None}),
        fsspec.filesystem("memory"),
    )
    files.store.clear()
    files.put(data.images, "/bucket/kohya", recursive=True)
    there = Data(images="memory://bucket/kohya")
    assert loaded(there, 3, 8)[1] == loaded(data, 3, 8)[1] == ["c", "a shoe", "a shoe"]
    assert sources.count(there.images, None) == 3


def test_a_year_is_no_number_of_repeats(place):
    data = place({"2024_photos/0.png": None, "1_cat/0.png": None, "0_dog/0.png": None, "1.png": None, "1.txt": "top"})
    assert loaded(data, 3, 8)[1] == ["0_dog", "top", "cat", "2024_photos"]


def test_a_folder_with_caption_files_names_no_caption(place, capsys):
    """Half of the caption files are missing, or all have other names."""
    data = place({"a/0.png": None, "a/0.txt": "a red shoe", "a/1.png": None, "b/0.png": None, "b/x0.txt": "a red shoe"})
    assert images.captions(data) == ["a red shoe"]
    said = capsys.readouterr().err
    assert "2 of 3 samples rejected (2 no caption file of its name, though its folder has caption files)" in said
    with pytest.raises(InputError, match="2 of 3 samples rejected"):
        images.captions(Data(images=data.images))


def test_captions_in_a_folder_of_their_own(place, capsys):
    data = place({f"images/{i}.png": None for i in "abc"} | {"captions/a.txt": "A", "captions/b.caption": "B"})
    assert loaded(data, 3, 8)[1] == images.captions(data) == ["A", "B"]
    said = capsys.readouterr().err
    assert "data.images: captions come from another folder's files: 2 of 3 (captions)" in said
    assert "1 of 3 samples rejected (1 no caption file of its name" in said


def test_captions_below_a_folder_of_pictures(place):
    data = place({"0.png": None, "text/0.txt": "zero", "in/1.png": None, "text/1.txt": "one"})
    assert images.captions(data) == ["zero", "one"]


@pytest.mark.parametrize("ending", ["tif", "tiff", "gif", "jfif", "jpe", "JPG", "avif"])
def test_every_picture_is_read(ending, place):
    if ending == "avif" and not Image.registered_extensions().get(".avif"):
        pytest.skip("this Pillow has no AVIF")
    data = place({f"0.{ending}": None, "0.txt": "a red shoe"})
    pixels, captions, _ = loaded(data, 3, 8)
    assert captions == ["a red shoe"] and pixels[0, 0].float().mean() > 240


@pytest.mark.parametrize("ending", ["heic", "jxl", "svg", "psd", "cr2"])
def test_or_counted(ending, place, capsys):
    data = place({"0.png": None, "0.txt": "a red shoe", "1.txt": "lost", f"1.{ending}": "?"})
    assert images.captions(data) == ["a red shoe"]
    assert f"1 of 2 samples rejected (1 a kind of picture that is not read), the first: {data.images}/1.{ending} (" in (
        capsys.readouterr().err
    )


def test_what_programs_leave_behind_is_no_picture(place):
    data = place(
        {"0.png": None, "0.txt": "a", "._0.png": "?", ".ipynb_checkpoints/0-checkpoint.png": None, "Thumbs.db": "?"}
    )
    assert images.captions(Data(images=data.images, max_rejected=0)) == ["a"]


def test_prompts_may_begin_with_a_byte_order_mark(tmp_path):
    for name, text in (("prompts.txt", "a red shoe"), ("prompts.json", json.dumps({"0": {"prompt": "a red shoe"}}))):
        (tmp_path / name).write_text(f"\ufeff{text}\n", encoding="utf-8")
        assert read_prompts(tmp_path / name, 1) == ["a red shoe"]
    assert read_text(tmp_path / "prompts.txt") == "a red shoe\n"
    assert read_json(tmp_path / "prompts.json") == {"0": {"prompt": "a red shoe"}}
