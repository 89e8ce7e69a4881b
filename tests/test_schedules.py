"""Schedules: every identity of EDM's Table 1, column by column, and the ladders by closed forms."""

import math

import pytest
import torch
from torch.autograd.functional import jacobian

from oracles import close, tensor
from schedules import DDPM, EDM, IDDPM, SCHEDULES, VE, VP

COLUMNS = {name: column() for name, column in SCHEDULES.items()}
LADDERS = {name: column for name, column in COLUMNS.items() if hasattr(column, "levels")}
every_column = pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS)
every_ladder = pytest.mark.parametrize("column", LADDERS.values(), ids=LADDERS)
U = (torch.arange(3000, dtype=torch.float64) + 0.5) / 3000         # a stratified uniform


# ---- Every function ------------------------------------------------------------------------------

@every_column
def test_sigma_inv_inverts_sigma_and_dsigma_and_ds_are_the_derivatives(column):
    sigma = torch.cat([column.training_sigma(U[::60]), column.sigma(column.time_steps(20)[:-1])])
    t = column.sigma_inv(sigma)
    close(column.sigma(t), sigma)
    for f, df in (column.sigma, column.dsigma), (column.s, column.ds):
        close(df(t), jacobian(f, t).diagonal())                    # 0 where f is constant


def test_sigma_and_s_are_the_tables_formulas():
    assert dict(vp=VP, ve=VE, iddpm=IDDPM, edm=EDM, ddpm=DDPM).items() <= SCHEDULES.items()
    t = torch.logspace(-5, 0, 50, dtype=torch.float64)
    for column in (EDM(), IDDPM(), DDPM()):
        assert torch.equal(column.sigma(t), t) and (column.s(t) == 1).all()
    close(VE().sigma(t) ** 2, t)
    assert (VE().s(t) == 1).all()
    beta = [19.9 * v ** 2 / 2 + 0.1 * v for v in t.tolist()]
    close(VP().sigma(t), [math.expm1(b) ** 0.5 for b in beta])
    close(VP().s(t), [math.exp(-b / 2) for b in beta])


def test_vp_in_float32_is_exact_near_0_where_the_naive_formula_loses_percents():
    t = torch.logspace(-5, -3, 200)
    exact, naive = VP().sigma(t.double()), ((19.9 * t ** 2 / 2 + 0.1 * t).exp() - 1).sqrt()
    assert (naive / exact - 1).abs().max() > 0.01
    close(VP().sigma(t).double(), exact, rtol=1e-5)
    close(VP().sigma_inv(exact.float()).double(), t.double(), rtol=1e-5)
    close(VP().dsigma(t).double(), VP().dsigma(t.double()), rtol=1e-5)


@every_column
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_function_keeps_shape_and_dtype_and_each_sample_has_its_own_sigma(column, dtype):
    for u in (tensor(0.3)[0].to(dtype), tensor(0.1, 0.5, 0.9).to(dtype).view(3, 1, 1, 1)):
        def results(u):
            own = [getattr(column, f)(u) for f in ("sigma", "sigma_inv", "dsigma", "s", "ds",
                                                   "weight", "training_sigma")]
            return own + list(column.precondition(column.training_sigma(u)))

        for together, *alone in zip(results(u), *(results(v) for v in u.flatten())):
            assert together.shape == u.shape and together.dtype == dtype
            assert together.isfinite().all()
            close(together.flatten(), torch.stack(alone), rtol=1e-6)


# ---- Noise levels of sampling and training -------------------------------------------------------

@every_column
def test_time_steps_are_n_plus_1_strictly_decreasing_to_0_between_the_same_ends(column):
    first, last, _ = column.time_steps(2)
    for N in (1, 2, 57, 256):
        t = column.time_steps(N)
        assert t.shape == (N + 1,) and t.dtype == torch.float64 and t.device.type == "cpu"
        assert (t.diff() < 0).all() and t[-1] == 0 and t[0] == first
        assert N == 1 or abs(t[-2] / last - 1) < 1e-9


def test_vp_steps_are_even_in_t_ve_steps_in_log_t_edm_steps_in_t_to_the_1_over_rho():
    """And run from the table's first level to its last."""
    steep = EDM(sigma_min=0.01, sigma_max=10, rho=3)
    for t, first, last in (
            (VP().time_steps(30), 1, 1e-3),
            (VE().time_steps(30).log(), math.log(100 ** 2), math.log(0.02 ** 2)),
            (EDM().time_steps(30) ** (1 / 7), 80 ** (1 / 7), 0.002 ** (1 / 7)),
            (steep.time_steps(30) ** (1 / 3), 10 ** (1 / 3), 0.01 ** (1 / 3))):
        close(t[:-1], torch.linspace(first, last, 30, dtype=torch.float64))


@every_ladder
def test_steps_on_a_ladder_are_its_levels_nearest_to_even_ones_and_no_more_than_there_are(column):
    most = len(column.levels) - getattr(column, "j0", 0)
    levels = column.levels[:most].flip(0)
    assert torch.equal(column.time_steps(most)[:-1], levels)
    for N in (2, 50, 333):
        t = column.time_steps(N)[:-1]
        index = (levels - t.unsqueeze(1)).abs().argmin(1)
        assert torch.equal(levels[index], t)
        even = torch.linspace(0, most - 1, N, dtype=torch.float64)
        assert (index - even).abs().max() <= 0.5 + 1e-9
    with pytest.raises(ValueError, match=rf"has {most} levels to step on, not {most + 1}$"):
        column.time_steps(most + 1)


