"""One run of every kernel in Triton's interpreter, shared by the tests of this folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def interpreted() -> list[dict]:
    """Rows of kernel, case, type and error."""
    pytest.importorskip("triton")
    program = Path(__file__).with_name("interpreted.py")
    done = subprocess.run(
        [sys.executable, str(program)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
