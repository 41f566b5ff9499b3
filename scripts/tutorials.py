"""Run the tutorials' commands as a user does, and write into their pages what the screen said, with pictures.

    pip install -e '.[eval,demo]' playwright
    python scripts/tutorials.py --chromium /usr/bin/chromium      # or some of: tutorial tutorial_flux notebook

A page is its own script. A command in a ``bash`` block is run if a ``text`` block follows it, which then holds the
screen; keys in a ``yaml`` block are set in the recipe that ``init`` has written last; a picture's line is where it is
taken. The pipelines are stand-ins of random weights, in a temporary folder that the pages share: ``tutorial_comfyui``
goes on with the run of ``tutorial``. notebook.md is written whole, from docs/examples/quickstart.ipynb and what its
cells show.
"""

import argparse
import ast
import contextlib
import functools
import html
import io
import json
import os
import re
import sys
import tempfile
from code import InteractiveInterpreter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from check_pages import chromium
from PIL import Image
from walk import DRAWN, ROOT, Step, changed, run, screen, stand_in, without_places

DOCS = ROOT / "docs"
NOTEBOOK = DOCS / "examples" / "quickstart.ipynb"
PICTURES = "pictures/tutorials"
BLOCK = re.compile(rf"^```(\w+)\n(.*?)^```$|^!\[[^\]]*\]\({PICTURES}/([\w-]+)\.png\)$", re.DOTALL | re.MULTILINE)
PAGES = ("tutorial", "tutorial_flux", "tutorial_comfyui", "tutorial_gpus")
WIDTH, HEIGHT = 960, 620
FIRST, LAST, AFTER = 12, 30, 2
"""Lines of a screen that are kept: of its begin, of its end, and behind the bar of the training."""
SOURCES = {
    "sdxl-report": "runs/sdxl/report/index.html",
    "sdxl-grid": "grid.png",
    "flux-preview": "runs/flux/previews/*.png",
    "comfyui-workflow": "comfyui/comfyui/workflow.json",
    "gpus-preview": "runs/gpus/previews/*.png",
}
"""A picture, and what it is taken of: a picture, the newest of several, a page, or a workflow's nodes."""
SDXL = {"teacher.pipeline": "./sdxl", "teacher.precision": "fp32"}
"""For the notebook, which asks about SDXL and downloads nothing here."""


def filled(text: str, ran: Callable[[str], list[str]], done: Callable[[str, str], None]) -> str:
    """A page with its screens.

    Args:
        text: of the page.
        ran: runs a line, a command and its comment, and returns the lines of its screen.
        done: called with each other block in its order: ``yaml`` and its text, or ``picture`` and its name.
    """
    parts, at, commands = [], 0, []
    for found in BLOCK.finditer(text):
        language, inside, picture = found.groups()
        parts.append(text[at : found.start()])
        at, shown = found.end(), found[0]
        if language == "bash":
            commands = [line for line in inside.splitlines() if line.strip()]
        elif language == "text" and commands:
            shown = "\n".join(["```text", *(line for command in commands for line in ran(command)), "```"])
        elif picture or language == "yaml":
            done("picture" if picture else "yaml", picture or inside)
        if language != "bash":
            commands = []
        parts.append(shown)
    return "".join([*parts, text[at:]])


def dotted(tree: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested keys by their dotted names; a list or a value is a leaf."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= dotted(value, f"{before}{key}.") if isinstance(value, dict) else {before + key: value}
    return leaves


def shortened(lines: Sequence[str]) -> list[str]:
    """The lines that are kept, with a line that counts those left out between them; no empty ones at the ends."""
    lines = "\n".join(lines).strip("\n").splitlines()
    bars = {
        number + more for number, line in enumerate(lines) if line.startswith("train ━") for more in range(AFTER + 1)
    }
    kept, last = [], -1
    for number, line in enumerate(lines):
        if FIRST <= number < len(lines) - LAST and number not in bars:
            continue
        left_out = number - last - 1
        kept += lines[last + 1 : number] if left_out == 1 else [f"... ({left_out} lines)"] if left_out else []
        kept.append(line)
        last = number
    return kept


def small(picture: Image.Image, file: Path, colours: int) -> None:
    """Write a picture of few colours, at most ``WIDTH`` pixels across; one of a few pixels is enlarged."""
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = picture.convert("RGB")
    if picture.width > WIDTH:
        picture = picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)), Image.Resampling.LANCZOS)
    if times := WIDTH // (4 * picture.width):
        picture = picture.resize((times * picture.width, times * picture.height), Image.Resampling.NEAREST)
    picture.quantize(colours, dither=Image.Dither.NONE).save(file, optimize=True)


