"""method.time_shift: the distributions of the times at which a flow model's samples, critic and GAN are looked at."""

import math

import pytest
import torch

from stepdistill.methods import METHODS
from stepdistill.methods.base import CriticConfig
from stepdistill.methods.parts.times import T_FLOOR, uniform_times
from stepdistill.roles import Roles
from stepdistill.testing.bed import SCHEDULES, OnGrid, batch, generator

FLOW = SCHEDULES["flow"]
MANY = 40_000
FEWER = 10_000
SHIFTED = [name for name in METHODS if issubclass(METHODS[name].Config, CriticConfig)]


def unshifted(t: torch.Tensor, shift: float) -> torch.Tensor:
    return t / (shift - (shift - 1) * t)


@pytest.mark.parametrize("shift", [0.5, 3.0, 5.0])
def test_what_is_uniform_is_the_time_before_its_shift(shift):
    """At s, the median of t' = s u/(1 + (s - 1) u) is s/(1 + s), and a quarter lies below s/(3 + s)."""
    t = uniform_times(batch(MANY), "t", FLOW, 0.0, 1.0, shift)
    u = unshifted(t, shift)
    assert t.quantile(0.5).item() == pytest.approx(shift / (1 + shift), abs=0.01)
    assert t.quantile(0.25).item() == pytest.approx(shift / (3 + shift), abs=0.01)
    assert u.mean().item() == pytest.approx(0.5, abs=0.01) and u.var().item() == pytest.approx(1 / 12, abs=0.002)


def test_the_range_is_that_of_the_times_themselves():
    t = uniform_times(batch(MANY), "t", FLOW, 0.02, 0.98, 5.0)
    assert t.min() >= 0.02 and t.max() <= 0.98 and t.min() < 0.025 and t.max() > 0.979
    torch.testing.assert_close(uniform_times(batch(8), "t", FLOW, 0.02, 0.98), batch(8).uniform("t", 0.02, 0.98))


def seen_times(name: str, shift: float) -> dict[str, torch.Tensor]:
    """The times that a method's losses ask its critic and teacher about, by player."""
    config = {"t_min": 0.0, "t_max": 1.0} | ({"phases": 1} if name == "phased-dmd" else {})
    players = {role: generator(FLOW, "flow", 0.9, 0.1) for role in ("teacher", "student", "critic")}
    roles = Roles(**players, scale=1.0)
    method = METHODS[name](METHODS[name].Config(time_shift=shift, **config), roles, OnGrid(FLOW, [1.0]))
    found = {}
    for role in ("teacher", "critic"):
        network, call = players[role].network, players[role].network.forward

        def forward(x, timestep, *rest, role=role, call=call, **named):
            found.setdefault(role, []).append(FLOW.time(timestep).detach())
            return call(x, timestep, *rest, **named)

        network.forward = forward
    rows = batch(FEWER)
    rows.latents = torch.zeros(FEWER, 1, dtype=torch.float64)
    for player in method.players:
        method.losses(player, rows)
    return {role: torch.cat(times) for role, times in found.items()}


@pytest.mark.parametrize("name", ["dmd2", "decoupled-dmd", "phased-dmd", "vsd", "diff-instruct", "sid", "sid-lsg"])
def test_matching_and_critic_are_shifted(name):
    """The odds t/(1 - t) of every time are multiplied by s, uniform or log-normal."""
    assert name in SHIFTED
    plain, moved = seen_times(name, 1.0), seen_times(name, 4.0)
    for role, times in plain.items():
        before, after = times.logit().median(), moved[role].logit().median()
        assert (after - before).item() == pytest.approx(math.log(4), abs=0.1), role


@pytest.mark.parametrize("name, term", [("dmd2", "gan"), ("sida", "gan"), ("diff-ratio", "ratio")])
def test_gan_times_are_shifted(name, term):
    players = {role: generator(FLOW, "flow", 0.9, 0.1) for role in ("teacher", "student", "critic")}
    weight = {"gan_weight": 0.1} if term == "gan" else {"t_min": T_FLOOR, "t_max": 1.0}
    config = METHODS[name].Config(time_shift=3.0, **weight)
    method = METHODS[name](config, Roles(**players), OnGrid(FLOW, [1.0]))
    t = getattr(method, term).times(batch(MANY), "gan time")
    assert unshifted(t, 3.0).mean().item() == pytest.approx(0.5 * (1 + T_FLOOR), abs=0.01)
