"""Samplers against the truth: Gaussian data and Gaussian mixtures have exact denoisers."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.functional import jacobian

from samplers import edm_stochastic, euler, heun, ode_slope, seeded_noise
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
    r = ((x - middle) @ gap / total + ODDS).sigmoid().unsqueeze(1)                # (B, 1)
    return (MEANS[1] + r * gap) * (sigma ** 2 / total) + x * (V / total)


def start(row, t, noise):
    return row.s(t) * row.sigma(t) * noise


def counted(denoise):
    """denoise, and the list of the sigmas that it is called with."""
    calls = []

    def wrapped(x, sigma):
        calls.append(float(sigma))
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


def test_a_stochastic_sample_does_not_depend_on_its_batch():
    def sample(seeds):
        x = 80 * seeded_noise(seeds, (2,), dtype=torch.float64)()
        noise = seeded_noise([seed + 1000 for seed in seeds], (2,), dtype=torch.float64)
        return edm_stochastic(mixture_denoise, x, EDM().time_steps(12), noise, S_churn=6)

    close(sample([7, 8, 9])[[2, 0]], sample([9, 7]))
    assert (sample([7]) - sample([8])).abs().max() > 1e-3


# ---- The contract --------------------------------------------------------------------------------

def stochastic(denoise, x, t, schedule):
    """edm_stochastic in the signature of the others, the schedule being sigma(t) = t."""
    noise = seeded_noise(range(len(x)), x.shape[1:], dtype=x.dtype)
    return edm_stochastic(denoise, x, schedule.sigma(t), noise, S_churn=10)


SOLVERS = {"euler": euler, "heun": heun, "stochastic": stochastic}
every_sampler = pytest.mark.parametrize("sampler", SOLVERS.values(), ids=SOLVERS)


@every_row
@every_sampler
@pytest.mark.parametrize("N", [1, 2, 9])
def test_nfe_is_n_for_euler_and_2n_minus_1_for_heun_and_algorithm_2(name, sampler, N):
    denoise, calls = counted(gaussian_denoise)
    t = ROWS[name].time_steps(N)
    sampler(denoise, start(ROWS[name], t[0], randn(2, 2)), t, ROWS[name])
    assert len(calls) == (N if sampler is euler else 2 * N - 1)
    assert min(calls) > 0                            # D is never asked at sigma = 0


@every_row
@every_sampler
@pytest.mark.parametrize("N", [1, 18])
def test_float32_and_float64_states_keep_their_type_under_float64_times(name, sampler, N):
    t = ROWS[name].time_steps(N)
    x = start(ROWS[name], t[0], randn(4, 2))

    def denoise(x, sigma):
        assert sigma.shape == () and sigma.device.type == "cpu"    # 0-d: a plain number to x
        D = x / (1 + sigma ** 2)
        assert D.dtype == x.dtype                    # the state is what it was at every call
        return D

    double = sampler(denoise, x, t, ROWS[name])
    assert double.dtype == torch.float64
    single = sampler(denoise, x.float(), t, ROWS[name])
    assert single.dtype == torch.float32 and single.isfinite().all()
    if sampler is not stochastic:                    # there the draws depend on the type
        close(single.double(), double, rtol=1e-4, atol=1e-4)


@every_row
@every_sampler
def test_images_and_points_are_the_same_to_a_sampler(name, sampler):
    row = ROWS[name]
    t = row.time_steps(6)
    x = start(row, t[0], randn(3, 2, 4, 5))

    def denoise(x, sigma):
        return x.flatten(1).roll(1, 1).view_as(x) / (1 + sigma ** 2)

    y = sampler(denoise, x, t, row)
    assert y.shape == x.shape
    close(y.flatten(1), sampler(denoise, x.flatten(1), t, row))


@every_sampler
def test_the_start_is_left_as_it_was_and_no_graph_is_kept(sampler):
    gain = torch.ones((), dtype=torch.float64, requires_grad=True)
    x = 80 * randn(3, 2)
    before = x.clone()
    y = sampler(lambda x, sigma: gain * gaussian_denoise(x, sigma), x, EDM().time_steps(5), EDM())
    assert torch.equal(x, before) and not y.requires_grad
