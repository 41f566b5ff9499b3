"""The report of a benchmark: rows, verdicts, and its three files report.json, report.md and index.html."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from stepdistill.errors import InputError
from stepdistill.eval.names import DIVERSITY, METRICS, metric_name
from stepdistill.eval.perceptual import ALSO, also_files
from stepdistill.eval.pictures import read_pictures, write_pictures
from stepdistill.eval.render import SECTIONS, html, markdown, notebook_html, plots
from stepdistill.eval.verdict import GAP_TARGET, RATIO_TARGET, Verdict, verdict_metric
from stepdistill.files import read_json, write_json, write_text

SCHEMA = 1
ORDER = ("teacher", "student", "solver")

Role = Literal["teacher", "student", "solver"]

_STATED = ("protocol", "seed", "command", "versions", "device", "floor")
_OPTIONAL = ("controls", "labels", "files", "remarks", "trained")


@dataclass
class Row:
    """One sampler of one pipeline, measured. ``cost``: seconds_per_image, peak_memory_mib, parameters; where it was
    requested also latency_seconds, batch and flops. ``diagnostics`` hold a standard error ``<metric>_error`` where one
    was estimated.

    ``cached`` says that the metrics were measured before. ``machine``: what the cost was measured on; "" where that is
    not known.
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
    machine: str = ""


@dataclass
class Report:
    """Everything a benchmark found. ``floor``: the metrics of real images at the same number of samples.

    ``controls``: those of other images that no sampler made, by what they are. ``labels``: metrics' names under a
    protocol of prompts. ``files``: SHA-256 of what it stands on. ``remarks``: notes for the reader. ``trained``: of
    students whose run is here ``student_steps``, ``steps``, ``seconds`` (of all updates, from those that were logged)
    and ``evaluations``. (caption, picture)
    stand in the page, not in report.json: ``first`` (who draws beside each other, one condition a picture: its caption
    has the condition, then a line for each), ``pictures`` (grids of the same seeds), ``strips`` (images of one prompt a
    row), ``worst``, and ``training`` (curves of the runs).
    """

    protocol: str
    seed: int
    command: str
    versions: dict[str, str]
    device: str
    floor: dict[str, float]
    rows: list[Row]
    verdict: list[Verdict] = field(default_factory=list)
    controls: dict[str, dict[str, float]] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    trained: dict[str, dict[str, float]] = field(default_factory=dict)
    first: list[tuple[str, Image.Image]] = field(default_factory=list, repr=False)
    pictures: list[tuple[str, Image.Image]] = field(default_factory=list, repr=False)
    strips: list[tuple[str, Image.Image]] = field(default_factory=list, repr=False)
    worst: list[tuple[str, Image.Image]] = field(default_factory=list, repr=False)
    training: list[tuple[str, Image.Image]] = field(default_factory=list, repr=False)

    @property
    def samples(self) -> int:
        return self.rows[0].samples if self.rows else 0

    @property
    def heading(self) -> str:
        """What the report is about: its students and their teachers."""
        of = {role: list(dict.fromkeys(row.name for row in self.rows if row.role == role)) for role in ORDER}
        students, teachers = of["student"], of["teacher"]
        if not students:
            return ", ".join(teachers) or self.protocol
        who = ", ".join(students) if len(students) <= 3 else f"{len(students)} students"
        named = dict.fromkeys(name.partition(" w=")[0] for name in teachers)
        return f"{who} beside {', '.join(named)}" if named else who

    @property
    def metric_names(self) -> list[str]:
        """The metrics to show, in the report's order; a diversity only where the teacher's is known."""
        present = [metric for metric in self.labels or METRICS if any(metric in row.metrics for row in self.rows)]
        return [metric for metric in present if metric not in DIVERSITY or self._teachers(metric) is not None]

    def title(self, metric: str, samples: int | None = None) -> str:
        """A metric's name as people are shown it; ``samples`` None: those of the report's rows."""
        return self.labels.get(metric) or metric_name(metric, samples or self.samples)

    def displayed(self, metrics: Mapping[str, float], metric: str) -> float | None:
        """A row's value of a metric as people are shown it: a diversity as the ratio to the first teacher's."""
        value = metrics.get(metric)
        if value is None or metric not in DIVERSITY:
            return value
        teacher = self._teachers(metric)
        return value / teacher if teacher else None

    def _teachers(self, metric: str) -> float | None:
        return next((row.metrics[metric] for row in self.rows if row.role == "teacher" and metric in row.metrics), None)

    @property
    def verdict_summary(self) -> str:
        """How many students pass, and by what."""
        passed = sum(entry.passed is True for entry in self.verdict)
        open_ = sum(entry.passed is None for entry in self.verdict)
        undecided = f" Of {open_} the samples are too few to decide." if open_ else ""
        metric = self.title(verdict_metric(self.labels))
        return (
            f"{passed} of {len(self.verdict)} students replace their teacher: {metric} at most {RATIO_TARGET:g}× the "
            f"teacher's, and at least {100 * GAP_TARGET:.0f} % closed of the gap that the best stock solver at that "
            f"NFE leaves.{undecided}"
        )

    def timed(self, row: Row) -> bool:
        """Whether a row's cost was measured on the report's device, and may be held against the others'.

        Reports from before rows stated their machine say only of cached rows that it was another.
        """
        return row.machine == self.device or not (row.machine or row.cached)

    def to_dict(self) -> dict[str, Any]:
        """The content of report.json, schema 1."""
        content = {name: getattr(self, name) for name in _STATED}
        content |= {name: value for name in _OPTIONAL if (value := getattr(self, name))}
        rows, verdicts = [asdict(row) for row in self.rows], [asdict(verdict) for verdict in self.verdict]
        return _finite({"schema": SCHEMA, **content, "rows": rows, "verdict": verdicts})

    def to_markdown(self) -> str:
        """The report as GitHub-flavoured Markdown."""
        return markdown(self)

    def to_html(self) -> str:
        """The report as one self-contained page: no request, pictures inside."""
        return html(self, plots(self))

    def _repr_html_(self) -> str:
        return notebook_html(self)

    def write(self, folder: str | Path, single_file: bool = False) -> Path:
        """Write report.json, report.md, index.html and pictures/ into ``folder``; returns the page's path.

        Args:
            single_file: the page holds its pictures itself; those in pictures/ are there to be merged.
        """
        folder = Path(folder)
        drawn = plots(self)
        sections = {name: getattr(self, name) for name in SECTIONS} | {"plots": drawn}
        places = write_pictures(folder / "pictures", sections)
        write_json(folder / "report.json", self.to_dict())
        write_text(folder / "report.md", self.to_markdown())
        page = folder / "index.html"
        write_text(page, html(self, drawn, None if single_file else places))
        return page


