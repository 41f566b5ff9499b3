"""Images with a known class, and a cheap stand-in for the second feature network."""

from pathlib import Path

import torch

from stepdistill import assets

ROWS = 60


class Pixels(torch.nn.Module):
    """Stands for the second network: the feature row is the image shrunk to 4x4."""

    num_features = 16

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def features(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1) / 255


def pictures(n, seed, noise=0):
    """Images whose class is the height of a bright bar, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 10
    images = torch.randint(0, 40, (n, 1, 32, 32), generator=generator)
    for image, label in zip(images, labels, strict=True):
        image[0, 3 * label : 3 * label + 4] += 150
    images = images + noise * torch.randn(images.shape, generator=generator)
    return images.clamp(0, 255).to(torch.uint8), labels


def reference_file(protocol):
    return assets.root() / "assets" / Path(protocol.reference.file)
