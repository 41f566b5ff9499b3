"""What one call of a network costs, and the second time that a call may carry."""

import torch
from torch import nn

from stepdistill.diffusion.denoiser import CallSpec, Denoiser
from stepdistill.diffusion.schedule import FlowSchedule


class Network(nn.Module):
    """x - t, with one block to take features of."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity()])

    def forward(self, x, t):
        return self.blocks[0](x) - t[:, None]


def test_a_call_counts_its_rows_and_its_arguments_alone_do_not():
    denoiser = Denoiser(Network(), CallSpec("x", "t"), FlowSchedule(), "flow")
    x, t = torch.zeros(3, 2), torch.full((3,), 0.5)
    denoiser.arguments(x, t, {})
    assert denoiser.evaluations == 0
    denoiser(x, t, {})
    assert denoiser.evaluations == 3
    denoiser.features(x, t, {})
    assert denoiser.evaluations == 6


def test_a_tuple_of_conditions_is_given_back_as_one():
    spec = CallSpec("x", "t", apart={"pair": tuple})
    given = (torch.ones(3, 2), torch.zeros(3, 4))
    denoiser = Denoiser(Network(), spec, FlowSchedule(), "flow")
    conditions = spec.conditions({"pair": given}, ["pair.0", "pair.1"])
    pair = denoiser.arguments(torch.zeros(3, 2), torch.ones(3), conditions)["pair"]
    assert isinstance(pair, tuple) and all(map(torch.equal, pair, given))
