"""Metrics against closed forms and independent implementations, and their accumulators in parts."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.metrics import confusion_matrix, top_k_accuracy_score
from sklearn.neighbors import NearestNeighbors

from guided_diffusers.evaluation.metrics import (
    Accumulator,
    ClassScore,
    ConfusionMatrix,
    FeatureSample,
    Moments,
    NearestImages,
    accumulator,
    bootstrap_frechet_distances,
    bootstrap_weights,
    class_diversity,
    confidence_interval,
    density_coverage,
    frechet_distance,
    kernel_distance,
    precision_recall,
    sliced_wasserstein,
)
from guided_diffusers.evaluation.metrics.frechet import gaussian_frechet_distance


def features(rows: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64) @ mixing + seed


def exactly(mean: float, std: float) -> torch.Tensor:
    """Points on a line whose sample mean and standard deviation are these."""
    x = torch.linspace(-1, 1, 11, dtype=torch.float64)[:, None]
    return mean + std * x / x.std()


def test_frechet_distance_of_gaussians_on_a_line() -> None:
    """(mean_a - mean_b)^2 + (std_a - std_b)^2."""
    assert frechet_distance(exactly(1.0, 2.0), exactly(-0.5, 0.25)) == pytest.approx(
        1.5**2 + 1.75**2, rel=1e-12
    )


def test_frechet_distance_is_that_of_scipys_matrix_root() -> None:
    a, b = features(300, 12, 0), features(200, 12, 1)
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(
        cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real
    )
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_fewer_images_than_features() -> None:
    """Singular covariances: still finite, and that of the subspace they live in."""
    a, b = features(8, 3, 0), features(9, 3, 1)
    wide = torch.randn(3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    wide = torch.linalg.qr(wide.T).Q.T  # an isometry into 20 dimensions
    assert frechet_distance(a @ wide, b @ wide) == pytest.approx(frechet_distance(a, b), rel=1e-6)


def test_precision_and_recall_are_those_of_scikit_learns_neighbours() -> None:
    real, generated, k = features(120, 4, 0), 1.5 * features(90, 4, 1) - 2, 4

    def share(inside: torch.Tensor, manifold: torch.Tensor) -> float:
        radius = NearestNeighbors(n_neighbors=k + 1).fit(manifold).kneighbors(manifold)[0][:, -1]
        return float((torch.cdist(inside, manifold).numpy() <= radius).any(1).mean())

    precision, recall = precision_recall(real, generated, k)
    assert (precision, recall) == (share(generated, real), share(real, generated))
    assert 0 < precision < 1 and 0 < recall < 1


def test_a_collapsed_model_is_precise_and_recalls_nothing() -> None:
    real = features(200, 3, 0)
    collapsed = real[:1] + 1e-3 * features(50, 3, 1)
    precision, recall = precision_recall(real, collapsed)
    assert precision == 1 and recall < 0.05


def test_wrong_features_are_refused() -> None:
    with pytest.raises(ValueError, match="two or more rows"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="have 2 and 3 columns; the same number"):
        frechet_distance(torch.zeros(5, 2), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="k=5"):
        precision_recall(torch.zeros(5, 2), torch.zeros(9, 2), k=5)


def with_moments(
    mean: torch.Tensor, deviations: torch.Tensor, rows: int, seed: int
) -> torch.Tensor:
    """Features whose sample mean is this, and whose covariance is diagonal, with these standard deviations."""
    x = torch.randn(
        rows, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False).T
    return mean + white * deviations


def test_frechet_distance_of_gaussians() -> None:
    """|mean_a - mean_b|^2 + sum (std_a - std_b)^2 of covariances that commute, in any orientation."""
    mean, std = (
        torch.tensor([[1.0, 2, 0, -1], [0.5, -1, 3, 0]]),
        torch.tensor([[1.0, 2, 0.1, 5], [3, 2, 0.5, 0.01]]),
    )
    turn = torch.linalg.qr(
        torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ).Q
    a, b = (with_moments(mean[i].double(), std[i].double(), 50 + i, i) @ turn for i in (0, 1))
    expected = (mean[0] - mean[1]).square().sum() + (std[0] - std[1]).square().sum()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-7)


class Flat(torch.nn.Module):
    """Features that are the pixels, for torchmetrics."""

    num_features = 6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


def test_distances_are_those_of_torchmetrics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    real, generated = features(200, 6, 0), 1.2 * features(200, 6, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = FrechetInceptionDistance(Flat()).set_dtype(torch.float64)
        kid = KernelInceptionDistance(Flat(), subsets=1, subset_size=200).set_dtype(torch.float64)
        score = InceptionScore(Flat(), splits=1)
    for metric in (theirs, kid):
        metric.update(real[:, :, None, None], real=True)
        metric.update(generated[:, :, None, None], real=False)
    score.update(generated[:, :, None, None])
    assert frechet_distance(real, generated) == pytest.approx(float(theirs.compute()), rel=1e-4)
    assert float(kernel_distance(real, generated)) == pytest.approx(
        float(kid.compute()[0]), rel=1e-4
    )
    ours = ClassScore(6)
    ours.update(torch.arange(200), generated)
    assert float(ours.compute()[0]) == pytest.approx(float(score.compute()[0]), rel=1e-4)


def test_kernel_distance_by_power_sums() -> None:
    """On a line, sum_ij (x_i y_j + 1)^3 = sum_p C(3, p) (sum x^p) (sum y^p)."""

    def pairs(x: torch.Tensor, y: torch.Tensor) -> float:
        return sum(c * float((x**p).sum() * (y**p).sum()) for p, c in enumerate((1, 3, 3, 1)))

    def within(x: torch.Tensor) -> float:
        return (pairs(x, x) - float(((x * x + 1) ** 3).sum())) / (len(x) * (len(x) - 1))

    x, y = features(40, 1, 2), features(30, 1, 3)
    expected = within(x) + within(y) - 2 * pairs(x, y) / (40 * 30)
    assert float(kernel_distance(x, y)) == pytest.approx(expected, rel=1e-10)


def test_kernel_distance_is_unbiased() -> None:
    """Of two samples of one distribution it is 0 on average."""
    found = torch.stack(
        [
            kernel_distance(
                *torch.randn(
                    2, 10, 3, generator=torch.Generator().manual_seed(i), dtype=torch.float64
                )
            )
            for i in range(400)
        ]
    )
    assert abs(float(found.mean())) < 4 * float(found.std()) / 20


def test_sliced_wasserstein_of_a_translation_and_of_one_set() -> None:
    """W(u . x, u . (x + m)) = (u . m)^2, and sum_k (u_k . m)^2 = |m|^2 over a basis: 3 |m|^2."""
    x, m = features(50, 7, 0), torch.linspace(-1, 2, 7).double()
    assert float(sliced_wasserstein(x, x)) < 1e-10
    assert float(sliced_wasserstein(x + 1e3, x + 1e3 + m)) == pytest.approx(
        3 * float(m.square().sum()), rel=1e-9
    )
    assert float(sliced_wasserstein(x, x[torch.arange(50).repeat(3)] + m)) == pytest.approx(
        3 * float(m.square().sum()), rel=1e-9
    )  # each three times: the same distribution from more rows


def test_sliced_wasserstein_of_gaussians() -> None:
    """Between N(m, s^2 I) and N(n, t^2 I): 3 |m - n|^2 + 3 D (s - t)^2, three Frechet distances."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(count, 4, generator=generator).double() for count in (10_000, 8000))
    expected = 3 * (4 * 0.5**2 + 4 * 0.5**2)
    assert float(sliced_wasserstein(x, 1.5 * y + 0.5, directions=40)) == pytest.approx(
        expected, rel=0.05
    )
    assert 3 * frechet_distance(x, 1.5 * y + 0.5) == pytest.approx(expected, rel=0.05)


