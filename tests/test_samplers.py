"""Samplers against the truth: Gaussian data and Gaussian mixtures have exact denoisers."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.functional import jacobian

from samplers import (analytic_covariance, ddim, ddpm, dormand_prince, edm_stochastic, euler,
                      guidance, heun, langevin, npr_covariance, ode_slope, predictor_corrector,
                      rk45, seeded_noise, sn_covariance, snr_step)
from schedules import EDM, SCHEDULES

ROWS = {name: row() for name, row in SCHEDULES.items()}
every_row = pytest.mark.parametrize("name", ROWS)
every_solver = pytest.mark.parametrize("solver", [euler, heun])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Thousands of tiny products: on a busy machine threads waiting for each other cost 10 x."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(a, b, rtol=0.0, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# ---- The truth -----------------------------------------------------------------------------------
# Gaussian data N(mu, C), C = Q diag(var) Q': full, so that a sampler that treats coordinates
# alone, or mixes them up, is found out.

MU = torch.tensor([0.3, -0.5], dtype=torch.float64)
Q = torch.tensor([[0.8, -0.6], [0.6, 0.8]], dtype=torch.float64)
VAR = torch.tensor([0.25, 1.5], dtype=torch.float64)
C = Q * VAR @ Q.T


def gaussian_denoise(x, sigma):
    """E[x0 | x] = mu + C (C + sigma^2 I)^-1 (x - mu)."""
    return MU + (x - MU) @ Q * (VAR / (VAR + sigma ** 2)) @ Q.T


def gaussian_flow(x, sigma_0, sigma):
    """Where the probability flow takes x from sigma_0 to sigma: each eigenvector scales alone."""
    return MU + (x - MU) @ Q * ((VAR + sigma ** 2) / (VAR + sigma_0 ** 2)).sqrt() @ Q.T


# A mixture w_0 N(m_0, v I) + w_1 N(m_1, v I): the flow is curved and must decide between the two.

MEANS = torch.tensor([[1.0, 0.5], [-1.0, -0.2]], dtype=torch.float64)
ODDS = math.log(0.3 / 0.7)                                                        # w_0 : w_1
V = 0.04


def mixture_denoise(x, sigma):
    """E[x0 | x]: each component's posterior mean, by its posterior probability (r for m_0)."""
    total = V + sigma ** 2
    middle, gap = (MEANS[0] + MEANS[1]) / 2, MEANS[0] - MEANS[1]
    r = ((x - middle) @ gap.unsqueeze(1) / total + ODDS).sigmoid()                # (B, 1)
    return (MEANS[1] + r * gap) * (sigma ** 2 / total) + x * (V / total)


def start(row, t, noise):
    return row.s(t) * row.sigma(t) * noise


def counted(denoise):
    """denoise, and the list of the sigmas that it is called with."""
    calls = []

    def wrapped(x, sigma):
        calls.append(float(sigma.max()))
        return denoise(x, sigma)
    return wrapped, calls


def test_the_gaussian_oracle_solves_the_flow_equation():
    # dx/dsigma = (x - D)/sigma along the exact flow: the truth itself, checked by autograd.
    x, sigma = randn(5, 2), torch.tensor(1.3, dtype=torch.float64)
    slope = jacobian(lambda v: gaussian_flow(x, sigma, v), sigma)
    close(slope, (x - gaussian_denoise(x, sigma)) / sigma)


def test_the_mixture_oracle_is_the_posterior_mean():
    # By quadrature of Bayes' rule over x0, on a grid fine enough for v.
    axis = torch.arange(-3, 3, 0.04, dtype=torch.float64)
    x0 = torch.cartesian_prod(axis, axis)                                         # (22500, 2)
    prior = sum(w * (-((x0 - m) ** 2).sum(1) / (2 * V)).exp() for w, m in zip((0.3, 0.7), MEANS))
    for sigma in torch.tensor([0.2, 0.6, 3.0], dtype=torch.float64):
        x = randn(4, 2)
        p = prior * (-((x.unsqueeze(1) - x0) ** 2).sum(2) / (2 * sigma ** 2)).exp()
        close(mixture_denoise(x, sigma), p @ x0 / p.sum(1, keepdim=True), atol=1e-9)


# ---- Deterministic -------------------------------------------------------------------------------

@every_row
def test_ode_slope_is_the_derivative_of_the_scaled_exact_flow(name):
    row, noise = ROWS[name], randn(5, 2)
    for t in row.time_steps(7)[:-1]:
        sigma, x = row.sigma(t), start(row, t, noise)
        slope = jacobian(lambda v: row.s(v) * gaussian_flow(x / row.s(t), sigma, row.sigma(v)), t)
        close(ode_slope(gaussian_denoise, x, t, row), slope, rtol=1e-9, atol=1e-9)


def test_ode_slope_is_minus_sigma_dsigma_score_plus_scaling():
    # EDM eq. 4 with the score, not the denoiser: ds/s x - s^2 dsigma sigma grad log p(x/s; sigma).
    row, t, x = ROWS["vp"], torch.tensor(0.4, dtype=torch.float64), randn(5, 2)
    sigma, s = row.sigma(t), row.s(t)
    score = -(x / s - MU) @ torch.linalg.inv(C + sigma ** 2 * torch.eye(2, dtype=torch.float64))
    # the score in x/s; the chain rule's 1/s is why s^2 stands in eq. 4 and s here
    close(ode_slope(gaussian_denoise, x, t, row),
          row.ds(t) / s * x - s * row.dsigma(t) * sigma * score)


# Two numbers of steps where the slope has settled.  On the ladders N - 1 must divide the ladder,
# or rounding makes the grid uneven: 999/333 = 3 and 999/999 = 1 do; 991 is prime, so iDDPM's
# grids carry a jitter of at most half a level and a wider tolerance.
@every_row
@pytest.mark.parametrize("solver, order", [(euler, 1), (heun, 2)])
def test_order_of_convergence_is_1_for_euler_and_2_for_heun(name, solver, order):
    row = ROWS[name]
    steps = {"iddpm": (249, 497), "ddpm": (334, 1000)}.get(name, (129, 257))
    tolerance = {"iddpm": 0.08, "ve": 0.08}.get(name, 0.03)

    def error(N):
        # Without the last step: from t_{N-1} to 0 it is the same for every N, so it would leave
        # a floor under the error.
        t = row.time_steps(N)[:-1]
        sigma_0, sigma = row.sigma(t[0]), row.sigma(t[-1])
        x = solver(gaussian_denoise, start(row, t[0], randn(4, 2)), t, row)
        return (x / row.s(t[-1]) - gaussian_flow(sigma_0 * randn(4, 2), sigma_0, sigma)).abs().max()

    coarse, fine = error(steps[0]), error(steps[1])
    slope = (coarse / fine).log() / math.log((steps[1] - 1) / (steps[0] - 1))
    assert abs(slope - order) < tolerance
    assert fine < (0.2 if order == 1 else 0.01)


@every_row
@every_solver
def test_every_row_and_solver_leads_the_same_noise_to_the_same_point(name, solver, mixture_path):
    row = ROWS[name]
    truth = mixture_path(0)

    def error(N):
        t = row.time_steps(N)
        x = row.s(t[0]) * mixture_path(row.sigma(t[0]))            # each row joins at its own top
        return (solver(mixture_denoise, x, t, row) - truth).abs().max()

    few, many = error(40), error(160)
    # Four times the steps: an error 4 or 16 times smaller in the limit.  The modes are 2 apart;
    # measured .01 - .025 for Euler and 4e-5 - 5e-4 for Heun, ten times that in VE's t = sigma^2.
    assert many < (0.04 if solver is euler else 0.001) * (10 if name == "ve" else 1)
    assert many < few / (3 if solver is euler else 12)


