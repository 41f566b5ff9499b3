"""Whatever a file holds, it is read or refused with an InputError: no other exception, and no hang.

More examples: pytest tests/test_fuzz.py --hypothesis-profile soak
"""

import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.loaded import loaded
from stepdistill.data import images
from stepdistill.errors import InputError
from stepdistill.eval.bench.sources import read_source
from stepdistill.eval.report import read_report
from stepdistill.methods import METHODS
from stepdistill.pipeline import conditioning
from stepdistill.recipe import Data, Recipe, load, yaml_lines
from stepdistill.training import checkpoint
from stepdistill.training.run_folder import keep_lines_before

GOOD = {
    "teacher": {"pipeline": "fashion-dit", "guidance": {"scale": 1.5}},
    "student": {"steps": 2},
    "data": {"conditions": "classes"},
    "method": {"name": "sfd", "substeps": 1},
    "train": {"steps": 4, "batch_size": 4, "lr": 1e-3, "betas": [0.9, 0.99]},
    "report": {"samples": 0, "steps": [1, 2]},
    "output": "runs/fuzzed",
}
SECTIONS = {name: field.annotation for name, field in Recipe.model_fields.items()}
KEYS = sorted(
    {*SECTIONS, *(key for kind in SECTIONS.values() for key in getattr(kind, "model_fields", ())), "substeps", "w_min"}
)
WORDS = [
    *METHODS,
    *KEYS,
    "~",
    "~nobody/x",
    "a.py:B",
    "/",
    "..",
    "\0",
    "1e999",
    "- x",
    "{",
    "*a",
    "!!python/object:x",
    "null",
]
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.sampled_from([-1, 0, 1, 2, 3, 101]),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(WORDS),
)
names = st.sampled_from(KEYS) | st.text(max_size=5)
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
places = st.lists(names, min_size=1, max_size=3)


def reads(work):
    """What ``work`` returns; None where it refuses its input."""
    try:
        return work()
    except InputError as error:
        assert str(error)
        return None


def changed(changes) -> dict:
    """The good recipe with values put, or keys taken away, at random places."""
    tree = json.loads(json.dumps(GOOD))
    for place, value, remove in changes:
        section = tree
        for key in place[:-1]:
            section = section.setdefault(key, {}) if isinstance(section, dict) else section
        if isinstance(section, dict):
            section.pop(place[-1], None) if remove else section.update({place[-1]: value})
    return tree


@given(st.lists(st.tuples(places, trees, st.booleans()), max_size=4), st.lists(st.text(max_size=20), max_size=1))
def test_recipes(changes, overrides):
    recipe = reads(lambda: load(changed(changes), overrides))
    if recipe is not None:
        assert load(yaml_lines.read(recipe.to_yaml(), "written")[0]) == recipe


@given(st.lists(st.tuples(places, trees), max_size=3))
def test_overrides(given):
    overrides = [f"{'.'.join(place)}={yaml_lines.dump(value)}" for place, value in given]
    reads(lambda: load(GOOD, overrides))


def spliced(content: bytes):
    """Strategy: ``content`` with random bytes flipped, cut out, put in, or everything random."""
    length = len(content)

    def apply(edits):
        data = bytearray(content)
        for place, kind, value in edits:
            if kind == "flip" and data:
                data[place % len(data)] ^= 1 << value % 8
            elif kind == "cut":
                del data[place : place + value]
            elif kind == "end":
                del data[place:]
            else:
                data[place:place] = bytes([value]) * (value % 7)
        return bytes(data)

    kinds = st.sampled_from(["flip", "flip", "cut", "end", "put"])
    edits = st.lists(st.tuples(st.integers(0, length), kinds, st.integers(0, 255)), min_size=1, max_size=6)
    return st.one_of(edits.map(apply), st.binary(max_size=200))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


TEXT = yaml_lines.dump(GOOD).encode()


@given(spliced(TEXT))
def test_recipe_files(folder, content):
    (folder / "recipe.yaml").write_bytes(content)
    reads(lambda: load(folder / "recipe.yaml"))


def network() -> torch.nn.Module:
    return torch.nn.Linear(3, 2)


@pytest.fixture(scope="module")
def saved(folder) -> dict[str, bytes]:
    """The files of a checkpoint."""
    state = checkpoint.State(5, {"student": network()})
    path = checkpoint.save(folder / "checkpoints", state, keep=1)
    return {file.name: file.read_bytes() for file in path.iterdir()}