def test_sliced_wasserstein_on_a_line_is_optimal_transport() -> None:
    """Between 6 and 4 numbers, whose cheapest transport splits each into parts of 1 / 12; and the
    weights of a resample repeat numbers."""
    x, y = features(6, 1, 0), features(4, 1, 1)
    fine = (x.repeat_interleave(2, 0).sort(0).values, y.repeat_interleave(3, 0).sort(0).values)
    expected = 3 * float((fine[0] - fine[1]).square().mean())
    assert float(sliced_wasserstein(x, y)) == pytest.approx(expected, rel=1e-10)
    weights = torch.tensor([[0, 3, 1, 2], [1, 1, 1, 1]]).double()
    repeated = y.repeat_interleave(weights[0].long(), 0)
    found = sliced_wasserstein(x, y, weights).tolist()
    assert found == pytest.approx([float(sliced_wasserstein(x, repeated)), expected], rel=1e-10)


def test_sliced_wasserstein_needs_no_gaussians() -> None:
    """Of two points at 1 and -1 against a normal distribution, whose Frechet distance is 0:
    the integral of (F^-1(q) - sign)^2 is 2 - 2 E|z| = 2 - 2 sqrt(2 / pi)."""
    z = torch.special.ndtri((torch.arange(4000).double() + 0.5) / 4000)[:, None]
    assert float(sliced_wasserstein(z, z.sign(), directions=1)) == pytest.approx(
        3 * (2 - 2 * (2 / np.pi) ** 0.5), rel=1e-3
    )
    assert frechet_distance(z, z.sign()) == pytest.approx(0, abs=1e-5)


