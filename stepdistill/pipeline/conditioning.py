"""Prompts or classes -> conditioning batches: the pipeline's own encoding, caught at its denoiser, kept on disk."""

import difflib
import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from stepdistill.data.sample import Pictures
from stepdistill.denoiser import Conditions
from stepdistill.errors import InputError
from stepdistill.host_rows import HostRows, to_device
from stepdistill.pipeline.compare import close
from stepdistill.pipeline.load import quiet
from stepdistill.pipeline.observe import Call, Recording, calls_of, fewest_steps, modules, observe
from stepdistill.pipeline.trace import Trace
from stepdistill.tensor_cache import cached
from stepdistill.text_files import read_text

CHUNK = 32
# Names under which a diffusers network's config states how many classes it embeds.
CLASS_COUNTS = ("num_classes", "num_class_embeds", "num_embeds_ada_norm")


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told for each of N entries.

    Args:
        labels: the entries for people: prompts or class names. cond: N rows.
        null: the pipeline's own empty condition; None where it does not guide. One row, or N of what is not the same
            for all: the pictures of the entries.
        entries: what the pipeline is called with: prompts or class ids.
        device: where batches go. The rows stay in the host's memory: thousands of them are too many for a GPU.
    """

    labels: tuple[str, ...]
    cond: Conditions
    null: Conditions | None
    entries: tuple[str | int, ...] = ()
    device: torch.device | str = "cpu"

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor) -> tuple[Conditions, Conditions | None]:
        """(cond, null) for entries ``index`` (B,): B rows each, on the device."""

        def taken(rows: Tensor) -> Tensor:
            if len(rows) == 1:
                return to_device(rows, self.device).expand(len(index), *rows.shape[1:])
            return to_device(rows[index.to(rows.device)], self.device)

        cond = {name: taken(rows) for name, rows in self.cond.items()}
        return cond, None if self.null is None else {name: taken(rows) for name, rows in self.null.items()}

    def to(self, device: torch.device | str) -> "Conditioning":
        """Batches on ``device``; what is one row for all entries is kept there."""

        def moved(conditions: Conditions) -> Conditions:
            return {name: rows.to(device) if len(rows) == 1 else rows for name, rows in conditions.items()}

        null = None if self.null is None else moved(self.null)
        return replace(self, cond=moved(self.cond), null=null, device=device)


def class_names(trace: Trace) -> tuple[str, ...]:
    """The classes of a class-conditional pipeline in the order of their ids; empty for any other pipeline.

    From the pipeline's own labels (id2label) where it has them, numbered by the network's config otherwise.
    """
    if trace.entry != "class_labels":
        return ()
    labels = getattr(trace.pipeline, "labels", None) or {}
    if labels:
        by_id: dict[int, str] = {}
        for name, number in labels.items():
            by_id.setdefault(int(number), name)
        return tuple(by_id.get(i, str(i)) for i in range(max(by_id) + 1))
    config = getattr(trace.denoiser.network, "config", {})
    count = next((config[name] for name in CLASS_COUNTS if config.get(name)), 0)
    return tuple(str(i) for i in range(count))


def class_count(trace: Trace) -> int:
    """How many classes the pipeline knows; 0 for a pipeline that takes no classes."""
    return len(class_names(trace))


def entries(trace: Trace, wanted: str | Sequence[str | int]) -> list[str | int]:
    """What to call the pipeline with, from what a person wrote.

    Args:
        wanted: "classes" (all of them), a file with an entry a line, or a list; classes by name or number.

    Raises:
        InputError: "classes" of a pipeline without, no such file, an unknown class, nothing at all.
    """
    names = class_names(trace)
    if wanted == "classes":
        if trace.entry == "batch_size":
            return [0]
        if not names:
            ways = "--prompt or --prompts; in a recipe data.conditions: a list, a file, everyday or captions"
            raise InputError(f"conditions: expected prompts for this pipeline ({ways}), found 'classes', the default")
        return list(range(len(names)))
    if isinstance(wanted, str):
        file = Path(wanted)
        if not file.is_file():
            raise InputError(f"conditions: expected 'classes', a list or a file, found no file {wanted}")
        wanted = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if not wanted:
        raise InputError("conditions: expected at least one, found none")
    if trace.entry == "class_labels":
        return [_class_id(entry, names) for entry in wanted]
    return list(wanted)


def encode(
    trace: Trace, entries: Sequence[str | int], cache: Path | None = None, pictures: Sequence[Pictures] | None = None
) -> Conditioning:
    """The conditions of ``entries``, by running the pipeline up to its denoiser's first calls.

    Args:
        entries: prompts for a text pipeline, class ids for a class pipeline.
        cache: folder for the result; the file's name is a hash of the pipeline, the entries and the pictures.
        pictures: each entry's own arguments of the pipeline's call, in place of the trace's.

    Raises:
        InputError: no entries, or entries of the wrong type or range; pictures of another size than the trace's.
    """
    names = class_names(trace)
    entries = tuple(entries)
    _check(trace, entries, names)
    labels = tuple(names[entry] if names else str(entry) for entry in entries)
    file = cache / f"conditions-{_key(trace, entries, pictures)}.safetensors" if cache is not None else None
    stored = cached(file, lambda: _encoded(trace, entries, pictures))
    cond, null = _section(stored, "cond/"), _section(stored, "null/")
    whole = {name: null.get(name, rows) for name, rows in cond.items()} if null else None
    device = next(trace.denoiser.network.parameters()).device
    return Conditioning(labels, cond, whole, entries).to(device)


def rest_encoders(trace: Trace, device: torch.device) -> None:
    """Move the networks that make conditions into the host's memory; called again, they work there.

    A preview is decoded by the pipeline's own call, which encodes a prompt first: seconds on a CPU, for gigabytes that
    training needs. ``device`` is the pipeline's, where the answers are sent.
    """
    for name in trace.encoders:
        encoder = getattr(trace.pipeline, name).to("cpu")
        encoder.register_forward_pre_hook(lambda _, *given: send_to_device(given, "cpu"), with_kwargs=True)
        encoder.register_forward_hook(lambda _module, _inputs, output: send_to_device(output, device))


def unread(trace: Trace, prompts: Sequence[str]) -> dict[str, str]:
    """Of those prompts that none of the pipeline's tokenizers has room for, the end that none of them reads."""
    tokenizers = [one for one in trace.pipeline.components.values() if isinstance(one, PreTrainedTokenizerBase)]
    if not tokenizers or trace.entry != "prompt":
        return {}
    cut = [_cut(one, _room(trace, one), prompts) for one in tokenizers]
    return {text: min((ends[text] for ends in cut), key=len) for text in cut[0] if all(text in ends for ends in cut)}