def read_report(path: str | Path) -> Report:
    """A report from its report.json, or from the folder that holds it.

    Raises:
        InputError: there is none, or it is not of schema 1.
    """
    path = Path(path)
    path = path / "report.json" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"report: {path} does not exist")
    stored = read_json(path)
    if stored.get("schema") != SCHEMA:
        raise InputError(f"{path}: expected a report of schema {SCHEMA}, found {stored.get('schema')!r}")
    try:
        rows = [Row(**_known(Row, row)) for row in stored["rows"]]
        verdicts = [Verdict(**_known(Verdict, entry)) for entry in stored.get("verdict", [])]
        content = {name: stored[name] for name in _STATED} | {
            name: stored[name] for name in _OPTIONAL if name in stored
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: expected a report of schema {SCHEMA}, found another content: {error}") from None
    return Report(**content, rows=rows, verdict=verdicts)


def merge(reports: Sequence[Report]) -> Report:
    """One report with the rows and pictures of several, equal ones once; seed, command and versions are the first's.

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
        if differ := _differing(first.files, other.files):
            raise InputError(f"rows measured with different {', '.join(differ)} cannot stand in one table")
    rows: list[Row] = []
    machine_of = lambda report, row: report.device if report.timed(row) else row.machine  # noqa: E731
    for row in (replace(row, machine=machine_of(report, row)) for report in reports for row in report.rows):
        if not any((row.name, row.steps, row.metrics) == (other.name, other.steps, other.metrics) for other in rows):
            rows.append(row)
    merged = {(e.student, e.steps, e.teacher, e.text): e for report in reports for e in report.verdict}
    content = {name: getattr(first, name) for name in (*_STATED, *_OPTIONAL)}
    content["controls"] = {name: control for report in reports for name, control in report.controls.items()}
    content["labels"] = {metric: label for report in reports for metric, label in report.labels.items()}
    content["trained"] = {name: facts for report in reports for name, facts in report.trained.items()}
    content["files"] = {name: sha256 for report in reports for name, sha256 in report.files.items()}
    content["remarks"] = list(dict.fromkeys(remark for report in reports for remark in report.remarks))
    devices, seeds = (list(dict.fromkeys(getattr(report, name) for report in reports)) for name in ("device", "seed"))
    if len(devices) > 1:
        several = f"Rows come from several devices ({'; '.join(devices)})"
        content["remarks"].append(f"{several}: seconds and memory are shown of those from {devices[0]}.")
    if len(seeds) > 1:
        content["remarks"].append(f"Rows and pictures come from several seeds ({', '.join(map(str, seeds))}).")
    pictures = {name: _once(pair for report in reports for pair in getattr(report, name)) for name in SECTIONS}
    return Report(**content, **pictures, rows=rows, verdict=list(merged.values()))


def _differing(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """Files of which two reports state another content; metrics that only one of them added do not matter."""
    added = {spec.file for spec in also_files(tuple(ALSO))}
    names = sorted({*ours, *theirs})
    return [n for n in names if ours.get(n) != theirs.get(n) and (n not in added or (n in ours and n in theirs))]


def _once(pairs: Iterable[tuple[str, Image.Image]]) -> list[tuple[str, Image.Image]]:
    unique = {(caption, one.size, one.convert("RGB").tobytes()): (caption, one) for caption, one in pairs}
    return list(unique.values())


def compare(paths: Sequence[str | Path], out: str | Path | None = None, single_file: bool = False) -> Report:
    """Merge finished reports into one, written into ``out``, with the pictures beside them.

    Raises:
        InputError: see :func:`read_report` and :func:`merge`.
    """
    reports = [read_report(path) for path in paths]
    for path, report in zip(map(Path, paths), reports, strict=True):
        pictures = read_pictures((path if path.is_dir() else path.parent) / "pictures")
        for name in SECTIONS:
            getattr(report, name).extend(pictures.get(name, []))
    merged = merge(reports)
    if out is not None:
        merged.write(out, single_file)
    return merged


def between_markers(path: Path, begin: str, end: str, text: str) -> None:
    """Put ``text`` between two marker lines of a file.

    Raises:
        InputError: the file does not have them.
    """
    before, has_begin, rest = path.read_text(encoding="utf-8").partition(begin)
    _, has_end, after = rest.partition(end)
    if not has_begin or not has_end:
        raise InputError(f"{path}: expected the lines {begin} and {end}, found no such place for a table")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


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