def test_class_score_of_sure_and_of_silent_answers() -> None:
    """K for sure and evenly spread answers, 1 for silence and for always the same."""
    for logits, expected in (
        (1000 * torch.eye(5).repeat(4, 1), 5),
        (torch.zeros(9, 5), 1),
        (torch.eye(5)[[2] * 9], 1),
    ):
        score = ClassScore(5)
        score.update(torch.arange(len(logits)), logits)
        assert float(score.compute()[0]) == pytest.approx(expected, rel=1e-12)


def test_density_and_coverage_are_those_of_scikit_learns_neighbours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, generated, k = features(120, 4, 0), 1.5 * features(90, 4, 1) - 2, 5
    radius = NearestNeighbors(n_neighbors=k + 1).fit(real).kneighbors(real)[0][:, -1]
    within = torch.cdist(generated, real).numpy() <= radius
    expected = within.sum() / k / 90, within.any(0).mean()
    assert density_coverage(real, generated, k) == pytest.approx(expected, rel=1e-12)
    assert 0 < expected[0] and 0 < expected[1] < 1
    whole = precision_recall(real, generated), kernel_distance(real, generated)
    monkeypatch.setattr(accumulator, "BLOCK", 700)  # blocks of a few rows change nothing
    assert density_coverage(real, generated, k) == pytest.approx(expected, rel=1e-12)
    assert precision_recall(real, generated) == whole[0]
    assert float(kernel_distance(real, generated)) == pytest.approx(float(whole[1]), rel=1e-10)


def test_an_outlier_makes_recall_large_and_not_density() -> None:
    """What Naeem et al. hold against recall: one far image's ball takes in everything."""
    real = features(100, 3, 0)
    few = torch.cat(
        [real.mean(0) + 0.001 * features(4, 3, 1), real.mean(0) + torch.tensor([[100.0, 0, 0]])]
    )
    assert precision_recall(real, few, 4)[1] == 1 and density_coverage(real, few, 4)[1] < 1


def test_class_diversity_is_the_mean_pairwise_distance() -> None:
    x, labels = features(30, 4, 0), torch.arange(30) % 3
    expected = torch.stack([torch.pdist(x[labels == c]).mean() for c in range(3)]).mean()
    assert float(class_diversity(x, labels)) == pytest.approx(float(expected), rel=1e-10)
    alone = torch.cat([labels[:-1], torch.tensor([7])])  # a class of one image has no pair
    assert class_diversity(x[:-1], alone[:-1]) == class_diversity(x, alone)


def test_answers_are_those_of_scikit_learn() -> None:
    labels, logits = (
        torch.arange(200) % 8,
        features(200, 8, 0).float() + 3 * torch.eye(8)[torch.arange(200) % 8],
    )
    answers = ConfusionMatrix(8)
    for some in torch.arange(200).split(33):
        answers.update(labels[some], logits[some])
    total, right, among = answers.compute()
    assert (answers.counts.numpy() == confusion_matrix(labels, logits.argmax(1))).all()
    assert float(among.sum() / total.sum()) == pytest.approx(
        top_k_accuracy_score(labels, logits, k=5)
    )
    assert 0 < right.sum() < among.sum() < 200


