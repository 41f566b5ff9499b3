"""Render a report: the table, the notes under it, Markdown and one page of HTML."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from PIL import Image

from stepdistill.eval.names import DIVERSITY, explained, metric_text
from stepdistill.eval.pictures import Pictures, gap_of, png_data_uri, quality_plot, width_of
from stepdistill.eval.summary import sentences

if TYPE_CHECKING:
    from stepdistill.eval.report import Report, Row


def notes(report: "Report") -> list[str]:
    """What a reader must know to read the table rightly."""
    lines = _prompt_notes(report) if report.labels else _class_notes(report)
    if any(row.cached for row in report.rows):
        lines.append("The metrics of rows marked ° were measured before.")
    if not all(map(report.timed, report.rows)):
        lines.append("Rows without seconds were timed on another machine, whose seconds do not compare.")
    if any(key.endswith("_error") for row in report.rows for key in row.diagnostics):
        lines.append("± is half of a 95 % interval over other samples of the same model, by bootstrap.")
    return [*lines, *report.remarks]


def _class_notes(report: "Report") -> list[str]:
    """Of a protocol of classes."""
    lines = [
        f"Protocol {report.protocol}, N = {report.samples} images a row, seed {report.seed}: image i is of class i "
        "modulo the number of classes, and its noise depends on the seed and i alone.",
        "FD is the Fréchet distance on the features of the named network, lower is better; it is not FID and cannot be "
        "compared with FIDs. KID is the unbiased kernel distance and may be below zero.",
        "NFE counts network evaluations per image, guidance's second pass included. Solvers run the teacher.",
    ]
    if any(metric in DIVERSITY for metric in report.metric_names):
        lines.append(
            "Diversity is the variance of the features within a class, mean over classes, as a ratio to the (first) "
            "teacher's; below 1, images of one class resemble each other more than the teacher's do. Rows that were "
            "measured before it existed show none."
        )
    if report.samples < 10_000:
        lines.append(
            f"At N = {report.samples} every FD is biased upwards: compare it with the row of real images, which has "
            "the same bias, or look at KID."
        )
    if not report.floor:
        lines.append("Real images were not measured at this N: the data set is not installed here.")
    return lines


PREFERENCES = ("image_reward", "hpsv2", "pick_score")


def _prompt_notes(report: "Report") -> list[str]:
    """Of every other protocol."""
    lines = [
        f"Protocol {report.protocol}, N = {report.samples:,} images a row, seed {report.seed}: the noise of image i "
        "depends on the seed and i alone, and teacher and students see the same prompts and noise.",
        "Numbers of another protocol, or measured with other files than those whose SHA-256 report.json states, must "
        "not be compared with these.",
        "NFE counts network evaluations per image, guidance's second pass included.",
    ]
    if any(metric.startswith("lpips_") for metric in report.metric_names):
        lines.append(
            "LPIPS between images of a prompt is diversity: higher, its seeds differ more. LPIPS to the teacher's "
            "image of the same noise is low where a student reproduces its teacher; one that matches distributions "
            "may be far from it and as good."
        )
    if "lit_score" in report.metric_names:
        lines.append(
            "LiT-score is the mean cosine that a small scorer, trained on this data set's other pictures, gives a "
            "picture and its caption. It is not a CLIP score; real images, with their own captions and with each "
            "other's, say what its values mean."
        )
    if "memorised" in report.metric_names:
        lines.append(
            "Memorised is the share of pictures that are nearer to a training image, by mean colours of 8 x 8 fields, "
            "than 19 of 20 unseen real images are: 0.05 for fresh pictures, 1 for copies."
        )
    if "fd_enet" in report.metric_names:
        lines.append(
            "FD and KID are not Inception's: they cannot be compared with FIDs, nor with another protocol's. FD is "
            "biased upwards at small N, that of the real images as well; KID is not."
        )
    if any(metric in PREFERENCES for metric in report.metric_names):
        lines.append("ImageReward, HPSv2 and PickScore predict what people prefer for a prompt: higher is better.")
    if report.samples < 10_000 and "fid" in report.metric_names:
        lines.append(
            f"Warning: at N = {report.samples:,}, below 10,000, every FID is biased upwards; compare it at equal N "
            "only, or look at KID or CMMD."
        )
    return lines


def markdown(report: "Report") -> str:
    """The report as GitHub-flavoured Markdown."""
    table = table_of(report)
    lines = [f"# {report.heading}", ""]
    lines += [" ".join(said), ""] if (said := sentences(report)) else []
    lines += [line for entry in report.verdict for line in (f"**{entry.text}**", "")]
    lines.append("| " + " | ".join(table.header) + " |")
    lines.append("|" + "|".join(" :--- " if index < 1 else " ---: " for index in range(len(table.header))) + "|")
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for _, cells in table.rows]
    lines += ["", *(f"- {note}" for note in notes(report)), ""]
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return "\n".join([*lines, f"Device: {report.device}. {versions}.", "", f"    {report.command}", ""])


@dataclass(frozen=True)
class Table:
    """Text cells under ``header``; every row comes with its role, ``floor`` for real images.

    ``meanings``: of each column, "" where nobody has described it.
    """

    header: list[str]
    rows: list[tuple[str, list[str]]]
    meanings: list[str]


def table_of(report: "Report") -> Table:
    """The report's rows as text, real images first; the page, the Markdown and the terminal all show this."""
    metrics = report.metric_names
    costs = [cost for cost in COSTS if cost.always or any(cost.key in row.cost for row in report.rows)]
    header = ["Sampler", "Steps", "NFE", *(report.title(metric) for metric in metrics), *(cost.title for cost in costs)]
    rows: list[tuple[str, list[str]]] = []
    if report.floor:
        cells = [metric_text(metric, report.displayed(report.floor, metric)) for metric in metrics]
        rows.append(("floor", ["real images", "–", "–", *cells, *("–" for _ in costs)]))
    for name, values in report.controls.items():
        cells = [metric_text(metric, values.get(metric)) for metric in metrics]
        rows.append(("floor", [name, "–", "–", *cells, *("–" for _ in costs)]))
    order = {"teacher": 0, "student": 1, "solver": 2}
    for row in sorted(report.rows, key=lambda row: order[row.role]):
        name = f"{row.name}{' °' if row.cached else ''}"
        cells = [_with_interval(report, row, metric) for metric in metrics]
        cost = row.cost if report.timed(row) else {}
        rows.append((row.role, [name, str(row.steps), str(row.nfe), *cells, *(column.text(cost) for column in costs)]))
    columns = ["Sampler", "Steps", "NFE", *metrics, *(cost.key for cost in costs)]
    return Table(header, rows, [explained(column) for column in columns])


