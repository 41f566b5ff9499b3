"""Many images on one sheet."""

import numpy as np
from PIL import Image
from torch import Tensor


def image_grid(images: Tensor, columns: int, gap: int = 2) -> Image.Image:
    """Images uint8 (N, C, H, W), C = 1 or 3, in rows of ``columns`` on a white sheet, ``gap`` pixels apart."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"expected images (N, 1 or 3, H, W) with N >= 1, found {tuple(images.shape)}")
    _, channels, height, width = images.shape
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, dtype=np.uint8)
    for index, image in enumerate(images.cpu().numpy()):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    return Image.fromarray(sheet[..., 0] if channels == 1 else sheet)