def filled(kind: str, some: torch.Tensor) -> Accumulator:
    """An accumulator of the images `some` of 200."""
    x, labels = features(200, 6, 4), torch.arange(200) % 3
    match kind:
        case "moments":
            found: Accumulator = Moments(6, 3)
            found.update(x[some], labels[some])
        case "kept":
            found = FeatureSample(6, 200, 50, seed=1)
            found.update(some, labels[some], x[some])
        case "answers":
            found = ConfusionMatrix(6)
            found.update(labels[some], x[some])
        case "score":
            found = ClassScore(6, 20, seed=1)
            found.update(some, x[some])
        case "nearest":
            found = NearestImages(features(20, 6, 5))
            found.update(some, x[some])
    return found


def test_the_nearest_image_is_exact_where_it_is_a_copy() -> None:
    """Of points that are far from 0, training images at known distances: 0, and 1e-6 times the query's number."""
    base = 1e3 + 10 * features(40, 6, 0)
    found, numbers = (
        NearestImages(base),
        torch.randperm(40, generator=torch.Generator().manual_seed(0)),
    )
    step = 1e-6 * torch.arange(40, dtype=torch.float64)
    moved = base + step[:, None] * torch.eye(6, dtype=torch.float64)[torch.arange(40) % 6]
    for some in numbers.split(30):  # many at once, and few
        found.update(some, moved[some])
    distance, number = found.distance, found.index
    assert number.tolist() == list(range(40)) and distance[0] == 0
    assert torch.allclose(distance, step, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["moments", "kept", "answers", "score", "nearest"])
def test_merged_parts_give_what_one_gives(kind: str) -> None:
    """In any order, of any sizes, with empty parts."""
    whole = filled(kind, torch.arange(200)).state()
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    merged = filled(kind, torch.arange(0))
    for part in order.split([1, 60, 0, 100, 39]):
        merged.merge(filled(kind, part))
    for name, value in merged.state().items():
        assert torch.allclose(value.double(), whole[name].double(), rtol=1e-12, atol=1e-12), name


def test_moments_are_exact_far_from_zero() -> None:
    """Where means of squares less squares of means have no digit left."""
    x = features(500, 3, 0) + 1e8
    moments = Moments(3)
    for part in x.split(7):
        moments.update(part)
    mean, covariance = moments.compute()
    assert torch.allclose(mean, x.mean(0), rtol=1e-14)
    assert torch.allclose(covariance, (x - 1e8).T.cov(), rtol=1e-6)
    classes = Moments(3, 2)
    classes.update(x, torch.arange(500) % 2)
    assert torch.allclose(classes.compute(1)[1], (x[1::2] - 1e8).T.cov(), rtol=1e-6)
    assert torch.allclose(classes.pooled().compute()[1], (x - 1e8).T.cov(), rtol=1e-6)
    assert frechet_distance(moments, features(500, 3, 0) + 1e8) == pytest.approx(0, abs=1e-4)


def test_kept_images_are_drawn_uniformly_whatever_the_batches() -> None:
    x, often = torch.arange(60)[:, None].float(), torch.zeros(60)
    for seed in range(300):
        kept = FeatureSample(1, 60, 15, seed)
        for part in torch.arange(60).split(seed % 13 + 1):
            kept.update(part, part % 4, x[part])
        numbers, labels, vectors = kept.indices, kept.labels, kept.features
        assert len(set(numbers.tolist())) == 15
        assert torch.equal(labels, numbers % 4) and torch.equal(vectors[:, 0], numbers.float())
        often[numbers] += 1
    assert (
        (often - 75).square() / (300 * 0.25 * 0.75)
    ).mean() < 1.6  # chi square of 60 shares, each 300 / 4


def nbytes(accumulator: Accumulator) -> int:
    return sum(value.nbytes for value in accumulator.state().values())


def test_accumulators_do_not_grow() -> None:
    sizes = []
    for count in (2_000, 20_000):
        kept, moments, score = FeatureSample(16, count, 1_000), Moments(16), ClassScore(16, 10)
        for numbers in torch.arange(count).split(500):
            x = torch.randn(len(numbers), 16)
            kept.update(numbers, numbers % 4, x)
            moments.update(x)
            score.update(numbers, x)
        sizes.append([nbytes(accumulator) for accumulator in (kept, moments, score)])
    assert sizes[0] == sizes[1] and sizes[0][0] == 1_000 * (16 * 4 + 8)


