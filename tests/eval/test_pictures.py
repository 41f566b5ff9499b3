"""Grids and plots."""

import pytest
import torch

from stepdistill.eval.pictures import png_data_uri, quality_plot, training_plot
from stepdistill.eval.report import Row
from stepdistill.sampling.image_grid import image_grid


def row(role, nfe, value, name="x"):
    cost = {"seconds_per_image": 0.1, "peak_memory_mib": 1.0, "parameters": 5}
    return Row(name, role, nfe, nfe, 1.0, 100, {"fd_classifier": value}, cost)


def test_grid_puts_every_pixel_where_it_belongs():
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 1, 3, 4) * 10
    grid = image_grid(images, columns=3, gap=1)
    assert grid.mode == "L" and grid.size == (3 * 4 + 2, 2 * 3 + 1)
    assert [grid.getpixel((5 * column + 1, 4 * line + 1)) for line in (0, 1) for column in range(3)] == [
        0, 10, 20, 30, 40, 255,
    ]  # fmt: skip
    assert grid.getpixel((4, 0)) == 255


def test_grid_keeps_colours_and_does_not_widen_for_few_images():
    images = torch.tensor([200, 100, 50], dtype=torch.uint8)[None, :, None, None].expand(2, 3, 2, 2)
    grid = image_grid(images, columns=10, gap=2)
    assert grid.mode == "RGB" and grid.size == (6, 2) and grid.getpixel((4, 1)) == (200, 100, 50)


@pytest.mark.parametrize("shape", [(0, 1, 2, 2), (3, 2, 2, 2), (3, 2, 2)])
def test_grid_refuses_what_is_not_images(shape):
    with pytest.raises(ValueError, match="expected images"):
        image_grid(torch.zeros(shape, dtype=torch.uint8), columns=2)


def test_plots_are_pictures_and_training_without_known_series_has_none():
    rows = [row("student", 1, 30.0), row("student", 4, 12.0), row("teacher", 100, 10.0), row("solver", 4, 50.0)]
    plot = quality_plot(rows, "fd_classifier", "FD-classifier@100", floor=1.0)
    assert plot.width > 600 and len(plot.getcolors()) > 5
    assert png_data_uri(plot).startswith("data:image/png;base64,iVBOR")
    lines = [
        {"step": i, "student/loss/dmd": 1.0 / (i + 1), "student/grad_norm": 2.0, "drift/mean": -0.1} for i in (0, 1)
    ]
    assert training_plot(lines).height > plot.height
    assert training_plot([{"step": 1, "seconds": 3.0}]) is None
    assert training_plot([]) is None