def photograph(browser: Any, address: str, file: Path, whole: bool = False) -> None:
    """A page's first screen, or all of it, as a small picture."""
    page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
    page.goto(address)
    if not whole:
        page.wait_for_function(DRAWN)
    taken = page.locator("body").screenshot() if whole else page.screenshot()
    small(Image.open(io.BytesIO(taken)), file, 24 if whole else 128)  # a whole page is text for the most part
    page.close()


def nodes(workflow: Mapping[str, Any]) -> str:
    """A page that draws a workflow: a box for each node, in columns from left to right, with its values and inputs."""
    depth: dict[str, int] = {}

    def column(name: str) -> int:
        if name not in depth:
            inputs = [value[0] for value in workflow[name]["inputs"].values() if isinstance(value, list)]
            depth[name] = 1 + max(map(column, inputs), default=-1)
        return depth[name]

    columns: dict[int, list[str]] = {}
    for name, node in workflow.items():
        rows = ""
        for key, value in node["inputs"].items():
            said = f"from {workflow[value[0]]['class_type']}" if isinstance(value, list) else str(value)
            rows += f"<tr><td>{html.escape(key)}<td>{html.escape(said)}"
        box = f"<table><caption>{html.escape(node['class_type'])}</caption>{rows}</table>"
        columns.setdefault(column(name), []).append(box)
    style = (
        "body{margin:12px;display:flex;gap:14px;font:11px sans-serif;background:#fff}"
        "div{display:flex;flex-direction:column;gap:12px;flex:1;min-width:0}"
        "table{border:1px solid #888;border-radius:6px;width:100%;padding:4px}"
        "caption{font-weight:bold;text-align:left;padding:2px}"
        "td{vertical-align:top;white-space:nowrap}td+td{color:#246;white-space:normal;overflow-wrap:anywhere}"
    )
    boxes = "".join(f"<div>{''.join(columns[number])}</div>" for number in sorted(columns))
    return f"<!doctype html><meta charset=utf-8><style>{style}</style>{boxes}"


def take(name: str, folder: Path, browser: Any) -> None:
    """Take the picture of that name."""
    *_, source = sorted(folder.glob(SOURCES[name]))
    file = DOCS / PICTURES / f"{name}.png"
    if source.suffix == ".png":
        return small(Image.open(source), file, 128)
    if source.suffix == ".json":
        drawn = folder / "workflow.html"
        drawn.write_text(nodes(json.loads(source.read_text(encoding="utf-8"))), encoding="utf-8")
        return photograph(browser, drawn.as_uri(), file, whole=True)
    return photograph(browser, source.as_uri(), file)


def tutorial(name: str, folder: Path, browser: Any) -> None:
    """Run a page's commands in ``folder`` and write the page again."""
    recipe = None

    def ran(line: str) -> list[str]:
        nonlocal recipe
        command, _, comment = map(str.strip, line.partition("  #"))
        seen = run(Step("", "", command), folder)
        print(f"$ {command}\n" + "\n".join(seen.lines) + f"\n[{seen.seconds:.0f} s, exit code {seen.code}]", flush=True)
        if seen.code != (2 if "exit code 2" in comment else 0):
            sys.exit(f"{name}: {command}: exit code {seen.code}")
        if command.startswith("stepdistill init "):
            recipe = folder / command.split()[-1]
        return shortened(seen.lines)

    def done(kind: str, text: str) -> None:
        if kind == "picture":
            take(text, folder, browser)
        elif recipe is not None:
            keys = dotted(yaml.safe_load(text))
            stated = changed(yaml.safe_load(recipe.read_text(encoding="utf-8")), keys)
            recipe.write_text(yaml.safe_dump(stated, sort_keys=False), encoding="utf-8")

    page = DOCS / f"{name}.md"
    page.write_text(filled(page.read_text(encoding="utf-8"), ran, done), encoding="utf-8")


