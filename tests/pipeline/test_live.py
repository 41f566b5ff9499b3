"""Conditions encoded for a batch have the bits of those that a store holds."""

import pytest
import torch

from pipeline.zoo import ZOO
from stepdistill.errors import InputError
from stepdistill.pipeline import conditioning, live
from stepdistill.pipeline.trace import trace

PROMPTS = ["rain", "a red shoe", "two grey birds", "", *(f"thing {'x' * number}" for number in range(17))]


@pytest.fixture(scope="module")
def traced():
    return trace(ZOO["sd"].build(), ZOO["sd"].arguments)


def test_live_rows_are_those_of_the_store(traced, tmp_path, monkeypatch):
    for module in (conditioning, live):
        monkeypatch.setattr(module, "CHUNK", 4)
    stored, made = conditioning.encode(traced, PROMPTS, tmp_path), live.live(traced, PROMPTS)
    assert len(made) == len(PROMPTS) == 21 and made.labels == stored.labels
    state = torch.random.get_rng_state()
    for index in ([3, 9, 9, 5], [20, 0, 4, 8, 17], [20], [1, 5, 9, 13, 17]):
        known, found = (one.batch(torch.tensor(index)) for one in (stored, made))
        for side, other in zip(known, found, strict=True):
            assert side.keys() == other.keys() and all(torch.equal(side[name], other[name]) for name in side)
    assert torch.equal(torch.random.get_rng_state(), state), "a step's random numbers are its own"
    assert made.store is None and made.content != conditioning.encode(traced, PROMPTS[:-1], tmp_path).content


def test_conditions_of_any_length_are_refused():
    found = trace(ZOO["qwen-image"].build(), ZOO["qwen-image"].arguments)
    with pytest.raises(InputError, match=r"data\.encode: expected 'store' .* has any length, found 'live'"):
        live.live(found, PROMPTS)
