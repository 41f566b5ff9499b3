"""The distances against closed forms on Gaussians, brute force, and torchmetrics."""

import math

import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from stepdistill.eval.metrics import (
    Moments,
    class_accuracy,
    class_variance,
    cmmd,
    density_coverage,
    frechet_distance,
    inception_score,
    kid,
    precision_recall,
    prompt_diversity,
    variance_ratio,
)


class TakeRows(torch.nn.Module):
    """A feature network for torchmetrics that hands back prepared rows by the index its image carries."""

    def __init__(self, rows):
        super().__init__()
        self.rows, self.num_features = rows, rows.shape[1]

    def forward(self, images):
        return self.rows[images[:, 0, 0, 0].long()]


def index_images(start, stop):
    return torch.arange(start, stop)[:, None, None, None].float().expand(-1, 3, 4, 4)


def gaussian(n, d, seed, shift=0.0, scale=1.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale + shift


def test_frechet_distance_of_commuting_gaussians_is_the_closed_form():
    a, b = torch.tensor([4.0, 9.0, 0.25]), torch.tensor([1.0, 16.0, 0.0])
    rotation = torch.linalg.qr(gaussian(3, 3, seed=0)).Q
    covs = [rotation @ spectrum.double().diag() @ rotation.T for spectrum in (a, b)]
    means = torch.zeros(3).double(), torch.full((3,), 2.0).double()
    expected = 3 * 2.0**2 + (a.sqrt() - b.sqrt()).square().sum().item()
    # The zero eigenvalue comes back as about 1e-16, whose root is 1e-8.
    assert frechet_distance(*map(Moments, means, covs)) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_non_commuting_gaussians_is_the_closed_form_in_two_dimensions():
    a, b = (m @ m.T for m in (gaussian(2, 2, seed=1), gaussian(2, 2, seed=2)))
    root = math.sqrt((a @ b).trace().item() + 2 * math.sqrt((a.det() * b.det()).item()))
    zero = torch.zeros(2).double()
    expected = (a.trace() + b.trace()).item() - 2 * root
    assert frechet_distance(Moments(zero, a), Moments(zero, b)) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_matches_torchmetrics():
    rows = torch.cat([gaussian(300, 16, seed=0), gaussian(200, 16, seed=1, shift=0.3, scale=1.4)])
    metric = FrechetInceptionDistance(feature=TakeRows(rows), input_img_size=(3, 4, 4)).set_dtype(torch.float64)
    metric.update(index_images(0, 300), real=True)
    metric.update(index_images(300, 500), real=False)
    ours = frechet_distance(Moments.of(rows[:300]), Moments.of(rows[300:]))
    assert ours == pytest.approx(metric.compute().item(), rel=1e-6)


def test_frechet_distance_of_a_rank_deficient_set_to_itself_is_zero():
    moments = Moments.of(gaussian(10, 64, seed=0))
    assert frechet_distance(moments, moments) == pytest.approx(0.0, abs=1e-6)


def test_frechet_distance_is_symmetric_and_sees_a_shift_of_the_mean():
    a, b = Moments.of(gaussian(50, 8, seed=0)), Moments.of(gaussian(50, 8, seed=1))
    moved = Moments(b.mean + 3, b.cov)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    expected = (a.mean - b.mean - 3).square().sum() - (a.mean - b.mean).square().sum()
    assert frechet_distance(a, moved) - frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)


def test_kid_of_one_whole_subset_is_the_unbiased_estimate_by_brute_force():
    a, b = gaussian(7, 3, seed=0), gaussian(7, 3, seed=1, shift=0.5)
    kernel = lambda x, y: (float(x @ y) / 3 + 1) ** 3  # noqa: E731
    pairs = [(i, j) for i in range(7) for j in range(7) if i != j]
    within = sum(kernel(a[i], a[j]) + kernel(b[i], b[j]) for i, j in pairs) / 42
    across = sum(kernel(x, y) for x in a for y in b) / 49
    mean, std = kid(a, b, subsets=1, size=7)
    assert mean == pytest.approx(within - 2 * across, rel=1e-12)
    assert std == 0


