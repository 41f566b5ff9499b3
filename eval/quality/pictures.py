"""Pictures of a report: plots of quality against cost, training curves, and the files that keep them."""

import base64
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from stepdistill.files import read_json, write_json

CAPTIONS = "captions.json"
Pictures = list[tuple[str, Image.Image]]
"""(caption, picture) in a page's order."""
INK, MUTED, GRID = "#1f2328", "#6b7280", "#e5e7eb"
COLOURS = {"teacher": "#1f2328", "solver": "#b45309"}
LINES = ("#0b6e4f", "#b45309", "#4057a8", "#a23b72", "#2a9d8f", "#c1121f", "#7c6a0a", "#8d6cab")
PALETTE = ("#0b6e4f", "#b45309", "#4057a8", "#a23b72", "#6b7280", "#2a9d8f")


def shrunk(images: Tensor, largest: int = 128) -> Tensor:
    """Images uint8 (N, C, H, W) no larger than ``largest`` pixels a side, for a page of many."""
    size = [max(1, round(side * largest / max(images.shape[-2:]))) for side in images.shape[-2:]]
    if max(size) >= max(images.shape[-2:]):
        return images
    small = F.interpolate(images.float(), size, mode="bilinear", antialias=True, align_corners=False)
    return small.round().to(torch.uint8)


