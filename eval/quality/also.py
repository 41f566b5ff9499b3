"""Metrics that a benchmark measures beside a protocol's own when it is asked to (``bench --also lpips,pickscore``).

Their files lie below the data folder and are found, downloaded and checked as a protocol's are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stepdistill.errors import InputError
from stepdistill.eval.perceptual import Lpips, Preference, hpsv2, image_reward, pick_score
from stepdistill.eval.standard import FileSpec

DIVERSITY, DISTANCE = "lpips_diversity", "lpips_teacher"


@dataclass(frozen=True)
class Also:
    """One name of ``--also``: its files, what people are shown for each metric, and how the files become a network."""

    files: tuple[FileSpec, ...]
    labels: dict[str, str]
    load: Callable[..., Any]

    @property
    def wants_prompts(self) -> bool:
        """Whether it scores an image for its prompt."""
        return DISTANCE not in self.labels


ALSO = {
    "lpips": Also(
        files=(
            FileSpec(
                file="lpips/alexnet-owt-7be5be79.pth",
                sha256="7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
                url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
            ),
        ),
        labels={DIVERSITY: "LPIPS between images of a prompt", DISTANCE: "LPIPS to the teacher's image"},
        load=lambda trunk, device: Lpips(trunk).to(device),
    ),
    "imagereward": Also(
        files=(
            FileSpec(
                file="imagereward/ImageReward.pt",
                sha256=None,
                url="https://huggingface.co/THUDM/ImageReward/resolve/main/ImageReward.pt",
            ),
            FileSpec(
                file="imagereward/med_config.json",
                sha256=None,
                url="https://huggingface.co/THUDM/ImageReward/resolve/main/med_config.json",
            ),
            FileSpec(
                file="imagereward/bert-base-uncased",
                sha256=None,
                hub="google-bert/bert-base-uncased",
                names=("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"),
            ),
        ),
        labels={"image_reward": "ImageReward"},
        load=image_reward,
    ),
    "hpsv2": Also(
        files=(
            FileSpec(
                file="hpsv2/HPS_v2.1_compressed.pt",
                sha256=None,
                url="https://huggingface.co/xswu/HPSv2/resolve/main/HPS_v2.1_compressed.pt",
            ),
        ),
        labels={"hpsv2": "HPSv2.1 ×100"},
        load=hpsv2,
    ),
    "pickscore": Also(
        files=(FileSpec(file="pickscore", sha256=None, hub="yuvalkirstain/PickScore_v1"),),
        labels={"pick_score": "PickScore"},
        load=pick_score,
    ),
}


def check_also(names: Sequence[str]) -> None:
    """Raises InputError unless all are names of ``--also``."""
    if unknown := [name for name in names if name not in ALSO]:
        raise InputError(f"also: expected some of {', '.join(ALSO)}, found {unknown[0]!r}")


def also_files(names: Sequence[str]) -> list[FileSpec]:
    """What these metrics need below the data folder."""
    return [spec for name in names for spec in ALSO[name].files]


def also_labels(names: Sequence[str]) -> dict[str, str]:
    """What people are shown for each of these metrics."""
    return {metric: label for name in names for metric, label in ALSO[name].labels.items()}


def load_also(name: str, folder: Path, device: str | torch.device) -> Lpips | Preference:
    """LPIPS or a preference score, on ``device``, with its files from the data folder.

    Raises:
        InputError: a package is not installed (it is named), or a file is not what it should be.
    """
    return ALSO[name].load(*(folder / spec.file for spec in ALSO[name].files), device=device)
