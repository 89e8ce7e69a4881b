"""Schedules: every identity of EDM's Table 1, row by row, and the ladders against closed forms."""

import math

import pytest
import torch
from torch.autograd.functional import jacobian

from schedules import DDPM, EDM, IDDPM, SCHEDULES, VE, VP

ROWS = {name: row() for name, row in SCHEDULES.items()}
DISCRETE = ["iddpm", "ddpm"]
STEPS = {"iddpm": 992, "ddpm": 1000}  # the most steps that a ladder allows: iDDPM starts at j0 = 8
every_row = pytest.mark.parametrize("name", ROWS)
discrete_row = pytest.mark.parametrize("name", DISCRETE)


def tensor(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def times(name):
    """Times over the row's whole range, training included, none of them 0."""
    low, high = {"vp": (1e-5, 1), "ve": (4e-4, 1e4)}.get(name, (1e-3, 2e4))
    return torch.logspace(math.log10(low), math.log10(high), 50, dtype=torch.float64)


def close(a, b, rtol=1e-10, atol=0.0):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype).expand_as(a),
                               rtol=rtol, atol=atol)


def test_the_table_has_its_rows():
    assert SCHEDULES == dict(vp=VP, ve=VE, iddpm=IDDPM, edm=EDM, ddpm=DDPM)


# ---- sigma(t), s(t) ------------------------------------------------------------------------------

@every_row
def test_sigma_inv_of_sigma_is_t(name):
    t = times(name)
    close(ROWS[name].sigma_inv(ROWS[name].sigma(t)), t)
    close(ROWS[name].sigma(ROWS[name].sigma_inv(t)), t)            # and both ways round


@pytest.mark.parametrize("name, sigma, s", [
    ("vp", lambda t: (math.exp(19.9 * t ** 2 / 2 + .1 * t) - 1) ** .5,
     lambda t: math.exp(19.9 * t ** 2 / 2 + .1 * t) ** -.5),
    ("ve", lambda t: t ** .5, lambda t: 1.0),
    ("iddpm", lambda t: t, lambda t: 1.0),
    ("edm", lambda t: t, lambda t: 1.0),
    ("ddpm", lambda t: t, lambda t: 1.0)])
def test_sigma_and_s_are_the_tables_formulas(name, sigma, s):
    t = times(name)
    close(ROWS[name].sigma(t), [sigma(v) for v in t.tolist()], rtol=1e-9)   # exp - 1 loses digits
    close(ROWS[name].s(t), [s(v) for v in t.tolist()])


@every_row
@pytest.mark.parametrize("f, df", [("sigma", "dsigma"), ("s", "ds")])
def test_dsigma_and_ds_are_the_derivatives(name, f, df):
    t = times(name)
    autograd = jacobian(getattr(ROWS[name], f), t).diagonal()      # 0 where f is constant
    close(getattr(ROWS[name], df)(t), autograd)


def test_vp_preserves_variance():
    t = times("vp")
    sigma, s = ROWS["vp"].sigma(t), ROWS["vp"].s(t)
    close(s ** 2 * (1 + sigma ** 2), 1.0)                          # unit-variance data stays so
    close(s ** 2, 1 / (1 + sigma ** 2))                            # alpha_bar = s^2


def test_vp_in_float32_is_exact_near_0_where_the_naive_formula_loses_percents():
    t = torch.logspace(-5, -3, 200)
    exact = ROWS["vp"].sigma(t.double())

    def error(sigma):
        return (sigma.double() / exact - 1).abs().max().item()

    naive = ((19.9 * t ** 2 / 2 + .1 * t).exp() - 1).sqrt()
    assert error(naive) > 0.01
    assert error(ROWS["vp"].sigma(t)) < 1e-5
    inverse = ROWS["vp"].sigma_inv(exact.float())
    assert (inverse.double() / t.double() - 1).abs().max() < 1e-5
    slope = ROWS["vp"].dsigma(t).double() / ROWS["vp"].dsigma(t.double()) - 1
    assert slope.abs().max() < 1e-5


# ---- Time steps ----------------------------------------------------------------------------------

@every_row
@pytest.mark.parametrize("N", [1, 2, 3, 10, 18, 57, 256, 991])
def test_time_steps_are_n_plus_1_strictly_decreasing_to_0(name, N):
    t = ROWS[name].time_steps(N)
    assert t.shape == (N + 1,) and t.dtype == torch.float64 and t.device.type == "cpu"
    assert (t.diff() < 0).all() and t[-1] == 0
    assert t.isfinite().all()