def gap_of(width: int) -> int:
    """Pixels between pictures of ``width`` pixels that stand beside each other at the top of a report."""
    return max(1, width // 64)


def width_of(beside: Image.Image, columns: int) -> int | None:
    """The width of one of ``columns`` pictures that stand :func:`gap_of` apart; None where they do not."""
    whole = lambda width: columns * width + (columns - 1) * gap_of(width)  # noqa: E731
    return next((width for width in range(1, beside.width + 1) if whole(width) == beside.width), None)


def png_data_uri(picture: Image.Image) -> str:
    """A picture as ``data:image/png;base64,...``, to be put into a page."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_pictures(folder: Path, sections: Mapping[str, Pictures]) -> dict[str, list[str]]:
    """Write PNG files and their captions, captions.json, into ``folder``, in place of those that are there.

    Returns:
        Paths of the files by section, relative to the folder that ``folder`` is in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    captions: dict[str, list[tuple[str, str]]] = {}
    for section, pictures in sections.items():
        for number, (caption, picture) in enumerate(pictures, 1):
            file = f"{section}-{number:02d}.png"
            picture.save(folder / file, optimize=True)
            captions.setdefault(section, []).append((file, caption))
    write_json(folder / CAPTIONS, captions)
    return {section: [f"{folder.name}/{file}" for file, _ in entries] for section, entries in captions.items()}


def read_pictures(folder: Path) -> dict[str, Pictures]:
    """What :func:`write_pictures` wrote; nothing where there is no such folder."""
    if not (folder / CAPTIONS).is_file():
        return {}
    pictures = {}
    for section, captions in read_json(folder / CAPTIONS).items():
        files = [(caption, folder / Path(file).name) for file, caption in captions]
        pictures[section] = [(caption, _opened(file)) for caption, file in files if file.is_file()]
    return pictures


def _opened(file: Path) -> Image.Image:
    with Image.open(file) as picture:
        picture.load()
        return picture


def quality_plot(
    rows: Sequence[Any], metric: str, label: str, floor: float | None = None, axis: Literal["nfe", "seconds"] = "nfe"
) -> Image.Image:
    """``metric`` against NFE or time on logarithmic axes: students as lines, teachers and solvers as marks.

    Args:
        rows: report rows (name, role, nfe, metrics, cost).
        label: the y axis.
        floor: real images' value, drawn as a line.
        axis: ``seconds`` is the latency at batch 1 where every row has it, seconds per image elsewhere.
    """
    rows = [row for row in rows if (row.metrics.get(metric) or 0) > 0]
    timed = all("latency_seconds" in row.cost for row in rows)
    key = "latency_seconds" if timed else "seconds_per_image"
    place = {id(row): row.nfe if axis == "nfe" else row.cost.get(key) for row in rows}
    rows = [row for row in rows if place[id(row)]]
    named = {"nfe": "NFE per image", "seconds": "latency, s" if timed else "seconds per image"}
    students = dict.fromkeys(row.name for row in rows if row.role == "student")
    # Small, so that it can be read on a phone; names of many students need room beside it.
    few = len(students) <= len(PALETTE)
    figure = _figure((5.4, 3.8) if few else (7.2, 4.0), 160)
    axes = figure.add_subplot()
    _clean(axes)
    axes.set(xscale="log", xlabel=named[axis], ylabel=_plain(label))
    marks = itertools.chain.from_iterable(itertools.repeat(mark, len(PALETTE)) for mark in itertools.cycle("os^v"))
    for name, colour, mark in zip(students, itertools.cycle(PALETTE), marks):
        points = sorted((place[id(row)], row.metrics[metric]) for row in rows if row.name == name)
        style = {"marker": mark, "linewidth": 1.6, "markersize": 6}
        axes.plot(*zip(*points, strict=True), color=colour, label=_plain(name), **style)
    for role, mark, legend in (("teacher", "D", "teacher"), ("solver", "x", "teacher under stock solvers")):
        points = [(place[id(row)], row.metrics[metric]) for row in rows if row.role == role]
        if points:
            axes.plot(*zip(*points, strict=True), mark, color=COLOURS[role], markeredgewidth=2, label=_plain(legend))
    if floor is not None and floor > 0:
        axes.axhline(floor, color=MUTED, linestyle=(0, (4, 3)), linewidth=1, label="real images")
    if axis == "nfe":
        axes.set_xticks(ticks := sorted({row.nfe for row in rows}), [str(tick) for tick in ticks])
    else:
        _readable(axes.xaxis)
    _logarithmic(axes)
    if rows and few:
        axes.legend(frameon=False, fontsize=8, loc="best")
    elif rows:
        axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return _render(figure)


def panels_plot(
    panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]],
    label: str,
    levels: Mapping[str, float],
    reference: Mapping[str, Sequence[tuple[int, float]]],
    marked: Mapping[str, int],
    columns: int = 3,
) -> Image.Image:
    """A value against NFE on logarithmic axes, a panel for each group of lines; the y axis is shared.

    Args:
        panels: points (NFE, value) by panel and line.
        label: the y axis.
        levels: horizontal lines in every panel.
        reference: lines to be drawn in every panel that lies at their NFE.
        marked: the NFE of a line's ring.
    """
    columns = min(columns, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    figure = _figure((4.1 * columns, 3.6 * rows), 140)
    drawn = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for axes, (title, lines) in itertools.zip_longest(drawn, panels.items(), fillvalue=(None, None)):
        if title is None:
            axes.set_visible(False)
            continue
        _clean(axes)
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        reach = {nfe for points in lines.values() for nfe, _ in points}
        for (name, value), style in zip(levels.items(), itertools.cycle(["-", (0, (4, 3))])):
            axes.axhline(value, color=INK, linestyle=style, linewidth=1, label=_plain(name))
        for name, points in reference.items():
            if inside := [point for point in points if point[0] in reach]:
                axes.plot(
                    *zip(*inside, strict=True), "x:", color=MUTED, linewidth=1.2, markersize=5, label=_plain(name)
                )
        marks = itertools.cycle("os^Dv")
        for (name, points), colour, mark in zip(lines.items(), itertools.cycle(LINES), marks):
            axes.plot(
                *zip(*points, strict=True), color=colour, marker=mark, linewidth=1.6, markersize=4, label=_plain(name)
            )
            if at := [point for point in points if point[0] == marked.get(name)]:
                axes.plot(*zip(*at, strict=True), color=colour, marker=mark, markersize=10, markerfacecolor="none")
        axes.set(xscale="log", xlabel="NFE per image")
        axes.set_xticks(ticks := sorted(reach), [str(tick) for tick in ticks])
        axes.set_xlim(min(ticks) / 1.25, max(ticks) * 1.25)
        _logarithmic(axes)
        axes.tick_params(labelleft=True)
        below = {"ncols": 3, "loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}  # of what no empty corner holds
        axes.legend(frameon=False, fontsize=7, **(below if len(lines) > 8 else {"ncols": 2, "loc": "best"}))
    for axes in drawn[::columns]:
        axes.set_ylabel(label)
    return _render(figure)


def training_plot(lines: Sequence[Mapping[str, float]]) -> Image.Image | None:
    """Losses, gradient norms and drift against the step, from the lines of metrics.jsonl; None without any."""
    panels = {
        "loss": _series(lines, lambda key: "/loss/" in key),
        "gradient norm": _series(lines, lambda key: key.endswith("/grad_norm")),
        "drift against the teacher": _series(lines, lambda key: key.startswith("drift/")),
    }
    panels = {title: series for title, series in panels.items() if series}
    if not panels:
        return None
    figure = _figure((7.2, 2.5 * len(panels)), 150)
    for index, (title, series) in enumerate(panels.items()):
        axes = figure.add_subplot(len(panels), 1, index + 1)
        _clean(axes)
        axes.set_title(title, loc="left", fontsize=9, color=INK)
        for number, (key, points) in enumerate(sorted(series.items())):
            name = key.replace("/loss/", " ").replace("/grad_norm", "").replace("drift/", "")
            style = {"linewidth": 1.2, "marker": "o" if len(points) == 1 else None}  # of one point there is no line
            axes.plot(*zip(*points, strict=True), color=PALETTE[number % len(PALETTE)], label=_plain(name), **style)
        values = [value for points in series.values() for _, value in points]
        if title != "drift against the teacher" and min(values) > 0:
            _logarithmic(axes)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_xlabel("step")
    return _render(figure)


def _figure(size: tuple[float, float], dpi: int) -> Any:
    """An empty matplotlib figure of ``size`` inches; the library takes a second to import, and training needs none."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, dpi=dpi, layout="constrained")


def _plain(name: str) -> str:
    """A name as matplotlib shows it as it is: between dollar signs it would read mathematics."""
    return name.replace("$", r"\$")


def _series(
    lines: Sequence[Mapping[str, float]], selected: Callable[[str], bool]
) -> dict[str, list[tuple[float, float]]]:
    series: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for key, value in line.items():
            if selected(key) and "step" in line and np.isfinite(value):
                series.setdefault(key, []).append((line["step"], value))
    return series


def _clean(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=8)
    axes.xaxis.label.set(color=INK, size=9)
    axes.yaxis.label.set(color=INK, size=9)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _logarithmic(axes: Any) -> None:
    """A logarithmic y axis that reads 1, 2, 5, 10, ... in plain numbers."""
    axes.set_yscale("log")
    _readable(axes.yaxis)
    axes.minorticks_off()


def _readable(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _render(figure: Any) -> Image.Image:
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"font.size": 9}):
        figure.savefig(buffer, format="png", facecolor="white")
    buffer.seek(0)
    return Image.open(buffer).convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
