"""Walk the first hour as a new user does, and write docs/walk.md: each command, its seconds, and what the screen said.

    pip install -e '.[eval,demo]' playwright
    python scripts/walk.py --chromium /usr/bin/chromium

Every command is a process of its own on a terminal of 80 columns, in a temporary folder with an empty cache; all but
the installation are without a network. The own pipeline is a stand-in: SDXL with random weights, 70 thousand of them,
in one file of the published layout. Pages are opened in a headless Chromium, and their first screens kept in
docs/pictures/walk. Without gradio those of ``watch`` and ``demo`` are left out.
"""

import argparse
import fcntl
import functools
import importlib.util
import io
import os
import platform
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from check_pages import chromium
from PIL import Image

import stepdistill

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "walk.md"
PICTURES = "pictures/walk"
"""Of the page's own folder."""
VIEW = {"width": 1180, "height": 840}
DRAWN = """document.querySelector('.frame img, .watch img, .slider') && !document.querySelector('.frame:empty')
  && [...document.images].every(image => image.complete)"""
"""True in a page of ours whose pictures are there."""
COLUMNS, ROWS = 80, 50
FIRST, LAST = 10, 24
"""Lines of a screen that are kept."""
PATIENCE = 1800
"""Seconds for one command."""
OPEN = re.compile(r"open at (http://\S+) until Ctrl-C")
CONTROL = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|\x1b[=>]|(\r)|(\n)")
PROMPTS = ("a red shoe", "rain on a window", "two grey birds on a wire", "a boat at night")
CHANGED = {
    "teacher.pipeline": "my.safetensors",
    "teacher.config": "./sdxl-base",
    "teacher.guidance.scale": 7.0,
    "data.conditions": "prompts.txt",
    "output": "runs/sdxl",
}
SHORTER = {
    "train.steps": 20,
    "train.batch_size": 4,
    "train.accumulation": 1,
    "train.lr_warmup": 0,
    "train.log_every": 5,
    "train.preview_every": 10,
    "report.samples": 16,
}
"""Keys of the recipe that make the run end in seconds; nobody would change them so for SDXL."""


@dataclass(frozen=True)
class Step:
    """A step of the walk.

    Args:
        title: its heading.
        words: a sentence or two on what is seen.
        command: as it is typed.
        page: whether it opens a page, whose picture is taken before the command is interrupted.
        shows: a page that it leaves, whose picture is shown below the screen.
    """

    title: str
    words: str
    command: str
    page: bool = False
    shows: str = ""

    @property
    def picture(self) -> str:
        """The file name of its picture; empty where it has none."""
        return re.sub(r"\W+", "-", self.title.lower()) + ".png" if self.page or self.shows else ""


STEPS = (
    Step(
        "Installation",
        "Into a fresh environment, with torch from the package index.",
        "python3 -m venv .venv && .venv/bin/pip install -qq -e ~/stepdistill'[eval,demo]'",
    ),
    Step("Version", "No torch is loaded for it.", "stepdistill --version"),
    Step("What this machine can do", "A line for each thing, with advice below what is missing.", "stepdistill doctor"),
    Step(
        "Quickstart, shortened",
        "The embedded teacher of clothes, with a fifth of the steps and a tenth of the pictures. The student is not "
        "good yet; that takes the whole quickstart.",
        "stepdistill train quickstart train.steps=40 method.regression_steps=12 method.critic_warmup=6 "
        "report.samples=100",
        shows="runs/quickstart/report/index.html",
    ),
    Step("Demo", "The page of the shipped student of emoji.", "stepdistill demo", page=True),
    Step(
        "Which recipe for SDXL on this card",
        "Recipes that a 24 GB card holds.",
        "stepdistill recipes --base sdxl --gpu 24",
    ),
    Step(
        "The own pipeline", "One file, as Civitai has them.", "stepdistill inspect my.safetensors --config ./sdxl-base"
    ),
    Step(
        "A recipe to edit",
        "The file keeps the comments of the shipped one.",
        "stepdistill init sdxl_dmd2_lora_24gb sdxl.yaml",
    ),
    Step("Will it fit, can it work", "No weight is loaded.", "stepdistill plan sdxl.yaml --gpu 24"),
    Step("Train", "The student, its export and its report.", "stepdistill train sdxl.yaml"),
    Step("The runs", "All runs in `runs/`, and how each stands.", "stepdistill runs"),
    Step(
        "Watch",
        "A page with state, curves and previews; here of the run that has ended.",
        "stepdistill watch runs/sdxl",
        page=True,
    ),
    Step(
        "Export for ComfyUI",
        "The stock folder, and files for ComfyUI in it.",
        "stepdistill export runs/sdxl out --to comfyui",
    ),
    Step(
        "Draw",
        "Four steps in place of fifty.",
        'stepdistill sample runs/sdxl --steps 4 --prompt "a red shoe" --count 4 --out grid.png',
    ),
)


