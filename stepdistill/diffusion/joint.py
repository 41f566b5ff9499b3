"""Joint samples: several that one network denoises together (a video and its sound), as one packed tensor (B, N).

Methods, losses and samplers see one sample. A call of the network gets the parts in their own arguments, and its
outputs are packed as the sample is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepdistill.diffusion.nested import tensors_in
from stepdistill.diffusion.window import Span, Window


@dataclass(frozen=True)
class Part:
    """One of the samples.

    Args:
        argument: the network's argument that holds it.
        window: where in it.
        shape: of one, as its scheduler steps it; where it has a :attr:`free` part, that.
        output: the place of its prediction among the network's output tensors.
        free: the part of what its scheduler steps that is sampled; None: all.
    """

    argument: str
    window: Window
    shape: tuple[int, ...]
    output: int
    free: Span | None = None

    @property
    def beside(self) -> tuple[str, ...]:
        """The names of what is beside it in its argument, as :attr:`.denoiser.CallSpec.beside`."""
        return self.window.beside_names(self.argument)

    def inside(self, stepped: Tensor) -> Tensor:
        """The sampled part of what its scheduler steps."""
        return stepped if self.free is None else self.free.inside(stepped)


@dataclass(frozen=True)
class Joint:
    """How several samples make one.

    Args:
        parts: in the order of the packed tensor. The pipeline's own scheduler steps the first, its n-th copy that steps
            the n-th after it.
    """

    parts: tuple[Part, ...]

    @property
    def sample(self) -> str:
        """The name of the argument that stands for those of all parts."""
        return " and ".join(part.argument for part in self.parts)

    @property
    def in_words(self) -> str:
        """The parts, in a sentence."""
        parts = [f"{part.argument} {list(part.shape)}" for part in self.parts]
        return f"{' and '.join(parts)} are sampled together, packed as one"

    @property
    def beside(self) -> tuple[str, ...]:
        """The names of what is beside all parts in their arguments."""
        return tuple(name for part in self.parts for name in part.beside)

    def packed(self, samples: Sequence[Tensor]) -> Tensor:
        """Samples (B, ...) as one (B, N)."""
        return torch.cat([sample.flatten(1) for sample in samples], 1)

    def split(self, x: Tensor) -> list[Tensor]:
        """The inverse of :meth:`packed`."""
        lengths = [torch.Size(part.shape).numel() for part in self.parts]
        return [one.unflatten(1, part.shape) for one, part in zip(x.split(lengths, 1), self.parts, strict=True)]

    def packed_call(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a network's call with the packed sample, and what is beside its parts, for those of the
        parts; as they are, where they are so."""
        if self.sample in arguments:
            return dict(arguments)
        own = {part.argument: arguments[part.argument] for part in self.parts}
        call = {self.sample: self.packed([part.window.sample(own[part.argument]) for part in self.parts])}
        for part in self.parts:
            call |= dict(zip(part.beside, part.window.beside(own[part.argument]), strict=True))
        return call | {name: value for name, value in arguments.items() if name not in own}

    def network_call(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of :meth:`packed_call`."""
        call = dict(arguments)
        for part, sample in zip(self.parts, self.split(call.pop(self.sample)), strict=True):
            call[part.argument] = part.window.argument(sample, [call.pop(name) for name in part.beside])
        return call

    def output(self, raw: Any) -> Tensor:
        """The packed prediction (B, N) in what the network returned; a tensor is one that is packed already."""
        if isinstance(raw, Tensor):
            return raw
        outputs = tensors_in(raw)
        return self.packed([part.window.prediction(outputs[part.output]) for part in self.parts])