@pytest.mark.parametrize("name, first, last", [
    ("vp", 1.0, 1e-3), ("ve", 100.0 ** 2, .02 ** 2), ("edm", 80.0, .002),
    ("iddpm", ROWS["iddpm"].levels[8].item(), ROWS["iddpm"].levels[999].item()),
    ("ddpm", ROWS["ddpm"].levels[999].item(), ROWS["ddpm"].levels[0].item())])
def test_time_steps_run_from_the_tables_first_level_to_its_last(name, first, last):
    close(ROWS[name].time_steps(1), [first, 0])                    # one step starts there too
    for N in (2, 7, 100):
        close(ROWS[name].time_steps(N)[[0, -2]], [first, last])


def test_vp_steps_are_even_in_t_ve_steps_in_log_t_edm_steps_in_t_to_the_1_over_rho():
    for name, f in ("vp", lambda t: t), ("ve", torch.log), ("edm", lambda t: t ** (1 / 7)):
        d = f(ROWS[name].time_steps(30)[:-1]).diff()
        close(d, d[0].item(), rtol=1e-9)


@discrete_row
@pytest.mark.parametrize("N", [2, 3, 50, 333, 700])
def test_respacing_picks_levels_of_the_ladder(name, N):
    levels = ROWS[name].levels
    t = ROWS[name].time_steps(N)[:-1]
    index = (levels - t.unsqueeze(1)).abs().argmin(1)
    assert torch.equal(levels[index], t)
    ends = (8, 999) if name == "iddpm" else (999, 0)
    even = torch.linspace(*ends, N, dtype=torch.float64)           # each is the nearest level to
    assert (index - even).abs().max() <= 0.5 + 1e-9                # N places evenly spaced


@discrete_row
def test_as_many_steps_as_levels_walk_the_whole_ladder(name):
    t = ROWS[name].time_steps(STEPS[name])[:-1]
    levels = ROWS[name].levels
    assert torch.equal(t, levels[8:] if name == "iddpm" else levels.flip(0))


@discrete_row
def test_more_steps_than_levels_is_an_error_in_one_sentence(name):
    N = STEPS[name] + 1
    with pytest.raises(ValueError, match=rf"DDPM has {N - 1} levels to step on, not {N}$"):
        ROWS[name].time_steps(N)


# ---- The ladders ---------------------------------------------------------------------------------

def alpha_bar(j, M=1000, C2=0.008):
    return math.sin(math.pi / 2 * j / (M * (C2 + 1))) ** 2


def test_iddpm_ladder_is_the_cosine_schedule_where_the_clamp_is_idle():
    u = ROWS["iddpm"].levels
    assert u.shape == (1000,) and u.dtype == torch.float64 and (u.diff() < 0).all()
    # C1 acts on the step from j = 1 to 0 only, where alpha_bar_0 = 0: below it the recursion
    # telescopes to u_j^2 + 1 = alpha_bar_M / alpha_bar_j.
    assert all(alpha_bar(j - 1) / alpha_bar(j) > 0.001 for j in range(2, 1001))
    close(u[1:], [(alpha_bar(1000) / alpha_bar(j) - 1) ** .5 for j in range(1, 1000)], rtol=1e-9)
    close(u[0] ** 2 + 1, (u[1] ** 2 + 1) / 0.001)


def test_iddpm_constants():
    u = ROWS["iddpm"].levels
    assert round(u[0].item()) == 20291
    assert round(u[8].item(), 1) == 80.2             # why j0 = 8: EDM's sigma_max, about
    assert round(u[999].item(), 4) == 0.0064
    assert IDDPM(M=100, j0=0).levels.shape == (100,)


def test_ddpm_ladder_is_alpha_bar_of_linear_betas():
    product, ladder = 1.0, []                        # an independent walk in plain floats
    for t in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        ladder.append(product)
    levels = ROWS["ddpm"].levels
    assert levels.dtype == torch.float64
    close(1 / (1 + levels ** 2), ladder)
    close(levels ** 2, [(1 - a) / a for a in ladder], rtol=1e-9)


def test_ddpm_constants():
    levels = ROWS["ddpm"].levels
    assert levels.shape == (1000,) and (levels.diff() > 0).all()
    assert round(levels[0].item(), 4) == 0.01 and round(levels[-1].item()) == 157
    assert round(levels.mean().item(), 1) == 17.8    # Debias' weight, sigma, has this mean


