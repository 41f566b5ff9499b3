"""How a pipeline is called to be watched: with probes, whose number is read off what the call makes of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepdistill.pipeline.call import COUNTS, by_itself
from stepdistill.pipeline.observe import observe
from stepdistill.pipeline.recording import Recording
from stepdistill.pipeline.singly import observe_each

PROBES: dict[str, tuple[Any, ...]] = {
    # Of different lengths, the longest last (the guided run leaves it out), so that conditions which grow with the
    # prompt are noticed.
    "prompt": ("a red shoe", "rain", "two grey birds on a long wire"),
    "class_labels": (0, 1, 2),
    **dict.fromkeys(COUNTS, (0, 1, 2)),
}


@dataclass(frozen=True)
class ProbeCall:
    """The call of a pipeline.

    Args:
        entry: the argument that states the images: prompt, class_labels, or one of COUNTS.
        arguments: further arguments of every call.
        alone: a call is for one entry.
    """

    pipeline: Any
    entry: str
    arguments: Mapping[str, Any]
    alone: bool = False

    @property
    def one(self) -> Sequence[Any] | str:
        """The entries of a call for one image."""
        return by_itself(PROBES[self.entry][0]) if self.alone else PROBES[self.entry][:1]

    def observe(self, **options: Any) -> Recording:
        """A run for one image; ``options`` as for :func:`.observe.observe`."""
        return observe(self.pipeline, self.one, self.arguments, **options)

    def several(self, count: int, **options: Any) -> Recording:
        """A run for ``count`` images, or one for each as if it were one."""
        watch = observe_each if self.alone else observe
        return watch(self.pipeline, PROBES[self.entry][:count], self.arguments, **options)
