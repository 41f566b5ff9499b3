"""What a protocol's metrics are computed from."""

import pytest
import torch

from stepdistill.eval.measure import ViewRows, measure
from stepdistill.eval.protocol import load_protocol
from stepdistill.eval.references import RealSide
from stepdistill.eval.shards import HeldRows


def test_precision_and_recall_see_every_category_of_real_pictures():
    """MJHQ's files lie category by category: the first of them would be one kind of picture."""
    generator = torch.Generator().manual_seed(0)
    places = torch.eye(3).repeat_interleave(40, 0) * 100
    real = places + torch.randn(120, 3, generator=generator)
    fake = places + torch.randn(120, 3, generator=generator)
    protocol = load_protocol("mjhq30k-v1")
    few = protocol.neighbours.model_copy(update={"rows": 45})
    protocol = protocol.model_copy(update={"neighbours": few})
    view = ViewRows(HeldRows({"rows": fake[torch.randperm(120, generator=generator)]}))
    view.real = RealSide(rows=lambda: real)
    found = measure(protocol, {"inception": view, "clip": view}, ["precision", "recall"])
    assert found.metrics == {"precision": pytest.approx(0.9, abs=0.1), "recall": pytest.approx(0.9, abs=0.1)}