# ---- Training noise levels -----------------------------------------------------------------------

U = (torch.arange(10000, dtype=torch.float64) + 0.5) / 10000       # a stratified uniform


def test_vp_trains_on_uniform_t():
    t = ROWS["vp"].sigma_inv(ROWS["vp"].training_sigma(U))
    close(t, 1e-5 + U * (1 - 1e-5))
    close(ROWS["vp"].training_sigma(tensor(0, 1)), ROWS["vp"].sigma(tensor(1e-5, 1)).tolist())


def test_ve_trains_on_log_uniform_sigma():
    log_sigma = ROWS["ve"].training_sigma(U).log()
    close(log_sigma, math.log(.02) + U * math.log(100 / .02), atol=1e-12)
    close(ROWS["ve"].training_sigma(tensor(0, 0.5, 1)), [.02, (.02 * 100) ** .5, 100])


def test_edm_trains_on_log_normal_sigma():
    log_sigma = ROWS["edm"].training_sigma(U).log()
    z = (log_sigma + 1.2) / 1.2
    close(z.mean(), 0.0, atol=1e-9)
    close(z.std(), 1.0, atol=1e-3)                   # the strata cut the tails by that much
    close((1 + torch.erf(z / 2 ** .5)) / 2, U, rtol=1e-9)          # Phi(z) = u, at every quantile


@discrete_row
def test_discrete_rows_train_on_every_level_alike(name):
    row = ROWS[name]
    sigma = row.training_sigma((torch.arange(3000, dtype=torch.float64) + 0.5) / 3000)
    assert torch.equal(sigma.sort().values, row.levels.sort().values.repeat_interleave(3))


@discrete_row
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_u_near_0_and_near_1_gives_the_ladders_two_ends(name, dtype):
    below_1 = 1 - torch.finfo(dtype).eps / 2
    sigma = ROWS[name].training_sigma(tensor(0, 1e-9, below_1, 1, dtype=dtype))
    levels = ROWS[name].levels.sort().values.to(dtype)
    assert torch.equal(sigma, levels[[0, 0, -1, -1]])


@every_row
def test_u_to_sigma_is_increasing(name):
    assert (ROWS[name].training_sigma(U).diff() >= 0).all()      # stratified u: stratified sigma


# ---- Preconditioning -----------------------------------------------------------------------------

def sigmas(name):
    return ROWS[name].levels if name in DISCRETE else ROWS[name].training_sigma(U[::100])


def target_variance(c, sigma, sigma_data):
    """Var(x0 - c (x0 + sigma noise)): what is left for c_out F to supply, c the c_skip."""
    return (1 - c) ** 2 * sigma_data ** 2 + c ** 2 * sigma ** 2


@pytest.mark.parametrize("name, sigma_data", [("edm", 0.5), ("vp", 1), ("iddpm", 1), ("ddpm", 1)])
def test_c_in_normalises_the_input_variance_to_1(name, sigma_data):
    sigma = sigmas(name)
    c_in = ROWS[name].precondition(sigma)[2]
    close(c_in ** 2 * (sigma_data ** 2 + sigma ** 2), 1.0)


def test_vp_c_in_is_s():
    t = times("vp")
    close(ROWS["vp"].precondition(ROWS["vp"].sigma(t))[2], ROWS["vp"].s(t))


def test_ve_leaves_its_input_alone():
    assert (ROWS["ve"].precondition(sigmas("ve"))[2] == 1).all()


def test_edm_c_out_normalises_the_targets_variance_to_1():
    sigma = sigmas("edm")
    c_skip, c_out, _, _ = ROWS["edm"].precondition(sigma)
    close(target_variance(c_skip, sigma, 0.5) / c_out ** 2, 1.0)


def test_edm_c_skip_minimises_c_out():
    sigma = sigmas("edm")
    c_skip, c_out, _, _ = ROWS["edm"].precondition(sigma)
    grid = torch.linspace(-0.5, 1.5, 20001, dtype=torch.float64).unsqueeze(1)
    variance = target_variance(grid, sigma, 0.5)                   # (20001, 100)
    best = variance.min(0)
    assert (grid[best.indices, 0] - c_skip).abs().max() <= 0.5e-4 + 1e-9
    assert (best.values >= c_out ** 2 * (1 - 1e-12)).all()


