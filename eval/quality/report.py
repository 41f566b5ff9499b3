"""The report of a benchmark: rows, verdicts, and its three files report.json, report.md and index.html."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import jinja2
from PIL import Image

from stepdistill.errors import InputError
from stepdistill.eval.pictures import png_data_uri, quality_plot, training_plot
from stepdistill.eval.protocol import DIVERSITY, METRICS
from stepdistill.eval.row_cache import write_json

SCHEMA = 1
RATIO_TARGET = 1.2
GAP_TARGET = 0.8
VERDICT_METRIC = "fd_classifier"

Role = Literal["teacher", "student", "solver"]

_NAMES = {
    "fd_classifier": "FD-classifier@{n}",
    "kid_classifier": "KID-classifier@{n} ×1000",
    "fd_enet": "FD-ENetLite0@{n}",
    "kid_enet": "KID-ENetLite0@{n} ×1000",
    "precision": "Precision",
    "recall": "Recall",
    "accuracy": "Class accuracy",
    "diversity_classifier": "Diversity-classifier / teacher's",
    "diversity_enet": "Diversity-ENetLite0 / teacher's",
}


def metric_name(metric: str, samples: int) -> str:
    """What people are shown, such as ``FD-classifier@2000``; these distances are never called FID."""
    return _NAMES[metric].format(n=samples)


def metric_text(metric: str, value: float | None) -> str:
    """A metric's value as people are shown it; kernel distances are multiplied by 1000.

    People see a diversity as the ratio to the teacher's (:meth:`Report.shown`), which is what ``value`` is then.
    """
    if value is None or not math.isfinite(value):
        return "–"
    if metric.startswith("fd_"):
        return f"{value:.2f}"
    if metric.startswith("kid_"):
        return f"{1000 * value:.2f}"
    return f"{value:.3f}"


@dataclass
class Row:
    """One sampler of one pipeline, measured. ``cost``: seconds_per_image, peak_memory_mib, parameters.

    ``cached`` says that nothing was run: the row's cost is that of the machine which measured it.
    """

    name: str
    role: Role
    steps: int
    nfe: int
    guidance: float
    samples: int
    metrics: dict[str, float]
    cost: dict[str, float]
    cached: bool = False
    diagnostics: dict[str, float] = field(default_factory=dict)


@dataclass
class Verdict:
    """Whether a student replaces its teacher, by FD on the classifier's features.

    Args:
        ratio: student / teacher. gap_closed: (solver - student) / (solver - teacher) for the best solver at the
            student's NFE; None without solvers, or when the best of them is as good as the teacher.
        passed: ratio <= 1.2, and at least 0.8 of the gap closed where there is one.
    """

    student: str
    teacher: str
    solver: str | None
    steps: int
    ratio: float
    gap_closed: float | None
    passed: bool
    text: str


def verdict(student: Row, teacher: Row, solvers: Sequence[Row]) -> Verdict | None:
    """The verdict on one student row; None when the rows lack the metric that it is about."""
    if any(VERDICT_METRIC not in row.metrics for row in (student, teacher, *solvers)):
        return None
    ours, theirs = student.metrics[VERDICT_METRIC], teacher.metrics[VERDICT_METRIC]
    best = min(solvers, key=lambda row: row.metrics[VERDICT_METRIC], default=None)
    ratio = ours / theirs if theirs > 0 else math.inf
    gap = None
    if best is not None and best.metrics[VERDICT_METRIC] > theirs:
        reference = best.metrics[VERDICT_METRIC]
        gap = (reference - ours) / (reference - theirs)
    passed = ratio <= RATIO_TARGET and (gap is None or gap >= GAP_TARGET)
    name = metric_name(VERDICT_METRIC, student.samples)
    text = (
        f"{'Pass' if passed else 'Fail'}: {student.name} in {student.steps} {_plural('step', student.steps)} "
        f"(NFE {student.nfe}) has {name} {ours:.2f}, {ratio:.2f}× that of its teacher ({theirs:.2f}, {teacher.steps} "
        f"steps, w = {teacher.guidance:g}, NFE {teacher.nfe}; target at most {RATIO_TARGET:g}×)"
    )
    if gap is not None:
        text += (
            f", and closes {100 * gap:.0f} % of the gap to the teacher that the best stock solver at NFE {best.nfe} "
            f"leaves ({best.name}, {best.metrics[VERDICT_METRIC]:.2f}; target at least {100 * GAP_TARGET:.0f} %)"
        )
    elif best is not None:
        text += (
            f"; the stock solver {best.name} at NFE {best.nfe} is already as good as the teacher, so there is no gap"
        )
    return Verdict(
        student=student.name,
        teacher=teacher.name,
        solver=best.name if best else None,
        steps=student.steps,
        ratio=ratio,
        gap_closed=gap,
        passed=passed,
        text=text + ".",
    )


@dataclass
class Report:
    """Everything a benchmark found. ``floor``: the metrics of real images at the same number of samples.

    ``pictures`` (caption, grid) and ``training`` (lines of metrics.jsonl) go into the page, not into report.json.
    """

    protocol: str
    seed: int
    command: str
    versions: dict[str, str]
    device: str
    floor: dict[str, float]
    rows: list[Row]
    verdict: list[Verdict] = field(default_factory=list)
    pictures: list[tuple[str, Image.Image]] = field(default_factory=list, repr=False)
    training: list[Mapping[str, float]] = field(default_factory=list, repr=False)

    @property
    def samples(self) -> int:
        return self.rows[0].samples if self.rows else 0

    @property
    def metric_names(self) -> list[str]:
        """The metrics to show, in the report's order; a diversity only where the teacher's is known."""
        found = [metric for metric in METRICS if any(metric in row.metrics for row in self.rows)]
        return [metric for metric in found if metric not in DIVERSITY or self._teachers(metric) is not None]

    def shown(self, metrics: Mapping[str, float], metric: str) -> float | None:
        """A row's value of a metric as people are shown it: a diversity as the ratio to the first teacher's."""
        value = metrics.get(metric)
        if value is None or metric not in DIVERSITY:
            return value
        teacher = self._teachers(metric)
        return value / teacher if teacher else None

    def _teachers(self, metric: str) -> float | None:
        return next((row.metrics[metric] for row in self.rows if row.role == "teacher" and metric in row.metrics), None)

    def to_dict(self) -> dict[str, Any]:
        """The content of report.json, schema 1."""
        stated = {name: getattr(self, name) for name in ("protocol", "seed", "command", "versions", "device", "floor")}
        rows, verdicts = [asdict(row) for row in self.rows], [asdict(verdict) for verdict in self.verdict]
        return _finite({"schema": SCHEMA, **stated, "rows": rows, "verdict": verdicts})

    def to_markdown(self) -> str:
        """The report as GitHub-flavoured Markdown."""
        return markdown(self)

    def to_html(self) -> str:
        """The report as one self-contained page: no script, no request, pictures inside."""
        return html(self)

    def write(self, folder: str | Path) -> Path:
        """Write report.json, report.md and index.html into ``folder``; returns the page's path."""
        folder = Path(folder)
        write_json(folder / "report.json", self.to_dict())
        (folder / "report.md").write_text(self.to_markdown(), encoding="utf-8")
        page = folder / "index.html"
        page.write_text(self.to_html(), encoding="utf-8")
        return page


