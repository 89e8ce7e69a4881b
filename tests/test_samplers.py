"""Samplers against the truth: the denoiser and the flow of Gaussian data are exact."""

import inspect
import math
import re

import pytest
import torch

import samplers
from oracles import (MU, VAR, C, Q, close, gaussian_denoise, gaussian_denoiser, generator, randn,
                     tensor)
from samplers import (analytic_covariance, ddim, ddpm, dormand_prince, edm_stochastic, euler,
                      euler_maruyama, guidance, heun, langevin, npr_covariance, ode_slope,
                      predictor_corrector, rk45, seeded_noise, sn_covariance, snr_step)
from schedules import EDM, SCHEDULES, VE, VP

ROWS = [column() for column in SCHEDULES.values()]


# ---- Every sampler -------------------------------------------------------------------------------
# A sampler of the file, one of later days too, takes denoise, x, its times, and a callback.

def takes(sampler):
    return list(inspect.signature(sampler).parameters)


SAMPLERS = [value for value in vars(samplers).values() if inspect.isfunction(value)
            and takes(value)[:2] == ["denoise", "x"] and "callback" in takes(value)]
FIXED = [sampler for sampler in SAMPLERS if "max_steps" not in takes(sampler)]
SETTINGS = {                                             # where the defaults switch something off
    edm_stochastic: dict(S_churn=99.0), rk45: dict(rtol=1e-4, atol=1e-4),
    ddim: dict(eta=0.5, covariance=npr_covariance(lambda x, s: 0.5 / (1 + s ** 2) + 0 * x)),
}
every_fixed = pytest.mark.parametrize("sampler", FIXED)
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)


def start(row, t, noise):
    return row.s(t) * row.sigma(t) * noise


ROW = VP()                                               # its s < 1 tells x and x/s apart
T = ROW.time_steps(6)
START = start(ROW, T[0], randn(5, 2))


def sample(sampler, denoise, x, t=T, row=ROW, noise=None, **settings):
    """Any sampler, from x at time t[0]; those of the frame sigma(t) = t get x/s and sigma(t)."""
    settings = SETTINGS.get(sampler, {}) | settings
    if "noise" in takes(sampler):
        settings["noise"] = noise or seeded_noise(range(len(x)), x.shape[1:], x.device, x.dtype)
    if "schedule" in takes(sampler):
        settings["schedule"] = row
    else:
        x, t = x / row.s(t[0]), row.sigma(t)
    out = sampler(denoise, x, t, **settings)
    return out[0] if sampler is rk45 else out


# ---- The truth -----------------------------------------------------------------------------------

EYE = torch.eye(2, dtype=torch.float64)
MEANS, V = tensor([1.0, 0.5], [-1.0, -0.2]), 0.04


def mixture_denoise(x, sigma):
    """E[x0 | x] of .3 N(m_0, v I) + .7 N(m_1, v I): each one's mean, by its probability r."""
    total = V + sigma ** 2
    square = ((x.unsqueeze(1) - MEANS) ** 2).sum(2)                               # (B, 2)
    r = (tensor(0.3, 0.7).log() - square / (2 * total)).softmax(1)
    return r @ MEANS * (sigma ** 2 / total) + x * (V / total)


def counted(denoise):
    """denoise, and the list of the sigmas that it is called with."""
    calls = []

    def wrapped(x, sigma):
        calls.append(float(sigma.max()))
        return denoise(x, sigma)
    return wrapped, calls


def in_turn(noises):
    """A noise source that gives these noises, one a call, and fails after the last."""
    return iter(noises).__next__


def grid(N):
    """N steps from 20 to .1, the last level above 0; grid(N) is part of grid(2 N)."""
    return 20 * (0.1 / 20) ** (torch.arange(N + 1, dtype=torch.float64) / N)


def variance_error(sampler, sigma, C=C, **settings):
    """How far the samples' covariance is from that of N(mu, C) under noise sigma[-1]: (2, 2).

    No sampling: samples are affine in the start and in the noises, and unit vectors for each of
    these in turn, after zeros for all, read off the matrices.
    """
    most = 2 * len(sigma)                                # two noises a step at most
    basis = torch.eye(2 * most, dtype=torch.float64)
    first, *noises = torch.cat([0 * basis[:1], basis]).view(-1, most, 2).unbind(1)
    root = torch.linalg.cholesky(C + sigma[0] ** 2 * EYE)
    out = sample(sampler, gaussian_denoiser(C), first @ root.T, sigma, EDM(), in_turn(noises),
                 **settings)
    out = out[1:] - out[0]
    return out.T @ out - C - sigma[-1] ** 2 * EYE