@dataclass(frozen=True)
class Seen:
    """What a step took and said: seconds, the exit code, and the lines of the screen."""

    seconds: float
    code: int
    lines: Sequence[str]


def screen(text: str, columns: int = COLUMNS) -> list[str]:
    """The lines that a terminal shows in the end, those that have scrolled away too.

    It knows what progress bars use: colours, carriage return, cursor up, and a line that is erased.
    """
    lines, row, column, at = [""], 0, 0, 0
    for found in [*CONTROL.finditer(text), None]:
        written = text[at : found.start() if found else None]
        while written:
            if column == columns:
                row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
            part, written = written[: columns - column], written[columns - column :]
            kept = f"{lines[row]:{column}}"
            lines[row] = kept[:column] + part + kept[column + len(part) :]
            column += len(part)
        if found is None:
            break
        at = found.end()
        if found[4]:
            row += 1
        elif found[3]:
            column = 0
        elif found[2] == "A":
            row = max(0, row - int(found[1] or 1))
        elif found[2] == "K":
            lines += [""] * (row + 1 - len(lines))
            lines[row] = lines[row][:column] if found[1] in ("", "0") else ""
    return [line.rstrip() for line in lines]


def kept(lines: Sequence[str], first: int = FIRST, last: int = LAST) -> list[str]:
    """The first and the last lines, with a line between that counts those left out; no empty ones at the ends."""
    lines = "\n".join(lines).strip("\n").splitlines()
    left_out = len(lines) - first - last
    return lines if left_out <= 1 else [*lines[:first], f"... ({left_out} lines)", *lines[-last:]]


def without_places(text: str, folder: Path) -> str:
    """``text`` without this machine's folders and name: ``~/walk`` is the walk, ``~/stepdistill`` the checkout."""
    places = {str(folder.resolve()): "~/walk", str(folder): "~/walk", str(ROOT): "~/stepdistill", str(Path.home()): "~"}
    for place, name in places.items():
        text = text.replace(place, name)
    text = text.replace(platform.platform(), platform.system())
    return re.sub(rf"\b{re.escape(socket.gethostname())}\b", "machine", text)


