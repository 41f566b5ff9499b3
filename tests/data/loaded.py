"""The images of a source in memory, which the library streams into a store."""

import torch
from torch import Tensor

from stepdistill.data.buckets import Bucket
from stepdistill.data.decoding import Medium
from stepdistill.data.images import close_tally, stream
from stepdistill.data.sample import Data, Pictures, Tally


def loaded(
    data: Data, channels: int, size: int, bucket: Bucket | None = None
) -> tuple[Tensor, list[str], list[Pictures]]:
    """Images (N, C, size, size), the condition of each, and the pictures of each."""
    tally = Tally("data.images", data.max_rejected)
    shape = channels, *((size, size) if bucket is None else bucket.size)
    items = [item for item in stream(data, Medium(shape), tally, bucket=bucket) if item is not None]
    close_tally(tally, data)
    return torch.stack([item.image for item in items]), [item.condition for item in items], [item.own for item in items]
