"""What the demo page shows: a teacher at its stock steps beside its student at a few, from the same noise.

Nothing here knows the page's library; :mod:`stepdistill.demo_page` puts it into a browser.
"""

import difflib
import html
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill import assets
from stepdistill.bench import TEACHER_STEPS
from stepdistill.errors import InputError
from stepdistill.eval.pictures import image_grid, png_data_uri
from stepdistill.generation.drawing import Sampler, draw
from stepdistill.generation.generate import can_run
from stepdistill.generation.sampling import inspect
from stepdistill.guidance import stated_rule
from stepdistill.pipeline.conditioning import class_names, unread
from stepdistill.pipeline.load import export_adapter, export_arguments, export_variant, source
from stepdistill.pipeline.trace import asked_for, under
from stepdistill.sources import read_source
from stepdistill.text_files import read_text

STEPS = (1, 2, 4)
VOCABULARY = "vocabulary.txt"
"""Beside a teacher's model_index.json: the words of the prompts that it was trained with, one a line."""
SHOWN_PIXELS = 256
SHOWN_WORDS = 12
MANY = 24


@dataclass(frozen=True)
class Drawn:
    """A picture uint8 (C, H, W), the network passes it took, and seconds from the words to the pixels."""

    image: Tensor
    nfe: int
    seconds: float