@pytest.fixture(scope="module")
def mixture_path():
    """sigma -> where 32 points of the same noise, put down at sigma = 200, have flowed to."""
    x, edm = 200 * randn(32, 2), ROWS["edm"]

    def down(x, a, b, N):
        grid = torch.linspace(a ** (1 / 7), b ** (1 / 7), N + 1, dtype=torch.float64) ** 7
        return heun(mixture_denoise, x, grid, edm)

    end = down(x, 200, 0, 600)
    assert ((end - MEANS[0]).norm(dim=1) < 1).any() and ((end - MEANS[1]).norm(dim=1) < 1).any()
    return lambda sigma: end if sigma == 0 else down(x, 200, float(sigma), 40)


@every_row
def test_euler_on_sigma_is_ddim(name):
    # Song et al. 2021: x_next = D + sigma_next/sigma (x - D), on any row's ladder of sigmas.
    sigma = ROWS[name].sigma(ROWS[name].time_steps(20))
    x = y = sigma[0] * randn(6, 2)
    for a, b in zip(sigma[:-1], sigma[1:]):
        D = mixture_denoise(y, a)
        y = D + b / a * (y - D)
    close(euler(mixture_denoise, x, sigma, ROWS["edm"]), y, atol=1e-11)


@every_row
@every_solver
def test_one_step_works_in_every_row(name, solver):
    row = ROWS[name]
    t = row.time_steps(1)
    x = start(row, t[0], randn(4, 2))
    y = solver(mixture_denoise, x, t, row)
    assert y.isfinite().all() and y.abs().max() < 1e3
    if row.sigma(t[0]) == t[0]:                      # sigma(t) = t: one step to 0 is D itself
        close(y, mixture_denoise(x, t[0]))


@every_solver
def test_a_step_from_sigma_min_to_0_is_d_and_in_ve_half_of_it(solver):
    x = randn(4, 2)
    for name, share in (("edm", 1.0), ("ve", 0.5)):
        t = ROWS[name].time_steps(9)[-2:]
        D = mixture_denoise(x, ROWS[name].sigma(t[0]))
        close(solver(mixture_denoise, x, t, ROWS[name]), x + share * (D - x))


def test_a_schedule_is_any_object_with_four_functions():
    row = SimpleNamespace(sigma=lambda t: t ** 3, dsigma=lambda t: 3 * t ** 2,
                          s=lambda t: 1 / (1 + t), ds=lambda t: -1 / (1 + t) ** 2)
    t = torch.linspace(2, 0.3, 200, dtype=torch.float64)
    x = heun(gaussian_denoise, start(row, t[0], randn(4, 2)), t, row)
    truth = gaussian_flow(row.sigma(t[0]) * randn(4, 2), row.sigma(t[0]), row.sigma(t[-1]))
    close(x, row.s(t[-1]) * truth, atol=1e-3)


# ---- Stochastic ----------------------------------------------------------------------------------

def refuse():
    raise AssertionError("the noise source must not be called")


def test_without_churn_algorithm_2_is_algorithm_1():
    t = EDM().time_steps(18)
    x = 80 * randn(16, 2)
    expected = heun(mixture_denoise, x, t, EDM())
    close(edm_stochastic(mixture_denoise, x, t, refuse), expected)
    # and with churn, where no sigma lies in the window
    close(edm_stochastic(mixture_denoise, x, t, refuse, S_churn=40, S_tmin=90), expected)
    close(edm_stochastic(mixture_denoise, x, t, refuse, S_churn=40, S_tmax=1e-3), expected)


@pytest.mark.parametrize("S_churn, gamma", [(2, .2), (4, .4), (5, 2 ** .5 - 1), (99, 2 ** .5 - 1)])
@pytest.mark.parametrize("S_tmin, S_tmax", [(0, float("inf")), (0.5, 8), (0, 2), (9, float("inf"))])
def test_noise_is_drawn_where_sigma_is_in_the_window_and_gamma_is_clamped(S_churn, gamma, S_tmin,
                                                                          S_tmax):
    sigma = torch.tensor([40, 20, 10, 8, 4, 2, 1, 0.5, 0.3, 0.2, 0], dtype=torch.float64)  # N = 10
    drawn = []

    def noise():
        drawn.append(len(calls))                     # how many times D was called before
        return randn(3, 2, seed=len(drawn))

    denoise, calls = counted(gaussian_denoise)
    edm_stochastic(denoise, 40 * randn(3, 2), sigma, noise, S_churn, S_tmin, S_tmax)
    inside = [S_tmin <= v <= S_tmax for v in sigma[:-1].tolist()]    # both ends belong to it
    sigma_hat = [v * (1 + gamma) if i else v for v, i in zip(sigma[:-1].tolist(), inside)]
    assert calls[::2] == pytest.approx(sigma_hat, rel=1e-12)
    assert calls[1::2] == sigma[1:-1].tolist()
    assert drawn == [2 * i for i, v in enumerate(inside) if v]     # once each, before D


def test_s_noise_scales_the_noise_of_a_step_done_by_hand():
    # D = x/2.  sigma = 2, gamma = .3/1: sigma^ = 2.6, sigma^^2 - sigma^2 = 2.76.
    x, z = randn(4, 2), randn(4, 2, seed=1)

    def run(sigma, S_noise):
        sigma = torch.tensor(sigma, dtype=torch.float64)
        return edm_stochastic(lambda x, _: x / 2, x, sigma, lambda: z, S_churn=0.3,
                              S_noise=S_noise)

    for S_noise in (1.0, 1.003, 2.0):
        x_hat = x + 2.76 ** 0.5 * S_noise * z
        close(run([2, 0], S_noise), x_hat / 2)                     # Euler to 0 is D(x^)
        d = x_hat / 2 / 2.6                                        # Heun to 1, from sigma^
        d_next = (x_hat - 1.6 * d) / 2
        close(run([2, 1], S_noise), x_hat - 1.6 * (d + d_next) / 2)


def test_churn_keeps_the_gaussian_marginal_in_exact_covariance():
    # For Gaussian data the sampler is affine: out = A_0 z_0 + sum_k A_k z_k + c.  Feeding unit
    # vectors for each noise in turn reads the A_k off, so the covariance comes without sampling.
    def covariance_error(N, S_noise=1.0):
        sigma = EDM().time_steps(N)
        basis = torch.zeros(N + 1, 2, N + 1, 2, dtype=torch.float64)
        basis[torch.arange(N + 1), :, torch.arange(N + 1)] = torch.eye(2, dtype=torch.float64)
        basis = basis.flatten(0, 1)                                # (2 (N + 1), N + 1, 2)
        scale = Q * (VAR + sigma[0] ** 2).sqrt()                   # of the marginal at sigma_max
        draws = iter(range(1, N + 1))
        out = edm_stochastic(lambda x, s: gaussian_denoise(x + MU, s) - MU, basis[:, 0] @ scale.T,
                             sigma, lambda: basis[:, next(draws)], S_churn=20, S_noise=S_noise)
        assert next(draws, None) is None                           # every noise was used
        return (out.T @ out - C).abs().max().item()

    coarse, fine = covariance_error(40), covariance_error(120)
    assert fine < 0.015 and fine < coarse / 5         # near second order: 3^2 = 9
    assert covariance_error(120, S_noise=1.1) > 20 * fine          # 10 % more noise shows


def test_churn_keeps_the_gaussian_marginal_in_samples():
    n, sigma = 4000, EDM().time_steps(120)
    top = (VAR + sigma[0] ** 2).sqrt()
    x = MU + randn(n, 2) * top @ Q.T
    g = torch.Generator().manual_seed(1)
    x = edm_stochastic(gaussian_denoise, x, sigma, S_churn=20,
                       noise=lambda: torch.randn(n, 2, generator=g, dtype=torch.float64))
    z = (x - MU) @ Q / VAR.sqrt()                                  # whitened: N(0, I) if right
    assert (z.mean(0).abs() < 3.5 / n ** 0.5).all()
    error = (z.T @ z / n - torch.eye(2, dtype=torch.float64)).abs()
    standard = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64).sqrt() / n ** 0.5
    assert (error < 3.5 * standard).all()


# ---- Seeded noise --------------------------------------------------------------------------------

