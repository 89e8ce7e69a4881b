"""One reference for a whole mini-batch: what that costs, and what the mean correction gives back.

Exact claims are summed over every reference of a small set; the rest is measured on a ring of eight
clusters, whose posterior is known, and on digits, whose posterior is that of the finite set.
"""

import itertools
import math

import pytest
import torch

from datasets import digits
from losses import interpolate, mean_correction, measure_gamma, others_mean, stf_target

ONE = torch.ones_like                                                   # gamma = 1 at every sigma


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- The correction ------------------------------------------------------------------------------

def test_others_mean_leaves_the_own_row_out_and_keeps_to_the_class():
    reference, labels = randn(9, 2, 3, seed=0), torch.tensor([0, 1, 0, 2, 1, 0, 1, 1, -1])
    mean, count = others_mean(reference[:4], reference)
    for i in range(4):
        rest = torch.cat([reference[:i], reference[i + 1:]])
        torch.testing.assert_close(mean[i], rest.mean(0))
    assert count.flatten().tolist() == [8] * 4
    mean, count = others_mean(reference[:4], reference, labels[:4], labels)
    for i in range(3):
        rest = [y for k, y in enumerate(reference) if labels[k] == labels[i] and k != i]
        torch.testing.assert_close(mean[i], torch.stack(rest).mean(0))
    assert count.flatten().tolist() == [2, 3, 2, 0] and mean[3].eq(0).all()


@pytest.mark.parametrize("classes", [False, True])
def test_correction_averages_to_zero_over_all_references_of_a_set(classes):
    """Given the source, over all sets of n - 1 others: so a target's mean stays, for any gamma."""
    data, labels = randn(7, 2, seed=1), torch.tensor([0, 0, 1, 0, 1, 1, 0])
    own = data[:1]
    mine = labels == labels[0] if classes else torch.ones(7, dtype=torch.bool)
    mu = (data[mine].sum(0) - own) / (mine.sum() - 1)
    corrections = []
    for others in itertools.combinations(range(1, 7), 3):
        rows = [0, *others]
        given = (labels[:1], labels[rows]) if classes else ()
        corrections.append(mean_correction(own, torch.ones(1, 1), data[rows], mu, ONE, *given))
    assert len(corrections) == 20 and torch.stack(corrections).abs().max() > 0.1
    torch.testing.assert_close(torch.stack(corrections).mean(0), torch.zeros(1, 2).double())


def test_correction_is_zero_where_the_reference_is_the_whole_set_or_the_class_is_its_source():
    data = randn(6, 3, seed=2)
    mu = (data.sum(0) - data) / 5
    whole = mean_correction(data, torch.ones(6, 1), data[torch.randperm(6)], mu, ONE)
    torch.testing.assert_close(whole, torch.zeros_like(data))
    alone = mean_correction(data[:2], torch.ones(2, 1), data, mu[:2], ONE, torch.tensor([4, 5]),
                            torch.tensor([4, 5, 0, 0, 0, 0]))
    assert alone.eq(0).all()


# ---- gamma ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0])
def test_gamma_is_the_regression_coefficient_exactly(sigma):
    """Cov(T, ybar)/Var(ybar) of one x, its source fixed, over every pair of other references."""
    data, n = torch.tensor([[-1.0], [0.2], [0.9], [3.0]]).double(), 3
    x0, noise, level = data[1:2], torch.full((1, 1), 0.7).double(), torch.tensor([sigma])
    references = [torch.cat([x0, data[list(rows)]])
                  for rows in itertools.product(range(4), repeat=2)]
    s = torch.full((1, 1), sigma).double()
    T = torch.cat([stf_target(x0 + s * noise, s, y) for y in references])
    ybar = torch.stack([y[1:].mean(0) for y in references])
    want = ((T - T.mean()) * (ybar - ybar.mean())).mean() / ((ybar - ybar.mean()) ** 2).mean()

    numerator = denominator = 0                 # the identity, with mu in place of its estimate
    for y in references:
        w = torch.softmax(-(x0 + s * noise - y).flatten() ** 2 / (2 * s.squeeze() ** 2), 0)
        target = (w[:, None] * y).sum()
        for k in (1, 2):
            numerator += w[k] / (1 - w[k]) * (y[k] - target) * (y[k] - data.mean())
            denominator += (y[k] - data.mean()) ** 2 / (n - 1)
    torch.testing.assert_close((numerator / denominator).squeeze(), want, rtol=1e-9, atol=1e-12)

    y = torch.cat([x0, data[[0, 3]]])                             # the code is that formula
    w = torch.softmax(-(x0 + s * noise - y).flatten() ** 2 / (2 * s.squeeze() ** 2), 0)
    target, mu = (w[:, None] * y).sum(), y[1:].mean()
    top = sum(w[k] / (1 - w[k]) * (y[k] - target) * (y[k] - mu) for k in (1, 2))
    want = top / ((y[1:] - mu) ** 2).mean()
    torch.testing.assert_close(measure_gamma(x0, noise, level.double(), y), want.clamp(0, 1))

    many = torch.cat([x0, data.repeat(1000, 1)])         # n = 4001: T is the posterior mean of data
    got = measure_gamma(x0, noise, level, many)
    posterior = torch.softmax(-(x0 + sigma * noise - data).flatten() ** 2 / (2 * sigma ** 2), 0)
    mean = (posterior * data.flatten()).sum()
    limit = (posterior * (data.flatten() - mean) ** 2).sum() / data.var(correction=0)
    assert got.item() == pytest.approx(min(limit.item(), 1), rel=0.05)


