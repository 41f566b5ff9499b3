"""The components of a pipeline, other ones in their places."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from stepdistill.pipeline.stock_call import is_modular

_ABSENT = object()


def modules(pipeline: Any) -> dict[str, nn.Module]:
    """The pipeline's components that are networks, by name, each once."""
    seen: dict[int, str] = {}
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module):
            seen.setdefault(id(component), name)
    return {name: pipeline.components[name] for name in seen.values()}


@contextmanager
def patched(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    """``owner.name`` is ``replacement`` inside the block, on this instance only."""
    before = owner.__dict__.get(name, _ABSENT)
    owner.__dict__[name] = replacement
    try:
        yield
    finally:
        if before is _ABSENT:
            del owner.__dict__[name]
        else:
            owner.__dict__[name] = before


@contextmanager
def scheduled(pipeline: Any, scheduler: Any) -> Iterator[None]:
    """Inside, ``scheduler`` is the pipeline's, where :func:`put` puts it."""
    with ExitStack() as stack:
        for owner, name in _places(pipeline, "scheduler"):
            stack.enter_context(patched(owner, name, scheduler))
        yield


def put(pipeline: Any, name: str, part: Any) -> None:
    """Make ``part`` the component ``name``, of a pipeline inside as well that has the same one (Kandinsky)."""
    if is_modular(pipeline):
        pipeline.register_components(**{name: part})
        return
    if getattr(pipeline, name, None) is None:
        pipeline.register_modules(**{name: part})
        return
    for owner, own in _places(pipeline, name):
        setattr(owner, own, part)


def shared_inside(pipeline: Any, name: str) -> bool:
    """Whether a pipeline inside has the same component, which keeps it when another one takes its place outside."""
    return len(_places(pipeline, name)) > 1


def _places(pipeline: Any, name: str) -> list[tuple[Any, str]]:
    """Where a component is: (the pipeline, its name), and of pipelines inside that have the same one."""
    part = getattr(pipeline, name)
    inside = [value for value in vars(pipeline).values() if isinstance(value, DiffusionPipeline)]
    same = [(owner, own) for owner in inside for own, value in vars(owner).items() if value is part]
    return [(pipeline, name), *same]
