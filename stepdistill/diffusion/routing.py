"""Which of several students draws a sample: decided by its condition, a class or the place of its prompt."""

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from stepdistill.diffusion.experts import Part
from stepdistill.errors import InputError
from stepdistill.files import read_json, write_text

FILE = "router.json"


@dataclass(frozen=True)
class Router:
    """Groups of conditions, a student for each; the students are named "0", "1", ...

    Args:
        argument: the condition that decides: class numbers (B,), or a prompt's tokens (B, N, d) or vector (B, d).
        classes: the numbers of each group's classes; empty where prompts decide.
        centres: of each group's prompts, d numbers; the nearest to a prompt's place (:func:`places`) has it.
    """

    argument: str
    classes: tuple[tuple[int, ...], ...] = ()
    centres: tuple[tuple[float, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.classes or self.centres)

    def group(self, condition: Tensor) -> Tensor:
        """The group of each row (B,), on the CPU.

        Args:
            condition: the rows of :attr:`argument`.

        Raises:
            InputError: a class is in no group, as the empty one is.
        """
        if self.centres:
            return nearest(places(condition), self._centres)
        numbers = condition.reshape(len(condition), -1)[:, 0].long().cpu()
        if unknown := sorted(set(numbers.tolist()) - {number for one in self.classes for number in one}):
            known = f"a class of {sum(map(len, self.classes))} that the students share"
            raise InputError(f"conditions: expected {known}, and no guidance, found class {unknown[0]}")
        return torch.stack([torch.isin(numbers, torch.tensor(one)) for one in self.classes]).int().argmax(0)

    @cached_property
    def _centres(self) -> Tensor:
        return torch.tensor(self.centres, dtype=torch.float32)

    def parts(self, conditions: dict[str, Tensor]) -> list[Part]:
        """The students that answer a batch, with their rows, as of :func:`stepdistill.diffusion.experts.parts`."""
        condition = conditions[self.argument]
        group = self.group(condition)
        rows = {str(one): (group == one).nonzero()[:, 0].to(condition.device) for one in group.unique().tolist()}
        return [(name, index if len(rows) > 1 else None) for name, index in rows.items()]

    def alike(self, other: "Router") -> bool:
        """Whether both make the same groups, but for the last digits of other machines."""
        sizes = [[len(centre) for centre in one.centres] for one in (self, other)]
        if (self.argument, self.classes) != (other.argument, other.classes) or sizes[0] != sizes[1]:
            return False
        return torch.allclose(self._centres, other._centres, rtol=0, atol=1e-4)

    def write(self, folder: Path) -> None:
        """Write :data:`FILE` into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / FILE, json.dumps({"schema": 1} | asdict(self)) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Router":
        """What :meth:`write` wrote.

        Raises:
            InputError: there is none in ``folder``, or it is damaged.
        """
        facts = read_json(folder / FILE)
        try:
            groups = {name: tuple(map(tuple, facts[name])) for name in ("classes", "centres")}
            return cls(facts["argument"], **groups)
        except (KeyError, TypeError) as error:
            raise InputError(f"{folder / FILE}: expected argument, classes and centres, found no {error}") from None


def places(condition: Tensor) -> Tensor:
    """Of prompts' tokens (B, N, d) or vectors (B, d): the direction of their sum, (B, d) of length 1, on the CPU.

    Padding with zeros, as many as a batch has, does not change it.
    """
    rows = condition.detach().float()
    return functional.normalize((rows.sum(1) if rows.ndim > 2 else rows).cpu(), dim=1)


def distances(points: Tensor, centres: Tensor) -> Tensor:
    """Of each point (N, d) to each centre (K, d): (N, K), the same for any number of points at once."""
    return torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist")


def nearest(points: Tensor, centres: Tensor) -> Tensor:
    """The number of the centre that is nearest to each point (N,)."""
    return distances(points, centres).argmin(1)
