"""The facts of an export: what is written is read, and so is the little that earlier versions wrote."""

import json

import pytest

from stepdistill.errors import InputError
from stepdistill.kernels import Rule
from stepdistill.pipeline.exports import FACTS, ExportFacts


def test_what_is_written_is_read(tmp_path):
    guidance = {"scale": 3.0, "interval": [0.1, 0.9], "rescale": 0.5}
    adapter = {"source": "folder", "weights": "a.safetensors", "image_encoder": "encoder", "scale": 0.5}
    teacher = {"guidance": guidance, "arguments": {"height": 32}, "ip_adapter": adapter, "variant": "fp16"}
    facts = ExportFacts("owner/name", 3.0, "dmd2", 4, form="lora", recipe={"teacher": teacher}, versions={"torch": "2"})
    facts.write(tmp_path)
    assert json.loads((tmp_path / FACTS).read_text())["schema"] == 1
    found = ExportFacts.read(tmp_path)
    assert found == facts and found.teacher_guidance.combination == Rule(rescale=0.5, interval=(0.1, 0.9))
    assert (found.arguments, found.variant, found.ip_adapter.scale) == ({"height": 32}, "fp16", 0.5)


def test_four_keys_are_enough(tmp_path):
    assert ExportFacts.read(tmp_path) is None
    stated = {"teacher": "fashion-dit", "guidance": 2, "method": "lcm", "steps": 2}
    (tmp_path / FACTS).write_text(json.dumps(stated | {"of a later version": 1}))
    facts = ExportFacts.read(tmp_path)
    assert facts.teacher_guidance.scale == 2.0 and facts.teacher_guidance.combination == Rule()
    assert (facts.arguments, facts.ip_adapter, facts.variant, facts.conditions) == ({}, None, None, None)
    for damaged in (stated | {"steps": "2"}, {"teacher": "fashion-dit"}):
        (tmp_path / FACTS).write_text(json.dumps(damaged))
        with pytest.raises(InputError, match=rf"{FACTS}: .* steps missing or wrong"):
            ExportFacts.read(tmp_path)
