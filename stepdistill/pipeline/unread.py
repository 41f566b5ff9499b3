"""Prompts that are longer than a pipeline reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from stepdistill.files import read_json, write_json
from stepdistill.pipeline.folder import quiet
from stepdistill.pipeline.stock_call import parameters
from stepdistill.pipeline.trace import Trace
from stepdistill.progress import say

PART = 1024
"""Prompts that are tokenized at once."""


def unread(trace: Trace, prompts: Sequence[str]) -> dict[str, str]:
    """Of those prompts that none of the pipeline's tokenizers has room for, the end that none of them reads."""
    tokenizers = _tokenizers(trace)
    if not tokenizers or trace.entry != "prompt":
        return {}
    cut = [_cut(one, _room(trace, one), prompts) for one in tokenizers]
    return {text: min((ends[text] for ends in cut), key=len) for text in cut[0] if all(text in ends for ends in cut)}


def say_what_is_unread(trace: Trace, prompts: Sequence[str | int], store: Path | None) -> None:
    """How many prompts are too long; looked for once where there is the folder of a ``store``."""
    file = store and store / "unread.json"
    if file is not None and file.is_file():
        facts = read_json(file)
    else:
        facts = {"count": 0, "end": "", "prompt": ""}
        for start in range(0, len(prompts), PART):
            for prompt, end in unread(trace, prompts[start : start + PART]).items():
                longest = max((facts["end"], facts["prompt"]), (end, prompt), key=lambda one: len(one[0]))
                facts = {"count": facts["count"] + 1, "end": longest[0], "prompt": longest[1]}
        if file is not None:
            write_json(file, facts)
    if facts["count"]:
        longer = f"{facts['count']} of {len(prompts)} prompts are longer than the pipeline reads"
        say(f"data.conditions: {longer}; it does not see “{facts['end']}” of “{facts['prompt']}”")


def with_most_tokens(trace: Trace, prompts: Sequence[str | int]) -> list[int]:
    """The number of the prompt that has the most tokens, of each of the pipeline's tokenizers; of none by letters."""
    tokenizers = _tokenizers(trace)
    most = [(0, 0)] * max(1, len(tokenizers))
    for start in range(0, len(prompts), PART):
        part = [str(prompt) for prompt in prompts[start : start + PART]]
        with quiet():
            counted = [[*map(len, one(part).input_ids)] for one in tokenizers] or [[*map(len, part)]]
        longest = [max(range(len(part)), key=counts.__getitem__) for counts in counted]
        found = [(counts[at], start + at) for counts, at in zip(counted, longest, strict=True)]
        most = [max(pair, key=lambda one: one[0]) for pair in zip(most, found, strict=True)]
    return [number for _, number in most]


def _tokenizers(trace: Trace) -> list[Any]:
    """Those of processors too, each once."""
    parts = [getattr(one, "tokenizer", one) for one in trace.pipeline.components.values()]
    return [*{id(one): one for one in parts if isinstance(one, PreTrainedTokenizerBase)}.values()]


def _room(trace: Trace, tokenizer: Any) -> int:
    """How many tokens the pipeline takes of one tokenizer; those of CLIP have room for what they were trained on."""
    limit = parameters(trace.pipeline).get("max_sequence_length")
    longest = trace.arguments.get("max_sequence_length", limit and limit.default)
    if isinstance(longest, int) and "CLIP" not in type(tokenizer).__name__:
        return min(longest, tokenizer.model_max_length)
    return tokenizer.model_max_length


def _cut(tokenizer: Any, room: int, prompts: Sequence[str]) -> dict[str, str]:
    """Of those prompts that have more than ``room`` tokens, the end beyond it."""
    with quiet():
        whole = tokenizer(list(prompts)).input_ids
    # The last token is a special one, and has its place in the room.
    ends = {text: ids[room - 1 :] for text, ids in zip(prompts, whole, strict=True) if len(ids) > room}
    return {text: tokenizer.decode(ids, skip_special_tokens=True) for text, ids in ends.items()}