def test_row_i_of_seeded_noise_depends_on_seed_i_alone():
    seeds, shape = [3, 1, 4, 15], (3, 2, 2)
    draw = seeded_noise(seeds, shape)
    first, second = draw(), draw()
    for rows in ([0], [2], [3, 1], [0, 1, 2, 3, 0], [2, 2]):
        part = seeded_noise([seeds[i] for i in rows], shape)
        assert torch.equal(part(), first[rows]) and torch.equal(part(), second[rows])


def test_seeded_noise_differs_between_calls_and_between_seeds():
    draw = seeded_noise(range(4), (8,))
    values = torch.cat([draw(), draw(), draw()]).flatten()
    assert len(values.unique()) == len(values)


def test_seeded_noise_is_standard_normal():
    draw = seeded_noise(range(100), (50,), dtype=torch.float64)
    z = torch.stack([draw() for _ in range(4)])                    # (4, 100, 50)
    n = z.numel()
    assert abs(z.mean()) < 3.5 / n ** 0.5
    assert abs((z ** 2).mean() - 1) < 3.5 * (2 / n) ** 0.5
    # neither calls nor seeds know of each other
    assert abs((z[0] * z[1]).mean()) < 3.5 / 5000 ** 0.5
    assert abs((z[:, :-1] * z[:, 1:]).mean()) < 3.5 / (n - 200) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_seeded_noise_has_its_shape_and_dtype_and_takes_any_integers(dtype):
    z = seeded_noise([1, 2], (3, 4, 4), dtype=dtype)()
    assert z.shape == (2, 3, 4, 4) and z.dtype == dtype
    assert torch.equal(seeded_noise(torch.tensor([1, 2]), (3, 4, 4), dtype=dtype)(), z)


# ---- Runge-Kutta ---------------------------------------------------------------------------------

def tableau():
    """a (7, 7), b, b_hat, c of dormand_prince, read off by stages whose slopes are unit vectors."""
    a, c = [], []

    def slope(x, t):
        a.append(x), c.append(t)
        return torch.eye(7, dtype=torch.float64)[len(a)]

    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    b, error, last = dormand_prince(slope, torch.zeros(7, dtype=torch.float64), zero, one,
                                    torch.eye(7, dtype=torch.float64)[0])
    assert len(a) == 6 and last.argmax() == 6                        # six calls, and k_7 comes back
    return (torch.stack([torch.zeros_like(b), *a]), b, b - error, torch.stack([zero, *c]))


def trees(order):
    """The rooted trees with that many nodes, each the sorted tuple of its branches."""
    def forests(n, top):
        """Multisets of trees with n nodes in all, none larger (as a tuple) than top."""
        if n == 0:
            return {()}
        return {tuple(sorted((*rest, tree))) for m in range(1, n + 1) for tree in trees(m)
                for rest in forests(n - m, top)}
    return forests(order - 1, None)


def size(tree):
    return 1 + sum(map(size, tree))


def density(tree):
    return size(tree) * math.prod(map(density, tree))


def test_dormand_prince_meets_the_17_conditions_of_order_5_and_the_8_of_order_4():
    # Butcher's theorem: order p holds if sum_i b_i g_i(tree) = 1/density(tree) for each rooted
    # tree of at most p nodes, where g_i = prod over the branches of sum_j a_ij g_j(branch).
    a, b, b_hat, c = tableau()

    def g(tree):
        value = torch.ones(7, dtype=torch.float64)
        for branch in tree:
            value = value * (a @ g(branch))
        return value

    assert [len(trees(n)) for n in range(1, 7)] == [1, 1, 2, 4, 9, 20]
    for n in range(1, 6):
        for tree in trees(n):
            assert b @ g(tree) == pytest.approx(1 / density(tree), abs=1e-14), tree
            if n < 5:
                assert b_hat @ g(tree) == pytest.approx(1 / density(tree), abs=1e-14), tree
    for weights, order in ((b, 6), (b_hat, 5)):                      # and no higher
        assert max(abs(weights @ g(tree) - 1 / density(tree)) for tree in trees(order)) > 1e-4
    close(a.sum(1), c, atol=1e-15)
    close(a[6], b, atol=0)                                           # first same as last


@pytest.mark.parametrize("k", range(6))
def test_a_step_of_dormand_prince_is_exact_for_slopes_that_are_polynomials(k):
    t, h = (torch.tensor(v, dtype=torch.float64) for v in (0.7, -0.4))
    x = randn(3, 2)
    x_next, error, last = dormand_prince(lambda x, t: t ** k * torch.ones_like(x), x, t, h,
                                         t ** k * torch.ones_like(x))
    truth = x + ((t + h) ** (k + 1) - t ** (k + 1)) / (k + 1)
    if k < 5:
        close(x_next, truth, atol=1e-15)                             # order 5: degree 4 in t
    if k < 4:
        close(error, torch.zeros_like(x), atol=1e-15)                # embedded order 4: degree 3
    else:
        assert error.abs().min() > 1e-7
    close(last, (t + h) ** k * torch.ones_like(x))


@every_row
def test_rk45_error_follows_rtol_over_four_decades(name):
    row, noise = ROWS[name], randn(8, 2)
    t = row.time_steps(20)[:-1]
    truth = gaussian_flow(row.sigma(t[0]) * noise, row.sigma(t[0]), row.sigma(t[-1]))
    calls = []
    for tolerance in (1e-4, 1e-5, 1e-6, 1e-7, 1e-8):
        x, nfe = rk45(gaussian_denoise, start(row, t[0], noise), t, row, tolerance, tolerance)
        error = (x / row.s(t[-1]) - truth).abs().max()
        assert 0.3 < error / tolerance < 30                          # measured .6 to 14
        calls.append(nfe.double().mean())
    assert calls[-1] < 1000 and calls[-1] > calls[0]


@every_row
def test_rk45_leads_the_same_noise_to_the_same_point(name, mixture_path):
    row = ROWS[name]
    t = row.time_steps(2)
    x, nfe = rk45(mixture_denoise, row.s(t[0]) * mixture_path(row.sigma(t[0])), t, row)
    assert (x - mixture_path(0)).abs().max() < 0.001 * (10 if name == "ve" else 1)
    assert nfe.max() < (700 if name == "ve" else 400)


@pytest.mark.parametrize("rtol, atol", [(1e-3, 1e-6), (1e-7, 1e-2), (0.0, 1e-5), (1e-5, 0.0)])
def test_rk45_controls_its_step_as_the_textbook_does(rtol, atol):
    # Hairer, Norsett & Wanner I, sec. II.4, on one sample in plain numbers: .9 r^(-1/5) in [.2, 5].
    t, end = EDM().time_steps(2)[:2]
    x = y = 80 * randn(1, 2)

    def slope(x, t):
        return (x - mixture_denoise(x, t)) / t

    k, h, nfe = slope(x, t), (t - end) / 100, 1
    while t > end:
        step = min(h, t - end)
        y_next, error, k_next = dormand_prince(slope, y, t, -step, k)
        scale = atol + rtol * torch.maximum(y.abs(), y_next.abs())
        r = float((error / scale).square().mean().sqrt())
        if r <= 1:
            y, k, t = y_next, k_next, t - step if step < t - end else end
        h, nfe = step * min(5, max(0.2, 0.9 * r ** -0.2)), nfe + 6
    x, ours = rk45(mixture_denoise, x, EDM().time_steps(2)[:2], EDM(), rtol, atol)
    assert ours.tolist() == [nfe]
    close(x, y, atol=1e-11)


def test_rk45_nfe_is_6_per_step_taken_or_refused_plus_1():
    # FSAL: 7 stages, 6 calls.  In VE's t = sigma^2 some steps are refused.
    t, row, states = ROWS["ve"].time_steps(2), ROWS["ve"], [randn(1, 2) * 100]
    denoise, calls = counted(mixture_denoise)
    x, nfe = rk45(denoise, states[0], t, row, callback=lambda i, x: states.append(x))
    refused = sum(torch.equal(a, b) for a, b in zip(states, states[1:]))
    steps = len(states) - 2                              # without the start and Euler's step to 0
    assert 0 < refused < steps / 2
    assert nfe.tolist() == [len(calls)] == [6 * steps + 1] and nfe.dtype == torch.int64
    # Euler's step to 0 has its slope already
    stopped, nfe_stopped = rk45(mixture_denoise, states[0], t[:-1], row)
    assert torch.equal(nfe, nfe_stopped) and torch.equal(stopped, states[-2])
    close(x, stopped - t[-2] * ode_slope(mixture_denoise, stopped, t[-2], row), atol=1e-9)