@dataclass(frozen=True)
class CostColumn:
    """A column of the table: ``key`` of a row's cost, multiplied by ``scale``. ``always``: also where no row has it."""

    key: str
    title: str
    scale: float
    form: str
    always: bool = False

    def text(self, cost: Mapping[str, float]) -> str:
        if self.key not in cost:
            return "–"
        value = cost[self.key] * self.scale
        return f"{value:,.0f}" if value >= 1000 else format(value, self.form)


COSTS = (
    CostColumn("seconds_per_image", "s / image", 1, ".4f", always=True),
    CostColumn("latency_seconds", "Latency ms", 1e3, ".1f"),
    CostColumn("batch", "Batch", 1, ".0f"),
    CostColumn("peak_memory_mib", "Memory MiB", 1, ".0f", always=True),
    CostColumn("flops", "GFLOPs / image", 1e-9, ".3g"),
)


def _with_interval(report: "Report", row: "Row", metric: str) -> str:
    text, error = metric_text(metric, report.displayed(row.metrics, metric)), row.diagnostics.get(f"{metric}_error")
    return text if error is None or text == "–" else f"{text} ± {metric_text(metric, 1.96 * error)}"


def html(report: "Report", drawn: Pictures, places: Mapping[str, list[str]] | None = None) -> str:
    """The report as one page; its only script moves the line between teacher and student.

    Args:
        drawn: its plots.
        places: where the page finds the pictures of each section, and its ``plots``; None: inside.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=loader, autoescape=True).get_template("report.html.j2")
    sections = [
        {"name": name, "title": title, "what": what, "words": words, "figures": _figures(name, pictures, places)}
        for name, (title, what, words) in SECTIONS.items()
        if name != "first" and (pictures := getattr(report, name))
    ]
    return template.render(
        report=report,
        summary=sentences(report),
        table=table_of(report),
        notes=notes(report),
        first=[
            figure | {"pair": _pair(picture, figure["lines"][1:])}
            for figure, (_, picture) in zip(_figures("first", report.first, places), report.first, strict=True)
        ],
        plots=_figures("plots", drawn, places),
        sections=sections,
    )


def _pair(beside: Image.Image, names: Sequence[str]) -> tuple[int, int, int, int] | None:
    """(column of the student, of the teacher, width, gap in pixels) in a picture of several beside each other.

    Returns:
        None where not both are there, or where the picture is not made of columns.
    """
    width = width_of(beside, len(names)) if names else None
    found = [[column for column, name in enumerate(names) if name.startswith(who)] for who in ("Student", "Teacher")]
    if width is None or not all(found):
        return None
    return found[0][0], found[1][0], width, gap_of(width)


def notebook_html(report: "Report") -> str:
    """What a notebook shows of a report: its first pictures, its sentences, its table."""
    table = table_of(report)
    pictures = [
        f"<figure style='display:inline-block;margin:0 1em 1em 0'><img src='{png_data_uri(picture)}' "
        f"style='height:128px;image-rendering:pixelated'><figcaption>{escape('; '.join(caption.splitlines()))}"
        "</figcaption></figure>"
        for caption, picture in report.first
    ]
    lines = [f"<li>{escape(sentence)}</li>" for sentence in sentences(report)]
    header = "".join(
        f'<th title="{escape(meaning)}">{escape(cell)}</th>'
        for cell, meaning in zip(table.header, table.meanings, strict=True)
    )
    rows = ["".join(f"<td>{escape(cell)}</td>" for cell in cells) for _, cells in table.rows]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f"<h4>{escape(report.heading)}</h4><div>{''.join(pictures)}</div><ul>{''.join(lines)}</ul>"
        f"<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>"
    )


def plots(report: "Report") -> Pictures:
    """Every distance against NFE and against time."""
    drawn = []
    for metric in (m for m in report.metric_names if m.startswith("fd_") or m == "fid"):
        for axis in ("nfe", "seconds"):
            rows = report.rows if axis == "nfe" else [row for row in report.rows if report.timed(row)]
            if not rows:
                continue
            picture = quality_plot(rows, metric, report.title(metric), report.floor.get(metric), axis)
            drawn.append((f"{report.title(metric)} against {axis}", picture))
    return drawn


SECTIONS = {
    "first": ("", "samples", ""),
    "pictures": ("The same seeds, side by side", "samples", "Image for image the same condition and the same noise."),
    "strips": ("One prompt a row, several seeds", "samples", "Rows of one prompt that look alike mean little variety."),
    "worst": ("The worst of its samples", "samples", "Averages hide them: look here before you publish a student."),
    "training": (
        "Training",
        "losses, gradient norms and drift against the training step",
        "Losses are of single batches, so they jump. With a critic or a discriminator a falling loss is no "
        "sign of quality. Drift compares the latents of student and teacher: the difference of their means, and the "
        "ratio of their deviations minus 1. Both should end near 0.",
    ),
}
"""A report's lists of pictures, in the page's order: heading, what a picture shows, and how to read it."""


def _figures(name: str, pictures: Pictures, places: Mapping[str, list[str]] | None) -> list[dict[str, Any]]:
    """What the template needs of a section's pictures."""
    inside = places is None
    sources = [png_data_uri(picture) for _, picture in pictures] if inside else places.get(name, [])
    return [
        {"caption": caption, "lines": caption.splitlines(), "source": source, "width": picture.width}
        for (caption, picture), source in zip(pictures, sources, strict=True)
    ]
