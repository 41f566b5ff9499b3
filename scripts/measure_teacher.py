"""Measure the embedded teacher: reference statistics, real-against-real floors, and its rows at 50 steps.

    python scripts/measure_teacher.py --guidance 1.5 2 3 --samples 1000 10000 --nfe 4

Writes, beside the teacher, the protocol's reference (and pins its SHA-256 and the classifier's in the protocol file,
where they are still null) and measurements.json, from which ``stepdistill bench`` takes rows instead of measuring
them again. Every row is stored as soon as it is known; run the same command again to go on. Rows and floors of these
--samples that lack a metric which is younger than they are get it added; what they hold already stays as it is. After
a change of teacher or classifier set the two SHA-256 in the protocol file back to null and delete both files.
"""

import argparse
import hashlib
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from stepdistill import assets
from stepdistill.bench import TEACHER_STEPS, Bench, Sampling, real_images, solver_samplings
from stepdistill.data import fashion_mnist
from stepdistill.errors import InputError
from stepdistill.eval.names import metric_text
from stepdistill.eval.protocol import (
    Instruments,
    Protocol,
    build_reference,
    floor,
    load_instruments,
    load_networks,
    load_protocol,
    locate,
    measure,
    pin,
)
from stepdistill.eval.row_cache import RowCache, read_measurements, write_json

FLOORS = (1000, 2000, 10_000)


def say(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", flush=True)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_reference(protocol_name: str, device: torch.device) -> Protocol:
    """Build and pin the reference where there is none; returns the pinned protocol."""
    protocol = load_protocol(protocol_name)
    out = assets.root() / "assets" / protocol.reference.file
    if not out.exists():
        images, labels = fashion_mnist.load("train")
        say(f"{out}: {protocol.reference.rows} images")
        build_reference(images, labels, out, protocol=protocol, networks=load_networks(protocol, device=device))
    pin(
        protocol_name, {"reference": sha256(out), "classifier": sha256(locate(protocol.networks["classifier"].weights))}
    )
    return load_protocol(protocol_name)


@torch.no_grad()
def reconstructions(vae, images, labels, count: int, instruments) -> dict[str, float]:
    """The metrics of real images after encoding and decoding: what no denoiser on these latents can beat by much."""
    device = next(vae.parameters()).device
    parts = []
    for x in images[:count].split(250):
        decoded = vae.decode(vae.encode(x.to(device).float() / 127.5 - 1).latent_dist.mean).sample
        parts.append(((decoded + 1) * 127.5).clamp(0, 255).round().to(torch.uint8).cpu())
    return measure(instruments, torch.cat(parts), labels[:count]).metrics


def lacking(metrics: dict[str, float], instruments: Instruments) -> set[str]:
    """The metrics that a stored row does not have."""
    return set(instruments.metric_names) - set(metrics)


def added(known: dict[str, float], found: dict[str, float]) -> dict[str, float]:
    """What was stored, untouched, and what is new.

    Raises:
        InputError: a stored value is not repeated to 1 %: the rows are not of the same thing.
    """
    for metric in known.keys() & found.keys():
        if abs(known[metric] - found[metric]) > 0.01 * max(abs(known[metric]), 0.1):
            raise InputError(f"{metric}: measured {found[metric]}, stored is {known[metric]}; delete the stored row")
    return {metric: known.get(metric, value) for metric, value in found.items()}


def line(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {metric_text(name, value)}" for name, value in metrics.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="fashion-dit", help="embedded teacher or pipeline folder")
    parser.add_argument("--protocol", default="fashion-v1")
    parser.add_argument("--guidance", type=float, nargs="*", default=[], help="scales w besides 1 (off)")
    parser.add_argument("--samples", type=int, nargs="*", default=[10_000], help="images per row; several allowed")
    parser.add_argument("--nfe", type=int, nargs="*", default=[], help="also stock solvers at these NFE, per scale")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)

    protocol = make_reference(arguments.protocol, device)
    instruments = load_instruments(arguments.protocol, device=device)
    path = assets.root() / "assets" / protocol.measurements
    stored = read_measurements(path, protocol.digest)
    real = real_images(protocol)
    for samples in FLOORS:
        known = stored["floors"].get(str(samples), {})
        whole = lacking(known, instruments) == set() if samples in arguments.samples else bool(known)
        if not whole and real is not None:
            stored["floors"][str(samples)] = added(known, floor(instruments, *real, samples).metrics)
            write_json(path, stored)
            say(f"real images, N = {samples}: {line(stored['floors'][str(samples)])}")

    bench = Bench(instruments, RowCache(path.parent, path, protocol.digest), 0, arguments.seed, device)
    model = bench.model(arguments.teacher)
    if "autoencoder" not in stored and real is not None:
        stored["autoencoder"] = {"1000": reconstructions(model.trace.pipeline.vae, *real, 1000, instruments)}
        write_json(path, stored)
        say(f"real images through the autoencoder, N = 1000: {line(stored['autoencoder']['1000'])}")
    samplings = [
        Sampling(f"{Path(arguments.teacher).name} w={w:g}", "teacher", model, model.scheduler, TEACHER_STEPS, w)
        for w in (*arguments.guidance, 1.0)
    ]
    for w in arguments.guidance or [1.0]:
        samplings += [one for nfe in arguments.nfe for one in solver_samplings(model, w, nfe)]
    for samples in arguments.samples:
        at_size = replace(bench, samples=samples, rows={})
        for sampling in samplings:
            key = at_size.key(sampling)
            known = stored["rows"].get(key, {"metrics": {}})
            if not lacking(known["metrics"], instruments):
                continue
            row = at_size.measured(sampling)
            # Read again: another process may have stored rows of its own in the meantime.
            stored = read_measurements(path, protocol.digest)
            stored["rows"][key] = asdict(row) | known | {"metrics": added(known["metrics"], row.metrics)}
            write_json(path, stored)
            say(f"{row.name}, {row.steps} steps, N = {samples}: {line(row.metrics)}")


if __name__ == "__main__":
    main()
