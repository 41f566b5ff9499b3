"""What metrics are called and how their values are written where people read them."""

import math

_NAMES = {
    "fd_classifier": "FD-classifier@{n}",
    "kid_classifier": "KID-classifier@{n} ×1000",
    "fd_enet": "FD-ENetLite0@{n}",
    "kid_enet": "KID-ENetLite0@{n} ×1000",
    "precision": "Precision",
    "recall": "Recall",
    "accuracy": "Class accuracy",
    "diversity_classifier": "Diversity-classifier / teacher's",
    "diversity_enet": "Diversity-ENetLite0 / teacher's",
}


def metric_name(metric: str, samples: int) -> str:
    """What people are shown, such as ``FD-classifier@2000``; these distances are never called FID."""
    return _NAMES[metric].format(n=samples)


def metric_text(metric: str, value: float | None) -> str:
    """A metric's value as people are shown it; kernel distances are multiplied by 1000.

    People see a diversity as the ratio to the teacher's (:meth:`Report.shown`), which is what ``value`` is then.
    """
    if value is None or not math.isfinite(value):
        return "–"
    if metric.startswith("fd_") or metric in ("fid", "patch_fid", "inception_score", "hpsv2", "pick_score"):
        return f"{value:.2f}"
    if metric == "kid" or metric.startswith("kid_"):
        return f"{1000 * value:.2f}"
    return f"{value:.3f}"