def read_report(path: str | Path) -> Report:
    """A report from its report.json, or from the folder that holds it.

    Raises:
        InputError: there is none, or it is not of schema 1.
    """
    path = Path(path)
    path = path / "report.json" if path.is_dir() else path
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"report: {path} does not exist") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: expected JSON, found {error.msg}") from error
    if not isinstance(stored, dict) or stored.get("schema") != SCHEMA:
        found = stored.get("schema") if isinstance(stored, dict) else type(stored).__name__
        raise InputError(f"{path}: expected a report of schema {SCHEMA}, found {found!r}")
    rows = [Row(**_known(Row, row)) for row in stored["rows"]]
    verdicts = [Verdict(**_known(Verdict, entry)) for entry in stored.get("verdict", [])]
    kept = {name: stored[name] for name in ("protocol", "seed", "command", "versions", "device", "floor")}
    return Report(**kept, rows=rows, verdict=verdicts)


def merge(reports: Sequence[Report]) -> Report:
    """One report with the rows of several, equal rows once; the first report's seed, command and versions are kept.

    Raises:
        InputError: they differ in protocol or in the number of samples, so their rows cannot be compared.
    """
    if not reports:
        raise InputError("reports: expected at least one, found none")
    first = reports[0]
    for other in reports[1:]:
        if other.protocol != first.protocol:
            raise InputError(f"rows of protocols {first.protocol} and {other.protocol} cannot stand in one table")
        if other.samples != first.samples:
            raise InputError(f"rows of {first.samples} and of {other.samples} samples cannot stand in one table")
    rows: list[Row] = []
    for row in (row for report in reports for row in report.rows):
        if not any((row.name, row.steps, row.metrics) == (kept.name, kept.steps, kept.metrics) for kept in rows):
            rows.append(row)
    merged = {entry.student: entry for report in reports for entry in report.verdict}
    stated = {name: getattr(first, name) for name in ("protocol", "seed", "command", "versions", "device", "floor")}
    return Report(**stated, rows=rows, verdict=list(merged.values()))