class Cells(InteractiveInterpreter):
    """Runs cells as a notebook does; an error ends the script."""

    def showtraceback(self) -> None:
        raise  # it is called where the error is handled

    def show(self, source: str) -> tuple[str, Any]:
        """Run a cell; returns what it printed, and the value of the last expression that stands alone."""
        out, values = io.StringIO(), [None]
        with contextlib.redirect_stdout(out), mock.patch("sys.displayhook", values.append):
            for statement in ast.parse(source).body:
                self.runsource(f"{ast.get_source_segment(source, statement)}\n", NOTEBOOK.name)
        return out.getvalue(), values[-1]


def shown(name: str, value: Any, folder: Path, browser: Any) -> Iterator[str]:
    """The lines for a cell's value: a picture of what a notebook shows of it."""
    file = DOCS / PICTURES / f"notebook-{name}.png"
    if hasattr(value, "_repr_png_"):
        small(Image.open(io.BytesIO(value._repr_png_())), file, 128)
    elif hasattr(value, "_repr_html_"):
        page = folder / "cell.html"
        body = f"<!doctype html><meta charset=utf-8><body style='font:14px sans-serif;margin:8px'>{value._repr_html_()}"
        page.write_text(without_places(body, folder), encoding="utf-8")
        photograph(browser, page.as_uri(), file, whole=True)
    else:
        return
    yield f"![What the notebook shows: {name}]({PICTURES}/{file.name})"


def notebook(folder: Path, browser: Any) -> None:
    """Run the notebook's cells in ``folder`` and write their page."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    parts: list[str] = []
    interpreter = Cells()
    with contextlib.chdir(folder):
        for cell in cells:
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                parts.append(source)
                continue
            parts.append(f"```python\n{source}\n```")
            tags = cell["metadata"].get("tags", ())
            if "install" in tags:
                continue
            said, value = interpreter.show(source)
            if "parameters" in tags:
                interpreter.locals["sdxl_settings"] = [f"{key}={stated}" for key, stated in SDXL.items()]
            if said:
                lines = shortened(screen(without_places(said, folder).replace("\n", "\r\n")))
                parts.append("\n".join(["```text", *lines, "```"]))
            parts += shown(cell["id"], value, folder, browser)
    first = (
        "This is [the notebook](examples/quickstart.ipynb) with what its cells show, run on two CPU cores by\n"
        "`python scripts/tutorials.py notebook`. In its last cell a stand-in of random weights has the place of SDXL."
        "\n\n<!-- colab -->"
    )
    (DOCS / "notebook.md").write_text(
        "\n\n".join([parts[0].replace("# A", "# Notebook: a", 1), first, *parts[1:]]) + "\n", encoding="utf-8"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", choices=[[], *PAGES, "notebook"], help="default: all")
    parser.add_argument("--chromium", help="an installed browser")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as place, chromium(arguments.chromium) as browser:
        folder = Path(place)
        os.environ["STEPDISTILL_CACHE"] = str(folder / "cache")
        stand_in(folder)
        from pipeline import checkpoints, tiny  # behind stand_in, which says where they are
        from stepdistill.pipeline.folder import save_pipeline

        save_pipeline(tiny.tiny_flux(), folder / "flux-dev")
        save_pipeline(checkpoints.tiny_sdxl(), folder / "sdxl")
        for name in arguments.pages or (*PAGES, "notebook"):
            (functools.partial(tutorial, name) if name in PAGES else notebook)(folder, browser)


if __name__ == "__main__":
    main()
