"""The demo in a browser: the few lines that need gradio. Nothing is fetched from elsewhere, not even a font."""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepdistill.demo import Demo, load_demo, shelf
from stepdistill.errors import InputError

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported
try:
    import gradio
except ImportError as error:
    raise InputError(f"demo: needs gradio (pip install -e '.[demo]'): {error}") from None

STYLE = """
.gradio-container {max-width: 1180px !important; margin: 0 auto !important}
.asked {text-align: center; font-weight: 600; margin: 0 0 8px}
.shelf {display: flex; flex-wrap: wrap; gap: 16px; justify-content: center; padding: 8px 0}
.shelf figure {margin: 0}
.shelf .frame {width: 256px; height: 256px; display: flex; align-items: center; justify-content: center;
  background: var(--background-fill-secondary); border-radius: 6px; overflow: hidden}
.shelf img {max-width: 256px; height: auto; display: block; margin: 0}
.shelf img.enlarged {image-rendering: pixelated}
.shelf figcaption {padding: 8px 2px; font-size: 14px; line-height: 1.5; font-variant-numeric: tabular-nums}
.shelf.busy .frame:empty {animation: waiting 1s ease-in-out infinite alternate}
@keyframes waiting {from {opacity: 1} to {opacity: 0.4}}
.hint {border-left: 3px solid #b45309; padding: 8px 12px; margin: 0 0 12px; font-size: 14px;
  background: var(--background-fill-secondary)}
.press {align-self: center; height: 44px; font-size: 15px}
"""


def page(demo: Demo) -> gradio.Blocks:
    """The page: words, a seed, a button, and the pictures that appear as they are done."""
    nothing = [None] * len(demo.samplers)

    def drawn(text: str, seed: float | None) -> Iterator[str]:
        entry, hint = demo.read(text)
        if entry is None:
            yield shelf(demo, nothing, hint=hint)
            return
        seed = int(seed or 0)
        words = demo.classes[entry] if demo.classes else text
        asked = f"{words}, seed {seed}" if words else f"seed {seed}"
        yield shelf(demo, nothing, asked, hint, busy=True)
        for pictures in demo.draw(entry, seed):
            yield shelf(demo, pictures, asked, hint, busy=None in pictures)

    with gradio.Blocks(title="stepdistill", analytics_enabled=False, fill_width=True) as blocks:
        gradio.Markdown(f"## stepdistill\n{demo.title}. All pictures start from the same noise. {demo.about}")
        with gradio.Row():
            text = gradio.Textbox(
                value=demo.examples[0] if demo.examples else "",
                label=demo.asks.capitalize(),
                visible=bool(demo.asks),
                autofocus=True,
                scale=4,
            )
            seed = gradio.Number(value=0, minimum=0, precision=0, label="Seed", scale=1)
            go = gradio.Button("Draw", variant="primary", scale=1, elem_classes="press")
            another = gradio.Button("Another seed", scale=1, elem_classes="press")
        examples = gradio.Dataset(
            components=[text],
            samples=[[one] for one in demo.examples],
            label="Known classes" if demo.classes else "Prompts of its training",
            visible=bool(demo.examples),
        )
        pictures = gradio.HTML(shelf(demo, nothing))
        # One at a time: all of them run the same networks.
        work: dict[str, Any] = {"fn": drawn, "inputs": [text, seed], "outputs": pictures}
        work |= {"concurrency_id": "draw", "concurrency_limit": 1, "show_progress": "hidden"}
        work |= {"trigger_mode": "always_last"}  # what is asked for meanwhile comes next
        gradio.on([text.submit, seed.submit, go.click, blocks.load], **work)
        another.click(lambda: random.randrange(10_000), outputs=seed).then(**work)
        examples.click(lambda chosen: chosen[0], inputs=examples, outputs=text).then(**work)
    return blocks


def serve(student: str | Path, teacher: str | Path | None = None, port: int | None = None) -> None:
    """Open the page at this machine's own address and stay until interrupted.

    Args:
        student, teacher: see :func:`stepdistill.demo.load_demo`. port: None: the first free one from 7860 up.
    """
    blocks = page(load_demo(student, teacher))
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
        wanted = "a free port from 7860 to 7959" if port is None else f"a free port, found {port} taken"
        raise InputError(f"--port: expected {wanted}") from error
    return url