# ---- Deterministic -------------------------------------------------------------------------------

@pytest.mark.parametrize("row", ROWS)
def test_ode_slope_is_minus_sigma_dsigma_score_plus_scaling(row):
    for t in row.time_steps(7)[:-1]:
        sigma, s, x = row.sigma(t), row.s(t), start(row, t, randn(5, 2))
        # EDM eq. 4 has the score of x/s; by the chain rule s^2 there is s here.
        score = -(x / s - MU) @ torch.linalg.inv(C + sigma ** 2 * EYE)
        close(ode_slope(gaussian_denoise, x, t, row),
              row.ds(t) / s * x - s * row.dsigma(t) * sigma * score, atol=1e-9)


@pytest.mark.parametrize("row", [row for row in ROWS if not hasattr(row, "levels")])
@pytest.mark.parametrize("solver, order", [(euler, 1), (heun, 2)])
def test_order_of_convergence_is_1_for_euler_and_2_for_heun(row, solver, order):
    """Not on ladders, whose steps are uneven, nor with the step to 0, the same for every N."""
    def error(N):
        t, noise = row.time_steps(N)[:-1], randn(4, 2)
        first, last = row.sigma(t[[0, -1]])
        x = solver(gaussian_denoise, start(row, t[0], noise), t, row)
        # the flow scales x - mu along each eigenvector of C as the standard deviation there
        scale = ((VAR + last ** 2) / (VAR + first ** 2)).sqrt()
        exact = MU + (first * noise - MU) @ Q * scale @ Q.T
        return (x / row.s(t[-1]) - exact).abs().max()

    coarse, fine = error(129), error(257)
    assert abs((coarse / fine).log2() - order) < 0.08
    assert fine < (0.2 if order == 1 else 0.01)


@pytest.mark.parametrize("sampler, settings", [
    (euler, {}), (heun, {}), (rk45, {}), (edm_stochastic, dict(S_churn=0.0)),
    (euler_maruyama, dict(beta=3.0)), (ddim, dict(cap=1)), (ddpm, dict(variance="beta"))])
def test_the_step_to_0_lands_on_d_without_noise_and_in_ve_half_way(sampler, settings):
    x, t = randn(4, 2), EDM().time_steps(9)[-2:]
    ours = sample(sampler, mixture_denoise, x, t, EDM(), in_turn([]), **settings)
    close(ours, mixture_denoise(x, t[0]))
    if "schedule" in takes(sampler):
        t = VE().time_steps(9)[-2:]
        D = mixture_denoise(x, t[0].sqrt())
        close(sample(sampler, mixture_denoise, x, t, VE()), x + (D - x) / 2)


def test_without_noise_stochastic_samplers_are_euler_or_heun_and_draw_none():
    t, x = EDM().time_steps(18), 80 * randn(6, 2)
    first, second = (solver(mixture_denoise, x, t, EDM()) for solver in (euler, heun))
    close(ddim(mixture_denoise, x, t), first)
    close(euler_maruyama(mixture_denoise, x, t, in_turn([]), beta=0.0), first)
    # without churn, and where no sigma lies in the window
    for settings in ({}, dict(S_churn=40, S_tmin=90), dict(S_churn=40, S_tmax=1e-3)):
        close(edm_stochastic(mixture_denoise, x, t, in_turn([]), **settings), second)


# ---- Stochastic ----------------------------------------------------------------------------------

