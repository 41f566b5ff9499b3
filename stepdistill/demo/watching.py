"""What the page of ``stepdistill watch`` shows of a run while it trains: state, newest preview, curves, last numbers.

Nothing here knows the page's library; :mod:`stepdistill.demo.page` puts it into a browser.
"""

import html
from contextlib import suppress
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from stepdistill.errors import InputError
from stepdistill.eval.pictures import png_data_uri, training_plot
from stepdistill.files import json_lines, read_json
from stepdistill.progress import in_short
from stepdistill.training.layout import RunFolder
from stepdistill.training.runs import standing

LINES = 12
"""Of metrics.jsonl, the newest."""


def check_run(folder: str | Path) -> None:
    """Raises InputError unless a run has begun in ``folder``."""
    run = RunFolder(folder)
    if not (run.recipe.is_file() and (run.heartbeat.is_file() or run.has_run)):
        raise InputError(f"watch: expected a run folder with recipe.yaml and heartbeat.json, found {folder} without")


def watch_html(folder: str | Path) -> str:
    """The run in ``folder`` as it stands now, as HTML."""
    run = RunFolder(folder)
    state, lines = standing(run.path), json_lines(run.metrics)
    doing = ""
    with suppress(InputError):  # between two writes, or of a run of an earlier version
        doing = str(read_json(run.heartbeat).get("doing", ""))
    best = "" if state.best is None else f" · best {state.metric} {state.best:.4g}"
    words = f"{state.state}{f': {doing}' if doing else ''} · step {state.step} of {state.steps}{best}"
    parts = [
        f"<h2>{html.escape(run.path.resolve().name)}</h2>",
        f'<p class="state">{html.escape(words)}</p><progress max="{state.steps}" value="{state.step}"></progress>',
        _preview(run),
    ]
    if (curves := training_plot(lines)) is not None:
        parts.append(f'<h3>Curves</h3><img src="{png_data_uri(curves)}" alt="losses, gradient norms and drift">')
    if lines:
        log = "\n".join(f"{line['step']:>7}  {in_short(line)}" for line in lines[-LINES:])
        parts.append(f"<h3>Last numbers</h3><pre>{html.escape(log)}</pre>")
    return f'<div class="watch">{"".join(parts)}</div>'


def _preview(run: RunFolder) -> str:
    """The newest preview that is whole."""
    for path in sorted(run.previews.glob("[0-9]*.png"), reverse=True):
        with suppress(OSError, UnidentifiedImageError), Image.open(path) as picture:  # it may be half written
            uri = png_data_uri(picture.copy())
            title = f"Preview after step {int(path.stem.partition('_')[0])}: teacher, student and critic, row by row"
            return f'<h3>{title}</h3><img src="{uri}" alt="{title}">'
    return "<p>No preview yet.</p>"
