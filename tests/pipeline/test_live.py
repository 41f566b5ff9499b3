"""Conditions encoded for a batch have the bits of those that a store holds."""

import pytest
import torch

from pipeline.zoo import ZOO
from stepdistill.errors import InputError
from stepdistill.pipeline import conditioning, live
from stepdistill.pipeline.trace import trace

PROMPTS = ["rain", "a red shoe", "two grey birds", "", *(f"thing {'x' * number}" for number in range(17))]


def equal(known: dict, found: dict) -> bool:
    return known.keys() == found.keys() and all(torch.equal(known[name], found[name]) for name in known)


@pytest.mark.parametrize("name", ["sd", "qwen-image"])
def test_live_rows_are_those_of_the_store(name, tmp_path, monkeypatch):
    """Of conditions with one length and of those that grow with the prompt."""
    traced = trace(ZOO[name].build(), ZOO[name].arguments)
    assert bool(conditioning.varying(traced)) == (name != "sd")
    for count in ("CHUNK", "FEW"):
        monkeypatch.setattr(conditioning, count, 4)
    stored, made = conditioning.encode(traced, PROMPTS, tmp_path), live.live(traced, PROMPTS)
    assert len(made) == len(PROMPTS) == 21 and made.labels == stored.labels
    state = torch.random.get_rng_state()
    for index in ([3, 9, 9, 5], [20, 0, 4, 8, 17], [20], [1, 5, 9, 13, 17]):
        known, found = (one.batch(torch.tensor(index)) for one in (stored, made))
        assert equal(known[0], found[0])
        assert (known[1] is None and found[1] is None) or equal(known[1], found[1])
    assert torch.equal(torch.random.get_rng_state(), state), "a step's random numbers are its own"
    assert made.store is None and made.content != conditioning.encode(traced, PROMPTS[:-1], tmp_path).content


def test_a_prompt_with_more_tokens_than_were_counted_is_named(monkeypatch):
    traced = trace(ZOO["qwen-image"].build(), ZOO["qwen-image"].arguments)
    monkeypatch.setattr(live, "with_most_tokens", lambda *_: [0])
    monkeypatch.setattr(conditioning, "FEW", 2)
    with pytest.raises(InputError, match=r"data\.encode: expected at most .* needs 'store'"):
        live.live(traced, PROMPTS).batch(torch.tensor([20]))
