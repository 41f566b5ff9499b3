"""What a replayed step may be off by: 1e-5, or what rounding makes of the network."""

from types import SimpleNamespace

import pytest
import torch

from stepdistill.pipeline import self_test
from stepdistill.pipeline.call import TraceError


@pytest.mark.parametrize(
    ("error", "gain", "passes"),
    [(0.8e-5, 1, True), (2e-5, 1, False), (2e-5, 50, True), (2e-5, 15, False), (2e-4, 1000, False)],
)
def test_an_error_counts_unless_rounding_of_the_sample_moves_the_step_as_far(error, gain, passes, monkeypatch):
    own = torch.linspace(-1, 1, 64)

    def replays(*_, rounding=0.0):
        return iter([(own + error + gain * rounding, own)])

    monkeypatch.setattr(self_test, "_replays", lambda *given: replays(rounding=given[4] if len(given) > 4 else 0.0))
    call = SimpleNamespace(output=own)
    runs = SimpleNamespace(on=SimpleNamespace(steps=[SimpleNamespace(calls=[call])]))
    denoiser = SimpleNamespace(network=torch.nn.Linear(1, 1), schedule=SimpleNamespace(rounding=0.0))
    if passes:
        assert self_test.self_test(runs, denoiser, None, []) == pytest.approx(error, rel=0.05)
        return
    with pytest.raises(TraceError, match="a replayed step is off"):
        self_test.self_test(runs, denoiser, None, [])
