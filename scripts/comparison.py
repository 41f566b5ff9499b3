"""The comparison of methods: what follows from its rows, its plot and its tables.

Everything here works on the content of comparison.json (docs/contracts.md); nothing is trained or measured.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from stepdistill.eval.names import DIVERSITY, METRICS, metric_name, metric_text
from stepdistill.eval.pictures import panels_plot
from stepdistill.methods import FAMILIES
from stepdistill.progress import counted

NFES = (1, 2, 4, 8)
PHASES = (
    "critic_warmup",
    "regression_steps",
    "stage_steps",
    "phase_steps",
    "tangent_warmup",
    "dynamic_steps",
    "warmup",
)
"""The methods' keys that count steps of training: they grow with a run's budget."""
GAP_BAR, ADAPTER_BAR, BEST_BARS = 0.9, 1.1, {1: 1.5, 2: 1.2, 4: 1.0}
FD, TARGET = "fd_classifier", 5.5
REACHED = f"Evaluations to FD {TARGET:g}"
Entry = dict[str, Any]
"""A row of the comparison."""


def conclude(content: dict[str, Any], notes: Mapping[str, str]) -> dict[str, Any]:
    """Sort the rows, and add what follows from them: gaps, means over seeds, and which bars are met.

    Args:
        notes: explanations by a student's name, put beside its rows.
    """
    rows = content["rows"]
    rows.sort(key=_order)
    teachers = [row["metrics"][FD] for row in rows if row["role"] == "teacher"]
    teacher, solvers = (teachers[0] if teachers else None), best_solvers(rows)
    means = {name: statistics.fmean(values) for name, values in _by_name(rows, FD).items()}
    for row in students(rows):
        fd, solver = row["metrics"][FD], solvers.get(row["nfe"])
        row["ratio"] = fd / teacher if teacher else None
        row["gap_closed"] = gap(fd, solver, teacher)
        row["bars"] = _bars(row, means[row["name"]], solver, teacher)
        row["note"] = notes.get(row["name"])
    content["seeds"] = []
    for name, values in _by_name(rows, FD).items():
        if len(values) > 1:
            seeds = sorted(row["training"]["seed"] for row in students(rows) if row["name"] == name)
            found = {metric: _by_name(rows, metric).get(name, []) for metric in METRICS}
            whole = {metric: values for metric, values in found.items() if len(values) == len(seeds)}
            mean = {metric: statistics.fmean(values) for metric, values in whole.items()}
            std = {metric: statistics.stdev(values) for metric, values in whole.items()}
            content["seeds"].append({"name": name, "seeds": seeds, "mean": mean, "std": std})
    content["bars"] = []
    for steps, target in BEST_BARS.items():
        at = {name: fd for name, fd in means.items() if name.endswith(f"@{steps}")}
        if at and teacher:
            best = min(at, key=at.__getitem__)
            bar = f"best at {counted(steps, 'step')}: FD at most {target:g}x the teacher's"
            content["bars"].append(
                {"name": best, **_bar(bar, at[best] / teacher, target, at[best] <= target * teacher)}
            )
    return content


def gap(fd: float, solver: float | None, teacher: float | None) -> float | None:
    """The share that a student closes of the way from the best stock solver to the teacher; None without one."""
    if solver is None or teacher is None or solver <= teacher:
        return None
    return (solver - fd) / (solver - teacher)


def best_solvers(rows: Sequence[Entry]) -> dict[int, float]:
    """The lowest FD of a stock solver by NFE."""
    found: dict[int, float] = {}
    for row in rows:
        if row["role"] == "solver":
            found[row["nfe"]] = min(row["metrics"][FD], found.get(row["nfe"], float("inf")))
    return dict(sorted(found.items()))


def students(rows: Sequence[Entry]) -> list[Entry]:
    return [row for row in rows if row["role"] == "student"]


def base(row: Entry) -> str:
    """A student's name without its number of steps."""
    return row["name"].partition("@")[0]


def as_trained(row: Entry) -> bool:
    """Whether a student runs in the number of steps it was trained for."""
    return row["role"] == "student" and row["steps"] == row["training"]["steps"]


def family(row: Entry) -> str:
    return next((name for name, methods in FAMILIES.items() if row["training"]["method"] in methods), "Other")


def _order(row: Entry) -> tuple:
    """The teacher with guidance, then without; solvers by NFE; students by family, name, steps and seed."""
    if row["role"] == "student":
        return 2, [*FAMILIES, "Other"].index(family(row)), base(row), row["steps"], row["training"]["seed"]
    role = ("teacher", "solver").index(row["role"])
    return role, row["nfe"] if role else -row["nfe"], row["name"], 0, 0


