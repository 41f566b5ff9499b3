"""Time FID's statistics and distance against torchmetrics' on the same rows, in the same run.

python scripts/bench_fid.py --samples 50000

Prints CPU seconds of all threads, which other work on the machine changes little, the two values, and the memory that
the statistics took.
"""

import argparse
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from stepdistill.eval.metrics import Moments, MomentSum, frechet_distance
from stepdistill.eval.shards import SHARD
from stepdistill.sampling.meter import metered


def blocks(samples: int, features: int, seed: int) -> Iterator[Tensor]:
    """Rows (n, features) of a Gaussian with a decaying spectrum and correlations, a shard at a time."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = (1 + torch.arange(features)).float() ** -0.5
    for first in range(0, samples, SHARD):
        rows = torch.randn(min(SHARD, samples - first), features, generator=generator)
        yield (rows + 0.5 * rows.roll(1, 1)) * spectrum + 0.05 * seed


class Handed(nn.Module):
    """A feature network for torchmetrics that gives the rows it was handed."""

    def __init__(self, features: int):
        super().__init__()
        self.num_features, self.rows = features, torch.zeros(1, features)

    def forward(self, images: Tensor) -> Tensor:
        return self.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--features", type=int, default=2048)
    arguments = parser.parse_args()
    shape = arguments.samples, arguments.features
    drawing = cpu_seconds(lambda: [None for seed in (0, 1) for _ in blocks(*shape, seed)])
    ours: list[Moments] = []
    with metered("cpu") as idle:
        pass
    with metered("cpu") as busy:
        moments = cpu_seconds(lambda: ours.extend(MomentSum.of(blocks(*shape, seed)).moments() for seed in (0, 1)))
    distance = cpu_seconds(lambda: frechet_distance(*ours))
    print(f"{shape[0]} x {shape[1]} rows twice, float64; CPU seconds without those of drawing the rows")
    print(f"stepdistill   moments {moments - drawing:6.1f}   distance {distance:6.1f}")
    print(f"              memory {busy.peak_memory_mib - idle.peak_memory_mib:7.0f} MiB")

    network = Handed(arguments.features)
    metric = FrechetInceptionDistance(feature=network, input_img_size=(3, 4, 4)).set_dtype(torch.float64)

    def update() -> None:
        for seed in (0, 1):
            for rows in blocks(*shape, seed):
                network.rows = rows
                metric.update(torch.zeros(len(rows), 3, 4, 4), real=seed == 0)

    moments, distance = cpu_seconds(update), cpu_seconds(metric.compute)
    print(f"torchmetrics  moments {moments - drawing:6.1f}   distance {distance:6.1f}")
    found, theirs = frechet_distance(*ours), float(metric.compute())
    print(f"distances {found:.9f} and {theirs:.9f}, relative difference {abs(found / theirs - 1):.1e}")


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    main()
