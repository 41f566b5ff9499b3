"""What the number of prompts and images costs a run: memory, its second start, and a step.

    python scripts/bench_data.py --json data.json
    python scripts/bench_data.py --prompts 1000 --images 1000 --processes 1 2 --json data.json
    python scripts/bench_data.py --prompts 1000000 --synthesise 1000000 --images --json data.json
    python scripts/bench_data.py --page assets/benchmarks/data.json      # the table of docs/data_size.md

A small Stable Diffusion of random weights (4.8 KiB a prompt, 1 KiB an image's latents). Images have five proportions
and go to three buckets. Every line is measured in two new groups of processes: one encodes into an empty cache, one
starts a run on what is there. Memory is the most that a process had resident, less that of the same process with one
prompt or ten images. A step is that of the trainer, in turns with one whose rows are tensors in memory: medians of
processor time, which other load leaves alone, that of the gathering thread included. Of several processes the highest
number counts. Of ``--synthesise`` prompts rows are random numbers in place of encoded ones: writing alone is measured.
``--json`` keeps the lines of a file that were not measured now.
"""

import argparse
import json
import os
import resource
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

BATCH, ROUNDS, WARM, KEPT, SEED = 4, 64, 4, 64, 0
BARS = {"encode_memory_mib": 300, "memory_mib": 300, "second_start_cpu_s": 10, "step_ratio": 1.02}
LEAST = {"prompts": 1, "images": 10}
SIDES = ((64, 64), (48, 80), (80, 48), (64, 96), (96, 64))
BUCKETS = [[16, 16], [16, 24], [24, 16]]
PAGE = Path(__file__).parents[1] / "docs" / "data_size.md"
BEGIN, END = "<!-- sizes: written by scripts/bench_data.py -->", "<!-- end of sizes -->"


def save_teacher(folder: Path) -> None:
    """A Stable Diffusion in small, with letters as tokens."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(SEED)
    letters = [symbol for letter in string.ascii_lowercase + string.digits for symbol in (letter, f"{letter}</w>")]
    vocabulary = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        norm_num_groups=8,
        attention_head_dim=8,
        cross_attention_dim=16,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=16,
    )
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def write_data(folder: Path, kind: str, count: int) -> dict[str, Any]:
    """The section ``data`` of a recipe with so many prompts or images, whose files are written."""
    folder.mkdir(parents=True)
    if kind == "prompts":
        with open(folder / "prompts.txt", "w") as file:
            file.writelines(f"a photo of thing {number} beside thing {number * 7 % count}\n" for number in range(count))
        return {"conditions": str(folder / "prompts.txt")}
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(SEED)
    with open(folder / "images.jsonl", "w") as file:
        for number in range(count):
            pixels = draw.integers(0, 256, (*SIDES[number % len(SIDES)], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png", compress_level=1)
            file.write(json.dumps({"text": f"thing {number % 10}", "image": f"{number}.png"}) + "\n")
    return {"conditions": "captions", "images": str(folder / "images.jsonl"), "buckets": BUCKETS}


def recipe_of(place: Path, kind: str, data: dict[str, Any]) -> dict[str, Any]:
    method = {"name": "sfd", "substeps": 2} if kind == "prompts" else {"name": "lcm"}
    return {
        "teacher": {"pipeline": str(place / "teacher"), "guidance": {"scale": 2.0}},
        "student": {"steps": 2, "train": "lora", "rank": 4},
        "data": data,
        "method": method,
        "train": {"steps": 10_000, "batch_size": BATCH, "lr": 1e-4, "seed": SEED},
        "output": str(place / "run"),
    }


def resident_mib() -> float:
    """The most that this process had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def synthesise() -> None:
    """Have conditions be random numbers in the shape of the first chunk."""
    import torch

    from stepdistill.data.shards import Chunk
    from stepdistill.pipeline import conditioning

    whole = conditioning._content

    def random_rows(*given: Any) -> Any:
        content = whole(*given)
        rows = next(content.make(0, content.chunk)).rows

        def make(first: int, last: int) -> Iterator[Chunk]:
            for start in range(first, last, content.chunk):
                count = min(content.chunk, last - start)
                yield Chunk({name: torch.randn_like(value[:count]) for name, value in rows.items()}, count, count)

        return replace(content, make=make)

    conditioning._content = random_rows


