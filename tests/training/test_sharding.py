"""How networks are divided up for sharing out, and what cannot be; test_distributed.py trains with shards."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn

from pipeline.tiny import save_dit, tiny_dit, tiny_sd
from stepdistill.errors import InputError
from stepdistill.recipe import load
from stepdistill.training.distributed import join
from stepdistill.training.session import build_without_data
from stepdistill.training.shard import (
    Shards,
    _outside_calls,
    blocks,
    clip_gradients,
    is_whole,
    share_out,
    weights,
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("teacher") / "dit"
    save_dit(tiny_dit(), folder)
    return {
        "teacher": {"pipeline": str(folder)},
        "student": {"steps": 2, "train": "lora", "rank": 2},
        "method": {"name": "sfd", "substeps": 1},
        "train": {"steps": 3, "batch_size": 4, "lr": 1e-4},
        "distributed": {"shard": True},
    }


def test_a_network_is_its_blocks_and_the_rest():
    transformer, unet = tiny_dit().transformer, tiny_sd().unet
    assert blocks(transformer) == list(transformer.transformer_blocks)
    assert blocks(unet) == [*unet.down_blocks, *unet.up_blocks, unet.mid_block]


def test_what_is_called_from_outside_of_its_block_is_found():
    """DiT's forward asks the first block's embedder for the time, before any block runs."""
    transformer = tiny_dit().transformer
    with _outside_calls(transformer) as found, torch.no_grad():
        x, one = torch.zeros(1, 4, 8, 8), torch.ones(1, dtype=torch.long)
        transformer(hidden_states=x, timestep=one, class_labels=one)
    assert found == [transformer.transformer_blocks[0].norm1.emb]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in transformer.modules())


def test_adapters_are_no_part_of_what_is_shared_out(recipe):
    roles = build_without_data(load(recipe), torch.device("cpu")).method.roles
    backbone = roles.teacher.network.backbone
    own = {id(parameter) for parameter in roles.student.network.parameters()}
    shared = {id(parameter) for parameter in weights(backbone)}
    assert own and shared and not own & shared
    assert own | shared == {id(parameter) for parameter in nn.Module.parameters(backbone)}
    assert not is_whole(roles.student.network) and is_whole(nn.Linear(2, 2))


def test_clipping_is_torchs():
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.0, 4.0])
    assert clip_gradients(parameters, 1.0).item() == 5.0
    torch.testing.assert_close(parameters[1].grad, torch.tensor([0.0, 0.8]))


def test_a_run_of_copies_has_no_shards():
    assert not Shards()
    Shards().settle()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.compile=true"], r"train\.compile: expected false beside distributed\.shard, found true"),
        (["train.optimizer=adamw8bit"], r"train\.optimizer: expected '?adamw'? beside distributed\.shard"),
        (
            ["method={name: pd, start_steps: 4, phase_steps: 1}", "data.images=fashion-mnist"],
            r"distributed\.shard: expected false for pd, found true",
        ),
    ],
)
def test_what_does_not_go_with_shards(overrides, said, recipe):
    with pytest.raises(InputError, match=said):
        load(recipe, overrides)


def test_zero_is_refused_with_its_replacement_and_null_of_earlier_runs_is_read(recipe):
    assert load(recipe, ["distributed={zero: null, shard: true}"]).distributed.shard
    with pytest.raises(InputError, match=r"distributed: expected shard: true \(FSDP\) in place of DeepSpeed's zero"):
        load(recipe, ["distributed={zero: 2}"])


def test_deepspeeds_launcher_is_refused(monkeypatch):
    launched = SimpleNamespace(distributed_type=DistributedType("DEEPSPEED"))
    monkeypatch.setattr("stepdistill.training.distributed.Accelerator", lambda **_: launched)
    with pytest.raises(InputError, match="launcher without DeepSpeed"):
        join()


def test_networks_that_were_added_to_are_refused(recipe):
    session = build_without_data(
        load(recipe, ["method={name: w-embed}", "data.images=fashion-mnist"]), torch.device("cpu")
    )
    with pytest.raises(InputError, match=r"distributed\.shard: expected false for a method that adds to its networks"):
        share_out(session.method, session.batch(0, 0, 1), torch.device("cpu"))


def test_an_older_torch_is_refused(recipe, monkeypatch):
    session = build_without_data(load(recipe, ["data.images=fashion-mnist"]), torch.device("cpu"))
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.6.0+cu124"))
    with pytest.raises(InputError, match=r"distributed\.shard: expected torch 2\.7 or newer, found 2\.6\.0"):
        share_out(session.method, session.batch(0, 0, 1), torch.device("cpu"))