@pytest.mark.parametrize("S_churn, gamma, window", [(4, 0.4, (0.5, 8)), (99, 2 ** 0.5 - 1, ())])
def test_noise_is_drawn_where_sigma_is_in_the_window_and_gamma_is_clamped(S_churn, gamma, window):
    sigma = tensor(40, 20, 10, 8, 4, 2, 1, 0.5, 0.3, 0.2, 0)                      # N = 10
    x, z, drawn = 40 * randn(3, 2), randn(3, 2, seed=1), []

    def noise():
        drawn.append(len(calls))                     # how many times D was called before
        return z

    denoise, calls = counted(gaussian_denoise)
    ours = edm_stochastic(denoise, x, sigma, noise, S_churn, *window)
    low, high = window or (0, math.inf)
    inside = [low <= v <= high for v in sigma[:-1].tolist()]         # both ends belong to it
    sigma_hat = [v * (1 + gamma) if i else v for v, i in zip(sigma[:-1].tolist(), inside)]
    assert calls[::2] == pytest.approx(sigma_hat, rel=1e-12)
    assert calls[1::2] == sigma[1:-1].tolist()
    assert drawn == [2 * i for i, v in enumerate(inside) if v]     # once each, before D
    half = in_turn([z / 2] * 10)
    close(edm_stochastic(gaussian_denoise, x, sigma, half, S_churn, *window, S_noise=2.0), ours)


def test_churn_keeps_the_gaussian_marginal_in_exact_covariance():
    coarse, fine = (variance_error(edm_stochastic, EDM().time_steps(N), S_churn=20).norm()
                    for N in (40, 120))
    assert fine < 0.015 and fine < coarse / 5         # near second order: 3^2 = 9


@pytest.mark.parametrize("sampler, settings", [
    (euler_maruyama, dict(beta=0.3)), (euler_maruyama, dict(beta=3.0)),
    (ddpm, dict(variance="beta")), (ddpm, {}), (predictor_corrector, dict(snr=0.01, norms=False))])
def test_the_gaussian_marginal_is_kept_with_weak_order_1_for_any_beta_and_variance(sampler,
                                                                                   settings):
    coarse, fine = (variance_error(sampler, grid(N), **settings).norm() for N in (200, 400))
    assert fine < 0.1 and abs((coarse / fine).log2() - 1) < 0.1