def test_kid_matches_torchmetrics_when_one_subset_holds_everything():
    rows = torch.cat([gaussian(60, 12, seed=0), gaussian(60, 12, seed=1, shift=0.4)])
    metric = KernelInceptionDistance(feature=TakeRows(rows), subsets=1, subset_size=60).set_dtype(torch.float64)
    metric.update(index_images(0, 60), real=True)
    metric.update(index_images(60, 120), real=False)
    assert kid(rows[:60], rows[60:], subsets=1, size=60)[0] == pytest.approx(metric.compute()[0].item(), rel=1e-5)


def test_kid_converges_to_the_closed_form_on_one_dimensional_gaussians():
    mean, scale = 0.5, 1.2
    # Moments of N(mean, scale^2) against those of N(0, 1) under (xy + 1)^3: 3 dm1^2 + 3 dm2^2 + dm3^2.
    second, third = mean**2 + scale**2, mean**3 + 3 * mean * scale**2
    expected = 3 * mean**2 + 3 * (second - 1) ** 2 + third**2
    value, _ = kid(gaussian(40_000, 1, seed=0), gaussian(40_000, 1, seed=1, shift=mean, scale=scale), subsets=80)
    assert value == pytest.approx(expected, rel=0.1)


def test_kid_between_equal_distributions_is_zero_within_its_error_and_repeats_exactly():
    a, b = gaussian(2000, 8, seed=0), gaussian(1500, 8, seed=1)
    value, std = kid(a, b, subsets=8, size=250)
    assert abs(value) < 3 * std / math.sqrt(8)
    assert kid(a, b, subsets=8, size=250) == (value, std)
    assert kid(a, b, subsets=8, size=250, seed=1) != (value, std)


def test_precision_and_recall_by_hand_on_a_line():
    real = torch.tensor([[0.0], [1.0], [3.0], [10.0]])
    fake = torch.tensor([[0.6], [0.7], [20.0], [20.5]])
    # k = 1 radii: real 1, 1, 2, 7 cover [-1, 5] and [3, 17]; fake .1, .1, .5, .5 cover [.5, .8] and [19.5, 21].
    assert precision_recall(real, fake, k=1) == (0.5, 0.0)


def test_precision_and_recall_are_brute_force():
    real, fake = gaussian(40, 4, seed=0), gaussian(30, 4, seed=1, shift=0.5, scale=0.8)

    def share_inside(points, centres):
        radii = [sorted(math.dist(x, y) for y in centres)[3] for x in centres]
        return sum(any(math.dist(p, c) <= r for c, r in zip(centres, radii, strict=True)) for p in points) / len(points)

    found = precision_recall(real, fake, k=3)
    assert found == (share_inside(fake.tolist(), real.tolist()), share_inside(real.tolist(), fake.tolist()))
    assert 0 < min(found) < max(found) < 1


def test_precision_and_recall_do_not_depend_on_the_chunk_and_are_one_for_equal_sets():
    real, fake = gaussian(200, 5, seed=0), gaussian(150, 5, seed=1, scale=0.6)
    whole = precision_recall(real, fake, chunk=1000)
    assert precision_recall(real, fake, chunk=7) == whole
    assert precision_recall(real, real) == (1.0, 1.0)
    precision, recall = whole
    assert precision > 0.9 > recall


def test_a_collapsed_set_keeps_precision_and_loses_recall_and_variance():
    real = gaussian(300, 6, seed=0)
    labels = torch.arange(300) % 3
    collapsed = real * 0.2
    precision, recall = precision_recall(real, collapsed)
    assert precision > 0.95 and recall < 0.2
    assert variance_ratio(collapsed, labels, real, labels) == pytest.approx(0.04, rel=1e-9)


