"""The host's memory in a plan, phase by phase, of one process."""

from stepdistill.exporting.lora import why_not_lora
from stepdistill.methods.base import DistillMethod
from stepdistill.planning.fake_pipeline import Blueprint
from stepdistill.planning.weights import AUTOENCODER, ENCODERS, Weights
from stepdistill.recipe import Recipe

FLOAT32 = 4


def host_memory(
    recipe: Recipe, drawn: Blueprint, method: DistillMethod, weights: Weights, stored: int, trajectories: int
) -> dict[str, int]:
    """Bytes at the peak of each phase: load, encode, train, export.

    Weights count where they are read, although those of files in the same precision are pages that processes share.
    Python and its libraries (about 1 GiB a process) are left out.

    Args:
        stored: bytes of conditions and latents that are there at a time.
        trajectories: bytes of those that are kept.
    """
    counts, sizes = ({name: pair[i] for name, pair in weights.sizes.items()} for i in (0, 1))
    others = sizes[ENCODERS] + sizes[AUTOENCODER]
    whole = [name for name, how in recipe.role_training.items() if how == "full"]
    # The network once more with exact weights, which copies on the device are made of.
    rounded = whole and (recipe.teacher.precision != "fp32" or recipe.teacher.storage is not None)
    exact = FLOAT32 * counts["teacher"] if rounded else 0
    copies = FLOAT32 * sum(counts[name] for name in whole) if recipe.distributed.shard else 0
    return {
        "load": max(weights.loaded + others, weights.offloaded + exact + copies),
        "encode": weights.offloaded + stored,
        "train": weights.offloaded + stored + trajectories,
        "export": _export(recipe, drawn, method, weights, whole),
    }


def _export(recipe: Recipe, drawn: Blueprint, method: DistillMethod, weights: Weights, whole: list[str]) -> int:
    """Writing the student with its pipeline loaded; the plain call in another process comes after that, with less."""
    counts, sizes = ({name: pair[i] for name, pair in weights.sizes.items()} for i in (0, 1))
    network, student = FLOAT32 * counts["teacher"], FLOAT32 * counts["student"]
    if recipe.export.check == "cpu":
        loaded = network + FLOAT32 * (counts[ENCODERS] + counts[AUTOENCODER])
    else:
        loaded = weights.loaded + sizes[ENCODERS] + sizes[AUTOENCODER]
    lora = not recipe.export.fuse and not why_not_lora(drawn.trace, method.roles.student.network)
    copies = FLOAT32 * sum(counts[name] for name in ("student", *method.exported) if name in whole)
    # What is no LoRA's file is written as one plain network, a copy.
    written = 0 if lora else student if "student" in whole else network
    return loaded + copies + written
