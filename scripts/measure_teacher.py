"""Measure the embedded teacher: reference statistics, real-against-real floors, and its rows at 50 steps.

    python scripts/measure_teacher.py --guidance 1.5 2 3 --samples 1000 10000 --nfe 4

Writes, beside the teacher, the protocol's reference (and pins its SHA-256 and the classifier's in the protocol file,
where they are still null) and measurements.json, from which ``stepdistill bench`` takes rows instead of measuring
them again. Every row is stored as soon as it is known; run the same command again to go on. Rows and floors of these
--samples that lack a metric or a standard error which is younger than they are get it added; what they hold already
stays as it is. After a change of teacher or classifier set the two SHA-256 in the protocol file back to null, take out
its key, and delete both files.
"""

import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from stepdistill import assets
from stepdistill.data import fashion_mnist
from stepdistill.errors import InputError
from stepdistill.eval.bench.real_rows import test_images
from stepdistill.eval.bench.rows import Bench, open_bench
from stepdistill.eval.bench.run import solver_samplers
from stepdistill.eval.bench.settings import Settings
from stepdistill.eval.measure import load_view, measure_classes
from stepdistill.eval.names import metric_text
from stepdistill.eval.protocol import Protocol, load_protocol, pin
from stepdistill.eval.references import build_reference
from stepdistill.eval.row_cache import read_measurements
from stepdistill.eval.verdict import VERDICT_METRIC
from stepdistill.files import sha256, write_json

FLOORS = (1000, 2000, 10_000)


def say(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", flush=True)


def make_reference(protocol_name: str, device: torch.device) -> Protocol:
    """Build and pin the reference where there is none; returns the pinned protocol."""
    protocol = load_protocol(protocol_name)
    out = protocol.reference.path()
    if not out.exists():
        images, labels = fashion_mnist.load("train")
        say(f"{out}: {protocol.reference.count} images")
        networks = {name: load_view(view, Path(), device) for name, view in protocol.views.items()}
        build_reference(images, labels, out, protocol=protocol, networks=networks)
    pin(protocol_name, {"reference": sha256(out), "classifier": sha256(protocol.views["classifier"].weights.path())})
    return load_protocol(protocol_name)


@torch.no_grad()
def reconstructions(vae, images: Tensor, labels: Tensor, bench: Bench) -> dict[str, float]:
    """The metrics of real images after encoding and decoding: what no denoiser on these latents can beat by much."""
    device = next(vae.parameters()).device
    parts = []
    for x in images.split(250):
        decoded = vae.decode(vae.encode(x.to(device).float() / 127.5 - 1).latent_dist.mean).sample
        parts.append(((decoded + 1) * 127.5).clamp(0, 255).round().to(torch.uint8).cpu())
    return real_row(bench, torch.cat(parts), labels)


def real_row(bench: Bench, images: Tensor, labels: Tensor) -> dict[str, float]:
    """The metrics of images in memory."""
    return measure_classes(bench.protocol, bench.networks, bench.real, images, labels, errors=False).metrics


def lacking(metrics: dict[str, float], protocol: Protocol) -> set[str]:
    """The metrics that a stored row does not have."""
    return set(protocol.metrics) - set(metrics)


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
    bench = open_bench(Settings(protocol=arguments.protocol, device=device, alone=True), seed=arguments.seed)
    path = assets.root() / "assets" / protocol.measurements
    stored = read_measurements(path, protocol.digest)
    real = test_images(protocol)
    for samples in FLOORS if real is not None else ():
        known = stored["floors"].get(str(samples), {})
        whole = lacking(known, protocol) == set() if samples in arguments.samples else bool(known)
        if not whole:
            found = real_row(bench, *(part[:samples] for part in real))
            stored["floors"][str(samples)] = added(known, found)
            write_json(path, stored)
            say(f"real images, N = {samples}: {line(stored['floors'][str(samples)])}")

    name = Path(arguments.teacher).name
    teacher = bench.sampler(arguments.teacher, name=name, role="teacher", steps=protocol.teacher.steps, guidance=1.0)
    if "autoencoder" not in stored and real is not None:
        found = reconstructions(teacher.trace.pipeline.vae, *(part[:1000] for part in real), bench)
        stored["autoencoder"] = {"1000": found}
        write_json(path, stored)
        say(f"real images through the autoencoder, N = 1000: {line(stored['autoencoder']['1000'])}")
    samplers = [replace(teacher, name=f"{name} w={w:g}", guidance=w) for w in (*arguments.guidance, 1.0)]
    for w in arguments.guidance or [1.0]:
        samplers += [one for nfe in arguments.nfe for one in solver_samplers(replace(teacher, guidance=w), nfe)]
    for samples in arguments.samples:
        at_size = replace(bench, samples=samples)
        for sampler in samplers:
            key = at_size.key(sampler)
            known = stored["rows"].get(key, {"metrics": {}, "diagnostics": {}})
            if not lacking(known["metrics"], protocol) and f"{VERDICT_METRIC}_error" in known["diagnostics"]:
                continue
            row = at_size.measured(sampler, at_size.views(sampler, at_size.real))
            # Read again: another process may have stored rows of its own in the meantime.
            stored = read_measurements(path, protocol.digest)
            facts = {"metrics": added(known["metrics"], row.metrics)}
            facts["diagnostics"] = row.diagnostics | known["diagnostics"]
            stored["rows"][key] = asdict(row) | known | facts
            write_json(path, stored)
            say(f"{row.name}, {row.steps} steps, N = {samples}: {line(row.metrics)}")


if __name__ == "__main__":
    main()
