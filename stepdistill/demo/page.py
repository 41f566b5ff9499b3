"""The demo in a browser: the few lines that need gradio. Nothing is fetched from elsewhere, not even a font."""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepdistill.demo.content import MOST_GUIDANCE, MOST_STEPS, Demo, load_demo
from stepdistill.demo.shown import answers, strip_html
from stepdistill.demo.watching import check_run, watch_html
from stepdistill.errors import InputError
from stepdistill.pipeline.sizes import Size

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported
try:
    import gradio
except ImportError as error:
    raise InputError(f"demo: needs gradio (pip install -e '.[demo]'): {error}") from None

EVERY = 5
"""Seconds between two looks at a run."""
STYLE = """
.gradio-container {max-width: 1180px !important; margin: 0 auto !important}
.title {text-align: center; font-weight: 600; margin: 0 0 8px}
.shelf {display: flex; flex-wrap: wrap; gap: 16px; justify-content: center; padding: 8px 0}
.shelf figure {margin: 0}
.shelf .frame {width: 256px; height: 256px; display: flex; align-items: center; justify-content: center;
  background: var(--background-fill-secondary); border-radius: 6px; overflow: hidden}
.shelf img {max-width: 256px; height: auto; display: block; margin: 0}
.shelf img.enlarged {image-rendering: pixelated}
.shelf figcaption {padding: 8px 2px; font-size: 14px; line-height: 1.5; font-variant-numeric: tabular-nums}
.shelf.busy .frame:empty {animation: waiting 1s ease-in-out infinite alternate}
@keyframes waiting {from {opacity: 1} to {opacity: 0.4}}
.save {text-align: center; margin: 4px 0 12px}
.hint {border-left: 3px solid #b45309; padding: 8px 12px; margin: 0 0 12px; font-size: 14px;
  background: var(--background-fill-secondary)}
@media (max-width: 640px) {
  .shelf {display: grid; grid-template-columns: 1fr 1fr; gap: 10px}
  .shelf .frame {width: 100%; height: auto; aspect-ratio: 1}
  .shelf img {width: 100%}
  .shelf figcaption {font-size: 13px}
}
.watch img {width: 100%; max-width: 1000px; height: auto}
.watch progress {width: 100%; max-width: 1000px}
.watch pre {overflow-x: auto; font-size: 13px}
.press {align-self: center; height: 44px; font-size: 15px}
"""


def page(demo: Demo) -> gradio.Blocks:
    """The page: words, a seed, a button, settings, and the pictures that appear as they are done."""
    teacher, *students = demo.samplers

    def drawn(*settings: Any) -> Iterator[str]:
        yield from answers(demo, *settings)

    with gradio.Blocks(title="stepdistill", analytics_enabled=False, fill_width=True) as blocks:
        gradio.Markdown(f"## stepdistill\n{demo.title}. All pictures start from the same noise. {demo.about}")
        with gradio.Row():
            text = gradio.Textbox(
                value=demo.examples[0] if demo.examples else "",
                label=demo.input_kind.capitalize(),
                visible=bool(demo.input_kind),
                autofocus=True,
                scale=4,
            )
            seed = gradio.Number(value=0, minimum=0, precision=0, label="Seed", scale=1)
            go = gradio.Button("Draw", variant="primary", scale=1, elem_classes="press")
            another = gradio.Button("Another seed", scale=1, elem_classes="press")
        with gradio.Accordion("Settings", open=False), gradio.Row():
            steps = gradio.Slider(1, MOST_STEPS, teacher.steps, step=1, label="Teacher's steps")
            guidance = gradio.Slider(
                *(0, max(MOST_GUIDANCE, demo.guidance or 0), demo.guidance or 0),
                step=0.1,
                label="Teacher's guidance (the student's is in its weights)",
                visible=demo.guidance is not None,
            )
            few = gradio.CheckboxGroup(
                [str(count) for count in demo.few],
                value=[str(one.steps) for one in students],
                label="Student's steps, a picture each",
                visible=len(demo.few) > 1,
            )
        examples = gradio.Dataset(
            components=[text],
            samples=[[one] for one in demo.examples],
            label="Known classes" if demo.classes else "Prompts of its training",
            visible=bool(demo.examples),
        )
        pictures = gradio.HTML(strip_html(demo, [None] * len(demo.samplers)))
        # One at a time: all of them run the same networks.
        work: dict[str, Any] = {"fn": drawn, "inputs": [text, seed, steps, guidance, few], "outputs": pictures}
        work |= {"concurrency_id": "draw", "concurrency_limit": 1, "show_progress": "hidden"}
        work |= {"trigger_mode": "always_last"}  # the latest request while busy runs next
        gradio.on([text.submit, seed.submit, go.click, blocks.load], **work)
        another.click(lambda: random.randrange(10_000), outputs=seed).then(**work)
        examples.click(lambda chosen: chosen[0], inputs=examples, outputs=text).then(**work)
    return blocks


def serve(
    student: str | Path, teacher: str | Path | None = None, port: int | None = None, size: Size | None = None
) -> None:
    """Open the page at this machine's own address and stay until interrupted.

    Args:
        student: see :func:`stepdistill.demo.content.load_demo`.
        teacher: likewise.
        port: None: the first free one from 7860 up.
        size: as ``student``.
    """
    _stay(page(load_demo(student, teacher, size)), port)


def watch(run: str | Path, port: int | None = None) -> None:
    """Open a page on a run, renewed every few seconds, and stay until interrupted.

    Args:
        run: its folder.
        port: as in :func:`serve`.

    Raises:
        InputError: no run has begun there, or the port is taken.
    """
    check_run(run)
    with gradio.Blocks(title=f"stepdistill {Path(run).name}", analytics_enabled=False, fill_width=True) as blocks:
        shown = gradio.HTML(watch_html(run))
        gradio.Timer(EVERY).tick(lambda: watch_html(run), outputs=shown, show_progress="hidden")
    _stay(blocks, port)


def _stay(blocks: gradio.Blocks, port: int | None) -> None:
    print(f"The page is open at {launch(blocks, port)} until Ctrl-C.", flush=True)
    blocks.block_thread()


def launch(blocks: gradio.Blocks, port: int | None) -> str:
    """Start the server beside this thread; returns its address.

    Raises:
        InputError: the port is taken.
    """
    system = ["system-ui", "sans-serif"]  # a theme may name fonts of Google's
    try:
        _, url, _ = blocks.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            theme=gradio.themes.Base(font=system, font_mono=["ui-monospace", "monospace"]),
            css=STYLE,
        )
    except OSError as error:
        expected = "a free port from 7860 to 7959" if port is None else f"a free port, found {port} taken"
        raise InputError(f"--port: expected {expected}") from error
    return url
