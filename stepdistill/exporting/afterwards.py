"""What a person does with a run that has ended: three sentences on it, where things are, and what to type."""

import base64
import html
import shlex
import textwrap
from pathlib import Path

from stepdistill.errors import InputError
from stepdistill.eval.report import read_report
from stepdistill.eval.summary import sentences
from stepdistill.exporting.card import PLACE, TEACHER
from stepdistill.files import read_json, read_text
from stepdistill.pipeline.exports import FACTS
from stepdistill.progress import COLUMNS
from stepdistill.training.layout import RunFolder


def afterwards(run: str | Path) -> str:
    """The text at the end of ``stepdistill train``; "" for a run without an export.

    Args:
        run: its folder.
    """
    folder = RunFolder(run)
    if not (folder.export / FACTS).is_file():
        return ""
    steps = int(read_json(folder.export / FACTS)["steps"])
    paragraphs = [textwrap.fill(" ".join(_summary(folder)), COLUMNS)]
    if code := snippet(folder.export):
        paragraphs.append("In Python:\n\n" + "\n".join(f"    {line}".rstrip() for line in code))
    name = shlex.quote(str(run))
    commands = [
        (f"stepdistill sample {name} --steps {steps} --out grid.png", "pictures"),
        (f"stepdistill demo {name}", "student and teacher in a browser"),
        ("stepdistill export -h", "ComfyUI, half precision, an upload to the hub"),
    ]
    if (run_logs := folder.path / "tensorboard").is_dir():
        commands.append((f"tensorboard --logdir {shlex.quote(str(run_logs))}", "curves and previews"))
    paragraphs.append("Next:\n\n" + "\n".join(f"    # {what}\n    {command}" for command, what in commands))
    return "\n\n".join(filter(None, paragraphs))


def as_html(run: str | Path) -> str:
    """What a notebook shows of a run: its newest preview and the text of :func:`afterwards`."""
    folder = RunFolder(run)
    previews = sorted(folder.previews.glob("[0-9]*.png"))
    picture = ""
    if previews:
        coded = base64.b64encode(previews[-1].read_bytes()).decode()
        alt = "Rows of pictures from the same noise: teacher, student and critic"
        picture = f'<img src="data:image/png;base64,{coded}" alt="{alt}" style="max-width:100%">'
    text = f'<pre style="white-space:pre-wrap">{html.escape(afterwards(run))}</pre>'
    return f"<p>{html.escape(str(run))}</p>{picture}{text}"


def snippet(export: Path) -> list[str]:
    """The lines of Python on an export's card, with the place of the export; none where the card has none."""
    card = export / "README.md"
    code = read_text(card).partition("```python\n")[2].partition("```")[0] if card.is_file() else ""
    teacher = str(read_json(export / FACTS)["teacher"])
    return code.replace(PLACE, str(export)).replace(TEACHER, teacher).strip().splitlines()


def _summary(folder: RunFolder) -> list[str]:
    try:
        return sentences(read_report(folder.report))
    except InputError:  # there is none
        return []