@pytest.mark.parametrize("name, sign", [("vp", 1), ("iddpm", 1), ("ddpm", 1), ("ve", -1)])
def test_noise_predicting_rows_have_the_noise_as_target(name, sign):
    sigma = sigmas(name)
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, len(sigma), generator=g, dtype=torch.float64)
    c_skip, c_out, _, _ = ROWS[name].precondition(sigma)
    close((x0 - c_skip * (x0 + sigma * noise)) / c_out, sign * noise, rtol=1e-6, atol=1e-9)


@every_row
def test_weight_is_1_over_c_out_squared(name):
    sigma = sigmas(name)
    close(ROWS[name].weight(sigma) * ROWS[name].precondition(sigma)[1] ** 2, 1.0)


@pytest.mark.parametrize("name, weight", [
    ("vp", lambda v: v ** -2), ("ve", lambda v: v ** -2), ("iddpm", lambda v: v ** -2),
    ("ddpm", lambda v: v ** -2), ("edm", lambda v: (v ** 2 + .25) / (v * .5) ** 2)])
def test_weight_is_the_tables(name, weight):
    close(ROWS[name].weight(sigmas(name)), weight(sigmas(name)))


@pytest.mark.parametrize("name, c_noise", [
    ("vp", lambda v: 999 * VP().sigma_inv(v)), ("ve", lambda v: (v / 2).log()),
    ("edm", lambda v: v.log() / 4), ("iddpm", lambda v: torch.arange(999, -1, -1)),
    ("ddpm", lambda v: torch.arange(1, 1001))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_c_noise_is_the_tables(name, c_noise, dtype):
    sigma = sigmas(name).to(dtype)
    close(ROWS[name].precondition(sigma)[3], c_noise(sigma), rtol=1e-6)


@discrete_row
def test_c_noise_between_two_levels_is_the_nearer_ones(name):
    levels = ROWS[name].levels
    for share in (0.4, 0.6):
        between = levels[:-1] + share * levels.diff()
        nearer = levels[:-1] if share < 0.5 else levels[1:]
        for dtype in (torch.float32, torch.float64):
            assert torch.equal(ROWS[name].precondition(between.to(dtype))[3],
                               ROWS[name].precondition(nearer.to(dtype))[3])


def test_edm_constants_are_the_users():
    row = EDM(sigma_min=.01, sigma_max=10, rho=3, sigma_data=2, P_mean=1, P_std=.5)
    close(row.time_steps(5)[[0, 2, 4]], [10, ((10 ** (1 / 3) + .01 ** (1 / 3)) / 2) ** 3, .01])
    close(row.training_sigma(tensor(0.5)), math.e)
    sigma = tensor(1.5)
    c_skip, c_out, c_in, _ = row.precondition(sigma)
    close(c_in ** 2 * (4 + sigma ** 2), 1.0)
    close(target_variance(c_skip, sigma, 2) / c_out ** 2, 1.0)
    close(row.weight(sigma) * c_out ** 2, 1.0)


# ---- Shapes and types ----------------------------------------------------------------------------

@every_row
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (3, 1, 1, 1)])
def test_every_function_keeps_shape_and_dtype(name, dtype, shape):
    row, u = ROWS[name], torch.full(shape, 0.3, dtype=dtype)
    results = [getattr(row, f)(u) for f in ("sigma", "sigma_inv", "dsigma", "s", "ds", "weight",
                                            "training_sigma")]
    results += row.precondition(row.training_sigma(u))
    assert len(results) == 11
    for r in results:
        assert r.shape == shape and r.dtype == dtype and r.isfinite().all()


@every_row
def test_every_sample_has_its_own_sigma(name):
    sigma = ROWS[name].training_sigma(tensor(0.1, 0.5, 0.9)).view(3, 1, 1, 1)
    together = torch.stack(ROWS[name].precondition(sigma))         # (4, 3, 1, 1, 1)
    alone = [torch.stack(ROWS[name].precondition(v)) for v in sigma.flatten()]
    close(together.flatten(1), torch.stack(alone, 1))


def test_the_rows_members_stand_in_one_order():
    order = ["sigma", "sigma_inv", "dsigma", "s", "ds", "time_steps", "training_sigma",
             "precondition", "weight"]
    for row in SCHEDULES.values():
        assert [f for f in vars(row) if f in order] == order
