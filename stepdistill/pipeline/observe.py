"""Run a pipeline and record the calls of its modules and its scheduler; all hooks are removed afterwards."""

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.diffusion.devices import torch_of
from stepdistill.diffusion.nested import first_tensor, flatten, tensors_in
from stepdistill.errors import InputError, first_line
from stepdistill.pipeline import in_two
from stepdistill.pipeline.call import TraceError, run
from stepdistill.pipeline.components import modules, patched
from stepdistill.pipeline.modular import free_hooks
from stepdistill.pipeline.recording import Call, Recording, Step, cloned, forked_random
from stepdistill.pipeline.stock_call import Replaced

CLIP_SKIP = (
    "clip_skip of this pipeline needs transformers 4: it reads a part of the text encoder that transformers 5 has "
    "removed (github.com/huggingface/diffusers/issues/14124); pip install 'transformers<5', or leave clip_skip out"
)


class _Enough(Exception):
    """Raised inside a pipeline's run to end it once everything requested has been recorded."""


def observe(
    pipeline: Any,
    entries: Sequence[Any] | str,
    arguments: Mapping[str, Any],
    *,
    steps: int,
    guidance: float,
    seed: int = 0,
    stop_steps: int | None = None,
    stop_calls: tuple[str, int] | None = None,
    plain: bool = False,
) -> Recording:
    """Run the pipeline and record it; everything hooked or replaced is restored, whatever happens.

    Args:
        entries: prompts or class ids, one per image; a string is one prompt for a call that takes no list.
        arguments: further arguments of the call.
        steps: the pipeline's num_inference_steps.
        guidance: its guidance scale.
        seed: of all its random numbers.
        stop_steps: end the run after that many scheduler steps.
        stop_calls: (component, n): end it just before that component's n-th call does its work.
        plain: draw random numbers from torch's own generator, as a call that names none does.

    Raises:
        TraceError: the pipeline has no scheduler with a step, or its run fails.
    """
    scheduler = getattr(pipeline, "scheduler", None)
    if not callable(getattr(scheduler, "step", None)):
        raise TraceError("components", f"{type(pipeline).__name__} has no scheduler with a step() to observe")
    record = Recording(count=1 if isinstance(entries, str) else len(entries))
    device = getattr(pipeline, "_execution_device", torch.device("cpu"))
    with ExitStack() as stack:
        stack.enter_context(forked_random(device))
        torch.manual_seed(seed)
        for name, module in modules(pipeline).items():
            _listen(stack, record, name, module, stop_calls, stop_steps)
        stack.enter_context(patched(scheduler, "step", _recording_step(record, scheduler, stop_steps)))
        grid = Replaced(scheduler, _recording_grid(record, scheduler))
        stack.enter_context(patched(scheduler, "set_timesteps", grid))
        wishes: dict[str, Any] = {} if plain else {"generator": torch.Generator().manual_seed(seed)}
        try:
            wishes |= {"steps": steps, "guidance": guidance, "output_type": "latent"}
            run(pipeline, entries, arguments, lambda: bool(record.steps), **wishes)
        except _Enough:
            free_hooks(pipeline)
        except InputError:
            raise
        except Exception as error:
            entries = entries if isinstance(entries, str) else list(entries)
            reason = first_line(error)
            if "clip_skip" in arguments and "'text_model'" in reason:
                reason += f"; {CLIP_SKIP}"
            raise TraceError("call", f"{type(pipeline).__name__} failed on {entries!r}: {reason}") from error
    if not record.steps:
        record.steps = record.apart
    if record.steps and (rows := len(record.steps[0].sample)) % record.count:
        raise TraceError("call", f"{type(pipeline).__name__} makes {rows} samples for {record.count} entries")
    return record


class Answer(tuple):
    """What stands in for the answer of a network or a scheduler: one tensor, readable as a tuple and by any name."""

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_"):
            raise AttributeError(name)
        return self[0]