def _by_name(rows: Sequence[Entry], metric: str) -> dict[str, list[float]]:
    """Values of every student over its seeds."""
    found: dict[str, list[float]] = {}
    for row in students(rows):
        if metric in row["metrics"]:
            found.setdefault(row["name"], []).append(row["metrics"][metric])
    return found


def _bars(row: Entry, fd: float, solver: float | None, teacher: float | None) -> list[Entry]:
    """The bars for a student at the steps it was trained for; ``fd`` is its mean over the seeds."""
    if teacher is None or not as_trained(row):
        return []
    if row["steps"] > max(NFES):
        bar = f"FD at most {ADAPTER_BAR:g}x the teacher's at half the NFE"
        return [_bar(bar, fd / teacher, ADAPTER_BAR, fd <= ADAPTER_BAR * teacher)]
    closed = gap(fd, solver, teacher)
    bar = f"closes {100 * GAP_BAR:g} % of the best stock solver's gap to the teacher"
    return [] if closed is None else [_bar(bar, closed, GAP_BAR, closed >= GAP_BAR)]


def _bar(bar: str, value: float, target: float, passed: bool) -> Entry:
    return {"bar": bar, "value": value, "target": target, "passed": passed}


def plot(content: dict[str, Any]) -> Image.Image:
    """FD against NFE, means over seeds: a panel for each family, a line for each student, a ring where trained."""
    points: dict[str, dict[str, dict[int, list[float]]]] = {}
    for row in students(content["rows"]):
        line = points.setdefault(family(row), {}).setdefault(base(row), {})
        line.setdefault(row["nfe"], []).append(row["metrics"][FD])
    panels = {
        name: {line: [(nfe, statistics.fmean(fds)) for nfe, fds in sorted(at.items())] for line, at in lines.items()}
        for name, lines in points.items()
    }
    teachers = [row for row in content["rows"] if row["role"] == "teacher"][:1]
    levels = {f"teacher, NFE {row['nfe']}": row["metrics"][FD] for row in teachers}
    if FD in content["floor"]:
        levels["real images"] = content["floor"][FD]
    solvers = {"best stock solver": list(best_solvers(content["rows"]).items())}
    trained = {base(row): row["nfe"] for row in content["rows"] if as_trained(row)}
    return panels_plot(panels, metric_name(FD, content["samples"]), levels, solvers, trained)


def short_table(content: dict[str, Any]) -> str:
    """One line for each student at the steps it was trained for, with its FD at every NFE; means over seeds."""
    n, rows = content["samples"], content["rows"]
    wanted = ("kid_enet", "precision", "recall", "accuracy", DIVERSITY[0])
    shown = [metric for metric in wanted if any(metric in row["metrics"] for row in rows)]
    header = ["", "NFE", metric_name(FD, n), *(f"at NFE {nfe}" for nfe in NFES)]
    header += [*(metric_name(metric, n) for metric in shown), "Gap closed", "Evaluations", REACHED, "Trained", "Bar"]
    lines: list[list[Any]] = []
    for row in (row for row in rows if row["role"] == "teacher"):
        cells = [_text(rows, row, metric) for metric in shown]
        lines.append(
            [f"{row['name']}, {row['steps']} steps", row["nfe"], _text(rows, row, FD), *"––––", *cells, *"–––––"]
        )
    if solvers := best_solvers(rows):
        at = [metric_text(FD, solvers.get(nfe)) for nfe in NFES]
        lines.append(["best stock solver", "–", "–", *at, *"–" * len(shown), *"–––––"])
    for name in dict.fromkeys(base(row) for row in rows if as_trained(row)):
        mine = {row["nfe"]: row for row in students(rows) if base(row) == name}
        row = next(row for row in mine.values() if as_trained(row))
        at = [_mean(rows, mine[nfe], FD) if nfe in mine else "–" for nfe in NFES]
        cells = [_mean(rows, row, metric) for metric in shown]
        lines.append(
            [f"**{name}**", row["nfe"], f"**{_mean(rows, row, FD)}**", *at, *cells, *_cost(row, rows), _verdict(row)]
        )
    if content["floor"]:
        floor = {"role": "floor", "metrics": content["floor"]}
        cells = [_text(rows, floor, metric) for metric in shown]
        lines.append(["real test images (the floor)", "–", _text(rows, floor, FD), *"––––", *cells, *"–––––"])
    return "\n".join([*_table(header, lines), "", _stated(content)])


