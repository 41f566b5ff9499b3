"""Short rounds of scripts/soak.py: what is killed where it hurts ends as what was left in peace."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow  # tests/training/test_trainer.py kills and resumes a run
@pytest.mark.skipif(not hasattr(os, "fork"), reason="its runs are forked")
def test_a_killed_run_ends_where_an_undisturbed_one_does(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "soak.py"), "--kills", "2", "--rounds", "1"]
    command += ["--methods", "sfd", "--precisions", "fp32"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    logs = [path.read_text()[-3000:] for path in tmp_path.glob("soak-*.txt")]
    assert done.returncode == 0, (done.stdout, done.stderr, logs)
    assert re.search(r"^1 runs, 2 kills \(.*\), 0 runs with a problem", done.stdout, re.MULTILINE)
    assert "sfd fp32" in done.stdout and "the same to the bit" in done.stdout


@pytest.mark.slow  # tests/data/test_store.py kills what writes a store
@pytest.mark.skipif(not hasattr(os, "fork"), reason="its processes are forked")
def test_a_killed_encode_fills_the_same_store(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "soak.py"), "--encode", "--kills", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert re.fullmatch(r"encode: .*\b0 missed: the same bytes\n", done.stdout)
