"""Conditions in groups, each for a student of its own: classes by their numbers, prompts by where they lie."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stepdistill.data.chosen import Chosen, chosen_rows
from stepdistill.diffusion.routing import Router, distances, nearest, places
from stepdistill.errors import InputError
from stepdistill.files import digest, read_json, write_json
from stepdistill.progress import say

if TYPE_CHECKING:
    from stepdistill.pipeline.conditioning import Conditioning
    from stepdistill.pipeline.trace import Trace
    from stepdistill.recipe import Data

ROUNDS, AT_ONCE, LEARNT = 50, 256, 20_000
GROUPS = "groups.json"
"""The group of each condition, beside the router."""


@dataclass(frozen=True)
class Group:
    """One of several groups of conditions.

    Args:
        router: which knows them all.
        number: of this one.
        labels: of all conditions, for people.
        entries: of all conditions, what the pipeline is called with.
    """

    router: Router
    number: int
    labels: Sequence[str]
    entries: Sequence[str | int]


def own_group(data: "Data", traced: "Trace", conditioning: "Conditioning") -> "Conditioning":
    """The conditions of the run's group, ``data.group`` of ``data.groups``; all where there is one group.

    Groups depend on the conditions alone. Classes are divided in the order of their numbers, into groups of one size or
    nearly; prompts into the clusters (k-means) of their text embeddings.

    Raises:
        InputError: the group has no condition, or the pipeline's networks take turns.
    """
    count, number = data.groups, data.group
    if count == 1:
        return conditioning
    if traced.denoiser.takes_turns:
        raise InputError("data.groups: expected 1 for a pipeline whose networks take turns")
    router, group = _found(conditioning, count)
    index = (group == number).nonzero()[:, 0]
    if not len(index):
        raise InputError(f"data.groups: expected fewer, found {count}, of which group {number} has no condition")
    say(f"data.groups: group {number} of {count} has {len(index)} of {len(conditioning)} conditions")
    numbers = index.tolist()
    cond, null = (
        side and {name: one if len(one) == 1 else chosen_rows(one, index) for name, one in side.items()}
        for side in (conditioning.cond, conditioning.null)
    )
    return replace(
        conditioning,
        labels=Chosen(conditioning.labels, numbers),
        entries=Chosen(conditioning.entries, numbers),
        cond=cond,
        null=null,
        key=f"{conditioning.key} group {number} of {count}: {digest(numbers)}",
        group=Group(router, number, conditioning.labels, conditioning.entries),
    ).to(conditioning.device)


def _found(conditioning: "Conditioning", count: int) -> tuple[Router, Tensor]:
    """The router, and the group of each condition (N,); looked for once for a store, all of which is read for it."""
    folder = conditioning.store and conditioning.store.folder / f"groups-{count}"
    if folder is not None and (folder / GROUPS).is_file():
        return Router.read(folder), torch.tensor(read_json(folder / GROUPS)["groups"])
    router = _by_class(conditioning, count) or _by_prompt(conditioning, count)
    rows, length = conditioning.cond[router.argument], len(conditioning)
    starts = range(0, length, AT_ONCE)
    group = torch.cat([router.group(rows[torch.arange(start, min(start + AT_ONCE, length))]) for start in starts])
    if folder is not None:
        router.write(folder)
        write_json(folder / GROUPS, {"groups": group.tolist()})
    return router, group


def _by_class(conditioning: "Conditioning", count: int) -> Router | None:
    """Of a class-conditional pipeline; None for others."""
    for name, rows in conditioning.cond.items():
        if len(rows) == len(conditioning.entries) and isinstance(conditioning.entries[0], int):
            values = rows[torch.arange(len(rows))]
            if not values.is_floating_point() and values.numel() == len(rows):
                ordered = torch.tensor(sorted(set(values.flatten().tolist())))
                parts = [tuple(part.tolist()) for part in ordered.tensor_split(count)]
                return Router(name, classes=tuple(parts))
    return None


def _by_prompt(conditioning: "Conditioning", count: int) -> Router:
    """Of a pipeline of prompts, by the largest of its conditions that has a row for each."""
    every = {
        name: rows
        for name, rows in conditioning.cond.items()
        if len(rows) == len(conditioning) and rows[torch.arange(1)].is_floating_point() and len(rows.shape) in (2, 3)
    }
    if not every:
        raise InputError(f"data.groups: expected 1 for a pipeline without classes or prompts, found {count}")
    argument = max(every, key=lambda name: (len(every[name].shape), every[name].shape[1:].numel()))
    rows = every[argument]
    some = torch.arange(0, len(rows), max(1, -(-len(rows) // LEARNT)))
    centres = _centres(torch.cat([places(rows[part]) for part in some.split(AT_ONCE)]), count)
    return Router(argument, centres=tuple(map(tuple, centres.tolist())))


def _centres(points: Tensor, count: int) -> Tensor:
    """The centres (count, d) of k-means on points (N, d), which begins with points far from each other."""
    centres = points[:1]
    for _ in range(count - 1):
        farthest = distances(points, centres).amin(1).argmax()
        centres = torch.cat([centres, points[farthest, None]])
    for _ in range(ROUNDS):
        near = nearest(points, centres)
        means = [points[near == k].mean(0) if (near == k).any() else centres[k] for k in range(count)]
        moved = torch.stack(means)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres
