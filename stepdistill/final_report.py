"""The report that a run writes about its student when it is done."""

from pathlib import Path

from stepdistill.bench import bench
from stepdistill.errors import InputError
from stepdistill.eval.protocol import load_protocol
from stepdistill.exporting.card import fill_in_quality
from stepdistill.fitting import check_fit
from stepdistill.progress import WorkProgress, say
from stepdistill.recipe import Recipe
from stepdistill.session import Session


def can_report(session: Session) -> bool:
    """Whether a report is wanted, and the embedded protocol measures such a pipeline: else a line says what does."""
    recipe = session.recipe
    if not recipe.report.samples:
        return False
    try:
        check_fit(session.trace, load_protocol(), recipe.teacher.pipeline)
    except InputError as error:
        say(f"no report at the end: {error}")
        return False
    return True


def write_report(folder: Path, recipe: Recipe) -> Path:
    """Measure the exported student, and put the table on its card."""
    wanted, out = recipe.report, folder / "report"
    with WorkProgress() as progress:
        report = bench(
            [folder],
            wanted.steps,
            wanted.samples,
            out=out,
            networks=wanted.networks,
            solvers=wanted.solvers,
            progress=progress,
        )
    fill_in_quality(folder / "export" / "README.md", report.to_markdown())
    for verdict in report.verdict:
        say(verdict.text)
    return out