def _room(trace: Trace, tokenizer: Any) -> int:
    """How many tokens the pipeline takes of one tokenizer; those of CLIP have room for what they were trained on."""
    limit = inspect.signature(trace.pipeline.__call__).parameters.get("max_sequence_length")
    stated = trace.arguments.get("max_sequence_length", limit and limit.default)
    if isinstance(stated, int) and "CLIP" not in type(tokenizer).__name__:
        return min(stated, tokenizer.model_max_length)
    return tokenizer.model_max_length


def _cut(tokenizer: Any, room: int, prompts: Sequence[str]) -> dict[str, str]:
    """Of those prompts that have more than ``room`` tokens, the end beyond it."""
    with quiet():
        whole = tokenizer(list(prompts)).input_ids
    # The last token is a special one, and has its place in the room.
    ends = {text: ids[room - 1 :] for text, ids in zip(prompts, whole, strict=True) if len(ids) > room}
    return {text: tokenizer.decode(ids, skip_special_tokens=True) for text, ids in ends.items()}


def _encoded(trace: Trace, entries: tuple[str | int, ...], pictures: Sequence[Pictures] | None) -> dict[str, Tensor]:
    """The file's tensors, in the host's memory; on the pipeline's device there is one chunk at a time.

    What the empty condition shares with the others, row by row, is stored once.
    """
    count = len(entries)
    # Conditions, and behind them the empty ones, all padded to one length.
    kept, guided = HostRows(2 * count if pictures else count + 1), False
    # With pictures one at a time: what a pipeline makes of a list of pictures is its own affair.
    size = CHUNK if pictures is None else 1
    with quiet():  # or diffusers warns of every chunk with a prompt that is too long, and repeats the whole chunk
        for start in range(0, count, size):
            chunk = entries[start : start + size]
            cond, null = _caught(trace, chunk, {} if pictures is None else pictures[start])
            if pictures is not None:
                _check_size(trace, chunk[0], cond)
            kept.write(start, cond)
            if null is not None and (pictures or start == 0):
                guided = True
                kept.write(count + start, {name: rows[:1] for name, rows in null.items()})
    stored = {f"cond/{name}": rows[:count] for name, rows in kept.tensors.items()}
    for name, rows in kept.tensors.items() if guided else ():
        empty = rows[count:]
        if all(close(part, empty[:1].expand_as(part)) for part in empty.split(CHUNK)):
            stored[f"null/{name}"] = empty[:1]
        elif not torch.equal(empty, rows[:count]):
            stored[f"null/{name}"] = empty
    return stored


