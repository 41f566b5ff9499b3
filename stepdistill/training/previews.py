"""Previews: teacher, student and critic from the same noise, and how far the student's latents have drifted."""

import textwrap
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from stepdistill.eval.pictures import shrunk
from stepdistill.progress import say
from stepdistill.sampling.image_grid import image_grid
from stepdistill.sampling.playing import drawn, write_whole
from stepdistill.training.layout import RunFolder
from stepdistill.training.run_samples import diffuse, distilled
from stepdistill.training.session import Session

COUNT = 16
# Apart from training and benchmark seeds, which a user picks.
SEED = 987_654_321
WIDEST = 2048
"""Pixels of a preview's width at most."""
READABLE = 96
"""Pixels of a picture's width from which on its prompt is written above it."""
GAP, MARGIN, LINE = 2, 56, 14


class Preview:
    """Writes previews/NNNNNN.png: one row each of teacher (guided), student and, where there is one, critic.

    Those of further sizes are NNNNNN_HEIGHTxWIDTH.png. Of videos the student's first four are in NNNNNN_student.webp,
    the teacher's in teacher.webp; of sounds in NNNNNN_student_0.wav, ... They are of ``train.preview_prompts``, or else
    of the run's first conditions.

    Args:
        session: the run.
        folder: its folder.
        writes: False in a process that only takes part in the networks' calls.
        size: the number of the pictures' size.
    """

    def __init__(self, session: Session, folder: Path, writes: bool = True, size: int = 0):
        self.own = session.previewed is not None
        self.count = len(session.previewed) if self.own else COUNT
        self.session = session.with_conditions(session.previewed) if self.own else session
        self.folder, self.writes, self.size = RunFolder(folder).previews, writes, size
        if writes:
            self.folder.mkdir(exist_ok=True)
        with self.session.at(size):
            self.teacher = diffuse(self.session, "teacher", self.count, SEED)
            self.teacher_images = self._drawn(self.teacher, "teacher")
        self.pictured = self.teacher_images.ndim == 4 and self.teacher_images.shape[1] in (1, 3)
        if writes and not self.pictured:
            shape = tuple(self.teacher_images.shape[1:])
            say(f"no previews: {type(session.trace.pipeline).__name__} returns no pictures, but {shape} numbers each")

    def path(self, step: int) -> Path:
        """Where the picture of ``step`` is."""
        return self.folder / f"{step:06d}{self._size}.png"

    @property
    def _size(self) -> str:
        return f"_{self.session.sizes[self.size].name}" if self.size else ""

    def _drawn(self, latents: Tensor, name: str = "") -> Tensor:
        """Pictures of latents, uint8 (N, C, H, W); with a ``name`` the first videos or sounds are written whole."""
        pictures, whole = drawn(self.session.trace, latents)
        if name and self.writes:
            write_whole(self.folder / f"{name}{self._size}", whole, self.session.trace)
        return pictures

    def write(self, step: int, averaged: AbstractContextManager) -> dict[str, float]:
        """Write the picture of ``step``; returns how far the latents' mean and deviation are from the teacher's."""
        with self.session.at(self.size):
            return self._write(step, averaged)

    @torch.no_grad()
    def _write(self, step: int, averaged: AbstractContextManager) -> dict[str, float]:
        session = self.session
        with averaged:
            student = distilled(session, self.count, SEED)
        if self.pictured:
            rows = {"teacher": self.teacher_images, "student": self._drawn(student, f"{step:06d}_student")}
            if "critic" in session.method.roles:
                rows["critic"] = self._drawn(diffuse(session, "critic", self.count, SEED))
            labels = session.conditioning.labels
            captions = [str(labels[number % len(labels)]) for number in range(self.count)]
            if self.writes:
                sheet(rows, captions, self.own).save(self.path(step))
        difference = student.float().mean() - self.teacher.float().mean()
        return {
            "drift/mean": difference.item(),
            "drift/std": (student.float().std() / self.teacher.float().std()).item() - 1,
        }


def sheet(rows: Mapping[str, Tensor], captions: Sequence[str], enlarge: bool = False) -> Image.Image:
    """Rows of pictures below each other, at most 2048 pixels wide; many large ones in blocks of eight columns.

    Args:
        rows: pictures uint8 (N, C, H, W) by the name of who drew them; every row of the same conditions.
        captions: those of the N columns, written where pictures are large enough.
        enlarge: repeat the pixels of small pictures until they are.
    """
    count, _, _, width = next(iter(rows.values())).shape
    if enlarge and width < READABLE:
        factor = -(-READABLE // width)
        rows = {name: one.repeat_interleave(factor, 2).repeat_interleave(factor, 3) for name, one in rows.items()}
        width *= factor
    columns = count if count * (width + GAP) <= WIDEST - MARGIN else min(count, 8)
    if (fitting := (WIDEST - MARGIN) // columns - GAP) < width:
        rows = {name: _narrowed(one, fitting) for name, one in rows.items()}
    shown = next(iter(rows.values()))
    blocks = [range(first, min(first + columns, count)) for first in range(0, count, columns)]
    grids = [
        image_grid(torch.cat([one[block.start : block.stop] for one in rows.values()]), len(block)) for block in blocks
    ]
    if shown.shape[3] < READABLE:  # the names of the rows alone
        captions = [""] * count
    return _captioned(grids, blocks, [*rows], captions, shown.shape[2] + GAP, shown.shape[3] + GAP)


def _narrowed(images: Tensor, width: int) -> Tensor:
    """Pictures (N, C, H, W) no wider than ``width`` pixels."""
    return shrunk(images, max(1, int(max(images.shape[2:]) * width / images.shape[3])))


def _captioned(
    grids: Sequence[Image.Image],
    blocks: Sequence[range],
    names: Sequence[str],
    captions: Sequence[str],
    height: int,
    width: int,
) -> Image.Image:
    """Grids below each other with the captions of their columns above and the names of their rows on the left."""
    texts = [textwrap.wrap(caption, max(8, width // 7), max_lines=3, placeholder=" …") for caption in captions]
    tall = [LINE * max(len(texts[number]) for number in block) + 6 for block in blocks]
    whole = sum(tall) + sum(grid.height + 4 * GAP for grid in grids)
    page = Image.new("RGB", (MARGIN + max(grid.width for grid in grids), whole), "white")
    draw, font, top = ImageDraw.Draw(page), ImageFont.load_default(11), 0
    for grid, block, above in zip(grids, blocks, tall, strict=True):
        for column, number in enumerate(block):
            for line, text in enumerate(texts[number]):
                draw.text((MARGIN + column * width, top + line * LINE), text, "black", font)
        top += above
        page.paste(grid, (MARGIN, top))
        for row, name in enumerate(names):
            draw.text((2, top + row * height + 2), name, "black", font)
        top += grid.height + 4 * GAP
    return page