def photograph(browser: Any, source: str | Path, file: Path) -> None:
    """The first screen of a page as a small PNG file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    page = browser.new_page(viewport=VIEW)
    page.goto(source.resolve().as_uri() if isinstance(source, Path) else source)
    page.wait_for_function(DRAWN, timeout=1000 * PATIENCE)
    shown = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    page.close()
    shown.quantize(64).save(file, optimize=True)


def run(step: Step, folder: Path, browser: Any = None, file: Path | None = None) -> Seen:
    """Run a step on a terminal in ``folder``; a page's picture goes to ``file``, and its command is interrupted."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    environment |= {"TERM": "xterm", "HF_HUB_OFFLINE": "1", "STEPDISTILL_CACHE": str(folder / "cache")}
    command = step.command.replace("~/stepdistill", str(ROOT))
    command = re.sub(r"^stepdistill ", f"exec {sys.executable} -m stepdistill ", command)
    start, said, opened = time.monotonic(), b"", 0.0
    with subprocess.Popen(
        ["sh", "-c", command],
        cwd=folder,
        env=environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        # In the background of a shell interrupts are ignored, by children too.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as process:
        os.close(theirs)
        while block := _read(ours):
            said += block
            address = OPEN.search("".join(screen(said.decode(errors="replace")))) if step.page and not opened else None
            if address:
                opened = time.monotonic() - start
                photograph(browser, address[1], file)
                process.send_signal(signal.SIGINT)
            if time.monotonic() - start > PATIENCE:
                process.kill()
        code = process.wait()
    os.close(ours)
    if step.shows and code == 0:
        photograph(browser, folder / step.shows, file)
    lines = screen(without_places(said.decode(errors="replace"), folder))
    return Seen(opened or time.monotonic() - start, code, lines)


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # its other end is closed
        return b""


def changed(recipe: Mapping, keys: Mapping[str, object]) -> dict:
    """A recipe with dotted ``keys`` set."""
    result = yaml.safe_load(yaml.safe_dump(dict(recipe)))
    for key, value in keys.items():
        *sections, last = key.split(".")
        place = result
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return result


def stand_in(folder: Path) -> None:
    """my.safetensors, sdxl-base/ with its configs alone, and prompts.txt."""
    sys.path.insert(0, str(ROOT / "tests"))
    from pipeline import checkpoints  # torch is not needed to write the page
    from stepdistill.pipeline.folder import save_pipeline

    pipeline = checkpoints.tiny_sdxl()
    save_pipeline(pipeline, folder / "sdxl-base")
    for weights in (folder / "sdxl-base").rglob("*.safetensors"):
        weights.unlink()
    checkpoints.save_sdxl(pipeline, folder / "my.safetensors")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")


def page(seen: Mapping[Step, Seen]) -> str:
    """The page of the walk."""
    version, total = stepdistill.__version__, sum(one.seconds for one in seen.values())
    parts = [
        "# The first hour, recorded",
        "What one sees from the first command to pictures of an own student. `python scripts/walk.py` ran every "
        f"command and wrote this page, on two CPU cores without a GPU, with stepdistill {version}.",
        f"The screens are those of a terminal of {COLUMNS} columns; of long ones the first and the last lines are "
        "shown. The own pipeline, from `inspect` on, is a stand-in: an SDXL of 70 thousand random weights in one file. "
        "Its numbers say nothing about SDXL, and its pictures are noise.",
        "| step | seconds |\n| --- | ---: |",
    ]
    rows = [f"| {number}. {step.title} | {one.seconds:.0f} |" for number, (step, one) in enumerate(seen.items(), 1)]
    parts[-1] = "\n".join([parts[-1], *rows, f"| together | {total:.0f} |"])
    for number, (step, one) in enumerate(seen.items(), 1):
        ending = f", exit code {one.code}" if one.code and not step.page else ""
        parts.append(f"## {number}. {step.title}")
        parts.append(f"{step.words} It took {one.seconds:.1f} seconds{ending}.")
        parts.append("\n".join(["```text", f"$ {step.command}", *kept(one.lines), "```"]))
        if step.picture:
            parts.append(f"![{step.title}: {step.shows or 'the page'}]({PICTURES}/{step.picture})")
        if " init " in step.command:
            parts += [
                "These keys are then changed in the file. Those of the second block make the run short, and belong to "
                "the stand-in alone.",
                "\n".join(["```text", *(f"{key}: {value}" for key, value in CHANGED.items()), "```"]),
                "\n".join(["```text", *(f"{key}: {value}" for key, value in SHORTER.items()), "```"]),
            ]
    wrapped = [part if part[0] in "#|`!" else textwrap.fill(part, 120, break_on_hyphens=False) for part in parts]
    return "\n\n".join(wrapped) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PAGE)
    parser.add_argument("--chromium", help="an installed browser")
    arguments = parser.parse_args()
    seen, has_pages = {}, importlib.util.find_spec("gradio") is not None
    with tempfile.TemporaryDirectory() as name, chromium(arguments.chromium) as browser:
        folder = Path(name)
        stand_in(folder)
        for step in [step for step in STEPS if has_pages or not step.page]:
            seen[step] = run(step, folder, browser, arguments.out.parent / PICTURES / step.picture)
            print(f"\n$ {step.command}\n" + "\n".join(seen[step].lines), flush=True)
            print(f"[{seen[step].seconds:.1f} s, exit code {seen[step].code}]", flush=True)
            if " init " in step.command:
                recipe = yaml.safe_load((folder / "sdxl.yaml").read_text(encoding="utf-8"))
                text = yaml.safe_dump(changed(recipe, CHANGED | SHORTER), sort_keys=False)
                (folder / "sdxl.yaml").write_text(text, encoding="utf-8")
    arguments.out.write_text(page(seen), encoding="utf-8")


if __name__ == "__main__":
    main()