def test_resampled_figures_are_those_of_repeated_images() -> None:
    """Weights say how often an image counts: as if the rows were repeated (of pairs, without an image with itself)."""
    real, x, labels = features(40, 3, 0), features(25, 3, 1), torch.arange(25) % 2
    weights = bootstrap_weights(25, 4, seed=0)
    assert (weights.sum(1) == 25).all() and bootstrap_weights(25, 4, 0, 70)[0].sum() == 70
    moments = Moments(3)
    moments.update(real)
    found = bootstrap_frechet_distances(moments.compute(), x, weights)
    expected = [frechet_distance(real, x.repeat_interleave(one.long(), 0)) for one in weights]
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    few = 3 + features(8, 3, 2) @ torch.randn(
        3, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    wide = Moments(20)  # fewer images than features
    wide.update(features(40, 20, 4))
    weights_of_few = bootstrap_weights(8, 6, 0, 30)
    expected = [
        gaussian_frechet_distance(*wide.compute(), rows.mean(0), rows.T.cov())
        for rows in (few.repeat_interleave(one.long(), 0) for one in weights_of_few)
    ]
    assert bootstrap_frechet_distances(
        wide.compute(), few, weights_of_few
    ).tolist() == pytest.approx(expected, rel=1e-6)
    some = (torch.arange(25) % 5 > 0).double()[None]  # each once or not at all
    for figure in (
        lambda rows, w: kernel_distance(real, x[rows], w),
        lambda rows, w: class_diversity(x[rows], labels[rows], w),
    ):
        assert float(figure(slice(None), some)[0]) == pytest.approx(
            float(figure(some[0] > 0, None)), rel=1e-9
        )


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Of the mean of 60 images, whose expectation is 0, over 300 draws of these."""
    held = 0
    for seed in range(300):
        x = torch.randn(60, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        low, high = confidence_interval(
            float(x.mean()), bootstrap_weights(60, 200, seed) @ x / 60, 0.9
        )
        held += low <= 0 <= high
    assert 0.84 < held / 300 < 0.95


@pytest.mark.parametrize("name", ["score", "frechet", "sliced"])
def test_intervals_are_as_wide_as_the_figure_varies(name: str) -> None:
    """The spread of the replicates of one draw against that over fresh draws."""
    scale, real = torch.linspace(0.5, 3, 5).double(), Moments(5)
    reference = torch.randn(
        2000, 5, generator=torch.Generator().manual_seed(999), dtype=torch.float64
    )
    real.update(reference)

    def figures(seed: int) -> torch.Tensor:
        x = scale * torch.randn(
            300, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        if name == "frechet":
            return torch.cat(
                [
                    torch.tensor([frechet_distance(real, x)]),
                    bootstrap_frechet_distances(
                        real.compute(), x, bootstrap_weights(300, 100, seed)
                    ),
                ]
            )
        if name == "sliced":
            sample, weights = reference, bootstrap_weights(300, 20, seed)
            value = sliced_wasserstein(sample, x, directions=20)[None]
            return torch.cat([value, sliced_wasserstein(sample, x, weights, directions=20)])
        score = ClassScore(5, 100, seed)
        score.update(torch.arange(300), x)
        return score.compute()

    all_ = torch.stack([figures(seed) for seed in range(40)])
    assert float(all_[:, 1:].std(1).mean()) == pytest.approx(float(all_[:, 0].std()), rel=0.3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: kernel_distance(torch.zeros(1, 2), torch.zeros(5, 2)), "two or more rows"),
        (lambda: sliced_wasserstein(torch.zeros(0, 2), torch.zeros(5, 2)), "one or more rows"),
        (lambda: sliced_wasserstein(torch.zeros(3, 2), torch.zeros(5, 1)), "number of columns"),
        (
            lambda: class_diversity(torch.zeros(2, 2), torch.tensor([0, 1])),
            "two of one class are needed",
        ),
        (lambda: density_coverage(torch.zeros(5, 2), torch.zeros(5, 2)), "k=5: more than k"),
        (lambda: Moments(2).compute(), "0 images: two or more"),
        (lambda: FeatureSample(2, 9, 0), "size=0"),
        (lambda: Moments(2).restore({"a": torch.zeros(1)}), "none of Moments"),
    ],
)
def test_what_cannot_be_measured_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
