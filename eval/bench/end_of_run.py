"""The protocol that measures a student at the end of its run; it needs no file of the user's."""

from collections.abc import Sequence
from pathlib import Path

from stepdistill import assets
from stepdistill.errors import InputError
from stepdistill.eval.bench.rows import needed
from stepdistill.eval.bench.samples import check_classes, check_pictures
from stepdistill.eval.files import obtain
from stepdistill.eval.measure import load_view
from stepdistill.eval.protocol import Protocol, load_protocol
from stepdistill.pipeline.names import source
from stepdistill.pipeline.trace import Trace

OWN = {"emoji": "emoji-v1"}
"""Protocols of embedded teachers of prompts, by their names."""
ANY = "teacher-enet-v1"
"""The protocol of every other pipeline: it compares with the teacher's samples."""


def protocol_of(trace: Trace, teacher: str, networks: Sequence[str]) -> Protocol:
    """The protocol of a teacher, whose packages are installed and whose files are the pinned ones.

    Args:
        networks: of a protocol of classes.

    Raises:
        InputError: a package or a file is missing, or the teacher makes no pictures.
    """
    check_pictures(trace, teacher)
    protocol = load_protocol()
    try:
        check_classes(trace, protocol, teacher)
        protocol = protocol.only(tuple(networks))
    except InputError:
        protocol = load_protocol(OWN.get(embedded(teacher), ANY))
        kind = "prompts" if trace.entry == "prompt" else "classes"
        protocol = protocol.model_copy(update={"conditions": kind} if protocol.id == ANY else {})
    files = [file for file in needed(protocol) if file is not protocol.prompts or protocol.id != ANY]
    obtain(files, Path(), offline=True)
    for view in protocol.views.values():
        load_view(view, Path(), "cpu")
    return protocol


def embedded(teacher: str) -> str:
    """The name of an embedded teacher, also where its folder is named; "" for any other pipeline."""
    place = Path(source(teacher)).resolve()
    return next((name for name in assets.teachers() if assets.find(f"teachers/{name}").resolve() == place), "")


def spread(prompts: Sequence[str], count: int) -> list[str]:
    """``count`` of the prompts, evenly from all over their list; all where there are fewer."""
    count = min(count, len(prompts))
    return [prompts[number * len(prompts) // count] for number in range(count)]