def between_markers(path: Path, begin: str, end: str, text: str) -> None:
    """Put ``text`` between two marker lines of a file.

    Raises:
        InputError: the file does not have them.
    """
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise InputError(f"{path}: expected the lines {begin} and {end}, found no such place for a table")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def notes(report: Report) -> list[str]:
    """What a reader must know to read the table rightly."""
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
    if any(row.cached for row in report.rows):
        lines.append("Rows marked ° were measured before; their seconds are those of the machine that measured them.")
    return lines


def markdown(report: Report) -> str:
    """See :meth:`Report.to_markdown`."""
    table = table_of(report)
    lines = ["# Benchmark", ""]
    lines += [line for entry in report.verdict for line in (f"**{entry.text}**", "")]
    lines.append("| " + " | ".join(table.header) + " |")
    lines.append("|" + "|".join(" :--- " if index < 1 else " ---: " for index in range(len(table.header))) + "|")
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for _, cells in table.rows]
    lines += ["", *(f"- {note}" for note in notes(report)), ""]
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return "\n".join([*lines, f"Device: {report.device}. {versions}.", "", f"    {report.command}", ""])


@dataclass(frozen=True)
class Table:
    """Text cells under ``header``; every row comes with its role, ``floor`` for real images."""

    header: list[str]
    rows: list[tuple[str, list[str]]]


def table_of(report: Report) -> Table:
    """The report's rows as text, real images first; the page, the Markdown and the terminal all show this."""
    metrics = report.metric_names
    header = ["Sampler", "Steps", "NFE", *(metric_name(m, report.samples) for m in metrics), "s / image", "Memory MiB"]
    rows: list[tuple[str, list[str]]] = []
    if report.floor:
        cells = [metric_text(metric, report.shown(report.floor, metric)) for metric in metrics]
        rows.append(("floor", ["real images", "–", "–", *cells, "–", "–"]))
    order = {"teacher": 0, "student": 1, "solver": 2}
    for row in sorted(report.rows, key=lambda row: order[row.role]):
        cells = [metric_text(metric, report.shown(row.metrics, metric)) for metric in metrics]
        cost = [f"{row.cost['seconds_per_image']:.4f}", f"{row.cost['peak_memory_mib']:.0f}"]
        name = f"{row.name}{' °' if row.cached else ''}"
        rows.append((row.role, [name, str(row.steps), str(row.nfe), *cells, *cost]))
    return Table(header, rows)


def html(report: Report) -> str:
    """See :meth:`Report.to_html`."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=loader, autoescape=True).get_template("report.html.j2")
    plots = []
    for metric in (m for m in report.metric_names if m.startswith("fd_")):
        label = metric_name(metric, report.samples)
        picture = quality_plot(report.rows, metric, label, report.floor.get(metric))
        plots.append((f"{label} against NFE", png_data_uri(picture)))
    curves = training_plot(report.training)
    return template.render(
        report=report,
        table=table_of(report),
        notes=notes(report),
        plots=plots,
        pictures=[(caption, png_data_uri(picture)) for caption, picture in report.pictures],
        curves=png_data_uri(curves) if curves else None,
    )


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"


def _known(kind: type, stored: Mapping[str, Any]) -> dict[str, Any]:
    names = {entry.name for entry in fields(kind)}
    return {key: value for key, value in stored.items() if key in names}


def _finite(value: Any) -> Any:
    """``value`` with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
