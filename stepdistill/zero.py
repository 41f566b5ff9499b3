"""What the processes of a run share out among themselves through DeepSpeed: its ZeRO, stages 2 and 3.

Stage 2: every process keeps all weights, and of a player's gradients, moments and master weights its part alone. A
player has an engine of its own, on a list of its parameters; roles and their networks are called as in any run.
Stage 3: of the weights too. Each network has one more engine, without an optimizer, whose hooks put a layer's weights
together while it runs, whichever role is calling and whichever player is moving.
"""

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from stepdistill.adapters import Adapted
from stepdistill.denoiser import Denoiser, innermost
from stepdistill.errors import InputError
from stepdistill.methods.base import DistillMethod
from stepdistill.optimizer import only_moving
from stepdistill.parts import is_shard
from stepdistill.recipe import Recipe, Train, load
from stepdistill.sharding import Shards

MOMENTS = ("exp_avg", "exp_avg_sq")


def as_launched(recipe: Recipe, accelerator: Accelerator, safe: bool = False) -> Recipe:
    """The recipe, with the stage that ``accelerate launch --use_deepspeed --zero_stage N`` asks for if it has none.

    Args:
        safe: as for :func:`stepdistill.recipe.load`.

    Raises:
        InputError: the recipe cannot be trained under that stage.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED or recipe.distributed.zero is not None:
        return recipe
    return load(recipe, [f"distributed.zero={accelerator.state.deepspeed_plugin.zero_stage}"], safe)


def _initialize(model: nn.Module, stage: int, settings: dict[str, Any], **more: Any) -> tuple:
    """DeepSpeed's engine for ``model``, and what it made of the optimizer.

    Raises:
        InputError: DeepSpeed is not installed.
    """
    try:
        import deepspeed  # an extra, seconds to import
        from deepspeed.utils import logger
    except ImportError as error:
        raise InputError(f"distributed.zero: needs DeepSpeed (pip install -e '.[deepspeed]'), found: {error}") from None
    logger.setLevel(logging.WARNING)
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        # Roles call networks in changing orders: there is no next layer to fetch ahead, and none that may stay.
        zero |= {"stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0}
        # It would put a linear layer of its own in the place of torch's, which no gradient penalty gets through.
        zero |= {"memory_efficient_linear": False}
    settings = settings | {"zero_optimization": zero, "zero_allow_untested_optimizer": True}
    return deepspeed.initialize(model=model, config=settings, dist_init_required=False, **more)[:2]


class Partitions(Shards):
    """Networks whose weights DeepSpeed shares out: ZeRO stage 3."""

    def __init__(self, networks: Iterable[nn.Module]):
        super().__init__(networks)
        self.hooks = [_initialize(network, 3, {"train_micro_batch_size_per_gpu": 1})[1] for network in self.networks]

    def settle(self) -> None:
        for hooks in self.hooks:
            hooks.release_backward_leftovers()
            hooks.partition_all_parameters()


def partition(method: DistillMethod) -> Partitions:
    """Share out the networks that the method's roles stand on, adapters included.

    Raises:
        InputError: DeepSpeed is not installed, or the method does not allow it.
    """
    roles = [role for role in vars(method.roles).values() if isinstance(role, Denoiser)]
    if any(isinstance(role.network, Adapted) for role in roles):
        raise InputError("distributed.zero: expected null or 2 for a method that adds to its networks, found 3")
    return Partitions(dict.fromkeys(innermost(role.network) for role in roles))


class ZeroOptimizer:
    """A player's AdamW in DeepSpeed's hands; to a checkpoint it is the torch optimizer that it stands for.

    Args:
        modules: the player's; their parameters are asking for gradients. Under stage 3 networks are shared out already.
        train: the recipe's section. lr: the rate to begin with, of ``param_groups``, which rule each update's.
        stage: ZeRO's.

    Raises:
        InputError: DeepSpeed is not installed.
    """

    def __init__(self, modules: Sequence[nn.Module], train: Train, lr: float, stage: int):
        self.stage = stage
        self.parameters = [parameter for module in modules for parameter in module.parameters()]
        self.param_groups = [{"params": self.parameters, "lr": lr}]
        adamw = torch.optim.AdamW(
            self.parameters, lr=lr, betas=tuple(train.betas), weight_decay=train.weight_decay, fused=True
        )
        settings = {
            "train_micro_batch_size_per_gpu": train.batch_size
            // train.accumulation
            // torch.distributed.get_world_size(),
            "gradient_accumulation_steps": train.accumulation,
            "gradient_clipping": train.clip or 0.0,
        }
        # Under stage 3 a layer's weights are there when it is called by hooks: those of heads are this engine's.
        heads = [one for one in modules if stage == 3 and not any(is_shard(p) for p in one.parameters())]
        model = nn.ModuleList([*heads, nn.ParameterList(self.parameters)])
        self.engine, self.zero = _initialize(model, stage, settings, optimizer=adamw)
        for parameter in (parameter for head in heads for parameter in head.parameters()):
            # Small, and stay whole between updates: a gradient penalty goes through them a second time, without hooks.
            parameter.ds_persist = True
            self.zero.persistent_parameters.append(parameter)

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients; those of the update's last one are averaged, and move the weights."""
        for group in self.zero.param_groups:
            group["lr"] = self.param_groups[0]["lr"]
        # Its engine does this where a micro-batch begins, with the forward pass that it does not see here.
        self.zero.clear_backward_seen_flag()
        self.engine.backward(loss, scale_wrt_gas=False)
        self.engine.step()

    def norm(self) -> Tensor:
        """The norm () of the last update's gradients over all processes, before clipping."""
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32)
        return torch.where(norm < 0, math.nan, norm)  # it says -1 where the norm is not finite

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state of each parameter, whole; only together with the other processes.

        It is there in the first process alone, on the CPU: all moments are more than a device may hold.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = [state["step"] for state in self.zero.optimizer.state.values() if "step" in state]
        states = {}
        with only_moving(self.parameters):  # DeepSpeed knows no moments of others
            for number, parameter in enumerate(self.parameters if steps else ()):
                moments = {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
                if torch.distributed.get_rank() == 0:
                    states[number] = {"step": steps[0]} | moments
                    states[number] = {name: value.cpu().clone() for name, value in states[number].items()}
        return {"state": states, "param_groups": self.param_groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, and the parameters' present values as master weights.

        Under stage 3 the moments are already the parts that this process has of them.
        """
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        self.zero.refresh_fp32_params()
        states = state["state"]
        if not states:
            return
        zero = self.zero
        for flat in zero.single_partition_of_fp32_groups if self.stage == 2 else zero.fp32_partitioned_groups_flat:
            kept = {"step": states[0]["step"].to(flat.device)}
            zero.optimizer.state[flat] = kept | {name: torch.zeros_like(flat) for name in MOMENTS}
        if self.stage == 2:
            # Otherwise done in the first step: only then a parameter knows where its moments are.
            zero._lazy_init_hp_params_optimizer_state()
        put = safe_set_full_optimizer_state if self.stage == 2 else safe_set_local_optimizer_state
        with only_moving(self.parameters):
            for number, parameter in enumerate(self.parameters):
                for name in MOMENTS:
                    put(parameter, states[number][name].to(parameter.device), name)