def encode(recipe: dict[str, Any], least: bool, synthesised: bool) -> dict[str, float]:
    """Fill the stores."""
    from stepdistill.run import encode as fill

    if synthesised:
        synthesise()
    began = time.perf_counter()
    stores = fill(recipe)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "mib": resident_mib(), "disk_mib": sum(one.bytes for one in stores.values()) / 2**20}


def in_memory(session: Any) -> Any:
    """The session with a few of its rows, as tensors in the host's memory."""

    def near(one: Any) -> Any:
        held = one.conditioning
        few = min(KEPT, len(held))
        cond = {name: rows[:few] for name, rows in held.cond.items()}
        rows = None if one.rows is None else tuple(part[:KEPT] for part in one.rows)
        return replace(one, conditioning=replace(held, labels=held.labels[:few], cond=cond, store=None), rows=rows)

    return replace(near(session), sizes=tuple(map(near, session.sizes)), ahead=None)


def device_bytes(session: Any) -> int:
    """Of all rows that are tensors on the device, and of a batch."""
    with session.at(0):
        batch = session.batch(0, 0, BATCH)
    sides = [side for one in session.sizes for side in (one.conditioning.cond, one.conditioning.null or {})]
    rows = [value for side in (*sides, batch.cond, batch.null or {}) for value in side.values()]
    rows += [] if session.rows is None else [batch.latents]
    storages = {held.data_ptr(): held.nbytes() for held in (r.untyped_storage() for r in rows if hasattr(r, "nbytes"))}
    return sum(storages.values())


def start(recipe: dict[str, Any], least: bool, synthesised: bool) -> dict[str, float]:
    """Build the run's session from what is stored, and take steps: few with the least data, whose memory counts."""
    from stepdistill.files import cache_folder
    from stepdistill.recipe import load
    from stepdistill.training.distributed import Processes, join
    from stepdistill.training.session import build
    from stepdistill.training.trainer import Trainer

    accelerator, loaded = join(), load(recipe)
    began, spent = time.perf_counter(), time.process_time()
    session = build(loaded, accelerator.device, cache_folder(), share=Processes(accelerator).encoders)
    seconds, spent = time.perf_counter() - began, time.process_time() - spent
    trainer, memory = Trainer(session, accelerator, Path(loaded.output)), in_memory(session)
    times: dict[str, list[float]] = {"store": [], "memory": []}
    with session.gathering_ahead():
        for step in range(WARM + 2 if least else ROUNDS):
            for name, one in (("store", session), ("memory", memory))[:: 1 if step % 2 else -1]:
                trainer.session, began = one, time.process_time()
                trainer.step(step)
                times[name].append(time.process_time() - began)
    # In pairs, as a step's size decides what it costs.
    pairs = [a / b for a, b in zip(times["store"][WARM:], times["memory"][WARM:], strict=True)]
    return {
        "seconds": seconds,
        "cpu_seconds": spent,
        "mib": resident_mib(),
        "device_bytes": device_bytes(session),
        "step_s": statistics.median(times["store"][WARM:]),
        "step_ratio": statistics.median(pairs),
        "pairs": len(pairs),
    }