def _listen(
    stack: ExitStack,
    record: Recording,
    name: str,
    module: nn.Module,
    stop: tuple[str, int] | None,
    stop_steps: int | None,
) -> None:
    signature = inspect.signature(module.forward)
    variable = {p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD}
    open_calls: list[Call] = []

    def before(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        if record.ended(stop_steps, copies=0) or len(record.apart) == stop_steps:  # some copy takes no steps
            raise _Enough
        bound = dict(signature.bind(*args, **kwargs).arguments)
        for extra in variable & bound.keys():
            bound |= bound.pop(extra)
        call = Call(name, {key: _copied(value) for key, value in flatten(bound).items()})
        open_calls.append(call)
        record.calls.append(call)
        if stop is not None and name == stop[0] and len(open_calls) == stop[1]:
            raise _Enough

    def after(_module: nn.Module, _args: tuple, _kwargs: dict, output: Any) -> None:
        open_calls[-1].output = _copied(first_tensor(output))
        open_calls[-1].outputs = _copied(tensors_in(output))
        open_calls[-1].returned = len(output) if isinstance(output, tuple) else 1

    for handle in (
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ):
        stack.callback(handle.remove)


def _recording_step(record: Recording, scheduler: Any, stop: int | None) -> Replaced:
    """A step() that records; those of the scheduler's copies are recorded beside the scheduler's own."""
    copies: list[Any] = []

    def of_copy(copied: Any) -> Callable:
        copies.append(copied)

        @functools.wraps(type(copied).step)
        def step(*args: Any, **kwargs: Any) -> Any:
            result, seen = _stepped_and_seen(copied, type(copied).step.__get__(copied), [], args, kwargs)
            if record.add_copys(seen) and record.ended(stop, len(copies)):
                raise _Enough
            return result

        return step

    original = scheduler.step
    in_halves = in_two.GIVEN in inspect.signature(original).parameters

    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        second = in_two.GIVEN in kwargs and bool(record.steps) and not record.calls
        if record.ended(stop, copies=0) and not second:
            raise _Enough
        calls = [call for one in record.apart for call in one.calls] + record.calls
        result, seen = _stepped_and_seen(scheduler, original, calls, args, kwargs)
        if second:
            seen = in_two.as_one(record.steps.pop(), seen)
        record.steps.append(seen)
        record.calls, record.apart = [], []
        if record.ended(stop, len(copies)) and (second or not in_halves):
            raise _Enough
        return result

    return Replaced(scheduler, step, of_copy)


def _stepped_and_seen(
    scheduler: Any, original: Callable, calls: list[Call], args: tuple, kwargs: dict[str, Any]
) -> tuple[Any, Step]:
    """What the scheduler's ``original`` step returns, and a record of it."""
    bound = dict(inspect.signature(original).bind(*args, **kwargs).arguments)
    generator = bound.get("generator")
    timestep = torch.as_tensor(bound["timestep"])
    if timestep.ndim and bool((timestep == timestep.reshape(-1)[0]).all()):  # the same for each image (SCM)
        timestep = timestep.reshape(-1)[0]
    seen = Step(
        scheduler=_snapshot(scheduler),
        timestep=timestep,
        model_output=_copied(bound["model_output"]),
        sample=_copied(bound["sample"]),
        options={
            name: value
            for name, value in bound.items()
            if name not in ("model_output", "timestep", "sample", "generator")
        },
        random_state=_random_state(bound["sample"].device, generator),
        calls=calls,
    )
    result = original(*args, **kwargs)
    seen.previous = _copied(first_tensor(result))
    return result, seen


def _recording_grid(record: Recording, scheduler: Any) -> Callable:
    original = scheduler.set_timesteps
    signature = inspect.signature(original)

    @functools.wraps(original)
    def set_timesteps(*args: Any, **kwargs: Any) -> Any:
        bound = dict(signature.bind(*args, **kwargs).arguments)
        bound |= bound.pop("kwargs", {})
        record.grid = {name: value for name, value in bound.items() if name != "device"}
        return original(*args, **kwargs)

    return set_timesteps


def _snapshot(scheduler: Any) -> Any:
    """The scheduler's state in a scheduler of its class, without what was replaced on the instance."""
    snapshot = copy.copy(scheduler)  # of a deep copy the steps would be recorded, as of one that the pipeline makes
    for name in ("step", "set_timesteps"):
        snapshot.__dict__.pop(name, None)
    return copy.deepcopy(snapshot)


def _copied(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_copied, value)) if type(value) in (list, tuple) else value
    return value.detach().clone() if isinstance(value, Tensor) else value


def _random_state(device: torch.device, generator: Any) -> dict[str, Any]:
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state["device"] = torch_of(device).get_rng_state(device)
    if generator is not None:
        state["generator"] = cloned(generator)
    return state