def test_gamma_on_a_gaussian_is_1_minus_c_skip():
    x0, noise = randn(400, 3, seed=3), randn(400, 3, seed=4)
    reference, levels = torch.cat([x0, randn(4000, 3, seed=5)]), torch.tensor([0.3, 1.0, 3.0, 30.0])
    got = measure_gamma(x0, noise, levels, reference)
    want = (levels ** 2 / (1 + levels ** 2)).double()
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.01)


def test_gamma_keeps_to_the_class():
    """Two classes in one reference give what they give apart, on average."""
    a, b = randn(300, 2, seed=6), 5 + 0.2 * randn(300, 2, seed=7)
    reference = torch.stack([a, b], 1).view(600, 2)
    labels, noise, level = torch.arange(600) % 2, randn(100, 2, seed=8), torch.tensor([0.5])
    apart = [measure_gamma(y[:50], noise[k::2], level, y) for k, y in enumerate((a, b))]
    size = [((y[:50, None] - y[None]) ** 2).mean() for y in (a, b)]
    got = measure_gamma(reference[:100], noise, level, reference, labels[:100], labels)
    want = sum(g * s for g, s in zip(apart, size)) / sum(size)
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.01)
    assert (got - measure_gamma(reference[:100], noise, level, reference)).abs() > 0.05


def test_interpolate_is_linear_in_ln_sigma_and_flat_outside():
    f = interpolate(torch.tensor([0.1, 1.0, 100.0]), torch.tensor([0.0, 0.5, 1.0]))
    sigma = torch.tensor([[0.01], [0.1], [math.sqrt(0.1)], [1.0], [10.0], [100.0], [1e4]])
    torch.testing.assert_close(f(sigma).flatten(), torch.tensor([0, 0, 0.25, 0.5, 0.75, 1, 1]))
    assert f(sigma.double()).dtype == torch.float64 and f(torch.tensor(1.0)).shape == ()


# ---- What it is worth ----------------------------------------------------------------------------

ANGLE = torch.arange(8) * 2 * math.pi / 8
CENTRES, SPREAD = torch.stack([ANGLE.cos(), ANGLE.sin()], 1).double() / 2 ** 0.5, 0.07


class Ring:
    """Eight Gaussian clusters on a circle: (B, 2)."""
    levels = (0.03, 0.1, 0.2, 0.316, 0.5, 1, 3, 10)
    B, n, repeats, best = 64, 64, 200, {0.316: (0.05, 0.2), 1: (0.01, 0.12),
                                                 10: (0.001, 0.01)}

    def draw(self, n, g):
        k = torch.randint(8, (n,), generator=g)
        return CENTRES[k] + SPREAD * torch.randn(n, 2, generator=g, dtype=torch.float64)

    def posterior_mean(self, x, sigma):
        v = SPREAD ** 2 + sigma ** 2
        w = (-((x[:, None] - CENTRES) ** 2).sum(2) / (2 * v)).softmax(1)
        means = CENTRES + SPREAD ** 2 / v[:, None] * (x[:, None] - CENTRES)
        return (w[..., None] * means).sum(1)

    def mu(self, x0):
        return torch.zeros_like(x0)