def test_vp_trains_on_uniform_t_ve_on_log_uniform_and_edm_on_log_normal_sigma():
    close(VP().sigma_inv(VP().training_sigma(U)), 1e-5 + U * (1 - 1e-5))
    close(VE().training_sigma(U).log(), math.log(0.02) + U * math.log(100 / 0.02))
    for column, mean, std in (EDM(), -1.2, 1.2), (EDM(P_mean=1.0, P_std=0.5), 1.0, 0.5):
        z = (column.training_sigma(U).log() - mean) / std
        close((1 + torch.erf(z / 2 ** 0.5)) / 2, U)                # Phi(z) = u, at every quantile


# ---- The ladders ---------------------------------------------------------------------------------

def test_iddpm_ladder_is_the_cosine_schedule_where_the_clamp_is_idle():
    def alpha_bar(j):
        return math.sin(math.pi / 2 * j / (1000 * 1.008)) ** 2

    u = IDDPM().levels.flip(0)                                     # u_0 ... u_{M-1}
    assert u.shape == (1000,) and u.dtype == torch.float64
    # C1 acts on the step from j = 1 to 0 only, where alpha_bar_0 = 0: below it the recursion
    # telescopes to u_j^2 + 1 = alpha_bar_M / alpha_bar_j.
    assert all(alpha_bar(j - 1) / alpha_bar(j) > 0.001 for j in range(2, 1001))
    close(u[1:], [(alpha_bar(1000) / alpha_bar(j) - 1) ** 0.5 for j in range(1, 1000)])
    close(u[0] ** 2 + 1, (u[1] ** 2 + 1) / 0.001)
    assert round(u[0].item()) == 20291 and round(u[999].item(), 4) == 0.0064
    assert round(u[IDDPM().j0].item(), 1) == 80.2    # about EDM's sigma_max
    assert IDDPM(M=100, j0=0).levels.shape == (100,)


def test_ddpm_ladder_is_alpha_bar_of_linear_betas():
    product, ladder = 1.0, []                        # an independent walk in plain floats
    for t in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        ladder.append(product)
    levels = DDPM().levels
    assert levels.shape == (1000,) and levels.dtype == torch.float64
    close(levels, [((1 - a) / a) ** 0.5 for a in ladder])
    assert round(levels[0].item(), 4) == 0.01 and round(levels[-1].item()) == 157
    assert round(levels.mean().item(), 1) == 17.8    # Debias' weight, sigma, has this mean


@every_ladder
def test_a_ladder_trains_on_every_level_alike_and_u_0_and_1_are_its_ends(column):
    levels = column.levels.float()
    u = (torch.arange(3 * len(levels)) + 0.5) / (3 * len(levels))                 # float32
    assert torch.equal(column.training_sigma(u), levels.repeat_interleave(3))
    below_1 = 1 - torch.finfo(torch.float32).eps / 2
    sigma = column.training_sigma(torch.tensor([0, 1e-9, below_1, 1]))
    assert torch.equal(sigma, levels[[0, 0, -1, -1]])


@every_ladder
def test_c_noise_on_a_ladder_is_the_number_of_the_nearest_level(column):
    """iDDPM's is M - 1 - j, DDPM's is t."""
    assert (IDDPM.first, DDPM.first) == (0, 1)
    first, last = column.first, column.first + len(column.levels) - 1
    levels, numbers = column.levels, torch.arange(first, last + 1)

    def c_noise(sigma):
        return column.precondition(sigma.float())[3]

    assert torch.equal(c_noise(levels), numbers.float())
    assert torch.equal(c_noise(levels[:-1] + 0.4 * levels.diff()), numbers[:-1].float())
    assert torch.equal(c_noise(levels[:-1] + 0.6 * levels.diff()), numbers[1:].float())
    assert c_noise(levels[[0, -1]] * tensor(0.01, 100)).tolist() == [first, last]


# ---- Preconditioning -----------------------------------------------------------------------------

def parts(column):
    """sigma over the training range, then c_skip, c_out, c_in, c_noise and the weight there."""
    sigma = column.training_sigma(U[::30])
    return sigma, *column.precondition(sigma), column.weight(sigma)


def test_vp_ve_and_the_ladders_predict_the_noise_with_the_weight_1_over_sigma_squared():
    for column in (VP(), VE(), IDDPM(), DDPM()):
        sigma, c_skip, c_out, c_in, _, weight = parts(column)
        assert (c_skip == 1).all()                                 # D = x + c_out F
        close(c_out, sigma if column == VE() else -sigma)          # F = -noise in VE, else noise
        close(c_in, 1.0 if column == VE() else (1 + sigma ** 2) ** -0.5)
        close(weight * sigma ** 2, 1.0)
    sigma = parts(VP())[0]
    t, (*_, c_in, c_noise) = VP().sigma_inv(sigma), VP().precondition(sigma)
    close(c_in, VP().s(t))                                         # c_in x is VP's own s x
    close(c_noise, 999 * t)
    close(VE().precondition(sigma)[3], (sigma / 2).log())


@pytest.mark.parametrize("sigma_data", [0.5, 2.0])
def test_edm_c_in_and_c_out_normalise_variances_to_1_and_so_does_the_weight(sigma_data):
    """And c_skip minimises c_out."""
    sigma, c_skip, c_out, c_in, c_noise, weight = parts(EDM(sigma_data=sigma_data))
    close(c_in ** 2 * (sigma_data ** 2 + sigma ** 2), 1.0)
    # x0 - c_skip (x0 + sigma noise) is left for c_out F to supply: its variance, of which the
    # derivative in c_skip is 0
    close(c_out ** 2, (1 - c_skip) ** 2 * sigma_data ** 2 + c_skip ** 2 * sigma ** 2)
    close((1 - c_skip) * sigma_data ** 2, c_skip * sigma ** 2)
    close(weight * c_out ** 2, 1.0)
    close(c_noise, sigma.log() / 4)