def test_class_variance_is_the_mean_trace_by_hand_and_is_blind_to_where_the_classes_are():
    rows = torch.tensor([[0.0, 0.0], [2.0, 0.0], [10.0, 5.0], [10.0, 9.0], [7.0, 7.0]])
    labels = torch.tensor([0, 0, 1, 1, 2])  # traces 2 and 8; a class of one row has none
    assert class_variance(rows, labels) == 5.0
    assert class_variance(rows + 100 * labels[:, None], labels) == 5.0
    assert math.isnan(class_variance(rows[4:], labels[4:]))
    many = gaussian(5000, 3, seed=0, scale=2.0)
    assert class_variance(many, torch.arange(5000) % 2) == pytest.approx(3 * 4, rel=0.05)
    # Unbiased: small sets have the same value on average.
    small = [class_variance(gaussian(6, 3, seed=i, scale=2.0), torch.arange(6) % 2) for i in range(2000)]
    assert sum(small) / len(small) == pytest.approx(12, rel=0.03)


def test_class_accuracy_counts_the_class_that_was_asked_for():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [0.0, 5.0]])
    assert class_accuracy(logits, torch.tensor([0, 1, 1, 1])) == 0.75


@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_rows_are_refused(rows):
    with pytest.raises(ValueError, match="at least 2 rows"):
        kid(torch.zeros(rows, 2), torch.zeros(10, 2))
    with pytest.raises(ValueError, match="more than k=3"):
        precision_recall(torch.zeros(10, 2), torch.zeros(rows, 2))


def test_density_and_coverage_are_brute_force():
    real, fake = gaussian(40, 4, seed=0), gaussian(30, 4, seed=1, scale=0.7)
    radii = [sorted(float((x - y).norm()) for y in real)[5] for x in real]
    inside = [[float((x - y).norm()) < radius for y in fake] for x, radius in zip(real, radii, strict=True)]
    expected = sum(map(sum, inside)) / (5 * 30), sum(map(any, inside)) / 40
    assert density_coverage(real, fake) == pytest.approx(expected, rel=1e-12)
    assert density_coverage(real, fake, chunk=7) == pytest.approx(expected, rel=1e-12)
    assert density_coverage(real, fake * 0 + real[0])[1] < 0.3
    with pytest.raises(ValueError, match="more than k=5 rows, found 5 and 30"):
        density_coverage(real[:5], fake)


def test_inception_score_by_hand_and_at_its_bounds():
    logits = gaussian(20, 6, seed=0)
    scores = []
    for part in (logits[:10], logits[10:]):
        p = part.softmax(1)
        scores.append(math.exp(float((p * (p / p.mean(0)).log()).sum(1).mean())))
    mean, std = inception_score(logits, splits=2)
    assert mean == pytest.approx(sum(scores) / 2, rel=1e-12) and std == pytest.approx(abs(scores[0] - scores[1]) / 2)
    assert inception_score(100 * torch.eye(6), splits=1)[0] == pytest.approx(6)
    assert inception_score(torch.zeros(6, 6), splits=3) == (1.0, 0.0)


def test_cmmd_is_brute_force_and_zero_for_equal_sets():
    a, b = gaussian(9, 5, seed=0), gaussian(7, 5, seed=1, shift=0.5)
    unit = lambda rows: [row / row.norm() for row in rows]  # noqa: E731
    mean = lambda x, y: sum(math.exp(-float((p - q) @ (p - q)) / 200) for p in x for q in y) / (len(x) * len(y))  # noqa: E731
    x, y = unit(a), unit(b)
    assert cmmd(a, b) == pytest.approx(1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)), rel=1e-9)
    assert cmmd(a, b, chunk=2) == pytest.approx(cmmd(a, b), rel=1e-9)
    assert cmmd(a, 3 * a) == pytest.approx(0, abs=1e-9)


def test_prompt_diversity_is_the_mean_cosine_distance_of_pairs():
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [1.0, 1.0], [1.0, -1.0], [5.0, 5.0]])
    prompts = torch.tensor([0, 0, 0, 1, 1, 2])
    assert prompt_diversity(rows, prompts) == pytest.approx((2 / 3 + 1) / 2)
    assert math.isnan(prompt_diversity(rows[5:], prompts[5:]))