def labelled(x, sigma, means, variances):
    """The denoiser of N(mean, variance I), both each sample's own: (b, 2), (b, 1)."""
    assert sigma.shape == (len(x), 1) and sigma.dtype == x.dtype and len(means) == len(x)
    return means + (x - means) * variances / (variances + sigma ** 2)


@every_row
@pytest.mark.parametrize("rows", [[0], [3], [4, 1], [2, 3, 0]])
def test_an_rk45_sample_with_labels_is_the_same_alone_or_in_company(name, rows):
    row, t = ROWS[name], ROWS[name].time_steps(2)
    x, means = start(row, t[0], randn(5, 2)), 3 * randn(5, 2, seed=1)
    variances = torch.tensor([[1e-6], [0.01], [1.0], [9.0], [400.0]], dtype=torch.float64)
    together, nfe = rk45(labelled, x, t, row, labels=(means, variances))
    alone, nfe_alone = rk45(labelled, x[rows], t, row, labels=(means[rows], variances[rows]))
    assert nfe.unique().numel() > 1                      # they do take different times
    assert torch.equal(nfe[rows], nfe_alone)
    close(alone, together[rows], atol=1e-10)


def test_rk45_samples_that_have_arrived_leave_the_batch():
    batches, calls = [], torch.zeros(5, dtype=torch.int64)

    def denoise(x, sigma, who, means, variances):
        batches.append(len(x))
        calls[who] += 1
        return labelled(x, sigma, means, variances)

    variances = torch.tensor([[1e-6], [0.01], [1.0], [9.0], [400.0]], dtype=torch.float64)
    labels = torch.arange(5), 3 * randn(5, 2, seed=1), variances
    x, nfe = rk45(denoise, 80 * randn(5, 2), EDM().time_steps(9), EDM(), labels=labels)
    assert torch.equal(calls, nfe)
    assert batches == sorted(batches, reverse=True) and batches[0] == 5 and batches[-1] < 5


