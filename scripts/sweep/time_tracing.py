"""How long tracing takes at the sizes that video pipelines have by default, and how much memory.

    python scripts/sweep/time_tracing.py --tests diffusers --json assets/benchmarks/tracing.json

The pipelines are the tiny random ones of diffusers' own tests (sweep.py says how to get these), called without height,
width and frames. What says how many tokens their networks see is set as the published ones have it: with the tests'
settings there are up to a hundred times as many. A guided step of the pipeline itself is timed beside it. Each is a
process of its own.
"""

import argparse
import functools
import json
import resource
import time
from pathlib import Path
from typing import Any

import diffusers_tests
import shim
import sweep
import torch

from stepdistill.eval.bench.sources import library_versions
from stepdistill.files import write_json
from stepdistill.pipeline.call import run
from stepdistill.pipeline.trace import trace

CASES = {
    "LTXPipelineFastTests": "512 x 704, 161 frames",
    "WanPipelineTesterConfig": "480 x 832, 81 frames",
    "HunyuanVideoPipelineFastTests": "720 x 1280, 129 frames",
}
PUBLISHED = {
    "LTXPipelineFastTests": {"vae": {"patch_size": 4, "spatio_temporal_scaling": (True, True, True, False)}},
    "WanPipelineTesterConfig": {"transformer": {"rope_max_seq_len": 1024}},
    "HunyuanVideoPipelineFastTests": {"transformer": {"patch_size": 2}},
}
"""Settings of the published parts with which their networks see as many tokens as the real ones."""
SIZES = ("height", "width", "num_frames")
LIMIT = 1800
"""Seconds for one."""


def timed(module: str, name: str, place: Path) -> dict[str, Any]:
    """Seconds and peak memory in MiB of a guided step and of tracing."""
    shim.install()
    case = sweep.Case(module, name, diffusers_tests.instance(module, name), place)
    torch.manual_seed(0)
    pipeline = sweep.build(case.test, fresh=True)
    for part, settings in PUBLISHED[name].items():
        own = getattr(pipeline, part)
        made = type(own).from_config({**own.config, **settings}).eval()
        sweep.redraw(made, 5)
        pipeline = type(pipeline)(**pipeline.components | {part: made})
    pipeline.set_progress_bar_config(disable=True)
    arguments = {key: value for key, value in sweep.arguments_of(case).items() if key not in SIZES}
    row: dict[str, Any] = {"pipeline": type(pipeline).__name__, "size": CASES[name]}
    for what, work in (
        ("step", lambda: run(pipeline, ("rain",), arguments, steps=1, guidance=5.0, output_type="latent")),
        ("trace", lambda: trace(pipeline, arguments)),
    ):
        began, before = time.perf_counter(), time.process_time()
        work()
        row[f"{what}_s"] = round(time.perf_counter() - began, 1)
        row[f"{what}_cpu_s"] = round(time.process_time() - before, 1)
        row[f"{what}_peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tests", type=Path, required=True, help="a folder that holds diffusers' tests")
    parser.add_argument("--only", default="", help="a part of a test's name")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    chosen = parser.parse_args()
    sweep.prepare(chosen.tests)
    rows = []
    for module, name in diffusers_tests.listed(chosen.tests):
        if name in CASES and chosen.only in name:
            made = sweep.forked(functools.partial(timed, module, name), LIMIT)
            print(made if isinstance(made, str) else json.dumps(made), flush=True)
            rows.append(made)
    if chosen.json:
        write_json(chosen.json, {"versions": library_versions(), "threads": torch.get_num_threads(), "rows": rows})


if __name__ == "__main__":
    main()
