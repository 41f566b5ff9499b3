"""The pictures of a report: the first samples of a row, several of one prompt, and the worst."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stepdistill.eval.bench.drawing import Sampler
from stepdistill.eval.bench.rows import Bench
from stepdistill.eval.measure import ViewRows
from stepdistill.eval.names import metric_text
from stepdistill.eval.pictures import gap_of, shrunk
from stepdistill.eval.references import RealSide
from stepdistill.eval.report import Report, Row
from stepdistill.eval.shards import Shards
from stepdistill.eval.verdict import verdict_metric
from stepdistill.pipeline.conditioning import class_names
from stepdistill.progress import counted
from stepdistill.sampling.image_grid import image_grid

PICTURES, COLUMNS = 24, 8
PICTURES_PER_CLASS = 4
FIRST, LARGE = 4, 256
"""Pictures at the top of the page, and the pixels of their longer side."""
WORST = 16
WORST_OF = 200
"""Samples that are looked through where a row was stored without its samples."""


def show(bench: Bench, report: Report, sampler: Sampler, row: Row, real: dict[str, RealSide] | None) -> Tensor | None:
    """Put a row's pictures into the report unless they are there; all processes together.

    Returns:
        The first images (N, C, H, W), for :func:`side_by_side`; None on all ranks but 0.
    """
    classes = len(bench.protocol.classes)
    count, columns = (PICTURES_PER_CLASS * classes, classes) if classes else (PICTURES, COLUMNS)
    caption = f"{row.name} · {counted(row.steps, 'step')}, NFE {row.nfe}"
    images = Shards(bench.folder(sampler) / "images", bench.samples, bench.block)
    looked_at = bench.samples
    if images.missing():
        looked_at = min(bench.samples, WORST_OF if row.role == "student" else count)
        images = bench.images(sampler, looked_at)
    # What the teacher of classes draws worst is no news, and may have to be drawn for it.
    views = bench.views(sampler, real, looked_at) if row.role == "student" or not classes else {}
    if not bench.first:
        return None
    first = torch.cat([images.read(indices)["images"] for indices in images.ranges[: -(-count // images.size)]])
    if any(earlier.startswith(caption) for earlier, _ in report.pictures):
        return shrunk(first[:FIRST], LARGE)
    title = caption
    if (metric := verdict_metric(report.labels)) in row.metrics:
        title += f" · {report.title(metric, row.samples)} {metric_text(metric, row.metrics[metric])}"
    title += " · a class a column" if classes else ""
    report.pictures.append((title, image_grid(shrunk(first[:count]), columns=columns)))
    if row.role != "solver" and (picked := worst(views)):
        numbers, why = picked
        chosen = torch.stack([_one(images, number) for number in numbers])
        of = f", of the first {looked_at}" if looked_at < bench.samples else ""
        report.worst.append((f"{caption} · {why}{of}", image_grid(shrunk(chosen), columns=COLUMNS)))
    if spread := bench.protocol.diversity:
        repeats = bench.repeat_shards(sampler).all("images")  # made with the row: no other process is waiting here
        several = [p + k * spread.prompts for p in range(min(6, spread.prompts)) for k in range(spread.images)]
        report.strips.append((caption, image_grid(shrunk(repeats[several]), columns=spread.images)))
    return shrunk(first[:FIRST], LARGE)


def side_by_side(report: Report, sampler: Sampler, drawn: Sequence[tuple[Row, Tensor | None]]) -> None:
    """Put the first images of several rows beside each other, a condition a picture.

    Args:
        sampler: one of them, for what was requested.
        drawn: rows with what :func:`show` returned.
    """
    there = [(row, images) for row, images in drawn if images is not None]
    if len(there) < 2:
        return
    names = {"teacher": "Teacher", "student": "Student"}
    labels = [f"{names.get(row.role, row.name)}, {counted(row.steps, 'step')}" for row, _ in there]
    classes = class_names(sampler.trace)
    for number, together in enumerate(zip(*(images for _, images in there), strict=False)):
        entry = sampler.entry(number)
        words = str(classes[entry] if classes and isinstance(entry, int) else entry)
        caption = "\n".join([" ".join(words.split()) or "-", *labels])
        report.first.append(
            (caption, image_grid(torch.stack(together), columns=len(there), gap=gap_of(together[0].shape[-1])))
        )


def worst(views: Mapping[str, ViewRows]) -> tuple[Sequence[int], str] | None:
    """(numbers of the worst images, worst first; in what they are bad), by the first view that can tell.

    Those least like their prompts by CLIP or LiT, least like their classes by the classifier, or else farthest from the
    mean of the real ones.
    """
    for view in views.values():
        blocks, mean = view.samples.blocks("rows"), view.real.moments and view.real.moments.mean
        if view.texts is not None:
            texts = view.texts.split(view.samples.size)
            badness = [-torch.cosine_similarity(*pair) for pair in zip(blocks, texts, strict=True)]
            why = "least like their prompts"
        elif view.labels is not None:
            block = view.samples.read(view.samples.ranges[0])
            if "logits" not in block:
                continue
            log_p = view.samples.all("logits").log_softmax(1)
            badness, why = [-log_p.gather(1, view.labels[:, None])[:, 0]], "least like their classes"
        elif mean is not None:
            badness = [(rows - mean).square().sum(1) for rows in blocks]
            why = "farthest from the mean of the real ones"
        else:
            continue
        return torch.cat(badness).argsort(descending=True)[:WORST].tolist(), why
    return None


def _one(images: Shards, number: int) -> Tensor:
    return images.read(images.ranges[number // images.size])["images"][number % images.size]
