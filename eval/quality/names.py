"""Names of metrics and the format of their values in tables and text."""

import math

METRICS = (
    "fd_classifier", "kid_classifier", "fd_enet", "kid_enet", "precision", "recall", "accuracy",
    "diversity_classifier", "diversity_enet",
)  # fmt: skip
"""Of a protocol of classes, in a report's order."""
DIVERSITY = ("diversity_classifier", "diversity_enet")
"""Younger than protocol fashion-v1: a stored row without them is whole, and is not measured again."""

_TITLES = {
    "fd_classifier": "FD-classifier@{n}", "kid_classifier": "KID-classifier@{n} ×1000",
    "fd_enet": "FD-ENetLite0@{n}", "kid_enet": "KID-ENetLite0@{n} ×1000",
    "precision": "Precision", "recall": "Recall", "density": "Density", "coverage": "Coverage",
    "accuracy": "Class accuracy",
    "diversity_classifier": "Diversity-classifier / teacher's", "diversity_enet": "Diversity-ENetLite0 / teacher's",
    "fid": "FID@{n}", "patch_fid": "Patch-FID@{n}", "kid": "KID@{n} ×1000", "fd_dinov2": "FD-DINOv2@{n}",
    "inception_score": "Inception score", "cmmd": "CMMD@{n}", "memorised": "Memorised",
    "lit_score": "LiT-score", "lit_score_styles": "LiT-score, unseen style",
    "lit_score_concepts": "LiT-score, unseen concept",
}  # fmt: skip


EXPLAINED = {
    "Sampler": "Who draws: the student, its teacher, or the teacher under a stock solver in as many passes.",
    "Steps": "Steps of the scheduler for an image.",
    "NFE": "Network passes for an image. Guidance outside the network needs two a step.",
    "fd_": "Fréchet distance between the features of these images and of the reference, on the named network, at the "
    "named number of images. Lower is better. It is no FID.",
    "fid": "Fréchet distance on Inception's features, at the named number of images. Lower is better.",
    "patch_fid": "FID of patches at full resolution: fine detail. Lower is better.",
    "kid": "Kernel distance between features, without a bias at few images; it may be below zero. Lower is better.",
    "precision": "Share of images that lie among the reference images: fidelity. Higher is better.",
    "recall": "Share of reference images that lie among these images: variety. Higher is better.",
    "density": "How many reference images each image lies near: fidelity. Higher is better.",
    "coverage": "Share of reference images that have one of these images near: variety. Higher is better.",
    "accuracy": "Share of images that a classifier puts into the class that was requested.",
    "diversity": "Spread between images of one prompt. Higher: more varied.",
    "diversity_": "Variance of features within a class, as a ratio to the teacher's. Below 1: less varied.",
    "inception_score": "Images that Inception is sure of, of many kinds. Higher is better.",
    "cmmd": "Kernel distance on CLIP's features. Lower is better.",
    "memorised": "Share of images that are as near to a training image as a copy: 0.05 for fresh ones, 1 for copies.",
    "lit_score": "Mean cosine of picture and caption by a small scorer of this data set. Higher is better.",
    "clip": "Cosine of picture and prompt by CLIP. Higher: the picture follows its prompt.",
    "lpips_diversity": "Perceptual distance between images of one prompt. Higher: its seeds differ more.",
    "lpips_": "Perceptual distance to the teacher's image of the same noise. Low: it reproduces its teacher.",
    "image_reward": "Predicted human preference for the picture of a prompt. Higher is better.",
    "hpsv2": "Predicted human preference for the picture of a prompt. Higher is better.",
    "pick_score": "Predicted human preference for the picture of a prompt. Higher is better.",
    "seconds_per_image": "Seconds for an image in a batch, decoding included, after a warm-up, on this machine.",
    "latency_seconds": "Milliseconds for a single image, decoding included.",
    "batch": "Images at once in the measurement of seconds.",
    "peak_memory_mib": "Largest memory in use while it draws, in MiB.",
    "flops": "Operations for an image, in thousand millions.",
}
"""What a column of a report means: by its metric, the start of its name, or its title."""


def explained(column: str) -> str:
    """What a column means; "" for one that nobody has described."""
    fitting = [name for name in EXPLAINED if column.startswith(name)]
    return EXPLAINED[max(fitting, key=len)] if fitting else ""


def metric_name(metric: str, samples: int) -> str:
    """What people are shown, such as ``FD-classifier@2000``; an FD of another network than Inception is no FID."""
    return _TITLES[metric].format(n=samples)


def metric_text(metric: str, value: float | None) -> str:
    """A metric's value as people are shown it; kernel distances are multiplied by 1000.

    Diversity within classes is shown as the ratio to the teacher's (:meth:`Report.displayed`): ``value`` is that then.
    """
    if value is None or not math.isfinite(value):
        return "–"
    if metric.startswith("fd_") or metric in ("fid", "patch_fid", "inception_score", "hpsv2", "pick_score"):
        return f"{value:.2f}"
    if metric == "kid" or metric.startswith("kid_"):
        return f"{1000 * value:.2f}"
    return f"{value:.3f}"