def test_rk45_looks_at_the_first_and_the_last_time_above_0_only():
    x = 80 * randn(4, 2)
    for t in (EDM().time_steps(7), EDM().time_steps(7)[:-1]):
        a, b = rk45(mixture_denoise, x, t, EDM()), rk45(mixture_denoise, x, EDM().time_steps(2)[
            :3 if t[-1] == 0 else 2], EDM())
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_rk45_says_which_sample_is_stuck_and_where():
    x, t, generator = 80 * randn(4, 2), EDM().time_steps(9), torch.Generator().manual_seed(0)

    def broken(x, sigma, who):
        return torch.where((who == 2) & (sigma < 1), float("nan"), gaussian_denoise(x, sigma))

    def rough(x, sigma):
        return 1e20 * torch.randn(x.shape, generator=generator, dtype=x.dtype)

    with pytest.raises(FloatingPointError, match="x is not finite in step .* sample 2, t = .*sigm"):
        rk45(broken, x, t, EDM(), labels=(torch.arange(4).unsqueeze(1),))
    with pytest.raises(FloatingPointError, match="h is too small in step .* sample ., t = .*sigma"):
        rk45(rough, x, t, EDM())
    with pytest.raises(FloatingPointError, match="max_steps reached in step 4 .* sample 0, t = "):
        rk45(mixture_denoise, x, t, EDM(), max_steps=3)
    nfe = rk45(mixture_denoise, x, t[:-1], EDM())[1].max()
    rk45(mixture_denoise, x, t[:-1], EDM(), max_steps=(nfe - 1) // 6)          # just enough


# ---- Guidance ------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_guidance_of_weight_1_is_none_and_of_weight_0_is_unconditional(dtype):
    x, t = (80 * randn(8, 2)).to(dtype), EDM().time_steps(9)

    def given(x, sigma):
        return x * (V / (V + sigma ** 2)) + MEANS[0].to(dtype) * (sigma ** 2 / (V + sigma ** 2))

    def free(x, sigma):
        return mixture_denoise(x.double(), sigma).to(dtype)

    for weight, alone in ((1, given), (1.0, given), (0.0, free)):
        assert torch.equal(heun(guidance(given, free, weight), x, t, EDM()),
                           heun(alone, x, t, EDM()))
    D, D_u = given(x, t[3]), free(x, t[3])
    for weight in (-1.0, 0.3, 2.5, 7.0):
        close(guidance(given, free, weight)(x, t[3]), D_u + weight * (D - D_u),
              atol=1e-12 if dtype == torch.float64 else 1e-5)


def test_guidance_gives_the_labels_to_the_conditional_denoiser_alone():
    def conditional(x, sigma, means):
        return labelled(x, sigma, means, torch.ones(len(x), 1))

    x, t, means = 80 * randn(4, 2), EDM().time_steps(9), randn(4, 2, seed=1)
    guided = rk45(guidance(conditional, gaussian_denoise, 1.0), x, t, EDM(), labels=(means,))
    assert torch.equal(guided[0], rk45(conditional, x, t, EDM(), labels=(means,))[0])


# ---- Ancestral -----------------------------------------------------------------------------------

LADDER = torch.tensor([20, 7, 2.5, 1, 0.4, 0.1], dtype=torch.float64)          # ends above 0
SMALL = torch.tensor([0.09, 0.64], dtype=torch.float64)                        # variances below 1


def diagonal(variance):
    """The denoiser and the exact covariance of N(0, diag(variance))."""
    return (lambda x, sigma: x * variance / (variance + sigma ** 2),
            lambda x, sigma, D: variance * sigma ** 2 / (variance + sigma ** 2))


def grid(N):
    """N steps from 20 to .1, the last level above 0."""
    return 20 * (0.1 / 20) ** (torch.arange(N + 1, dtype=torch.float64) / N)


def law(run, root, draws):
    """Covariance of run(x, noise) for x ~ N(0, root root'), run linear in x and its noises.

    No sampling: unit vectors for the start and for each noise in turn read off the matrices.
    """
    basis = torch.eye(2 * (draws + 1), dtype=torch.float64).view(-1, draws + 1, 2)
    turn = iter(range(1, draws + 1))
    out = run(basis[:, 0] @ root.T, lambda: basis[:, next(turn)])
    assert next(turn, None) is None                                  # every noise was used
    return out.T @ out


def scaled_step(x, D, t, s, eta, cov, z):
    """method.md 5 and 7 as printed, for y = sqrt(alpha_bar) x: DDIM with lam2 = v, and Cov."""
    ab_t, ab_s = 1 / (1 + t ** 2), 1 / (1 + s ** 2)
    y = ab_t.sqrt() * x
    eps_hat = (y - ab_t.sqrt() * D) / (1 - ab_t).sqrt()
    v = eta ** 2 * (1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s)
    var = v + (ab_s.sqrt() - ((1 - ab_s - v) * ab_t / (1 - ab_t)).sqrt()) ** 2 * cov
    y = ab_s.sqrt() * D + (1 - ab_s - v).sqrt() * eps_hat + var.sqrt() * z
    return y / ab_s.sqrt()


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("cov", [0.0, 0.07, SMALL])
def test_ddim_is_the_published_step_of_the_scaled_frame(eta, cov):
    x, z = 20 * randn(5, 2), [randn(5, 2, seed=i) for i in range(1, 6)]
    y, draw = x, iter(z)

    def covariance(x, sigma, D):                         # that needs all three
        return cov * (x ** 2 + D ** 2) / (x ** 2 + sigma ** 2)

    for a, b, noise in zip(LADDER[:-1], LADDER[1:], z):
        D = mixture_denoise(y, a)
        y = scaled_step(y, D, a, b, eta, covariance(y, a, D), noise)
    ours = ddim(mixture_denoise, x, LADDER, lambda: next(draw), eta, covariance)
    close(ours, y, atol=1e-11)
    if not torch.is_tensor(cov) and cov == 0 and eta > 0:            # Cov = 0 is no Cov
        draw = iter(z)
        close(ddim(mixture_denoise, x, LADDER, lambda: next(draw), eta), y, atol=1e-11)


def ddpm_step(x, D, t, s, variance, z):
    """DDPM eq. 4, 6, 7 as printed, in alpha, beta, alpha_bar: q(x_s | x_t, x_0 = D)."""
    ab_t, ab_s = 1 / (1 + t ** 2), 1 / (1 + s ** 2)
    alpha, y = ab_t / ab_s, ab_t.sqrt() * x
    beta = 1 - alpha
    beta_tilde = (1 - ab_s) / (1 - ab_t) * beta
    mean = ab_s.sqrt() * beta / (1 - ab_t) * D + alpha.sqrt() * (1 - ab_s) / (1 - ab_t) * y
    # method.md 5: beta_tilde + ab_s b^2/(1 - ab_t)^2 Cov[x0 | x_t]
    var = {"beta": beta, "beta_tilde": beta_tilde}.get(variance) if isinstance(variance, str) else (
        beta_tilde + ab_s * beta ** 2 / (1 - ab_t) ** 2 * variance)
    return (mean + var.sqrt() * z) / ab_s.sqrt()


@pytest.mark.parametrize("variance", ["beta", "beta_tilde", 0.07, SMALL])
def test_ddpm_is_the_published_step_of_the_scaled_frame(variance):
    x, z = 20 * randn(5, 2), [randn(5, 2, seed=i) for i in range(1, 6)]
    y, draw = x, iter(z)
    for a, b, noise in zip(LADDER[:-1], LADDER[1:], z):
        y = ddpm_step(y, mixture_denoise(y, a), a, b, variance, noise)
    given = variance if isinstance(variance, str) else lambda x, sigma, D: variance
    close(ddpm(mixture_denoise, x, LADDER, lambda: next(draw), given), y, atol=1e-11)


def test_ddim_of_eta_1_is_ddpm_with_beta_tilde_on_the_same_noise():
    for t in (EDM().time_steps(12), ROWS["ddpm"].time_steps(50)):
        seeds, x = range(6), t[0] * randn(6, 2)
        a = ddim(mixture_denoise, x, t, seeded_noise(seeds, (2,), dtype=torch.float64), eta=1.0)
        b = ddpm(mixture_denoise, x, t, seeded_noise(seeds, (2,), dtype=torch.float64))
        assert torch.equal(a, b)


@every_row
def test_ddim_of_eta_0_is_euler_in_sigma_and_draws_no_noise(name):
    sigma = ROWS[name].sigma(ROWS[name].time_steps(20))
    x = sigma[0] * randn(6, 2)
    expected = euler(mixture_denoise, x, sigma, ROWS["edm"])
    close(ddim(mixture_denoise, x, sigma), expected, atol=1e-11)
    close(ddim(mixture_denoise, x, sigma, refuse), expected, atol=1e-11)


@pytest.mark.parametrize("cap", [None, 1])
def test_the_step_to_0_is_noise_free_and_lands_on_d(cap):
    _, covariance = diagonal(SMALL)
    for sampler in (lambda *a: ddim(*a, 0.5, None, cap), lambda *a: ddim(*a, 0.0, covariance, cap),
                    lambda *a: ddpm(*a, "beta", cap), lambda *a: ddpm(*a, covariance, cap)):
        x = randn(4, 2)
        close(sampler(mixture_denoise, x, torch.stack([LADDER[-1], 0 * LADDER[-1]]), refuse),
              mixture_denoise(x, LADDER[-1]))
        draws = []
        sampler(mixture_denoise, x, torch.cat([LADDER, 0 * LADDER[:1]]),
                lambda: draws.append(0) or randn(4, 2))
        assert len(draws) == len(LADDER) - 1


@pytest.mark.parametrize("N", [1, 2, 3, 10, 40])
@pytest.mark.parametrize("variance", [torch.full((2,), 0.25, dtype=torch.float64), SMALL],
                         ids=["isotropic", "diagonal"])
def test_with_the_exact_covariance_the_gaussian_marginal_is_exact_in_any_number_of_steps(N,
                                                                                        variance):
    denoise, covariance = diagonal(variance)
    sigma = grid(N)
    root, truth = (variance + sigma[0] ** 2).sqrt().diag(), (variance + sigma[-1] ** 2).diag()
    for eta in (0.0, 0.3, 1.0):                          # DDPM is eta = 1; Analytic-DPM Theorem 1
        close(law(lambda x, z: ddim(denoise, x, sigma, z, eta, covariance), root, N), truth)
    close(law(lambda x, z: ddpm(denoise, x, sigma, z, covariance), root, N), truth)
    close(law(lambda x, z: ddpm(denoise, x, sigma, z, npr_covariance(
        lambda x, sigma: (covariance(x, sigma, None) / sigma ** 2).expand_as(x))), root, N), truth)
    close(law(lambda x, z: ddpm(denoise, x, sigma, z, sn_covariance(       # E[eps^2 | x], exactly
        lambda x, sigma: ((x - denoise(x, sigma)) ** 2 + covariance(x, sigma, None)) / sigma ** 2)),
        root, N), truth, atol=1e-9)
    # E|eps_hat|^2/d, eps_hat = sigma/(variance + sigma^2) x with x ~ N(0, variance + sigma^2)
    table = analytic_covariance(sigma, (sigma[:, None] ** 2 / (variance + sigma[:, None] ** 2)
                                        ).mean(1))
    ours = law(lambda x, z: ddpm(denoise, x, sigma, z, table), root, N)
    if variance[0] == variance[1]:
        close(ours, truth)
    else:                                                # one number: right in the sum, N = 1
        assert (ours - truth).abs().max() > 1e-3
        if N == 1:
            close(ours.trace(), truth.trace())


def test_beta_is_exact_for_standard_normal_data_and_beta_tilde_for_a_single_point():
    one = torch.ones(2, dtype=torch.float64)
    for variance, data in (("beta", one), ("beta_tilde", 0 * one)):
        for N in (1, 3, 10):
            sigma = grid(N)
            ours = law(lambda x, z: ddpm(diagonal(data)[0], x, sigma, z, variance),
                       (data + sigma[0] ** 2).sqrt().diag(), N)
            close(ours, (data + sigma[-1] ** 2).diag())


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_ddpm_tends_to_the_full_covariance_as_n_grows(variance):
    def error(N):
        sigma = grid(N)
        ours = law(lambda x, z: ddpm(lambda x, s: gaussian_denoise(x + MU, s) - MU, x, sigma, z,
                                     variance), Q * (VAR + sigma[0] ** 2).sqrt(), N)
        return (ours - C - sigma[-1] ** 2 * torch.eye(2, dtype=torch.float64)).abs().max()

    coarse, fine = error(50), error(200)
    assert fine < 0.1 and 3.5 < coarse / fine < 4.6                  # first order


def test_analytic_covariance_of_moments_estimated_on_samples():
    # Gamma = E|eps_hat|^2/d from 4000 samples of N(0, .25 I): within its standard error.
    n, v = 4000, torch.tensor(0.25, dtype=torch.float64)
    denoise, exact = diagonal(v)
    x0, moments = v.sqrt() * randn(n, 2), []
    for i, sigma in enumerate(LADDER):
        x = x0 + sigma * randn(n, 2, seed=i + 1)
        moments.append((((x - denoise(x, sigma)) / sigma) ** 2).mean())
    covariance = analytic_covariance(LADDER.tolist(), moments)
    for sigma in LADDER:                   # sigma^2 (1 - m), m = sigma^2/(v + sigma^2) chi^2/(2n)
        standard = sigma ** 4 / (v + sigma ** 2) * (1 / n) ** 0.5
        truth = exact(None, sigma, None)
        assert (covariance(x, sigma, x) - truth.clamp(max=1)).abs() < 3.5 * standard
        assert covariance(x, sigma, x).shape == ()


def test_covariances_are_clipped_to_0_and_to_the_bound():
    x, D, sigma = randn(3, 2), 0 * randn(3, 2), torch.tensor(2.0, dtype=torch.float64)
    h = torch.tensor([[-0.5, 0.1], [0.2, 0.3], [1e-3, 4]], dtype=torch.float64)
    close(npr_covariance(lambda x, sigma: h)(x, sigma, D), torch.tensor(
        [[0, 0.4], [0.8, 1], [0.004, 1]], dtype=torch.float64))
    close(npr_covariance(lambda x, sigma: h, bound=9.0)(x, sigma, D), torch.tensor(
        [[0, 0.4], [0.8, 1.2], [0.004, 9]], dtype=torch.float64))
    x = torch.tensor([[0.3, 0.5], [1, 1.0], [0.1, 0]], dtype=torch.float64)        # D = 0
    close(sn_covariance(lambda x, sigma: h)(x, sigma, D), torch.tensor(            # 4 h - x^2
        [[0, 0.15], [0, 0.2], [0, 1]], dtype=torch.float64))
    close(sn_covariance(lambda x, sigma: h, 0.1)(x, sigma, D).max(), 0.1 + 0 * sigma)
    for moment, expected in ((1.2, 0), (0.9, 0.4), (0.3, 1)):
        value = analytic_covariance([1.0, 2.0], [0.5, moment])(x, sigma, D)
        close(value, expected + 0 * sigma)
    close(analytic_covariance([1.0, 2.0], [0.5, 0.3], bound=5.0)(x, sigma, D), 2.8 + 0 * sigma)


def test_analytic_covariance_looks_its_table_up_in_log_sigma():
    covariance = analytic_covariance([8.0, 0.5, 2.0], [1 - 0.6 / 64, 0.6, 1 - 0.4 / 4])
    for sigma, value in ((0.5, 0.1), (2, 0.4), (8, 0.6), (1, 0.25), (4, 0.5),  # Cov at, and between
                         (99, 0.6), (0.4, 0.1), (0.01, 1e-4)):                 # and <= sigma^2
        close(covariance(None, torch.tensor(sigma, dtype=torch.float64), None),
              torch.tensor(value, dtype=torch.float64))
    for levels, moments in (([1.0], [0.5]), ([1.0, 2.0], [0.5]), ([[1.0, 2.0]], [[0.5, 0.5]])):
        with pytest.raises(ValueError, match="two rows of the same length"):
            analytic_covariance(levels, moments)


@pytest.mark.parametrize("y", [1, 2])
@pytest.mark.parametrize("ends", ["at 0", "above 0"])
def test_the_cap_holds_the_noise_of_the_last_noisy_step_to_y_grey_levels(y, ends):
    # D = 0 from x = 0 under noise 1: each state is the standard deviation of the noise just added.
    sigma = torch.cat([LADDER, 0 * LADDER[:1]]) if ends == "at 0" else LADDER
    one, large = torch.ones(1, 2, dtype=torch.float64), torch.tensor([1.0, 1e-9]).double()

    def added(cap, covariance, last):
        states = []
        ddpm(lambda x, s: -x * (s_next(s) / s) ** 2 / (1 - (s_next(s) / s) ** 2), 0 * one, sigma,
             lambda: one, covariance, cap, lambda i, x: states.append(x))
        return torch.cat(states)[:len(LADDER) - 1]                   # D + (b/a)^2 (x - D) = 0

    def s_next(s):
        return sigma[int((sigma == s).nonzero()) + 1]

    for covariance in ("beta", lambda x, s, D: large):
        free, capped = (added(cap, covariance, ends) for cap in (None, y))
        assert torch.equal(capped[:-1], free[:-1])                   # no other step
        # E|noise| = sqrt(2/pi) sd; a grey level is 2/255, in the scaled frame
        grey = capped[-1] / (1 + LADDER[-1] ** 2).sqrt() * (2 / math.pi) ** 0.5 / (2 / 255)
        assert free[-1, 0] > capped[-1, 0] and grey[0] == pytest.approx(y, rel=1e-12)
    gentle = torch.tensor([0.101, 0.1], dtype=torch.float64)         # sd .014: 1.4 grey levels
    free, held = (ddpm(lambda x, s: 0 * x, 0 * one, gentle, lambda: one, cap=c) for c in (None, y))
    assert torch.equal(free, held) == (y == 2)


def test_an_unknown_variance_is_refused_by_name():
    with pytest.raises(ValueError, match="beta_tilde, beta or a covariance, not 'sn'"):
        ddpm(gaussian_denoise, randn(2, 2), LADDER, refuse, "sn")


# ---- Predictor-corrector -------------------------------------------------------------------------

def test_one_step_of_pc_is_the_published_ve_algorithm():
    # SDE Algorithms 2 and 4; the corrector first, as published code has it.
    x, z = 9 * randn(3, 2), [randn(3, 2, seed=1), randn(3, 2, seed=2)]
    t = torch.tensor([81.0, 16.0, 0.0], dtype=torch.float64)                   # sigma 9 -> 4 -> 0
    for snr in (0.16, 0.5):
        y = x
        for a, b in torch.tensor([[9, 4], [4, 0]], dtype=torch.float64):
            g = (mixture_denoise(y, a) - y) / a ** 2
            e = 2 * (snr * z[0].norm(dim=1, keepdim=True) / g.norm(dim=1, keepdim=True)) ** 2
            y = y + e * g + (2 * e).sqrt() * z[0]
            g = (mixture_denoise(y, a) - y) / a ** 2
            y = y + (a ** 2 - b ** 2) * g + (a ** 2 - b ** 2) ** 0.5 * z[1] * (b > 0)
        draw = iter([*z, z[0]])
        ours = predictor_corrector(mixture_denoise, x, t, ROWS["ve"], lambda: next(draw), snr)
        close(ours, y, atol=1e-10)
        assert next(draw, None) is None                              # noise: 2N - 1 times


def test_one_step_of_pc_is_the_published_vp_algorithm_in_the_scaled_frame():
    # SDE Algorithms 3 and 5 in beta and alpha = 1 - beta; score = -eps_hat/sqrt(1 - alpha_bar).
    row, x, z = ROWS["vp"], randn(3, 2), [randn(3, 2, seed=1), randn(3, 2, seed=2)]
    t = row.time_steps(5)[1:4]
    y = x
    for a, b in zip(t[:-1], t[1:]):
        alpha_bar, alpha = row.s(a) ** 2, row.s(a) ** 2 / row.s(b) ** 2
        beta = 1 - alpha

        def score(y):
            eps_hat = (y / row.s(a) - mixture_denoise(y / row.s(a), row.sigma(a))) / row.sigma(a)
            return -eps_hat / (1 - alpha_bar).sqrt()

        g = score(y)
        e = 2 * alpha * (0.16 * z[0].norm(dim=1) / g.norm(dim=1)).unsqueeze(1) ** 2
        y = y + e * g + (2 * e).sqrt() * z[0]
        y = (2 - (1 - beta).sqrt()) * y + beta * score(y) + beta.sqrt() * z[1]
    draw = iter(z * 2)
    close(predictor_corrector(mixture_denoise, x, t, row, lambda: next(draw)), y, atol=1e-11)


def test_pc_without_norms_steps_by_the_norms_of_noise_alone():
    # D = 0: the score is -x/(s sigma)^2; for x = s sigma z both rules give the same step.
    for row in (ROWS["ve"], ROWS["vp"]):
        t, z = row.time_steps(9)[2:4], randn(4, 2)
        x = row.s(t[0]) * row.sigma(t[0]) * z
        a, b = (predictor_corrector(lambda x, _: 0 * x, x, t, row, lambda: z, 0.1, norms)
                for norms in (True, False))
        close(a, b, rtol=1e-12)


def test_the_corrector_s_step_is_each_sample_s_own():
    score, z = randn(3, 4, 5), randn(3, 4, 5, seed=1)
    step = snr_step(score, z, 0.16, 0.9)
    assert step.shape == (3, 1, 1)
    for i in range(3):
        expected = 2 * 0.9 * (0.16 * (z[i] ** 2).sum().sqrt() / (score[i] ** 2).sum().sqrt()) ** 2
        close(step[i].squeeze(), expected)
        close(snr_step(score[i:i + 1], z[i:i + 1], 0.16, 0.9), step[i:i + 1])


@pytest.mark.parametrize("step", [0.1, 0.01])
def test_langevin_alone_keeps_a_gaussian_law_as_its_step_falls(step):
    # Linear score: its stationary covariance is C (I - step C^-1/2)^-1, so C as step -> 0.
    step, eye = torch.tensor(step, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    inverse = torch.linalg.inv(C)
    stays = C @ torch.linalg.inv(eye - step / 2 * inverse)
    for before, after in ((stays, stays), (C, C + step ** 2 * inverse)):
        ours = law(lambda x, noise: langevin(x, -x @ inverse, noise(), step),
                   torch.linalg.cholesky(before), 1)
        close(ours, after)
    assert (stays - C).norm() / C.norm() < step * 1.1


def test_langevin_alone_keeps_the_law_of_a_mixture_in_samples():
    n, sigma = 8000, torch.tensor(0.5, dtype=torch.float64)
    x0, which = mixture_samples(n)
    x = x0 + sigma * randn(n, 2, seed=5)
    g, step = torch.Generator().manual_seed(3), torch.tensor(0.004, dtype=torch.float64)
    for _ in range(150):                                             # 150 step = .6 = 2 sigma^2
        score = (mixture_denoise(x, sigma) - x) / sigma ** 2
        x = langevin(x, score, torch.randn(n, 2, generator=g, dtype=torch.float64), step)
    assert_mixture(x, V + sigma ** 2)
    assert ((x - x0).norm(dim=1) > 0.5).double().mean() > 0.5        # it did move


def mixture_samples(n):
    g = torch.Generator().manual_seed(7)
    which = (torch.rand(n, generator=g) > 0.3).long()
    return MEANS[which] + V ** 0.5 * torch.randn(n, 2, generator=g, dtype=torch.float64), which


def assert_mixture(x, variance, bias=0.0):
    """Mean and full covariance of x are the mixture's: within 3.5 standard errors, and bias."""
    mean, gap, n = 0.3 * MEANS[0] + 0.7 * MEANS[1], MEANS[0] - MEANS[1], len(x)
    truth = 0.21 * torch.outer(gap, gap) + variance * torch.eye(2, dtype=torch.float64)
    y = x - mean
    assert (y.mean(0).abs() < 3.5 * y.std(0) / n ** 0.5 + bias).all()
    products = y.unsqueeze(2) * y.unsqueeze(1)                       # (n, 2, 2)
    assert ((products.mean(0) - truth).abs() < 3.5 * products.std(0) / n ** 0.5 + bias).all()


@pytest.mark.parametrize("d, tolerance", [(16, 0.04), (1024, 0.015)])
def test_own_norms_leave_langevin_a_variance_of_1_plus_2_over_d_squared(d, tolerance):
    # What snr_step's docstring says: steps ~ |z|^2/|score(x)|^2 depend on x, which costs
    # (1 + 2/d) twice, once for |z|^2 and once for |score|^2.
    n, g = 40000 // d, torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    for _ in range(250):                                             # 2 snr^2 250 = 5 times over
        z = torch.randn(n, d, generator=g, dtype=torch.float64)
        x = langevin(x, -x, z, snr_step(-x, z, 0.1, 1.0))
    expected = (1 + 2 / d) ** 2 / (1 - 0.1 ** 2)                     # and snr^2, as any step has
    assert abs((x ** 2).mean() / expected - 1) < tolerance           # 3.5 (2/40000)^(1/2) = .025


@every_row
def test_pc_leaves_the_gaussian_marginal_right_as_n_grows(name):
    row = ROWS[name]

    def error(N, snr):
        t = row.time_steps(N)[:-1]
        top, end = row.s(t[0]), row.s(t[-1])
        ours = law(lambda x, z: predictor_corrector(
            lambda x, s: gaussian_denoise(x + MU, s) - MU, x, t, row, z, snr, norms=False),
            top * Q * (VAR + row.sigma(t[0]) ** 2).sqrt(), 2 * N - 2)
        truth = C + row.sigma(t[-1]) ** 2 * torch.eye(2, dtype=torch.float64)
        return (ours / end ** 2 - truth).abs().max() / truth.max()

    few, many = error(75, 0.01), error(300, 0.01)
    assert many < 0.1 and 2.5 < few / many < 6                       # the predictor: first order
    assert error(300, 0.16) < 0.1


def test_pc_leaves_image_sized_gaussians_right_in_samples_with_own_norms():
    n, d, N = 30, 1024, 150
    variance = torch.tensor([0.25, 1.0], dtype=torch.float64).repeat(d // 2)
    row, g = ROWS["vp"], torch.Generator().manual_seed(0)
    t = row.time_steps(N)[:-1]

    def noise():
        return torch.randn(n, d, generator=g, dtype=torch.float64)

    x = row.s(t[0]) * (variance + row.sigma(t[0]) ** 2).sqrt() * noise()
    x = predictor_corrector(lambda x, s: x * variance / (variance + s ** 2), x, t, row, noise)
    z = x / row.s(t[-1]) / (variance + row.sigma(t[-1]) ** 2).sqrt()
    assert abs(z.mean()) < 3.5 / (n * d) ** 0.5
    for part in (z[:, ::2], z[:, 1::2]):
        assert abs((part ** 2).mean() - 1) < 0.05 + 3.5 * (4 / (n * d)) ** 0.5


@pytest.mark.parametrize("sampler", [
    lambda *a: ddpm(*a, "beta"), lambda *a: ddpm(*a, "beta_tilde"), lambda *a: ddim(*a, 0.5),
    lambda d, x, t, z: predictor_corrector(d, x, t, ROWS["edm"], z, 0.05, norms=False)],
    ids=["beta", "beta_tilde", "eta", "pc"])
def test_stochastic_samplers_leave_the_mixture_right_in_samples(sampler):
    n, sigma, g = 4000, EDM(sigma_max=20.0).time_steps(150), torch.Generator().manual_seed(2)

    def noise():
        return torch.randn(n, 2, generator=g, dtype=torch.float64)

    x = sampler(mixture_denoise, mixture_samples(n)[0] + sigma[0] * noise(), sigma, noise)
    assert_mixture(x, V, bias=0.01)


# ---- The contract --------------------------------------------------------------------------------

def draws(x):
    return seeded_noise(range(len(x)), x.shape[1:], x.device, x.dtype)


def in_sigma(sampler, **settings):
    """A sampler of the frame sigma(t) = t, s(t) = 1 in the signature of the others."""
    def run(denoise, x, t, schedule, callback=None, noise=None):
        return sampler(denoise, x / schedule.s(t[0]), schedule.sigma(t), noise or draws(x),
                       callback=callback, **settings)
    return run


def pc(denoise, x, t, schedule, callback=None, noise=None):
    return predictor_corrector(denoise, x, t, schedule, noise or draws(x), callback=callback)


def adaptive(denoise, x, t, schedule, callback=None):
    return rk45(denoise, x, t, schedule, 1e-4, 1e-4, callback=callback)[0]


half = npr_covariance(lambda x, sigma: 0.5 / (1 + sigma ** 2) + 0 * x)
STOCHASTIC = {"stochastic": in_sigma(edm_stochastic, S_churn=99),
              "ddim": in_sigma(ddim, eta=0.5, covariance=half), "ddpm": in_sigma(ddpm, cap=2),
              "pc": pc}
FIXED = {"euler": euler, "heun": heun, **STOCHASTIC}
SAMPLERS = {**FIXED, "rk45": adaptive}
NFE = {"euler": lambda N: N, "heun": lambda N: 2 * N - 1, "stochastic": lambda N: 2 * N - 1,
       "ddim": lambda N: N, "ddpm": lambda N: N, "pc": lambda N: 2 * N}


def given(sampler, noise):
    return {"noise": noise} if sampler in STOCHASTIC.values() else {}


every_fixed = pytest.mark.parametrize("sampler", FIXED.values(), ids=FIXED)
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)


@every_row
@pytest.mark.parametrize("kind", NFE)
@pytest.mark.parametrize("N", [1, 2, 9])
def test_nfe_is_what_each_docstring_says(name, kind, N):
    denoise, calls = counted(gaussian_denoise)
    t = ROWS[name].time_steps(N)
    FIXED[kind](denoise, start(ROWS[name], t[0], randn(2, 2)), t, ROWS[name])
    assert len(calls) == NFE[kind](N)
    assert min(calls) > 0                            # D is never asked at sigma = 0
    words = {"stochastic": edm_stochastic, "pc": predictor_corrector, "ddim": ddim, "ddpm": ddpm}
    says = {1: "NFE = N.", 2: "NFE = 2N."}.get(NFE[kind](1000) / 1000, "NFE = 2N - 1.")
    assert says in words.get(kind, FIXED[kind]).__doc__


@every_row
@every_sampler
@pytest.mark.parametrize("N", [1, 18])
def test_float32_and_float64_states_keep_their_type_under_float64_times(name, sampler, N):
    t = ROWS[name].time_steps(N)
    x = start(ROWS[name], t[0], randn(4, 2))

    def denoise(x, sigma):
        assert sigma.device.type == "cpu"            # 0-d: a plain number to x
        assert sigma.shape == (() if sampler is not adaptive else (len(x), 1))
        D = x / (1 + sigma ** 2)
        assert D.dtype == x.dtype == expected        # the state is what it was at every call
        return D

    expected = torch.float64
    double = sampler(denoise, x, t, ROWS[name])
    assert double.dtype == torch.float64
    expected = torch.float32
    single = sampler(denoise, x.float(), t, ROWS[name])
    assert single.dtype == torch.float32 and single.isfinite().all()
    if sampler not in STOCHASTIC.values():           # there the draws depend on the type
        close(single.double(), double, rtol=1e-4, atol=1e-3 if sampler is adaptive else 1e-4)


@every_row
@every_sampler
def test_images_and_points_are_the_same_to_a_sampler(name, sampler):
    row = ROWS[name]
    t = row.time_steps(6)
    x = start(row, t[0], randn(3, 2, 4, 5))

    def denoise(x, sigma):
        return x.flatten(1).roll(1, 1).view_as(x) / (1 + sigma.view(-1, *[1] * (x.ndim - 1)) ** 2)

    y = sampler(denoise, x, t, row)
    assert y.shape == x.shape
    close(y.flatten(1), sampler(denoise, x.flatten(1), t, row), rtol=1e-9)


@every_sampler
def test_the_start_is_left_as_it_was_and_no_graph_is_kept(sampler):
    gain = torch.ones((), dtype=torch.float64, requires_grad=True)
    x = 80 * randn(3, 2)
    before = x.clone()
    y = sampler(lambda x, sigma: gain * gaussian_denoise(x, sigma), x, EDM().time_steps(5), EDM())
    assert torch.equal(x, before) and not y.requires_grad


@every_row
@every_sampler
def test_one_step_of_any_sampler_works_in_every_row(name, sampler):
    row = ROWS[name]
    t = row.time_steps(1)
    states, x = [], start(row, t[0], randn(4, 2))
    y = sampler(mixture_denoise, x, t, row, lambda i, x: states.append(x))
    assert y.isfinite().all() and y.abs().max() < 1e3
    assert len(states) == 1 and torch.equal(states[0], y)
    if sampler in (SAMPLERS["ddim"], SAMPLERS["ddpm"]):
        close(y, mixture_denoise(x / row.s(t[0]), row.sigma(t[0])))


@pytest.mark.parametrize("name", ["edm", "vp"])
@every_fixed
def test_callbacks_see_the_state_after_every_step(name, sampler):
    row, N, seen = ROWS[name], 9, []
    t = row.time_steps(N)
    x = start(row, t[0], randn(4, 2))
    y = sampler(mixture_denoise, x, t, row, lambda i, x: seen.append((i, x)))
    assert [i for i, _ in seen] == list(range(N))
    assert torch.equal(seen[-1][1], y)
    for i, state in seen[:-2]:                       # the last noisy step is the one ddpm caps
        close(state, sampler(mixture_denoise, x, t[:i + 2], row) if sampler is not FIXED["ddpm"]
              else in_sigma(ddpm)(mixture_denoise, x, t[:i + 2], row))


def test_callbacks_of_rk45_see_all_samples_each_at_its_own_time():
    seen, x, t = [], 80 * randn(4, 2), EDM().time_steps(3)
    y = adaptive(gaussian_denoise, x, t, EDM(), lambda i, x: seen.append((i, x)))
    assert [i for i, _ in seen] == list(range(len(seen))) and torch.equal(seen[-1][1], y)
    path = torch.stack([x] + [x for _, x in seen])                             # (steps, 4, 2)
    # every state lies on the exact path of its sample: which eigenvalue tells at what sigma
    z, z_0 = (path - MU) @ Q, (x - MU) @ Q
    share = (z / z_0) ** 2 * (VAR + t[0] ** 2)                                 # VAR + sigma^2
    sigma = (share - VAR).clamp(min=0).sqrt()
    close(sigma[:-1, :, 0], sigma[:-1, :, 1], rtol=0.02, atol=0.05)
    assert (sigma[1:-1].diff(dim=0) <= 1e-9).all()


@every_row
@every_fixed
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_stops_with_its_step_and_sigma(name, sampler, bad):
    row, N, seen = ROWS[name], 7, []
    t = row.time_steps(N)
    sigma = row.sigma(t)

    def denoise(x, s):
        return torch.where((torch.arange(4) == 2).unsqueeze(1) & (s < 1.01 * sigma[3]), bad,
                           gaussian_denoise(x, s))

    with pytest.raises(FloatingPointError) as error:
        sampler(denoise, start(row, t[0], randn(4, 2)), t, row,
                lambda i, x: seen.append(bool(x.isfinite().all())))
    i = seen.index(False)
    assert i in (2, 3) and len(seen) == N            # noticed at the end: nothing waits before
    assert str(error.value) == (f"x is not finite after step {i + 1} of {N} "
                                f"(from sigma = {float(sigma[i]):.4g})")


@every_sampler
def test_a_single_bad_step_to_0_is_not_finite_either(sampler):
    with pytest.raises(FloatingPointError, match=r"after step 1 of 1 \(from sigma = 80\)"):
        sampler(lambda x, sigma: x / 0, 80 * randn(4, 2), EDM().time_steps(1), EDM())


@every_row
@every_fixed
def test_no_fixed_step_sampler_waits_for_its_device_before_the_end(name, sampler):
    # A meta tensor has no values: whoever asks for one raises.  All N steps must come before.
    row, N, seen = ROWS[name], 5, []
    x = torch.empty(4, 2, device="meta")
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        sampler(lambda x, sigma: x / (1 + sigma ** 2), x, row.time_steps(N), row,
                lambda i, x: seen.append(x.dtype), **given(sampler, lambda: torch.empty_like(x)))
    assert seen == [torch.float32] * N


@every_sampler
def test_sample_i_is_the_same_whichever_samples_share_its_batch(sampler):
    def sample(seeds):
        x = 80 * seeded_noise(seeds, (2,), dtype=torch.float64)()
        noise = seeded_noise([seed + 1000 for seed in seeds], (2,), dtype=torch.float64)
        return sampler(mixture_denoise, x, EDM().time_steps(12), EDM(), **given(sampler, noise))

    together = sample([7, 8, 9])
    close(sample([9, 7]), together[[2, 0]], atol=1e-10)
    close(sample([8]), together[1:2], atol=1e-10)
    assert (together[0] - together[1]).abs().max() > 1e-3
