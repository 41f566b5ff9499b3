"""Rows and a report as the tests of reports state them."""

import copy

import torch

from stepdistill.eval.names import METRICS
from stepdistill.eval.report import Report, Row
from stepdistill.eval.verdict import verdict
from stepdistill.sampling.image_grid import image_grid


def row(name, role, steps, fd, guidance=1.0, **changes):
    metrics = dict(zip(METRICS, (fd, 0.001, 3 * fd, 0.002, 0.8, 0.7, 0.93, 2 * fd, 4 * fd), strict=True))
    cost = {"seconds_per_image": 0.0123, "peak_memory_mib": 512.0, "parameters": 4_600_000}
    nfe = steps * (1 if guidance == 1 else 2)
    return Row(name, role, steps, nfe, guidance, 1000, metrics, cost, **changes)


TEACHER = row("fashion-dit w=1.5", "teacher", 50, 10.0, guidance=1.5)
SOLVERS = [row("DDIM", "solver", 4, 60.0), row("UniPC w=1.5", "solver", 2, 30.0, guidance=1.5)]


PIXEL = image_grid(torch.zeros(1, 1, 1, 1, dtype=torch.uint8), columns=1)


def a_report(*students, **changes):
    rows = copy.deepcopy([*students, TEACHER, *SOLVERS])
    verdicts = [verdict(student, TEACHER, SOLVERS) for student in students if student.steps == 4]
    stated = {
        "protocol": "fashion-v1",
        "seed": 0,
        "command": "stepdistill bench runs/<a> & b",
        "versions": {"torch": "2.6"},
        "device": "cpu, 2 threads",
        "floor": dict.fromkeys(METRICS, 0.5),
        "verdict": verdicts,
    }
    return Report(**(stated | {"rows": rows} | changes))


def measured(name, role, steps, fd, half, samples=20):
    """A row whose 95 % interval is ``fd`` plus or minus ``half``."""
    found = row(name, role, steps, fd, diagnostics={"fd_classifier_error": half / 1.96})
    found.samples = samples
    return found
