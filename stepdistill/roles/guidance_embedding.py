"""A student's input for guidance as a file beside its export, whose stock weights hold it at one w."""

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from stepdistill.errors import InputError
from stepdistill.roles.added import GuidanceEmbedded

FILE = "guidance_embedding.safetensors"


def write_embedding(network: nn.Module, folder: Path) -> None:
    """Write the embedding of w of a network that has one; ``folder`` is its export."""
    if isinstance(network, GuidanceEmbedded):
        weights = {name: value.detach().cpu().contiguous() for name, value in network.embedding().items()}
        save_file(weights, folder / FILE, metadata={"scale": repr(float(network.number))})


def read_embedding(network: nn.Module, folder: Path) -> nn.Module:
    """The network of an export with w as an input (``guidance_scale``), or as it is where the export has no embedding.

    Args:
        network: the stock network of ``folder``; changed in place, its biases no longer hold the w of the export.
        folder: the export.

    Raises:
        InputError: the file does not fit the network.
    """
    if not (folder / FILE).is_file():
        return network
    try:
        with safe_open(folder / FILE, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            scale = float(file.metadata()["scale"])
        embedded = GuidanceEmbedded(network, scale, len(weights["trunk.0.bias"]))
        embedded.load_embedding(weights)
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        raise InputError(f"{folder / FILE}: does not fit this {type(network).__name__}: {reason}") from None
    embedded.fold(network, -1.0)
    return embedded.eval()