def _check_size(trace: Trace, entry: str | int, cond: Conditions) -> None:
    for name, known in trace.conditioning.items():
        found = tuple(cond[name].shape[1:])
        if len(found) != len(known) or any(a not in (None, b) for a, b in zip(known, found, strict=True)):
            raise InputError(
                f"data.arguments: the pictures of {entry!r} give {name} the shape {found}, those in "
                f"teacher.arguments {known}; state height and width in teacher.arguments"
            )


def _caught(trace: Trace, entries: Sequence[str | int], pictures: Pictures) -> tuple[Conditions, Conditions | None]:
    calls = 2 if trace.guidance.kind == "two_calls" else 1
    recording = observe(
        trace.pipeline,
        entries,
        {**trace.arguments, **pictures},
        steps=fewest_steps(trace.pipeline),
        guidance=trace.guidance.scale,
        stop_calls=(trace.component, calls),
    )
    return trace.guidance.split(_calls(trace, recording), trace.denoiser.spec, trace.conditioning, len(entries))


def plain_conditions(trace: Trace, entries: Sequence[str | int], steps: int) -> Conditions:
    """What a plain call for ``entries`` tells its denoiser, seeded with 0 and without guidance.

    A picture that the pipeline encodes for its network is drawn at random there, so no other call's conditions will do.
    """
    recording = observe(
        trace.pipeline,
        entries,
        trace.arguments,
        steps=steps,
        guidance=trace.guidance.plain_scale,
        stop_calls=(trace.component, 1),
        plain=True,
    )
    return trace.denoiser.spec.conditions(_calls(trace, recording)[0].arguments, trace.conditioning)


def _calls(trace: Trace, recording: Recording) -> list[Call]:
    return calls_of(recording.calls, trace.component, [helper.name for helper in trace.denoiser.spec.helpers])


def _check(trace: Trace, entries: tuple[str | int, ...], names: tuple[str, ...]) -> None:
    if not entries:
        raise InputError("conditions: expected at least one, found none")
    expected = str if trace.entry == "prompt" else int
    for entry in entries:
        if not isinstance(entry, expected) or isinstance(entry, bool):
            what = "a prompt" if expected is str else "a class number"
            raise InputError(f"conditions: expected {what}, found {entry!r}")
        if names and not 0 <= entry < len(names):
            raise InputError(f"conditions: expected a class from 0 to {len(names) - 1}, found {entry}")


def _class_id(entry: str | int, names: tuple[str, ...]) -> int:
    if isinstance(entry, str) and entry in names:
        return names.index(entry)
    if str(entry).isdecimal() and int(entry) < len(names):
        return int(entry)
    close = difflib.get_close_matches(str(entry), names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise InputError(f"conditions: expected a class name or a number from 0 to {len(names) - 1}, found {entry!r}{hint}")


def _section(stored: dict[str, Tensor], prefix: str) -> Conditions:
    return {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}


def _key(trace: Trace, entries: tuple[str | int, ...], pictures: Sequence[Pictures] | None) -> str:
    """A hash of everything the conditions depend on; of the encoders' weights a few values of each tensor."""
    pipeline = trace.pipeline
    digest = hashlib.sha256()

    def add(*values: object) -> None:
        digest.update(json.dumps(values, sort_keys=True, default=str).encode())

    add(type(pipeline).__name__, trace.component, trace.guidance.kind, trace.guidance.scale, entries, trace.arguments)
    add({name: shape for name, shape in trace.conditioning.items()})
    add([hashlib.sha256(Path(trace.arguments[name]).read_bytes()).hexdigest() for name in trace.pictures])
    for name, picture in (item for own in pictures or () for item in own.items()):
        add(name, picture.size, hashlib.sha256(picture.tobytes()).hexdigest())
    for name, component in sorted(pipeline.components.items()):
        config = getattr(component, "config", None)
        config = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
        # Where the weights were loaded from is not what they are.
        add(name, type(component).__name__, {key: value for key, value in config.items() if key[0] != "_"})
        add(getattr(component, "model_max_length", None))
    for name, module in sorted(modules(pipeline).items()):
        if name != trace.component:
            for parameter_name, value in module.named_parameters():
                flat = value.detach().reshape(-1)
                add(name, parameter_name, str(value.dtype), flat[:: max(1, len(flat) // 16)].double().tolist())
    return digest.hexdigest()[:24]
