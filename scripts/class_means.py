"""In which classes a student goes wrong: squared distances of its class means from real ones, in classifier features.

    python scripts/class_means.py runs/comparison/sida-seed1 runs/comparison/sida-seed2

Forty images of each class of Fashion-MNIST, in 4 steps, from seed 0; beside them the first 6,000 training images.
"""

import argparse
from pathlib import Path

import torch

import stepdistill
from stepdistill.data import fashion_mnist
from stepdistill.eval.measure import load_view
from stepdistill.eval.networks import feature_pass
from stepdistill.eval.protocol import load_protocol

EACH, REAL = 40, 6000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders or exported pipelines")
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    network = load_view(load_protocol("fashion-v1").views["classifier"], Path(), "cpu")
    images, labels = fashion_mnist.load("train")
    real = feature_pass(network, images[:REAL], batch=500)["rows"]
    names = fashion_mnist.CLASS_NAMES
    print(f"{'':32}", *(f"{name[:9]:>9}" for name in names))
    for run in arguments.runs:
        drawn = stepdistill.sample(run, steps=arguments.steps, count=EACH * len(names), conditions=names)
        found = feature_pass(network, drawn.images)["rows"]
        which = torch.tensor([names.index(label) for label in drawn.labels])
        means = [(found[which == c].mean(0), real[labels[:REAL] == c].mean(0)) for c in range(len(names))]
        print(f"{run[-32:]:32}", *(f"{(a - b).square().sum().item():9.1f}" for a, b in means), flush=True)


if __name__ == "__main__":
    main()