def test_euler_maruyama_has_strong_order_1_for_its_noise_is_additive():
    # One Brownian path w for all N: a step's sqrt(h) z is the path's change over it.  The end is
    # linear in the start and in w's own normal numbers, so unit vectors for these give the root
    # mean square between the ends after N and after 2 N steps exactly.
    M, v, basis = 512, 0.25, torch.eye(513, dtype=torch.float64)
    changes = (-grid(M).diff()).sqrt().unsqueeze(1) * basis[1:]                   # (M, M + 1)
    w = torch.cat([0 * basis[:1], changes.cumsum(0)])                             # at grid(M)

    def end(N):
        sigma = grid(N)
        z = w[::M // N].diff(dim=0) / (-sigma.diff()).sqrt().unsqueeze(1)         # (N, M + 1)
        x = (v + sigma[0] ** 2).sqrt() * basis[:, :1]                             # of N(0, v)
        return euler_maruyama(lambda x, sigma: x * v / (v + sigma ** 2), x, sigma,
                              in_turn(z.unsqueeze(2)), beta=3.0)

    ends = [end(N) for N in (64, 128, 256, 512)]
    error = [(a - b).norm() for a, b in zip(ends, ends[1:])]
    for coarse, fine in zip(error, error[1:]):
        assert abs((coarse / fine).log2() - 1) < 0.05                # measured 1.005 to 1.033


def test_row_i_of_seeded_noise_depends_on_seed_i_alone_and_is_normal_at_every_call():
    draw = seeded_noise(range(100), (5, 10), dtype=torch.float64)
    z = torch.stack([draw() for _ in range(4)])                      # (4 calls, 100, 5, 10)
    for rows in ([99], [3, 1, 3]):
        part = seeded_noise(torch.tensor(rows), (5, 10), dtype=torch.float64)
        assert all(torch.equal(part(), z[call, rows]) for call in range(4))
    assert z.dtype == torch.float64 and seeded_noise([0], (2,))().dtype == torch.float32
    assert abs(z.mean()) < 3.5 / 20000 ** 0.5 and abs((z ** 2).mean() - 1) < 3.5 / 10000 ** 0.5
    assert z.unique().numel() == z.numel()                           # nothing is drawn twice


# ---- Runge-Kutta ---------------------------------------------------------------------------------

def trees(n):
    """The rooted trees with n nodes, each the sorted tuple of its branches."""
    if n == 1:
        return {()}
    return {tuple(sorted((*rest, branch))) for m in range(1, n)
            for rest in trees(n - m) for branch in trees(m)}


def size(tree):
    return 1 + sum(map(size, tree))


def density(tree):
    return size(tree) * math.prod(map(density, tree))


def test_dormand_prince_meets_the_17_conditions_of_order_5_and_the_8_of_order_4():
    # Butcher's theorem: order p holds if sum_i b_i g_i(tree) = 1/density(tree) for each rooted
    # tree of at most p nodes, where g_i = prod over the branches of sum_j a_ij g_j(branch).
    # Stages whose slopes are unit vectors give a (7, 7), b and c.
    a, c, unit = [], [], torch.eye(7, dtype=torch.float64)

    def slope(x, t):
        a.append(x), c.append(t)
        return unit[len(a)]

    b, error, last = dormand_prince(slope, 0 * unit[0], tensor(0)[0], tensor(1)[0], unit[0])
    assert len(a) == 6 and last.argmax() == 6                        # six calls, and k_7 comes back
    a = torch.stack([0 * b, *a])

    def g(tree):
        value = torch.ones(7, dtype=torch.float64)
        for branch in tree:
            value = value * (a @ g(branch))
        return value

    assert [len(trees(n)) for n in range(1, 7)] == [1, 1, 2, 4, 9, 20]
    for weights, order in ((b, 5), (b - error, 4)):
        for n in range(1, order + 1):
            for tree in trees(n):
                assert weights @ g(tree) == pytest.approx(1 / density(tree), abs=1e-14), tree
        beyond = [abs(weights @ g(tree) - 1 / density(tree)) for tree in trees(order + 1)]
        assert max(beyond) > 1e-4                                    # and no higher
    close(a.sum(1)[1:], torch.stack(c), atol=1e-15)
    close(a[6], b, rtol=0, atol=0)                                   # first same as last


def test_rk45_controls_its_step_as_the_textbook_does_without_growth_after_a_refusal():
    # Hairer, Norsett & Wanner I, sec. II.4, on one sample in plain numbers: the first step 1 % of
    # |x|/|slope|, then .9 r^(-1/5) in [.2, 10] times the last, and no growth after a refusal.
    rtol, atol, times = 3e-5, 1e-5, EDM().time_steps(7)
    t, end = times[0], times[-2]                                     # those between do not matter
    x = y = 80 * randn(1, 2)

    def slope(x, t):
        return (x - mixture_denoise(x, t)) / t

    def rms(y, x):
        return (y / (atol + rtol * x.abs())).square().mean().sqrt()

    k, steps, most, refusals = slope(x, t), 0, 10.0, 0
    h = 0.01 * rms(x, x) / rms(k, x)
    while t > end:
        step = min(h, t - end)
        y_next, error, k_next = dormand_prince(slope, y, t, -step, k)
        r = rms(error, torch.maximum(y.abs(), y_next.abs()))
        h, steps = step * min(most, max(0.2, 0.9 * r ** -0.2)), steps + 1
        assert steps < 200
        if r <= 1:
            y, k, t, most = y_next, k_next, t - step if step < t - end else end, 10.0
        else:
            most, refusals = 1.0, refusals + 1
    denoise, calls = counted(mixture_denoise)
    x, nfe = rk45(denoise, x, times, EDM(), rtol, atol)
    assert refusals > 0 and nfe.tolist() == [len(calls)] == [6 * steps + 1]
    close(x, y - end * k, atol=1e-9)                 # Euler's step to 0 has its slope already


def test_rk45_starts_at_zero_and_where_nothing_moves_too():
    t, x = EDM().time_steps(2), torch.zeros(2, 3, dtype=torch.float64)
    assert torch.equal(rk45(lambda x, sigma: x, x, t, EDM())[0], x)
    close(rk45(lambda x, sigma: torch.full_like(x, 0.5), x, t, EDM())[0], 0.5, atol=1e-4)


def test_an_rk45_sample_with_labels_is_the_same_alone_or_in_company_which_it_leaves():
    """And each ends, within the tolerance, where its own exact flow leads."""
    t, calls = T[:-1], torch.zeros(5, dtype=torch.int64)                 # without the step to 0
    means, variances = 3 * randn(5, 2, seed=1), tensor([1e-6], [0.01], [1.0], [9.0], [400.0])

    def denoise(x, sigma, who, mean):
        calls[who] += 1
        return mean + (x - mean) * variances[who] / (variances[who] + sigma ** 2)

    together, nfe = rk45(denoise, START, t, ROW, labels=(torch.arange(5), means))
    assert torch.equal(calls, nfe) and nfe.unique().numel() > 1          # each is called as needed
    for rows in torch.tensor([3]), torch.tensor([2, 3, 0]):
        alone, nfe_alone = rk45(denoise, START[rows], t, ROW, labels=(rows, means[rows]))
        assert torch.equal(nfe[rows], nfe_alone)
        close(alone, together[rows])
    first, last = ROW.sigma(t[[0, -1]])
    scale = ((variances + last ** 2) / (variances + first ** 2)).sqrt()
    exact = means + scale * (START / ROW.s(t[0]) - means)
    close(together / ROW.s(t[-1]), exact, rtol=0, atol=1e-3)


def test_rk45_says_which_sample_is_stuck_and_where():
    x, t, g = 80 * randn(4, 2), EDM().time_steps(9), generator(0)

    def broken(x, sigma, who):
        return torch.where((who == 2) & (sigma < 1), float("nan"), gaussian_denoise(x, sigma))

    def rough(x, sigma):
        return 1e20 * torch.randn(x.shape, generator=g, dtype=x.dtype)

    with pytest.raises(FloatingPointError, match="x is not finite in step .* sample 2, t = .*sigm"):
        rk45(broken, x, t, EDM(), labels=(torch.arange(4).unsqueeze(1),))
    with pytest.raises(FloatingPointError, match="h is too small in step .* sample ., t = .*sigma"):
        rk45(rough, x, t, EDM())
    with pytest.raises(FloatingPointError, match="max_steps reached in step 4 .* sample 0, t = "):
        rk45(mixture_denoise, x, t, EDM(), max_steps=3)
    with pytest.raises(FloatingPointError, match=r"after step 1 of 1 \(from sigma = 80\)"):
        rk45(lambda x, sigma: x / 0, x, EDM().time_steps(1), EDM())      # in the step to 0


# ---- Guidance ------------------------------------------------------------------------------------

def test_guidance_of_weight_1_is_none_and_of_weight_0_is_unconditional():
    x, sigma, label = randn(5, 2), tensor(0.7), randn(5, 2, seed=1)

    def conditional(x, sigma, label):
        return gaussian_denoise(x, sigma) + label

    D, D_u = conditional(x, sigma, label), mixture_denoise(x, sigma)
    for weight in (1, 0.0, -1.0, 0.3, 7.0):
        ours = guidance(conditional, mixture_denoise, weight)(x, sigma, label)
        close(ours, D_u + weight * (D - D_u))


# ---- Ancestral -----------------------------------------------------------------------------------

LADDER = tensor(20, 7, 2.5, 1, 0.4, 0.1)                             # ends above 0
X, Z = 20 * randn(5, 2), [randn(5, 2, seed=i) for i in range(1, 6)]


def by_hand(step):
    """Where published steps y <- step(y, D, ab_t, ab_s, noise) of y = sqrt(ab) x take X."""
    ab = 1 / (1 + LADDER ** 2)                           # alpha_bar
    y = ab[0].sqrt() * X
    for sigma, ab_t, ab_s, noise in zip(LADDER, ab, ab[1:], Z):
        y = step(y, mixture_denoise(y / ab_t.sqrt(), sigma), ab_t, ab_s, noise)
    return y / ab[-1].sqrt()


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_is_the_published_step_of_the_scaled_frame(eta):
    def covariance(x, sigma, D):                         # that needs all three
        return tensor(0.09, 0.64) * (x ** 2 + D ** 2) / (x ** 2 + sigma ** 2)

    def step(y, D, ab_t, ab_s, z):
        """DDIM eq. 12 with eq. 16's v; Cov[x0 | x] by Analytic-DPM Theorem 1."""
        eps_hat = (y - ab_t.sqrt() * D) / (1 - ab_t).sqrt()
        v = eta ** 2 * (1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s)
        k = ab_s.sqrt() - ((1 - ab_s - v) * ab_t / (1 - ab_t)).sqrt()
        cov = covariance(y / ab_t.sqrt(), (1 / ab_t - 1).sqrt(), D)
        return ab_s.sqrt() * D + (1 - ab_s - v).sqrt() * eps_hat + (v + k ** 2 * cov).sqrt() * z

    close(ddim(mixture_denoise, X, LADDER, in_turn(Z), eta, covariance), by_hand(step))


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_ddpm_is_the_published_step_of_the_scaled_frame(variance):
    def step(y, D, ab_t, ab_s, z):
        """DDPM eq. 4, 6, 7 as printed, in alpha, beta, alpha_bar: q(x_s | x_t, x_0 = D)."""
        alpha = ab_t / ab_s
        beta = 1 - alpha
        beta_tilde = (1 - ab_s) / (1 - ab_t) * beta
        mean = ab_s.sqrt() * beta / (1 - ab_t) * D + alpha.sqrt() * (1 - ab_s) / (1 - ab_t) * y
        return mean + {"beta": beta, "beta_tilde": beta_tilde}[variance].sqrt() * z

    close(ddpm(mixture_denoise, X, LADDER, in_turn(Z), variance), by_hand(step))


@pytest.mark.parametrize("N", [1, 10])
def test_with_the_exact_covariance_the_gaussian_marginal_is_exact_in_any_number_of_steps(N):
    sigma, variance, one = grid(N), tensor(0.09, 0.64), tensor(1, 1)

    def error(sampler, v, **settings):
        return variance_error(sampler, sigma, v.diag(), **settings)

    def residual(x, sigma):                              # E[(eps - eps_hat)^2 | x]
        return (variance / (variance + sigma ** 2)).expand_as(x)

    def square(x, sigma):                                # E[eps^2 | x]
        return (sigma * (x - MU) / (variance + sigma ** 2)) ** 2 + residual(x, sigma)

    def analytic(v):                                     # by E|eps_hat|^2/d
        return analytic_covariance(sigma, (sigma ** 2 / (v[:, None] + sigma ** 2)).mean(0))

    for eta in (0.0, 0.3, 1.0):                          # DDPM is eta = 1; Analytic-DPM Theorem 1
        close(error(ddim, variance, eta=eta, covariance=npr_covariance(residual)), 0.0)
    close(error(ddpm, variance, variance=sn_covariance(square)), 0.0, atol=1e-9)
    close(error(ddpm, one, variance=analytic(one)), 0.0)
    if N == 1:                                           # one number for both: right in the sum
        close(error(ddpm, variance, variance=analytic(variance)).trace(), 0.0)
    close(error(ddpm, one, variance="beta"), 0.0)
    close(error(ddpm, 0 * one, variance="beta_tilde"), 0.0)


def test_covariances_are_clipped_to_0_and_to_the_bound():
    x, D, sigma = tensor([0.8, 1], [1.5, 1.5], [0.6, 0.5]), tensor(0.5), tensor(2)[0]
    h = tensor([-0.5, 0.1], [0.2, 0.3], [1e-3, 4])
    for covariance, expected in (                        # 4 h, and 4 h - (x - D)^2
            (npr_covariance(lambda x, sigma: h), tensor([0, 0.4], [0.8, 1], [0.004, 1])),
            (npr_covariance(lambda x, sigma: h, 9.0), tensor([0, 0.4], [0.8, 1.2], [0.004, 9])),
            (sn_covariance(lambda x, sigma: h), tensor([0, 0.15], [0, 0.2], [0, 1])),
            (sn_covariance(lambda x, sigma: h, 0.1), tensor([0, 0.1], [0, 0.1], [0, 0.1]))):
        close(covariance(x, sigma, D), expected)
    for moment, bound, expected in ((1.2, 1, 0), (0.9, 1, 0.4), (0.3, 1, 1), (0.3, 5, 2.8)):
        value = analytic_covariance([1.0, 2.0], [0.5, moment], bound)(x, sigma, D)
        close(value, tensor(expected)[0])                            # one number, 0-d


def test_analytic_covariance_looks_its_table_up_in_log_sigma():
    covariance = analytic_covariance([8.0, 0.5, 2.0], [1 - 0.6 / 64, 0.6, 1 - 0.4 / 4])
    for sigma, value in ((0.5, 0.1), (2, 0.4), (8, 0.6), (1, 0.25), (4, 0.5),  # Cov at, and between
                         (99, 0.6), (0.4, 0.1), (0.01, 1e-4)):                 # and <= sigma^2
        close(covariance(None, tensor(sigma)[0], None), tensor(value)[0])
    for levels, moments in (([1.0], [0.5]), ([1.0, 2.0], [0.5]), ([[1.0, 2.0]], [[0.5, 0.5]])):
        with pytest.raises(ValueError, match="two rows of the same length"):
            analytic_covariance(levels, moments)
    with pytest.raises(ValueError, match="beta_tilde, beta or a covariance, not 'sn'"):
        ddpm(gaussian_denoise, X, LADDER, in_turn([]), "sn")


def test_the_cap_holds_the_noise_of_the_last_noisy_step_to_y_grey_levels():
    def total(sigma, cap):                       # of all deviations: D = x keeps x, noise is 1
        zero = torch.zeros(1, 2, dtype=torch.float64)
        return ddpm(lambda x, s: x, zero, sigma, lambda: zero + 1, "beta", cap)

    for sigma in (LADDER, torch.cat([LADDER, 0 * LADDER[:1]])):
        deviation = total(sigma, 2) - total(LADDER[:-1], None)       # no other step has a cap
        grey = (2 / math.pi) ** 0.5 * deviation / (2 / 255)          # E|noise| of N(0, deviation^2)
        close(grey / (1 + 0.1 ** 2) ** 0.5, 2)                       # in the scaled frame
    gentle = tensor(0.101, 0.1)                                      # sd .014: 1.4 grey levels
    free, one, two = (total(gentle, cap) for cap in (None, 1, 2))
    assert torch.equal(free, two) and (one < free).all()


# ---- Predictor-corrector -------------------------------------------------------------------------

@pytest.mark.parametrize("row", [VE(), VP()], ids=["ve", "vp"])
def test_pc_is_the_published_algorithm(row):
    # SDE Algorithms 2 - 5; the corrector first, as published code has it.  VP in alpha = 1 - beta.
    t, z = row.time_steps(5)[3:], Z[:2]                              # two steps, the second to 0
    x = start(row, t[0], randn(5, 2))
    for snr, norms in ((0.5, True), (0.16, False)):
        y, draw = x, in_turn([*z, z[0], None])
        for a, b in zip(t[:-1], t[1:]):
            sigma, s, alpha = row.sigma(a), row.s(a), row.s(a) ** 2 / row.s(b) ** 2
            deviation = sigma if alpha == 1 else (1 - s ** 2).sqrt()
            v = sigma ** 2 - row.sigma(b) ** 2 if alpha == 1 else 1 - alpha

            def score(y):
                return -(y / s - mixture_denoise(y / s, sigma)) / sigma / deviation      # -eps_hat

            g = score(y)
            # without norms, those of noise alone, whose score is -z/deviation
            ratio = z[0].norm(dim=1, keepdim=True) / g.norm(dim=1, keepdim=True)
            e = 2 * alpha * (snr * (ratio if norms else deviation)) ** 2
            y = y + e * g + (2 * e).sqrt() * z[0]
            y = (2 - alpha.sqrt()) * y + v * score(y) + v.sqrt() * z[1] * (b > 0)
        close(predictor_corrector(mixture_denoise, x, t, row, draw, snr, norms), y, atol=1e-10)
        assert draw() is None                                        # 2N - 1 noises, then the end


def test_own_norms_leave_langevin_a_variance_of_1_plus_2_over_d_squared():
    # What snr_step's docstring says: steps ~ |z|^2/|score(x)|^2 depend on x, which costs
    # (1 + 2/d) twice, once for |z|^2 and once for |score|^2.
    d, g = 16, generator(0)
    x = torch.randn(2500, d, generator=g, dtype=torch.float64)
    for _ in range(250):                                             # 2 snr^2 250 = 5 times over
        z = torch.randn(2500, d, generator=g, dtype=torch.float64)
        x = langevin(x, -x, z, snr_step(-x, z, 0.1, 1.0))
    expected = (1 + 2 / d) ** 2 / (1 - 0.1 ** 2)                     # and snr^2, as any step has
    assert abs((x ** 2).mean() / expected - 1) < 0.04                # 3.5 (2/40000)^(1/2) = .025


# ---- The contract --------------------------------------------------------------------------------

def test_the_contract_is_tested_on_all_samplers_there_are():
    assert {euler, heun, rk45, edm_stochastic, euler_maruyama, ddim, ddpm,
            predictor_corrector} <= set(SAMPLERS)


@every_sampler
def test_sigma_has_one_value_per_sample_and_the_type_of_x_in_every_call(sampler):
    """And images give what points and float32 give."""
    def denoise(y, sigma):
        assert sigma.shape == (len(y), *[1] * (y.ndim - 1)) and sigma.dtype == y.dtype == x.dtype
        return y.flatten(1).roll(1, 1).view_as(y) / (1 + sigma ** 2)

    def noise():
        return normal().view_as(x).to(x.dtype)

    images, results = start(ROW, T[0], randn(3, 2, 2, 3)), []
    for x in (images, images.flatten(1), images.float()):
        normal = seeded_noise(range(3), (12,), dtype=torch.float64)
        results.append(sample(sampler, denoise, x, noise=noise))
        assert results[-1].shape == x.shape and results[-1].dtype == x.dtype
    close(results[1].view_as(images), results[0], atol=1e-9)
    close(results[2].double(), results[0], rtol=1e-4, atol=1e-3)


@every_fixed
def test_nfe_is_what_each_docstring_says(sampler):
    factor, less = re.search(r"NFE = (\d*)N( - 1)?\.", sampler.__doc__).groups()
    for N in (1, 9):
        denoise, calls = counted(gaussian_denoise)
        sample(sampler, denoise, START, ROW.time_steps(N))
        assert len(calls) == int(factor or 1) * N - (less is not None)
        assert min(calls) > 0                            # D is never asked at sigma = 0


@every_sampler
def test_callbacks_see_the_state_after_every_step_and_the_start_is_left_as_it_was(sampler):
    """And no graph is kept, though the network has one."""
    gain, seen, before = torch.ones((), dtype=torch.float64, requires_grad=True), [], START.clone()

    def denoise(x, sigma):
        return gain * mixture_denoise(x, sigma)

    x = sample(sampler, denoise, START, callback=lambda i, x: seen.append((i, x)))
    assert torch.equal(START, before) and not x.requires_grad
    assert [i for i, _ in seen] == list(range(len(seen))) and torch.equal(seen[-1][1], x)
    if sampler in FIXED:
        assert len(seen) == len(T) - 1
        for i, state in seen:
            close(state, sample(sampler, denoise, START, T[:i + 2]))


@every_fixed
def test_a_state_that_is_not_finite_stops_with_its_step_and_sigma(sampler):
    seen, sigma = [], ROW.sigma(T)

    def denoise(x, s):
        here = (torch.arange(5) == 2).unsqueeze(1) & (s < 1.01 * sigma[3])
        return torch.where(here, math.inf, gaussian_denoise(x, s))

    with pytest.raises(FloatingPointError) as error:
        sample(sampler, denoise, START, callback=lambda i, x: seen.append(bool(x.isfinite().all())))
    i = seen.index(False)
    assert i in (2, 3) and len(seen) == len(T) - 1       # noticed at the end: nothing waits before
    assert str(error.value) == (f"x is not finite after step {i + 1} of {len(T) - 1} "
                                f"(from sigma = {float(sigma[i]):.4g})")


@every_fixed
def test_no_fixed_step_sampler_waits_for_its_device_before_the_end(sampler):
    # A meta tensor has no values: whoever asks for one raises.  All steps must come before.
    seen, x = [], torch.empty(4, 2, device="meta")

    def denoise(x, sigma):
        assert sigma.device == x.device
        return x / (1 + sigma ** 2)

    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        sample(sampler, denoise, x, callback=lambda i, x: seen.append(i), noise=lambda: x)
    assert len(seen) == len(T) - 1
