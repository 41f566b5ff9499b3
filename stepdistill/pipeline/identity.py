"""What the conditions of a pipeline depend on, as a hash."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from stepdistill.data.sample import Pictures
from stepdistill.files import digest, sha256
from stepdistill.pipeline.components import modules
from stepdistill.pipeline.stock_call import pictures_in
from stepdistill.pipeline.trace import Trace

FEW = 8
"""Entries that are encoded at once where each is padded to the longest beside it, and one alone takes all of them."""


def identity(trace: Trace, entries: Sequence[str | int], pictures: Sequence[Pictures] | None) -> str:
    """A hash of everything the conditions depend on; of the encoders' weights a few values of each tensor."""
    pipeline, guided = trace.pipeline, (trace.guidance.kind, trace.guidance.scale)
    call = (type(pipeline).__name__, trace.component, guided, trace.arguments, trace.conditioning)
    picture_hashes = [sha256(Path(file)) for name in trace.pictures for file in pictures_in(trace.arguments[name])]
    own = getattr(pictures, "identity", None) or [
        {name: (picture.size, picture.tobytes()) for name, picture in one.items()} for one in pictures or ()
    ]
    parts = {name: settings(component) for name, component in pipeline.components.items()}
    encoders = {name: module for name, module in modules(pipeline).items() if name not in trace.components}
    weights = {name: {n: some(p) for n, p in encoder.named_parameters()} for name, encoder in encoders.items()}
    # A textual inversion may show in none of these.
    further = [one] if (one := getattr(pipeline, "made_of", None)) else []
    if any(None in shape for shape in trace.conditioning.values()):
        further.append(f"{FEW} at once")  # each is padded to the longest beside it
    return digest(call, entries, picture_hashes, own, parts, weights, *further)


def settings(component: Any) -> tuple[Any, ...]:
    """What a pipeline's component is beside its weights; where those were loaded from is not what it is."""
    config = getattr(component, "config", None)
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
    settings = json.dumps({key: value for key, value in config.items() if key[0] != "_"}, sort_keys=True, default=str)
    return type(component).__name__, settings, getattr(component, "model_max_length", None)


def some(weights: Tensor) -> Tensor:
    """Sixteen values or a few more: hashing all of a text encoder's would take as long as a run's first steps."""
    flat = weights.detach().reshape(-1)
    return flat[:: max(1, len(flat) // 16)]
