"""What a protocol's metrics are computed from."""

from types import SimpleNamespace

import pytest
import torch

from stepdistill.eval.standard import load_standard
from stepdistill.eval.standard_measure import RealSide, ViewRows, measure_standard


def test_precision_and_recall_see_every_category_of_real_pictures():
    """MJHQ's files lie category by category: the first of them would be one kind of picture."""
    generator = torch.Generator().manual_seed(0)
    places = torch.eye(3).repeat_interleave(40, 0) * 100
    real = places + torch.randn(120, 3, generator=generator)
    fake = places + torch.randn(120, 3, generator=generator)
    protocol = load_standard("mjhq30k-v1")
    few = protocol.neighbours.model_copy(update={"rows": 45})
    protocol = protocol.model_copy(update={"neighbours": few})
    view = ViewRows(SimpleNamespace(all=lambda _: fake[torch.randperm(120, generator=generator)]))
    view.real = RealSide(rows=lambda: real)
    found = measure_standard(protocol, {"inception": view, "clip": view}, ["precision", "recall"])
    assert found.metrics == {"precision": pytest.approx(0.9, abs=0.1), "recall": pytest.approx(0.9, abs=0.1)}
