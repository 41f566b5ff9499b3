"""A comparison as it is seen: HTML that grows while it is drawn, and at the end one PNG to keep."""

import html
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from stepdistill.demo.content import Demo, Drawn
from stepdistill.errors import InputError
from stepdistill.eval.bench.drawing import Sampler
from stepdistill.eval.pictures import INK, MUTED, png_data_uri
from stepdistill.progress import counted
from stepdistill.sampling.image_grid import image_grid

SHOWN_PIXELS = 256
GAP = 16
"""Pixels between the pictures of a sheet, and around them."""


def answers(
    demo: Demo,
    text: str,
    seed: float | None = 0,
    steps: float | None = None,
    guidance: float | None = None,
    few: Sequence[int | str] = (),
) -> Iterator[str]:
    """What the page shows for one press of its button, as HTML, again whenever one more picture is done.

    Args:
        text: the prompt or the class.
        seed: of the noise; None: 0.
        steps: of the teacher; None: as they are.
        guidance: as in :meth:`stepdistill.demo.content.Demo.with_settings`.
        few: likewise.
    """
    entry, hint = demo.read(text)
    if entry is not None:
        try:
            demo = demo.with_settings(int(steps or demo.samplers[0].steps), guidance, [int(one) for one in few])
        except InputError as error:
            entry, hint = None, str(error)
    nothing = [None] * len(demo.samplers)
    if entry is None:
        yield strip_html(demo, nothing, hint=hint)
        return
    seed = int(seed or 0)
    words = demo.classes[entry] if isinstance(entry, int) and demo.classes else " ".join((text or "").split())
    title = f"{words}, seed {seed}" if words else f"seed {seed}"
    yield strip_html(demo, nothing, title, hint, busy=True)
    for pictures in demo.draw(entry, seed):
        yield strip_html(demo, pictures, title, hint, busy=None in pictures)


def strip_html(demo: Demo, drawn: Sequence[Drawn | None], title: str = "", hint: str = "", busy: bool = False) -> str:
    """The pictures side by side as HTML, each with its steps, passes and seconds, under ``title`` and the hint.

    Below them is a link that saves the comparison, once all are there.

    Args:
        busy: whether more pictures are to come.
    """
    heading = f'<p class="hint">{html.escape(hint)}</p>' if hint else ""
    heading += f'<p class="title">{html.escape(title)}</p>' if title else ""
    figures = "".join(_figure(sampler, one, drawn[0]) for sampler, one in zip(demo.samplers, drawn, strict=True))
    whole = [one for one in drawn if one is not None]
    save = ""
    if len(whole) == len(drawn):
        name = "-".join(re.findall(r"\w+", title.lower())[:12]) or "comparison"
        uri = png_data_uri(sheet(demo, whole, title))
        save = f'<p class="save"><a href="{uri}" download="{name}.png">Save comparison</a></p>'
    return f'{heading}<div class="shelf{" busy" if busy else ""}">{figures}</div>{save}'


def sheet(demo: Demo, drawn: Sequence[Drawn], title: str) -> Image.Image:
    """Teacher and student side by side on white, what each took under it, and ``title`` below all.

    Args:
        drawn: a picture for each of the demo's samplers.
        title: such as the prompt and the seed.
    """
    pictures = [_enlarged(one) for one in drawn]
    wide, tall = max(SHOWN_PIXELS, *(one.width for one in pictures)), max(one.height for one in pictures)
    size = wide // 21
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
    line, columns = round(1.4 * size), len(pictures)
    texts = [
        [sampler.role.capitalize(), *_costs(sampler, one, drawn[0])]
        for sampler, one in zip(demo.samplers, drawn, strict=True)
    ]
    width = GAP + columns * (wide + GAP)
    words = textwrap.wrap(title, max(20, round((width - 2 * GAP) / (0.62 * size))))
    below = GAP + tall + GAP // 2
    page = Image.new("RGB", (width, below + (max(map(len, texts)) + len(words) + 1) * line), "white")
    pen = ImageDraw.Draw(page)
    for column, (picture, lines) in enumerate(zip(pictures, texts, strict=True)):
        left = GAP + column * (wide + GAP)
        page.paste(picture, (left, GAP))
        for row, text in enumerate(lines):
            pen.text((left, below + row * line), text, MUTED if row else INK, font)
    below += max(map(len, texts)) * line + line // 2
    for row, text in enumerate(words):
        pen.text((GAP, below + row * line), text, INK, font)
    return page


def _factor(drawn: Drawn) -> int:
    """How many times a picture is enlarged: a whole number, so that every pixel is a square of one size."""
    return max(1, SHOWN_PIXELS // max(drawn.image.shape[1:]))


def _enlarged(drawn: Drawn) -> Image.Image:
    picture, factor = image_grid(drawn.image[None], 1), _factor(drawn)
    return picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST)


def _costs(sampler: Sampler, drawn: Drawn | None, teacher: Drawn | None) -> list[str]:
    """Lines: steps, passes and seconds, as far as they are known; the teacher's guidance, or how much less it takes."""
    lines = [counted(sampler.steps, "step")]
    if drawn is not None:
        lines = [f"{lines[0]} · {drawn.nfe} network pass{'' if drawn.nfe == 1 else 'es'} · {drawn.seconds:.2f} s"]
        if teacher is not None and drawn is not teacher:
            faster, fewer = _times(teacher.seconds / drawn.seconds), _times(teacher.nfe / drawn.nfe)
            lines.append(f"{faster} faster, {fewer} fewer passes")
    if sampler.guidance != 1:
        lines.append(f"guidance {sampler.guidance:g}")
    return lines


def _figure(sampler: Sampler, drawn: Drawn | None, teacher: Drawn | None) -> str:
    costs, picture = _costs(sampler, drawn, teacher), ""
    if drawn is not None:
        height, width = drawn.image.shape[1:]
        factor = _factor(drawn)
        size = f'width="{factor * width}" height="{factor * height}" class="{"enlarged" if factor > 1 else "whole"}"'
        uri = png_data_uri(image_grid(drawn.image[None], 1))
        picture = f'<img src="{uri}" alt="{sampler.role}, {costs[0].partition(" · ")[0]}" {size}>'
    caption = "<br>".join([f"<b>{sampler.role.capitalize()}</b>", *costs])
    return f'<figure><div class="frame">{picture}</div><figcaption>{caption}</figcaption></figure>'


def _times(ratio: float) -> str:
    return f"{ratio:.0f}×" if ratio >= 10 else f"{ratio:.1f}×"
