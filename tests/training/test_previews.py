"""Previews: of the user's own prompts, with captions, and never too large to look at."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image

from pipeline.tiny import tiny_sd
from stepdistill.errors import InputError
from stepdistill.recipe import load
from stepdistill.training import previews
from stepdistill.training.previews import Preview, sheet
from stepdistill.training.session import Session, build


def rows(count: int, height: int, width: int) -> dict[str, torch.Tensor]:
    return {name: torch.full((count, 3, height, width), 128, dtype=torch.uint8) for name in ("teacher", "student")}


@pytest.mark.parametrize(("height", "width"), [(128, 128), (300, 200), (1024, 1024)])
def test_a_preview_is_at_most_2048_pixels_wide_and_keeps_the_shape_of_pictures(height: int, width: int) -> None:
    page = sheet(rows(16, height, width), ["a red shoe on a table in the rain at night"] * 16)
    assert 1000 < page.width <= 2048 and page.height < 2048 * height / width


def test_small_pictures_stay_as_they_are_but_where_captions_are_to_be_read() -> None:
    page = sheet(rows(16, 32, 32), ["x"] * 16).convert("L")
    pictures, names = page.crop((56, 6, page.width, 6 + 2 * 34 - 2)), page.crop((0, 0, 56, page.height))
    assert pictures.size == (16 * 34 - 2, 2 * 34 - 2) and pictures.getextrema() == (128, 255)
    assert names.getextrema()[0] < 64  # who drew each row
    page = sheet(rows(2, 32, 32), ["x", "y"], enlarge=True)
    assert page.width >= 2 * 96 and page.convert("L").getextrema() == (0, 255)


def session_of(folder: Path, prompts: list) -> Session:
    tiny_sd().save_pretrained(folder / "teacher")
    recipe = {
        "teacher": {"pipeline": str(folder / "teacher"), "guidance": {"scale": 3.0}},
        "student": {"steps": 2},
        "data": {"conditions": ["rain", "cat"]},
        "method": {"name": "sfd", "substeps": 1},
        "train": {"steps": 1, "batch_size": 2, "lr": 1e-3, "preview_prompts": prompts},
    }
    return build(load(recipe), torch.device("cpu"))


def test_previews_are_of_the_users_own_prompts(tmp_path: Path) -> None:
    session = session_of(tmp_path, ["rain", "a red shoe", "night"])
    preview = Preview(session, tmp_path)
    assert list(preview.session.conditioning.entries) == ["rain", "a red shoe", "night"]
    assert set(preview.write(0, nullcontext())) == {"drift/mean", "drift/std"}
    with Image.open(preview.path(0)) as image:
        assert image.width >= 3 * 96  # three columns, enlarged for their captions
    assert list(session.conditioning.entries) == ["rain", "cat"]  # what it trains on


def test_preview_prompts_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train.preview_prompts"):
        session_of(tmp_path, [7])


def test_what_is_no_picture_is_not_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    """The numbers of a mesh."""
    drawn = torch.zeros(16, 640, dtype=torch.uint8), []
    monkeypatch.setattr(previews, "drawn", lambda _trace, _latents: drawn)
    preview = Preview(session_of(tmp_path, []), tmp_path)
    assert set(preview.write(0, nullcontext())) == {"drift/mean", "drift/std"}
    assert not preview.path(0).exists() and "returns no pictures, but (640,) numbers each" in capfd.readouterr().err