def first_table(content: dict[str, Any]) -> str:
    """README's table: the teacher, the best solver and the best student at each of 1, 2 and 4 passes, real images."""
    rows, columns = content["rows"], {"recall": "Recall", "accuracy": "Class accuracy"}
    lines = []

    def add(title: str, passes: int | str, row: Entry) -> None:
        lines.append([title, passes, *(_mean(rows, row, metric) for metric in (FD, *columns))])

    teacher = next(row for row in rows if row["role"] == "teacher")
    add(f"teacher, {teacher['steps']} steps with guidance", teacher["nfe"], teacher)
    for bar in content["bars"]:
        best = next(row for row in students(rows) if row["name"] == bar["name"])
        solvers = [row for row in rows if row["role"] == "solver" and row["nfe"] == best["nfe"]]
        solver = min(solvers, key=lambda row: row["metrics"][FD])
        add("best stock solver", solver["nfe"], solver)
        add(f"**best student**: [{base(best)}](docs/methods.md)", best["nfe"], best)
    add("real test images", "–", {"role": "floor", "name": "", "metrics": content["floor"]})
    return "\n".join(_table(["", "Passes", metric_name(FD, content["samples"]), *columns.values()], lines))


def choices(content: dict[str, Any], imaged: Sequence[str]) -> str:
    """The table of docs/choosing.md: the three best methods at each number of passes, by FD, without and with images.

    Args:
        imaged: names of students, without their steps, whose recipes read real images.
    """
    rows, lines = content["rows"], []
    for nfe in NFES:
        for title, with_images in (("none", False), ("yes", True)):
            found = {row["name"]: row for row in students(rows) if row["nfe"] == nfe and row["steps"] == nfe}
            found = {name: row for name, row in found.items() if (base(row) in imaged) == with_images}
            best = sorted(found.values(), key=lambda row: statistics.fmean(_by_name(rows, FD)[row["name"]]))[:3]
            cells = []
            for row in best:
                trained = row["training"]["steps"]
                other = "" if as_trained(row) else f" (trained for {trained})"
                cells.append(f"{base(row)}{other}: {_mean(rows, row, FD)}, {_mean(rows, row, 'recall')}")
            lines.append([nfe, title, *cells, *"–" * (3 - len(cells))])
    return "\n".join(_table(["Passes", "Real images", "Best", "Second", "Third"], lines))


def page(content: dict[str, Any], others: Sequence[dict[str, Any]] = (), listed: Sequence[str] = ()) -> str:
    """What docs/comparison.md shows between its markers: a line for each student, then every row with all of it.

    Args:
        others: comparisons of other budgets.
        listed: the students of all recipes; of those without a row the page says so.
    """
    n, rows = content["samples"], content["rows"]
    shown = [metric for metric in METRICS if any(metric in row["metrics"] for row in rows)]
    names = [metric_name(metric, n) for metric in shown]
    header = ["", "Seed", "Steps", "NFE", *names, "Gap closed", "Evaluations", REACHED, "Trained", "Peak MiB", "Bar"]
    text = [short_table(content), ""]
    text += [f"![{metric_name(FD, n)} against NFE, rings: the steps trained for](../assets/benchmarks/comparison.png)"]
    text += [""]
    for bar in content["bars"]:
        text.append(f"- {bar['bar']}: **{_met(bar)}** by {bar['name']}, {bar['value']:.2f}x")
    known = {base(row) for row in students(rows)} | {one["name"] for one in content["failures"]}
    for name in listed:
        if name not in known:
            text.append(f"- **{name}** is not measured yet: `python scripts/compare.py --methods {name}`")
    sections: dict[str, list[Entry]] = {}
    titles = {"teacher": "Teacher", "solver": "Stock solvers on the teacher"}
    for row in rows:
        sections.setdefault(titles.get(row["role"]) or family(row), []).append(row)
    for title, entries in sections.items():
        lines = [[*_line(row), *(_text(rows, row, metric) for metric in shown), *_end(row)] for row in entries]
        text += ["", f"## {title}", "", *_table(header, lines)]
        if said := {row["name"]: row["note"] for row in entries if row.get("note")}:
            text += ["", *(f"- **{name}**: {note}" for name, note in said.items())]
    if content["seeds"]:
        lines = []
        for entry in content["seeds"]:
            pairs = [(entry["mean"].get(metric), entry["std"].get(metric)) for metric in shown]
            cells = [_spread(rows, metric, *pair) for metric, pair in zip(shown, pairs, strict=True)]
            lines.append([entry["name"], len(entry["seeds"]), *cells])
        text += ["", "## Over seeds: mean ± standard deviation", "", *_table(["", "Seeds", *names], lines)]
    for other in others:
        text += ["", f"## With {other['budget']:g} times the budget", "", *_seeds(other)]
    for one in (one for each in (content, *others) for one in each["failures"]):
        text += ["", f"**Failed**: {one['name']} ({one['recipe']}, seed {one['seed']}): {one['error']}"]
    text += ["", "## How to read it", ""]
    if content["floor"]:
        floor = {"role": "floor", "metrics": content["floor"]}
        found = [f"{name} {_text(rows, floor, metric)}" for name, metric in zip(names, shown, strict=True)]
        text += [f"Real test images: {', '.join(found)}.", ""]
    text += [
        "Names in bold: the number of steps that the student was trained for. FD and KID are distances to real images, "
        "lower is better; diversity is the variance of the features within a class, as a ratio to the guided "
        "teacher's. Gap closed: (best stock solver at that NFE - student) / (that solver - teacher), in FD-classifier. "
        "An evaluation is one row through one network once, in training. A student is measured ten times on its way; "
        f"{REACHED} is when its FD was first as low as that, – in rows made before these measurements. "
        "Trained: the student's trainable parameters. The peak is that of training and of these measurements.",
        "",
        _stated(content),
        "",
    ]
    return "\n".join(text)


