"""Guidance adapters as files beside a pipeline, and back onto a pipeline's denoiser."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from stepdistill.errors import InputError
from stepdistill.roles.guidance_adapters import ADAPTERS, NAME, GuidanceAdapter, fasten, fastened

CONFIG, WEIGHTS = f"{NAME}.json", f"{NAME}.safetensors"


def attach(pipeline: Any, folder: str | Path, scale: float | None = None) -> Any:
    """Make a pipeline guided in one pass per step: fasten the guidance adapter in ``folder`` to its denoiser.

        pipe = DiTPipeline.from_pretrained("some-fine-tune")
        stepdistill.attach(pipe, "runs/fashion_agd/export")

    Args:
        pipeline: a diffusers pipeline with a denoiser of the class that the adapter was made for; changed in place.
        folder: an export with a guidance adapter.
        scale: w, in uncond + w (cond - uncond); None: that of the export.

    Returns:
        The pipeline. Call it with its own guidance off (guidance_scale=1).

    Raises:
        InputError: there is no adapter in ``folder``, or it is for another network.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind, component, denoiser, width = (config[key] for key in ("kind", "component", "denoiser", "width"))
        make = ADAPTERS[kind]
    except OSError:
        raise InputError(f"{folder}: expected an export with a guidance adapter, found no {CONFIG}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / CONFIG}: not the configuration of a guidance adapter: {error!r}") from None
    network = getattr(pipeline, component, None)
    if type(network).__name__ != denoiser:
        actual = type(network).__name__
        raise InputError(f"{folder}: expected the {denoiser} it was made for as the {component}, found {actual}")
    if (earlier := fastened(network)) is not None:
        earlier.release()
        delattr(network, NAME)
    adapter = make(network, 1.0, width)
    try:
        adapter.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"{folder / WEIGHTS}: does not fit this {denoiser}: {reason}") from None
    if scale is not None:
        adapter.scale.fill_(scale)
    fasten(network, adapter.to(network.device, network.dtype))
    return pipeline


def write_adapter(adapter: GuidanceAdapter, component: str, network: Any, folder: Path) -> None:
    """The files that :func:`attach` reads; ``component`` is the name of ``network`` in its pipeline."""
    config = {
        "schema": 1,
        "kind": adapter.kind,
        "component": component,
        "denoiser": type(network).__name__,
        "width": adapter.width,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    weights = {name: value.detach().cpu().contiguous() for name, value in adapter.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
