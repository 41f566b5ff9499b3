"""Walk the first hour as a new user does, and write docs/walk.md: each command, its seconds, and what the screen said.

    pip install -e '.[eval,demo]'
    python scripts/walk.py

Every command is a process of its own on a terminal of 80 columns, in a temporary folder with an empty cache and
without a network. The own pipeline is a stand-in: SDXL with random weights, 70 thousand of them, in one file of the
published layout. Without gradio the pages of ``watch`` and ``demo`` are left out.
"""

import argparse
import fcntl
import functools
import importlib.util
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
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

import stepdistill

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "walk.md"
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
        arguments: of the command.
        page: whether it opens a page, which is fetched once before the command is interrupted.
    """

    title: str
    words: str
    arguments: str
    page: bool = False


STEPS = (
    Step("Version", "No torch is loaded for it.", "--version"),
    Step("What this machine can do", "A line for each thing, with advice below what is missing.", "doctor"),
    Step(
        "Quickstart, shortened",
        "The embedded teacher of clothes, with a fifth of the steps and a tenth of the pictures. The student is not "
        "good yet; that takes the whole quickstart.",
        "train quickstart train.steps=40 method.regression_steps=12 method.critic_warmup=6 report.samples=100",
    ),
    Step("Demo", "The page of the shipped student of emoji.", "demo", page=True),
    Step("Which recipe for SDXL on this card", "Recipes that a 24 GB card holds.", "recipes --base sdxl --gpu 24"),
    Step("The own pipeline", "One file, as Civitai has them.", "inspect my.safetensors --config ./sdxl-base"),
    Step("A recipe to edit", "The file keeps the comments of the shipped one.", "init sdxl_dmd2_lora_24gb sdxl.yaml"),
    Step("Will it fit, can it work", "No weight is loaded.", "plan sdxl.yaml --gpu 24"),
    Step("Train", "The student, its export and its report.", "train sdxl.yaml"),
    Step("The runs", "All runs in `runs/`, and how each stands.", "runs"),
    Step(
        "Watch", "A page with state, curves and previews; here of the run that has ended.", "watch runs/sdxl", page=True
    ),
    Step("Export for ComfyUI", "The stock folder, and files for ComfyUI in it.", "export runs/sdxl out --to comfyui"),
    Step(
        "Draw",
        "Four steps in place of fifty.",
        'sample runs/sdxl --steps 4 --prompt "a red shoe" --count 4 --out grid.png',
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


def run(step: Step, folder: Path) -> Seen:
    """Run a step on a terminal in ``folder``; a page is fetched once, and its command interrupted."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    environment |= {"TERM": "xterm", "HF_HUB_OFFLINE": "1", "STEPDISTILL_CACHE": str(folder / "cache")}
    command = f"{sys.executable} -m stepdistill {step.arguments}"
    start, said, fetched = time.monotonic(), b"", ""
    with subprocess.Popen(
        ["sh", "-c", f"exec {command}"],
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
            address = OPEN.search("".join(screen(said.decode(errors="replace")))) if step.page and not fetched else None
            if address:
                with urllib.request.urlopen(address[1], timeout=60) as answer:
                    fetched = f"(the page was fetched: {answer.status} {answer.reason}, {len(answer.read()) >> 10} KiB)"
                seconds = time.monotonic() - start
                process.send_signal(signal.SIGINT)
            if time.monotonic() - start > PATIENCE:
                process.kill()
        code = process.wait()
    os.close(ours)
    lines = screen(without_places(said.decode(errors="replace"), folder))
    return Seen(seconds if fetched else time.monotonic() - start, code, [*lines, fetched] if fetched else lines)


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
        parts.append("\n".join(["```text", f"$ stepdistill {step.arguments}", *kept(one.lines), "```"]))
        if step.arguments.startswith("init"):
            parts += [
                "These keys are then changed in the file. Those of the second block make the run short, and belong to "
                "the stand-in alone.",
                "\n".join(["```text", *(f"{key}: {value}" for key, value in CHANGED.items()), "```"]),
                "\n".join(["```text", *(f"{key}: {value}" for key, value in SHORTER.items()), "```"]),
            ]
    wrapped = [part if part[0] in "#|`" else textwrap.fill(part, 120, break_on_hyphens=False) for part in parts]
    return "\n\n".join(wrapped) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PAGE)
    arguments = parser.parse_args()
    seen, has_pages = {}, importlib.util.find_spec("gradio") is not None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stand_in(folder)
        for step in [step for step in STEPS if has_pages or not step.page]:
            seen[step] = run(step, folder)
            print(f"\n$ stepdistill {step.arguments}\n" + "\n".join(seen[step].lines), flush=True)
            print(f"[{seen[step].seconds:.1f} s, exit code {seen[step].code}]", flush=True)
            if step.arguments.startswith("init"):
                recipe = yaml.safe_load((folder / "sdxl.yaml").read_text(encoding="utf-8"))
                text = yaml.safe_dump(changed(recipe, CHANGED | SHORTER), sort_keys=False)
                (folder / "sdxl.yaml").write_text(text, encoding="utf-8")
    arguments.out.write_text(page(seen), encoding="utf-8")


if __name__ == "__main__":
    main()