class Digits:
    """1,000 digits, rows without repetition: (B, 3, 16, 16)."""
    levels = (0.3, 1, 2, 3, 5, 10, 50)
    B, n, repeats, best = 32, 128, 12, {5: (0.12, 0.12), 10: (0.03, 0.03), 50: (0.001, 0.001)}
    data = torch.from_numpy(digits(1000)[0]).float() / 127.5 - 1

    def draw(self, n, g):
        return self.data[torch.randperm(len(self.data), generator=g)[:n]]

    def posterior_mean(self, x, sigma):
        return stf_target(x, sigma, self.data)

    def mu(self, x0):
        return (self.data.sum(0) - x0) / (len(self.data) - 1)


def errors(case, seed):
    """By sigma: the mean squares, over batches, of the mean error and of the gradient's error of
    the DSM target, the STF target, and the corrected one; as ratios to DSM's."""
    g = torch.Generator().manual_seed(seed)
    reference = case.draw(1024, g)[:max(case.n, 256)]
    x0 = reference[:256]
    noise = torch.randn(x0.shape, generator=g).to(x0)
    levels = torch.tensor(case.levels).to(x0)
    gamma = interpolate(levels, measure_gamma(x0, noise, levels, reference))
    weights = torch.randn(x0[0].numel(), 16, generator=g).to(x0) / x0[0].numel() ** 0.5
    table = {}
    for level in case.levels:
        mean, gradient = torch.zeros(3), torch.zeros(3)
        for _ in range(case.repeats):
            reference = case.draw(case.n, g)
            x0 = reference[:case.B]
            sigma = x0.new_full((case.B, *[1] * (x0.ndim - 1)), level)
            x = x0 + sigma * torch.randn(x0.shape, generator=g).to(x0)
            stf, exact = stf_target(x, sigma, reference), case.posterior_mean(x, sigma)
            fixed = stf - mean_correction(x0, sigma, reference, case.mu(x0), gamma)
            features = (x.flatten(1) @ weights / (1 + level)).tanh()                # (B, 16)
            features = torch.cat([features, torch.ones_like(x0.flatten(1)[:, :1])], dim=1)
            for j, target in enumerate((x0, stf, fixed)):
                error = (target - exact).flatten(1)                                 # (B, d)
                mean[j] += (error.mean(0) ** 2).sum()
                gradient[j] += ((features.T @ error / case.B) ** 2).sum()
        table[level] = mean / mean[0], gradient / gradient[0]
    return table


@pytest.mark.parametrize("case", [Ring(), Digits()], ids=["ring", "digits"])
def test_correction_lowers_the_error_of_batch_mean_and_batch_gradient_and_raises_it_nowhere(case):
    table = errors(case, seed=9)
    for level, (mean, gradient) in table.items():
        assert mean[2] <= 1.03 * mean[1] and gradient[2] <= 1.03 * gradient[1], level
        assert mean[1] <= 1.15 and gradient[1] <= 1.15, level                 # STF against DSM
    for level, most in case.best.items():
        assert table[level][0][2] < most[0] and table[level][1][2] < most[1]
    mean, gradient = table[max(case.levels)]
    assert mean[1] > 0.8 * case.B / case.n                  # shared references: B/n, and no less
    assert mean[2] < mean[1] / 50 and gradient[2] < gradient[1] / 50


def test_both_closed_forms_of_gamma_are_ruinous_somewhere():
    """Why gamma is measured: 1 - c_skip on digits at sigma 1, and 1 - w_i on the ring at .2."""
    for case, level, closed in ((Digits(), 1.0, lambda w: 1 / (1 + 0.25)), (Ring(), 0.2, None)):
        g = torch.Generator().manual_seed(10)
        plain = wrong = 0.0
        for _ in range(10):
            reference = case.draw(case.n, g)
            x0 = reference[:case.B]
            sigma = x0.new_full((case.B, *[1] * (x0.ndim - 1)), level)
            x = x0 + sigma * torch.randn(x0.shape, generator=g).to(x0)
            stf, exact = stf_target(x, sigma, reference), case.posterior_mean(x, sigma)
            square = ((x[:, None] - reference) ** 2).flatten(2).sum(2)
            own = (-square / (2 * level ** 2)).softmax(1).diagonal().mean()
            value = closed(own) if closed else 1 - own
            fixed = stf - mean_correction(x0, sigma, reference, case.mu(x0), lambda s: value)
            plain += ((stf - exact).mean(0) ** 2).sum()
            wrong += ((fixed - exact).mean(0) ** 2).sum()
        assert wrong > 5 * plain
