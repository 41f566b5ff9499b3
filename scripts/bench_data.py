"""What the number of prompts and images costs a run: memory, its second start, and a step.

    python scripts/bench_data.py --json data.json
    python scripts/bench_data.py --prompts 1000 --images 1000 --json data.json
    python scripts/bench_data.py --prompts 1000000 --synthesise --json data.json

A small Stable Diffusion of random weights (4.8 KiB a prompt, 1 KiB an image's latents). Every line is measured in two
new processes: one encodes into an empty cache, one starts a run on what is there. Memory is the most that a process had
resident, less that of the same process with one prompt or eight images. A step is that of the trainer, in turns with
one whose rows are tensors in memory: medians of processor time, which other load leaves alone, that of the thread that
gathers included. ``--synthesise`` writes random rows in place of encoded ones: the first process measures writing.
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

BATCH, ROUNDS, KEPT = 4, 14, 64
BARS = {"memory_mib": 300, "second_start_s": 10, "step_ratio": 1.02}


def save_teacher(folder: Path) -> None:
    """A Stable Diffusion in small, with letters as tokens."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
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

    draw = np.random.default_rng(0)
    with open(folder / "images.jsonl", "w") as file:
        for number in range(count):
            Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{number}.png")
            file.write(json.dumps({"text": f"thing {number % 10}", "image": f"{number}.png"}) + "\n")
    return {"conditions": "captions", "images": str(folder / "images.jsonl")}


def recipe_of(place: Path, kind: str, data: dict[str, Any]) -> dict[str, Any]:
    method = {"name": "sfd", "substeps": 2} if kind == "prompts" else {"name": "lcm"}
    return {
        "teacher": {"pipeline": str(place / "teacher"), "guidance": {"scale": 2.0}},
        "student": {"steps": 2, "train": "lora", "rank": 4},
        "data": data,
        "method": method,
        "train": {"steps": 10_000, "batch_size": BATCH, "lr": 1e-4},
        "output": str(place / "run"),
    }


def resident_mib() -> float:
    """The most that this process had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def encode(recipe: dict[str, Any], synthesised: bool) -> dict[str, float]:
    """Fill the stores; with ``synthesised`` rows of conditions are random numbers."""
    import torch

    from stepdistill.data.shards import Chunk
    from stepdistill.pipeline import conditioning
    from stepdistill.run import encode as fill

    whole = conditioning._content

    def random_rows(*given: Any) -> Any:
        content = whole(*given)
        rows = next(content.make(0, content.chunk)).rows

        def make(first: int, last: int) -> Iterator[Chunk]:
            for start in range(first, last, content.chunk):
                count = min(content.chunk, last - start)
                yield Chunk({name: torch.randn_like(value[:count]) for name, value in rows.items()}, count, count)

        return replace(content, make=make)

    if synthesised:
        conditioning._content = random_rows
    began = time.perf_counter()
    stores = fill(recipe)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "mib": resident_mib(), "disk_mib": sum(one.bytes for one in stores.values()) / 2**20}


def start(recipe: dict[str, Any]) -> dict[str, float]:
    """Build the run's session from what is stored, and take steps."""
    from accelerate import Accelerator

    from stepdistill.files import cache_folder
    from stepdistill.recipe import load
    from stepdistill.training.session import build
    from stepdistill.training.trainer import Trainer

    accelerator, loaded = Accelerator(cpu=True), load(recipe)
    began = time.perf_counter()
    session = build(loaded, accelerator.device, cache_folder())
    seconds = time.perf_counter() - began
    trainer = Trainer(session, accelerator, Path(loaded.output))
    held = session.conditioning
    kept = [rows for side in (held.cond, held.null or {}) for rows in side.values() if hasattr(rows, "nbytes")]
    few = min(KEPT, len(held))
    near = {name: rows[:few] for name, rows in held.cond.items()}
    memory = replace(session, conditioning=replace(held, labels=held.labels[:few], cond=near, store=None))
    if session.rows is not None:
        memory.rows = session.rows[0][:KEPT], session.rows[1][:KEPT]
    times: dict[str, list[float]] = {"store": [], "memory": []}
    with session.gathering_ahead():
        for step in range(ROUNDS):
            for name, one in (("store", session), ("memory", memory))[:: 1 if step % 2 else -1]:
                trainer.session, began = one, time.process_time()
                trainer.step(step)
                times[name].append(time.process_time() - began)
    pairs = [a / b for a, b in zip(times["store"][2:], times["memory"][2:], strict=True)]
    return {
        "seconds": seconds,
        "mib": resident_mib(),
        "device_bytes": sum(rows.nbytes for rows in kept),
        "step_s": statistics.median(times["store"][2:]),
        "step_ratio": statistics.median(pairs),
    }


def in_new_process(what: str, recipe: dict[str, Any], cache: Path, synthesised: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", json.dumps([what, recipe, synthesised])]
    environment = os.environ | {"STEPDISTILL_CACHE": str(cache), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(place: Path, kind: str, count: int, synthesised: bool) -> dict[str, dict[str, float]]:
    """What the processes that encode and that start a run say of so many prompts or images."""
    recipe = recipe_of(place, kind, write_data(place / f"{kind}-{count}", kind, count))
    cache = place / f"cache-{kind}-{count}"
    return {what: in_new_process(what, recipe, cache, synthesised) for what in ("encode", "start")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, nargs="*", default=[1_000, 10_000, 100_000])
    parser.add_argument("--images", type=int, nargs="*", default=[1_000, 10_000])
    parser.add_argument("--synthesise", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        what, recipe, synthesised = json.loads(given.child)
        print(json.dumps(encode(recipe, synthesised) if what == "encode" else start(recipe)))
        return
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        save_teacher(Path(folder) / "teacher")
        for kind, counts, least in (("prompts", given.prompts, 1), ("images", given.images, 8)):
            own = measure(Path(folder), kind, least, False) if counts else {}
            for count in counts:
                found = measure(Path(folder), kind, count, given.synthesise and kind == "prompts")
                line = {
                    "kind": kind,
                    "count": count,
                    "synthesised": given.synthesise and kind == "prompts",
                    "disk_mib": found["encode"]["disk_mib"],
                    "encode_s": found["encode"]["seconds"],
                    "encode_memory_mib": found["encode"]["mib"] - own["encode"]["mib"],
                    "memory_mib": found["start"]["mib"] - own["start"]["mib"],
                    "device_bytes": found["start"]["device_bytes"],
                    "second_start_s": found["start"]["seconds"],
                    "step_s": found["start"]["step_s"],
                    "step_ratio": found["start"]["step_ratio"],
                }
                line["within_bars"] = all(line[key] <= bar for key, bar in BARS.items()) and (
                    line["encode_memory_mib"] <= BARS["memory_mib"]
                )
                lines.append(line)
                print(
                    "  ".join(
                        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                        for key, value in line.items()
                    )
                )
    if given.json:
        given.json.write_text(json.dumps({"schema": 1, "bars": BARS, "lines": lines}, indent=1))


if __name__ == "__main__":
    main()
