"""Prompts that are longer than a pipeline reads."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from stepdistill.pipeline.folder import quiet
from stepdistill.pipeline.stock_call import parameters
from stepdistill.pipeline.trace import Trace


def unread(trace: Trace, prompts: Sequence[str]) -> dict[str, str]:
    """Of those prompts that none of the pipeline's tokenizers has room for, the end that none of them reads."""
    tokenizers = [one for one in trace.pipeline.components.values() if isinstance(one, PreTrainedTokenizerBase)]
    if not tokenizers or trace.entry != "prompt":
        return {}
    cut = [_cut(one, _room(trace, one), prompts) for one in tokenizers]
    return {text: min((ends[text] for ends in cut), key=len) for text in cut[0] if all(text in ends for ends in cut)}


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