@given(st.data())
def test_checkpoints(folder, saved, data):
    """Found damaged, or not damaged: never loaded as something else."""
    path = folder / "checkpoints" / "step-000005"
    name = data.draw(st.sampled_from(sorted(saved)))
    content = data.draw(spliced(saved[name]))
    for file, whole in saved.items():
        (path / file).write_bytes(content if file == name else whole)
    if reads(lambda: checkpoint.verify(path)) is not None:
        assert content == saved[name] or json.loads(content) == json.loads(saved[name])


@given(st.data())
def test_safetensors(folder, saved, data):
    """Also without a hash that tells: what is not these tensors is refused."""
    file, target = folder / "weights.safetensors", network()
    file.write_bytes(data.draw(spliced(saved["student.safetensors"])))
    reads(lambda: checkpoint.copy_parameters(file, dict(target.named_parameters())))


@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode), st.sampled_from(["prompt", "class_labels"]))
def test_prompt_files(folder, content, entry):
    (folder / "prompts.txt").write_bytes(content)
    pipeline = SimpleNamespace(labels={"Bag": 0, "Coat": 1})
    trace = SimpleNamespace(entry=entry, pipeline=pipeline)
    found = reads(lambda: conditioning.entries(trace, str(folder / "prompts.txt")))
    assert found is None or (found and all(isinstance(one, str if entry == "prompt" else int) for one in found))


def encoded(kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


PICTURES = {kind: encoded(kind) for kind in ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF")}


def usable(source: Path) -> None:
    """What is usable of a source of images is as it should be, the rest is said."""
    data = Data(images=str(source), max_rejected=1.0)
    found = reads(lambda: loaded(data, 3, 8))
    assert found is None or (found[0].shape[1:] == (3, 8, 8) and len(found[0]) == len(found[1]))
    reads(lambda: images.captions(data))


@given(st.sampled_from(sorted(PICTURES)).flatmap(lambda kind: spliced(PICTURES[kind])), st.binary(max_size=20))
def test_images(folder, content, caption):
    place = folder / "pictures"
    place.mkdir(exist_ok=True)
    (place / "picture.png").write_bytes(content)
    (place / "picture.txt").write_bytes(caption)
    usable(place)


def packed() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in (("a.png", PICTURES["PNG"]), ("a.txt", b"Bag"), ("../b.jpg", b"x"), ("c.json", b"{}")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


@given(spliced(packed()))
def test_shards(folder, content):
    (folder / "shard.tar").write_bytes(content)
    usable(folder / "shard.tar")


encoded_trees = trees.map(json.dumps).map(str.encode)
REPORT = {
    "schema": 1,
    "protocol": "p",
    "seed": 0,
    "command": "c",
    "versions": {},
    "device": "d",
    "floor": {},
    "rows": [],
}
ROW = {"name": "n", "role": "student", "steps": 1, "nfe": 1, "guidance": 1.0, "samples": 2, "metrics": {}, "cost": {}}
FACTS = {"teacher": "fashion-dit", "guidance": 1.5, "method": "dmd2", "steps": 4, "recipe": {}}


@given(st.one_of(encoded_trees, spliced(json.dumps(REPORT | {"rows": [ROW]}).encode())))
def test_reports(folder, content):
    (folder / "report.json").write_bytes(content)
    reads(lambda: read_report(folder / "report.json"))


@given(st.one_of(encoded_trees, spliced(json.dumps(FACTS).encode())))
def test_facts_of_exports(folder, content):
    (folder / "export").mkdir(exist_ok=True)
    (folder / "export" / "model_index.json").write_text("{}")
    (folder / "export" / "stepdistill.json").write_bytes(content)
    reads(lambda: read_source(folder / "export"))


LINES = b'{"step": 1, "evaluations": 5}\n{"step": 2, "evaluations": 9}\n'


@given(st.one_of(spliced(LINES), st.lists(encoded_trees, max_size=4).map(b"\n".join)))
def test_metrics(folder, content):
    (folder / "metrics.jsonl").write_bytes(content)
    assert keep_lines_before(folder / "metrics.jsonl", 1) is not None


OBJECTS = b'{"file_name": "pictures/picture.png", "text": "Bag"}\n{"image": 1, "caption": null}\n'


@given(st.one_of(spliced(OBJECTS), st.lists(encoded_trees, max_size=4).map(b"\n".join)))
def test_json_lines(folder, content):
    (folder / "lines.jsonl").write_bytes(content)
    usable(folder / "lines.jsonl")
