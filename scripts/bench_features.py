"""Images per second through Inception and OpenCLIP, beside the plain loops of their own libraries.

python scripts/bench_features.py --clip ViT-g-14 --images 1024

The networks have random weights of the real architectures; the images are random, 512 px, in memory. A plain loop takes
the library's own preprocessing, one image after the other, and its network in batches.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import open_clip
import torch
from PIL import Image
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from stepdistill.eval.bench.sources import device_name
from stepdistill.eval.networks import clip, feature_pass, inception


@torch.no_grad()
def plain_inception(network: FeatureExtractorInceptionV3, images: Tensor, batch: int, device: torch.device) -> Tensor:
    """torch-fidelity's network, which resizes on the device."""
    network.features_list = ["2048"]
    return torch.cat([network(part.to(device))[0].cpu() for part in images.split(batch)])


@torch.no_grad()
def plain_clip(model: open_clip.CLIP, images: Tensor, batch: int, device: torch.device) -> Tensor:
    """open_clip's transform and encoder."""
    transform = open_clip.image_transform(model.visual.image_size, is_train=False)
    parts = []
    for part in images.split(batch):
        pixels = [transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in part]
        parts.append(model.encode_image(torch.stack(pixels).to(device)).float().cpu())
    return torch.cat(parts)


def timed(work: Callable[[Tensor], Any], images: Tensor, batch: int) -> tuple[Any, float]:
    """(rows, images per second) after a first batch that is not counted."""
    work(images[:batch])
    start = time.perf_counter()
    rows = work(images)
    return rows, len(images) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clip", default="ViT-g-14")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    batch, device = arguments.batch, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (arguments.images, 3, 512, 512), generator=generator, dtype=torch.uint8)
    print(f"{device_name(device)}, {arguments.images} images, batch {batch}, float32")
    for name in ("inception", arguments.clip):
        network = (inception(None, resize="tf1") if name == "inception" else clip(name, None)).to(device)
        plain, inner = (plain_inception, network.network) if name == "inception" else (plain_clip, network.model)
        settings = {"batch": batch, "device": device}
        ours, speed = timed(partial(feature_pass, network, **settings), images, batch)
        theirs, reference = timed(partial(plain, inner, **settings), images, batch)
        difference = float((ours["rows"] - theirs).abs().max() / theirs.abs().max())
        print(f"{name:10} {speed:8.1f} images/s, plain loop {reference:8.1f}, rows differ by {difference:.0e}")


if __name__ == "__main__":
    main()
