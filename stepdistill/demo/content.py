"""What the demo page shows: a teacher at its stock steps beside its student at a few, from the same noise.

Nothing here knows the page's library; :mod:`stepdistill.demo.page` puts it into a browser.
"""

import difflib
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from stepdistill import assets
from stepdistill.diffusion.devices import best_device
from stepdistill.errors import InputError
from stepdistill.eval.bench.drawing import TEACHER_STEPS, Sampler, draw
from stepdistill.eval.bench.sources import read_source
from stepdistill.files import read_text
from stepdistill.pipeline.conditioning import class_names
from stepdistill.pipeline.exports import FACTS, ExportFacts
from stepdistill.pipeline.load import pipeline_of
from stepdistill.pipeline.names import source
from stepdistill.pipeline.open import open_teacher
from stepdistill.pipeline.set_up import can_run
from stepdistill.pipeline.sizes import Size, at_size
from stepdistill.pipeline.unread import unread
from stepdistill.progress import counted
from stepdistill.recipe.section import Guidance

STEPS = (1, 2, 4)
VOCABULARY = "vocabulary.txt"
"""Beside a teacher's model_index.json: the words of the prompts that it was trained with, one a line."""
FEW = (1, 2, 3, 4, 6, 8)
"""Steps in which a student can be drawn, where its scheduler takes them."""
MOST_STEPS, MOST_GUIDANCE = 100, 20.0
"""Of a teacher."""
UNGUIDED = ("embedded", "none")
"""Kinds of guidance without a second pass that could be weighed."""
SHOWN_WORDS = 12
MANY = 24
EXAMPLES = {
    "emoji": tuple(
        f"{style} emoji of {thing}"
        for style, things in (
            ("3d", ("red heart", "grinning face", "umbrella", "cat face", "strawberry", "airplane")),
            ("flat", ("red apple", "crab", "dog face", "soccer ball", "butterfly", "flag of italy", "house")),
            ("shaded", ("banana", "bicycle", "fish")),
        )
        for thing in things
    )
}
"""Of a shipped list of prompts: those whose pictures by the shipped teacher are plain to see."""


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
        few: steps that the student can take: more than those of ``samplers``.
    """

    samplers: tuple[Sampler, ...]
    facts: ExportFacts
    classes: tuple[str, ...] = ()
    words: frozenset[str] = frozenset()
    few: tuple[int, ...] = ()

    @property
    def input_kind(self) -> str:
        """The kind of its input: "prompt", "class", or "" for an unconditional pipeline."""
        return {"prompt": "prompt", "class_labels": "class"}.get(self.samplers[0].trace.entry, "")

    @property
    def guidance(self) -> float | None:
        """The teacher's scale, which can be chosen; None where it guides with no second pass.

        A student's is in its weights.
        """
        teacher = self.samplers[0]
        return None if teacher.trace.guidance.kind in UNGUIDED else teacher.guidance

    def with_settings(self, steps: int, guidance: float | None = None, few: Sequence[int] = ()) -> "Demo":
        """The same pair with other steps and another guidance.

        Args:
            steps: of the teacher.
            guidance: of the teacher; None: as it is. Ignored where the teacher has none.
            few: of the student, a picture each; none: as they are.

        Raises:
            InputError: a number is outside of what the scheduler takes.
        """
        teacher, *students = self.samplers
        if not 1 <= steps <= MOST_STEPS:
            raise InputError(f"The teacher's steps: expected 1 to {MOST_STEPS}, found {steps}.")
        if not can_run(teacher.trace, steps):
            raise InputError(f"The teacher's steps: its scheduler does not take {steps}.")
        if wrong := sorted(set(few) - set(self.few)):
            raise InputError(f"The student's steps: expected {', '.join(map(str, self.few))}, found {wrong[0]}.")
        teacher = replace(teacher, steps=steps)
        if guidance is not None and self.guidance is not None:
            if not 0 <= guidance <= MOST_GUIDANCE:
                raise InputError(f"The teacher's guidance: expected 0 to {MOST_GUIDANCE:g}, found {guidance:g}.")
            teacher = replace(teacher, guidance=guidance)
        drawn = [replace(students[0], steps=count) for count in sorted(set(few))] if few else students
        return replace(self, samplers=(teacher, *drawn))

    @property
    def title(self) -> str:
        """What is being compared, in a line."""
        teacher, facts = self.samplers[0], self.facts
        guided = f" with guidance {facts.guidance:g}" if facts.guidance != 1 else ""
        few = counted(facts.steps, "step")
        return f"The teacher, {teacher.name}, needs {teacher.steps} steps{guided}; its student was trained for {few}"

    @property
    def about(self) -> str:
        """What may be typed, in a line: some of the known words; "" where they are not known or shown as examples."""
        words = sorted(word for word in self.words if len(word) > 3 and word.isalpha())
        some = words[:: max(1, len(words) // SHOWN_WORDS)][:SHOWN_WORDS]
        return f"The teacher knows {len(self.words)} words, such as {', '.join(some)}." if some else ""

    @property
    def examples(self) -> list[str]:
        """What to start with: the classes, or prompts that the student was trained with, from all over their list."""
        prompts = self.facts.conditions
        if isinstance(prompts, str) and prompts in EXAMPLES:
            return list(EXAMPLES[prompts])
        if prompts in assets.prompt_lists():
            prompts = read_text(assets.prompts(prompts)).splitlines()
            prompts = prompts[len(prompts) // MANY // 2 :: max(1, len(prompts) // MANY)]
        return list(self.classes or (prompts if isinstance(prompts, list) else ()))[:MANY]

    def read(self, text: str) -> tuple[str | int | None, str]:
        """(what the pipeline is called with, None for nothing that it knows; a hint for the person, perhaps "")."""
        text = " ".join((text or "").split())
        if not self.input_kind:
            return 0, ""
        if not text:
            return None, "Type a prompt, or take one from below." if self.input_kind == "prompt" else "Type a class."
        return self._class(text) if self.input_kind == "class" else (text, self._prompt_hint(text))

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
            sampler = replace(self.samplers[number], entries=(entry,))
            start = time.perf_counter()
            (image,) = draw(sampler, [0], 0, seed=seed, batch=1)
            drawn[number] = Drawn(image, sampler.nfe, time.perf_counter() - start)
            yield list(drawn)


def load_demo(student: str | Path, teacher: str | Path | None = None, size: Size | None = None) -> Demo:
    """The student of a run or of an export, and its teacher, traced and warm.

    Args:
        teacher: where it is now, if not where the export says.
        size: height and width of the pictures; None: those that the student was trained on, the first of several.

    Raises:
        InputError: ``student`` is no student, or one of the two cannot be loaded, traced or drawn at this size, or they
            do not fit.
    """
    export = read_source(student)
    facts = ExportFacts.read(export.pipeline)
    if facts is None:
        raise InputError(f"demo: expected a run or an export of a student, found {student} without {FACTS}")
    moved = teacher is not None
    place = str(teacher) if moved else facts.teacher
    original = open_teacher(
        pipeline_of(place) if moved else facts.origin.model_copy(update={"pipeline": str(pipeline_of(place))}),
        arguments=facts.arguments,
        ip_adapter=facts.ip_adapter,
        guidance=facts.teacher_guidance,
    )
    distilled = open_teacher(export.pipeline, guidance=Guidance(scale=facts.guidance))
    if (original.latent_shape, original.entry) != (distilled.latent_shape, distilled.entry):
        raise InputError(f"demo: expected the teacher of {student}, found {place}, which draws something else")
    if size is not None:
        original, distilled = at_size(original, size), at_size(distilled, size)
    device = best_device()
    for traced in (original, distilled):
        traced.pipeline.to(device)
        traced.denoiser.network.to(device)
    w = 1.0 if original.guidance.kind in UNGUIDED else facts.guidance
    samplers = [Sampler(Path(place).name, "teacher", original, "", (), TEACHER_STEPS, w)]
    few = [steps for steps in sorted({*FEW, facts.steps}) if steps == facts.steps or can_run(distilled, steps)]
    for steps in few:
        if steps in (*STEPS, facts.steps):
            samplers.append(Sampler(export.label, "student", distilled, "", (), steps, 1.0))
    words = vocabulary(source(place), export.pipeline)
    demo = Demo(tuple(samplers), facts, class_names(original), words, tuple(few))
    for _ in demo.draw("" if demo.input_kind == "prompt" else 0, 0):
        pass  # the first pictures take longer than all others
    return demo


def vocabulary(*folders: str | Path) -> frozenset[str]:
    """The words in the first of the folders' vocabulary.txt; none without such a file."""
    file = next((file for folder in folders if (file := Path(folder) / VOCABULARY).is_file()), None)
    return frozenset(words_of(read_text(file))) if file else frozenset()


def words_of(text: str) -> list[str]:
    """The words of a prompt in lower case."""
    return re.findall(r"\w+(?:'\w+)*", text.lower().replace("’", "'"))
