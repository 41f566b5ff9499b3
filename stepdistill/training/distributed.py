"""The processes of a run, through accelerate: which rank computes which rows, and how all ranks stay identical."""

import logging
import os
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from stepdistill.data.shards import Share
from stepdistill.diffusion.devices import device_count, on_cpu
from stepdistill.errors import InputError
from stepdistill.files import digest

T = TypeVar("T")

LAUNCHED = ("LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables of which a launcher sets one: torchrun and accelerate, Open MPI, Intel MPI and MPICH, MVAPICH."""


def process_count(requested: int | None) -> int:
    """How many processes a run starts on this machine: ``requested``, or one per GPU; 1 if a launcher (accelerate
    launch, torchrun, mpirun, a SLURM job of theirs) has already started this one."""
    if any(name in os.environ for name in LAUNCHED):
        return 1
    return requested or max(1, device_count())


def join(**options: Any) -> Accelerator:
    """This process as one rank of its run. Ranks wait for each other for up to a day: the first one makes trajectories,
    evaluates and draws previews while the others stand still, which takes longer than PyTorch's ten minutes. What
    really hangs is found by the watchdog.

    Raises:
        InputError: a launcher started several, and they do not know each other: each would train the whole run.
    """
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))
    accelerator = Accelerator(cpu=on_cpu(), kwargs_handlers=[patience], **options)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise InputError(
            "expected a launcher without DeepSpeed, found accelerate launch --use_deepspeed; distributed.shard: true "
            "shards weights, gradients and moments with FSDP (docs/scaling.md)"
        )
    started = max(int(os.environ.get(name) or 1) for name in ("WORLD_SIZE", *LAUNCHED[1:]))
    if started != accelerator.num_processes:
        raise InputError(
            f"expected the {started} processes that the launcher has started, found {accelerator.num_processes}: "
            "accelerate cannot join them here; start them with torchrun"
        )
    return accelerator


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run ``stepdistill`` with these arguments in several processes on this machine; returns the exit code.

    The launcher is torchrun's, called from here so that a wrong input stays one line and exit code 2.

    Raises:
        InputError: there are fewer GPUs than processes.
    """
    gpus = device_count()
    if 0 < gpus < processes:
        raise InputError(f"distributed.processes: expected at most the {gpus} GPUs of this machine, found {processes}")
    if not gpus:
        os.environ["ACCELERATE_USE_CPU"] = "true"
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # It tells of every failed process in a page of its own; theirs have spoken.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "stepdistill", *arguments)
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        return 2 if 2 in codes else 1
    return 0


def rows_each(batch_size: int, accumulation: int, processes: int) -> int:
    """The rows of a process's micro-batch.

    Raises:
        InputError: the batch cannot be divided.
    """
    size, rest = divmod(batch_size, processes * accumulation)
    if rest:
        raise InputError(
            f"train.batch_size: expected a multiple of processes x train.accumulation ({processes} x "
            f"{accumulation}), found {batch_size}"
        )
    return size


def leave() -> None:
    """Part from the other processes, where there are any; the last thing a process of several does."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Processes:
    """The processes of a run, of which this is one; a run without a launcher has one, and nothing here costs time."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.count, self.rank = accelerator.num_processes, accelerator.process_index

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes files and logs."""
        return self.rank == 0

    def share(self, batch_size: int, accumulation: int) -> tuple[list[int], int]:
        """First row of each of this process's micro-batches in the global batch, and their size.

        Raises:
            InputError: the batch cannot be divided.
        """
        size = rows_each(batch_size, accumulation, self.count)
        return [(i * self.count + self.rank) * size for i in range(accumulation)], size

    @property
    def encoders(self) -> Share:
        """The processes as those that fill a store together."""
        return Share(self.rank, self.count, self.any, self.of_first)

    def once(self, work: Callable[[], T]) -> T:
        """What ``work`` returns, or raises, in the first process; the others wait for it and do not call it."""
        if self.count == 1:
            return work()
        result, failure = None, None
        if self.first:
            try:
                result = work()
            except Exception as error:  # it is raised below, in every process: none is left waiting
                failure = error
        result, failure = self.of_first((result, failure))
        if failure is not None:
            raise failure
        return result

    def of_first(self, value: T) -> T:
        """The first process's value, in all of them."""
        if self.count == 1:
            return value
        values = [value]
        broadcast_object_list(values)
        return values[0]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return bool(self.sum(int(flag)))

    def sum(self, number: int) -> int:
        """The number's sum over the processes."""
        if self.count == 1:
            return number
        return int(self.accelerator.reduce(torch.tensor(number, device=self.accelerator.device)))

    def mean(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Each number's mean over the processes."""
        if self.count == 1:
            return dict(metrics)
        values = torch.tensor(list(metrics.values()), dtype=torch.float32, device=self.accelerator.device)
        return dict(zip(metrics, self.accelerator.reduce(values, "mean").tolist(), strict=True))

    @torch.no_grad()
    def average_gradients(self, parameters: Iterable[nn.Parameter], uneven: bool = False) -> None:
        """Replace the gradients by their means over the processes, in one exchange per dtype.

        Args:
            uneven: a parameter may have a gradient in some processes alone, as that of an expert has which got rows
                there; it counts as zero in the others.
        """
        if self.count == 1:
            return
        if uneven:
            parameters = list(parameters)
            found = torch.tensor([p.grad is not None for p in parameters], device=self.accelerator.device).int()
            for parameter, somewhere in zip(parameters, self.accelerator.reduce(found).tolist(), strict=True):
                if somewhere and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is not None:
                by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in by_dtype.values():
            whole = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
            parts = whole.split([g.numel() for g in gradients])
            torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])

    @torch.no_grad()
    def add_up(self, tensor: Tensor) -> None:
        """Replace the tensor by its sum over the processes."""
        if self.count > 1:
            tensor.copy_(self.accelerator.reduce(tensor.clone()))

    def check_equal(self, step: int, parameters: Iterable[Tensor]) -> None:
        """Raises RuntimeError unless all processes are at this step with the same weights, to the bit."""
        if self.count == 1:
            return
        states = gather_object([(step, digest(*parameters)[:12])])
        if len(set(states)) > 1:
            raise RuntimeError(f"the processes have drifted apart (step, hash of the weights): {states}")