def in_new_processes(cache: Path, processes: int, *given: Any) -> dict[str, float]:
    """What the processes say that do ``given``, of each number the highest."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), __file__, "--child", json.dumps(given)]
    environment = os.environ | {"STEPDISTILL_CACHE": str(cache), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == processes, done.stdout
    return {name: max(one[name] for one in found) for name in found[0]}


def measure(place: Path, kind: str, count: int, processes: int, synthesised: bool) -> dict[str, dict[str, float]]:
    """What the processes that encode and that start a run say of so many prompts or images."""
    folder = place / f"{kind}-{count}-{processes}"
    with tempfile.TemporaryDirectory(dir=place) as cache:
        given = recipe_of(place, kind, write_data(folder, kind, count)), count == LEAST[kind], synthesised
        return {what: in_new_processes(Path(cache), processes, what, *given) for what in ("encode", "start")}


def line_of(
    kind: str,
    count: int,
    processes: int,
    synthesised: bool,
    found: dict[str, dict[str, float]],
    own: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """A line of the file, from what the processes say and what they say of the least data."""
    line = {
        "kind": kind,
        "count": count,
        "processes": processes,
        "synthesised": synthesised,
        "disk_mib": found["encode"]["disk_mib"],
        "encode_s": found["encode"]["seconds"],
        "encode_memory_mib": found["encode"]["mib"] - own["encode"]["mib"],
        "memory_mib": found["start"]["mib"] - own["start"]["mib"],
        "device_bytes": found["start"]["device_bytes"],
        "second_start_s": found["start"]["seconds"],
        "second_start_cpu_s": found["start"]["cpu_seconds"],
        "step_s": found["start"]["step_s"],
        "step_ratio": found["start"]["step_ratio"],
        "pairs": found["start"]["pairs"],
    }
    return line | {"within_bars": all(line[key] <= bar for key, bar in BARS.items())}


def keep(file: Path, line: dict[str, Any]) -> None:
    """Put a line in the place of an earlier one of its kind, count and processes."""
    from stepdistill.eval.bench.sources import library_versions

    def place(one: dict[str, Any]) -> tuple[str, int, int]:
        return one["kind"], one["processes"], one["count"]

    lines = json.loads(file.read_text())["lines"] if file.is_file() else []
    lines = [one for one in lines if place(one) != place(line)] + [line]
    facts = {"schema": 2, "bars": BARS, "seed": SEED, "batch_size": BATCH, "libraries": library_versions()}
    facts["lines"] = sorted(lines, key=lambda one: (one["kind"] != "prompts", *place(one)))
    file.write_text(json.dumps(facts, indent=1) + "\n")


def table(facts: dict[str, Any]) -> str:
    """The lines for people."""
    rows = [
        "| | processes | on disk | encoding | host memory, encoding | host memory, training | on the device "
        "| second start | step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for line in facts["lines"]:
        name = f"{line['count']:,} {line['kind']}{'*' if line['synthesised'] else ''}"
        rows.append(
            f"| {name if line['within_bars'] else f'**{name}**'} | {line['processes']} "
            f"| {line['disk_mib']:,.0f} MiB | {line['encode_s']:,.0f} s | {line['encode_memory_mib']:+.0f} MiB "
            f"| {line['memory_mib']:+.0f} MiB | {line['device_bytes'] / 1024:.0f} KiB "
            f"| {line['second_start_cpu_s']:.1f} s | {line['step_ratio']:.3f}x |"
        )
    libraries = ", ".join(f"{name} {version}" for name, version in facts["libraries"].items())
    return "\n".join([*rows, "", f"Seed {facts['seed']}, batches of {facts['batch_size']}; {libraries}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, nargs="*", default=[1_000, 10_000, 100_000])
    parser.add_argument("--images", type=int, nargs="*", default=[1_000, 10_000])
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument("--synthesise", type=int, nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path, help="write the page's table of this file, and measure nothing")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.page:
        from stepdistill.eval.report import between_markers

        between_markers(PAGE, BEGIN, END, table(json.loads(given.page.read_text(encoding="utf-8"))))
        return
    if given.child:
        what, *rest = json.loads(given.child)
        # In one write: lines of several processes come through one pipe.
        os.write(1, (json.dumps({"encode": encode, "start": start}[what](*rest)) + "\n").encode())
        return
    with tempfile.TemporaryDirectory() as folder:
        save_teacher(Path(folder) / "teacher")
        for kind, processes in [(kind, one) for kind in LEAST for one in given.processes]:
            counts = getattr(given, kind)
            own = measure(Path(folder), kind, LEAST[kind], processes, False) if counts else {}
            for count in counts:
                random = kind == "prompts" and count in given.synthesise
                found = measure(Path(folder), kind, count, processes, random)
                line = line_of(kind, count, processes, random, found, own)
                shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items())
                print("  ".join(shown), flush=True)
                if given.json:
                    keep(given.json, line)


if __name__ == "__main__":
    main()