def _seeds(content: dict[str, Any]) -> list[str]:
    """FD of every student at the steps it was trained for, a column for each training seed."""
    rows = [row for row in content["rows"] if as_trained(row)]
    seeds = sorted({row["training"]["seed"] for row in rows})
    found = {(row["name"], row["training"]["seed"]): row["metrics"][FD] for row in rows}
    lines = [
        [name, *(metric_text(FD, found.get((name, seed))) for seed in seeds)]
        for name in dict.fromkeys(row["name"] for row in rows)
    ]
    title = metric_name(FD, content["samples"])
    return [*_table(["", *(f"{title}, seed {seed}" for seed in seeds)], lines), "", _stated(content)]


def _line(row: Entry) -> list[Any]:
    seed = row["training"]["seed"] if row["role"] == "student" else "–"
    return [f"**{row['name']}**" if as_trained(row) else row["name"], seed, row["steps"], row["nfe"]]


def _end(row: Entry) -> list[str]:
    if row["role"] != "student":
        return ["–"] * 6
    memory = row["training"]["peak_memory_mib"]
    return [*_cost(row, [row]), f"{memory:.0f}" if memory else "–", _verdict(row)]


def _verdict(row: Entry) -> str:
    return ", ".join(map(_met, row["bars"])) or "–"


def _cost(row: Entry, rows: Sequence[Entry]) -> list[str]:
    """Gap closed, evaluations, those until FD is low enough (the mean of a name's ``rows``), trainable parameters."""
    closed, spent = row["gap_closed"], row["training"]["evaluations"]
    share = "–" if closed is None else f"{100 * closed:.0f} %"
    curves = [one["training"].get("curve") for one in students(rows) if one["name"] == row["name"]]
    reached = [until(curve) for curve in curves if curve]
    there = [number for number in reached if number is not None]
    cell = "–"
    if reached and as_trained(row):
        cell = "not reached" if len(there) < len(reached) else _thousands(statistics.fmean(there))
    trained = f"{row['training']['trainable_parameters'] / 1e6:.2f} M"
    return [share, _thousands(spent) if spent else "–", cell, trained]


def until(curve: Sequence[tuple[int, float]]) -> int | None:
    """The evaluations of a run when its FD was first measured at :data:`TARGET` or below; None if it never was."""
    return next((evaluations for evaluations, fd in curve if fd <= TARGET), None)


def _thousands(number: float) -> str:
    return f"{number / 1000:.0f} k"


def _met(bar: Entry) -> str:
    return "met" if bar["passed"] else "missed"


def _mean(rows: Sequence[Entry], row: Entry, metric: str) -> str:
    """A student's metric over its seeds."""
    values = _by_name(rows, metric).get(row["name"], [])
    if len(values) < 2:
        return _text(rows, row, metric)
    return _spread(rows, metric, statistics.fmean(values), statistics.stdev(values))


def _text(rows: Sequence[Entry], row: Entry, metric: str) -> str:
    return _spread(rows, metric, row["metrics"].get(metric), None)


def _spread(rows: Sequence[Entry], metric: str, mean: float | None, std: float | None) -> str:
    """``mean ± std`` as people are shown it, a diversity as the ratio to the first teacher's."""
    if metric in DIVERSITY:
        teachers = [row["metrics"][metric] for row in rows if row["role"] == "teacher" and metric in row["metrics"]]
        if not teachers:
            return "–"
        mean, std = (None if value is None else value / teachers[0] for value in (mean, std))
    return metric_text(metric, mean) + ("" if std is None else f" ± {metric_text(metric, std)}")


def _table(header: Sequence[str], lines: Sequence[Sequence[Any]]) -> list[str]:
    rule = "|" + "|".join(" ---: " if index else " :--- " for index in range(len(header))) + "|"
    return ["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(map(str, line)) + " |" for line in lines)]


def _stated(content: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    budget = "" if content["budget"] == 1 else f", {content['budget']:g} times the recipes' budget"
    return (
        f"Protocol {content['protocol']}, N = {content['samples']}, seed {content['seed']}{budget}, "
        f"{content['device']}; {versions}."
    )