@dataclass(frozen=True)
class Demo:
    """A teacher and its student, ready to draw.

    Args:
        samplers: the teacher, then the student from few steps to many.
        facts: the student's, from its export.
        classes: names by number; empty for a pipeline of prompts.
        words: what its prompts may be made of; empty where nobody has written it down.
    """

    samplers: tuple[Sampler, ...]
    facts: dict[str, Any]
    classes: tuple[str, ...] = ()
    words: frozenset[str] = frozenset()

    @property
    def asks(self) -> str:
        """What the pipeline is asked for: "prompt", "class", or "" where there is nothing to choose."""
        return {"prompt": "prompt", "class_labels": "class"}.get(self.samplers[0].trace.entry, "")

    @property
    def title(self) -> str:
        """What is being compared, in a line."""
        teacher, facts = self.samplers[0], self.facts
        guided = f" (guidance {facts['guidance']:g})" if facts["guidance"] != 1 else ""
        return f"{teacher.name}{guided} beside its {facts['method']} student, trained for {facts['steps']} steps"

    @property
    def about(self) -> str:
        """What may be typed, in a line: some of the known words; "" where they are not known or shown as examples."""
        words = sorted(word for word in self.words if len(word) > 3)
        some = words[:: max(1, len(words) // SHOWN_WORDS)][:SHOWN_WORDS]
        return f"The teacher knows {len(self.words)} words, such as {', '.join(some)}." if some else ""

    @property
    def examples(self) -> list[str]:
        """What to start with: the classes, or prompts that the student was trained with, from all over their list."""
        told = self.facts.get("recipe", {}).get("data", {}).get("conditions")
        if told in assets.prompt_lists():
            told = read_text(assets.prompts(told)).splitlines()
            told = told[len(told) // MANY // 2 :: max(1, len(told) // MANY)]
        return list(self.classes or (told if isinstance(told, list) else ()))[:MANY]

    def read(self, text: str) -> tuple[str | int | None, str]:
        """(what the pipeline is called with, None for nothing that it knows; a hint for the person, perhaps "")."""
        text = " ".join((text or "").split())
        if not self.asks:
            return 0, ""
        if not text:
            return None, ""
        return self._class(text) if self.asks == "class" else (text, self._prompt_hint(text))

    def _class(self, text: str) -> tuple[int | None, str]:
        lower = [name.lower() for name in self.classes]
        if text.lower() in lower:
            return lower.index(text.lower()), ""
        if text.isdecimal() and int(text) < len(lower):
            return int(text), ""
        near = difflib.get_close_matches(text.lower(), lower, n=3, cutoff=0.5)
        near = near or [name for name in lower if text.lower() in name][:3]
        meant = " or ".join(self.classes[lower.index(name)] for name in near)
        more = f" and {len(lower) - MANY} more" if len(lower) > MANY else ""
        question = f" Did you mean {meant}?" if meant else ""
        return None, f"There is no class “{text}”.{question} Known: {', '.join(self.classes[:MANY])}{more}."

    def _prompt_hint(self, text: str) -> str:
        hints = []
        if strange := [word for word in dict.fromkeys(words_of(text)) if self.words and word not in self.words]:
            near = {word: difflib.get_close_matches(word, self.words, n=2, cutoff=0.7) for word in strange}
            named = [f"“{word}”" + (f" (closest: {', '.join(near[word])})" if near[word] else "") for word in strange]
            hints.append(f"The teacher has never seen {', '.join(named)}: expect little of it.")
        if lost := unread(self.samplers[0].trace, [text]).get(text):
            hints.append(f"Too long, the end is not read: “{lost}”.")
        return " ".join(hints)

    def draw(self, entry: str | int, seed: int) -> Iterator[list[Drawn | None]]:
        """The pictures of all samplers from one noise, yielded again whenever one more is done; the teacher's last."""
        drawn: list[Drawn | None] = [None] * len(self.samplers)
        for number in (*range(1, len(drawn)), 0):
            sampler = replace(self.samplers[number], wanted=(entry,))
            start = time.perf_counter()
            (image,) = draw(sampler, [0], 0, seed=seed, batch=1)
            drawn[number] = Drawn(image, sampler.nfe, time.perf_counter() - start)
            yield list(drawn)


def load_demo(student: str | Path, teacher: str | Path | None = None) -> Demo:
    """The student of a run or of an export, and its teacher, traced and warm.

    Args:
        teacher: where it is now, if not where the export says.

    Raises:
        InputError: ``student`` is no student, or one of the two cannot be loaded or traced, or they do not fit.
    """
    found = read_source(student)
    if found.facts is None:
        raise InputError(f"demo: expected a run or an export of a student, found {student} without stepdistill.json")
    facts, arguments = found.facts, export_arguments(found.pipeline)
    place, revision = (facts["teacher"], facts.get("revision")) if teacher is None else (str(teacher), None)
    scale = float(facts["guidance"])
    variant = export_variant(found.pipeline) if teacher is None else None
    original = asked_for(inspect(place, revision, arguments, export_adapter(found.pipeline), variant), scale)
    distilled = asked_for(inspect(found.pipeline), scale)
    if (original.latent_shape, original.entry) != (distilled.latent_shape, distilled.entry):
        raise InputError(f"demo: expected the teacher of {student}, found {place}, which draws something else")
    original = under(original, stated_rule(facts))
    w = 1.0 if original.guidance.kind in ("embedded", "none") else scale
    samplers = [Sampler(Path(place).name, "teacher", original, "", (), TEACHER_STEPS, w)]
    for steps in sorted({*STEPS, facts["steps"]}):
        if steps == facts["steps"] or can_run(distilled, steps):
            samplers.append(Sampler(found.label, "student", distilled, "", (), steps, 1.0))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for traced in (original, distilled):
        traced.pipeline.to(device)
    demo = Demo(tuple(samplers), facts, class_names(original), vocabulary(source(place), found.pipeline))
    for _ in demo.draw("" if demo.asks == "prompt" else 0, 0):
        pass  # the first pictures take longer than all others
    return demo


def vocabulary(*folders: str | Path) -> frozenset[str]:
    """The words in the first of the folders' vocabulary.txt; none without such a file."""
    file = next((file for folder in folders if (file := Path(folder) / VOCABULARY).is_file()), None)
    return frozenset(words_of(read_text(file))) if file else frozenset()


def words_of(text: str) -> list[str]:
    """The words of a prompt in lower case."""
    return re.findall(r"\w+(?:'\w+)*", text.lower().replace("’", "'"))


def shelf(demo: Demo, drawn: Sequence[Drawn | None], asked: str = "", hint: str = "", busy: bool = False) -> str:
    """The pictures side by side as HTML, each with its steps, NFE and seconds, under what was asked for and the hint.

    Args:
        busy: whether more pictures are to come.
    """
    told = f'<p class="hint">{html.escape(hint)}</p>' if hint else ""
    told += f'<p class="asked">{html.escape(asked)}</p>' if asked else ""
    figures = "".join(map(_figure, demo.samplers, drawn))
    return f'{told}<div class="shelf{" busy" if busy else ""}">{figures}</div>'


def _figure(sampler: Sampler, drawn: Drawn | None) -> str:
    cost, picture = f"{sampler.steps} step{'s' if sampler.steps > 1 else ''}", ""
    if drawn is not None:
        height, width = drawn.image.shape[1:]
        # Whole multiples, so that every pixel is a square of one size.
        factor = max(1, SHOWN_PIXELS // max(height, width))
        size = f'width="{factor * width}" height="{factor * height}" class="{"enlarged" if factor > 1 else "whole"}"'
        uri = png_data_uri(image_grid(drawn.image[None], 1))
        picture = f'<img src="{uri}" alt="{sampler.role}, {cost}" {size}>'
        cost += f" · NFE {drawn.nfe} · {drawn.seconds:.2f} s"
    caption = f"<b>{sampler.role.capitalize()}</b><br>{cost}"
    return f'<figure><div class="frame">{picture}</div><figcaption>{caption}</figcaption></figure>'
