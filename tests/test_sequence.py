"""The sequence-aware loss against its paper's two theorems and, on Gaussian data, its exact
minimiser.  Then antithetic pairs, and interpolation between noise levels.
"""


import pytest
import torch
import torch.nn.functional as F

from losses import (antithetic_loss, constant_weight, dsm_loss, interpolate, path_noise, sa_loss,
                    sa_tau)
from schedules import DDPM, IDDPM

LINEAR = DDPM().levels                                      # sigma_1 < ... < sigma_1000
LADDERS = {"ddpm": LINEAR, "iddpm": IDDPM().levels.flip(0)}
SHORT = DDPM(beta_1=0.02, beta_T=0.4, T=10).levels


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def window(t, K):
    """The levels t, t-1, ..., t-K+1, those below the ladder as 1: (K, B) int64."""
    return (t - torch.arange(K)[:, None]).clamp(min=1)


def shaped(values, x):
    """(K, B) -> (K, B, 1, ..., 1), to broadcast with x (B, ...)."""
    return values.view(*values.shape, *[1] * (x.ndim - 1)).to(x)


def z_score(samples):
    """How many standard errors the mean of (B,) samples is from zero."""
    return (samples.mean() / samples.std() * len(samples) ** 0.5).item()


# ---- tau -----------------------------------------------------------------------------------------

def printed_tau(ladder):
    """Theorem 1's formula, symbol by symbol in alpha_bar; tau_1 = 0."""
    ab = 1 / (1 + ladder ** 2)
    ab_1, ab_i, ab_before = ab[0], ab[1:], ab[:-1]
    beta = 1 - ab_i / ab_before
    gamma_1 = ab_before.sqrt() * beta / (1 - ab_i)
    tau = (ab_before.sqrt() * (1 - ab_1) / (ab_1.sqrt() * (1 - ab_before)) * gamma_1
           * (1 - ab_i).sqrt() / ab_i.sqrt())
    return F.pad(tau, (1, 0))                                                     # (T,)


@pytest.mark.parametrize("name", LADDERS)
def test_sa_tau_paper_is_the_formula_of_theorem_1(name):
    ladder, T = LADDERS[name], 1000
    got = sa_tau(ladder, torch.arange(1, T + 1), 3, "paper")                      # (3, T)
    want = printed_tau(ladder)
    for k in range(3):
        torch.testing.assert_close(got[k], F.pad(want, (k, 0))[:T], rtol=1e-9, atol=0)
    assert got[0, 0] == 0 and (got[0, 1:] > 0).all()


def test_sa_tau_on_linear_betas_takes_the_loss_away():
    got = sa_tau(LINEAR, torch.tensor([2, 10, 100, 1000]), 1, "paper")[0]
    torch.testing.assert_close(got, torch.tensor([8.1e-3, 4.0e-4, 6.1e-6, 1.3e-8]).double(),
                               rtol=0.01, atol=0)


def test_sa_tau_window_is_the_ratio_of_the_papers():
    t, K = torch.arange(1, 1001), 4
    paper, got = sa_tau(LINEAR, t, K, "paper"), sa_tau(LINEAR, t, K, "window")
    torch.testing.assert_close(got[:, 1:], paper[:, 1:] / paper[0, 1:])
    assert (got[0] == 1).all() and (got[1:, 0] == 0).all() and got[1, 1] == 0      # t = 1, 2
    ratio = got[0] / got[1]                                       # tau_t/tau_{t-1}, from t = 3
    assert (ratio[46:] > 0.96).all() and (ratio[2:] < 0.996).all()             # from t = 47
    assert ratio[2].item() == pytest.approx(0.415, abs=1e-3)                   # at t = 3
    torch.testing.assert_close(got[2, 3:], 1 / (ratio[3:] * ratio[2:-1]))


def test_sa_tau_unit_is_one_on_the_ladder_and_zero_below():
    got = sa_tau(LINEAR, torch.tensor([1, 2, 3, 1000]), 3)
    assert got.tolist() == [[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]]
    for kind in ("paper", "window"):
        below = sa_tau(LINEAR, torch.tensor([1, 2, 3]), 5, kind)
        assert torch.equal(below == 0, below.new_tensor([[kind == "paper", 0, 0], [1, 1, 0],
                                                         [1, 1, 1], [1, 1, 1], [1, 1, 1]]) == 1)


def test_sa_tau_refuses_another_name():
    with pytest.raises(ValueError, match="'exact' is none of unit, window, paper"):
        sa_tau(LINEAR, torch.tensor([5]), 2, "exact")


# ---- Theorem 1 -----------------------------------------------------------------------------------

def posterior_mean(x, x0, i, ladder=SHORT):
    """mu~_i(x_i, x0), the mean of q(x_{i-1} | x_i, x0), in DDPM's frame   (SA section 2.2)."""
    ab, ab_before = 1 / (1 + ladder[i - 1] ** 2), 1 / (1 + ladder[i - 2] ** 2)
    beta = 1 - ab / ab_before
    gamma_1 = ab_before.sqrt() * beta / (1 - ab)
    gamma_2 = (1 - beta).sqrt() * (1 - ab_before) / (1 - ab)
    return gamma_1 * x0 + gamma_2 * x


def noise_in(x, x0, i):
    """eps_i of x_i = sqrt(ab_i) (x0 + sigma_i eps_i)."""
    return (x * (1 + SHORT[i - 1] ** 2).sqrt() - x0) / SHORT[i - 1]


def test_sa_tau_carries_an_error_of_one_step_down_to_x_1():
    for i in range(2, 11):
        error = -SHORT[i - 1]                            # x0_hat - x0, where eps_hat - eps is 1
        moved = posterior_mean(torch.zeros(()).double(), error, i)
        for j in range(i - 1, 1, -1):
            moved = posterior_mean(moved, 0, j)          # gamma_2 of every step that follows
        assert -moved.item() == pytest.approx(sa_tau(SHORT, torch.tensor([i]), 1, "paper").item())


def test_sa_theorem_1_gap_is_the_difference_of_two_trajectories_at_x_1():
    """d = sum_i tau_i (eps_hat_i - eps_i) is the true reverse process's x_1 less the model's.

    The theorem does not say which x_i the network sees, nor what eps_i then is.  It is exact, for
    any predictor, if x_i is what the network is given and eps_i the noise in it. So either

      sampling         x_i are the sampler's own states, and eps_i changes with every earlier error;
      teacher forcing  x_i are a forward path's, and only the means of the model's steps accumulate.

    Training sees the second, the sampler does the first; that both have the same gap needs errors
    that do not depend on the state, and a network's do.
    """
    x0, x_T = randn(5, 3, seed=1), randn(5, 3, seed=2)
    tau = sa_tau(SHORT, torch.arange(1, 11), 1, "paper")[0]

    def gaps(eps_hat):
        """x_1 (true) - x_1 (model), and d, for sampling and for teacher forcing."""
        true = sampled = forced = x_T
        d_sampled = d_forced = 0
        for i in range(10, 1, -1):
            ab, sigma = 1 / (1 + SHORT[i - 1] ** 2), SHORT[i - 1]
            d_sampled += tau[i - 1] * (eps_hat(sampled, i) - noise_in(sampled, x0, i))
            d_forced += tau[i - 1] * (eps_hat(true, i) - noise_in(true, x0, i))
            estimate = lambda x: x / ab.sqrt() - sigma * eps_hat(x, i)             # of x0
            z = 0.1 * randn(5, 3, seed=10 + i)                        # the same in all three
            sampled, forced, true = (posterior_mean(sampled, estimate(sampled), i) + z,
                                     posterior_mean(forced, estimate(true), i) + z,
                                     posterior_mean(true, x0, i) + z)
        return true - sampled, d_sampled, true - forced, d_forced

    network = gaps(lambda x, i: (x + 0.1 * i).tanh())
    torch.testing.assert_close(network[0], network[1], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(network[2], network[3], rtol=1e-10, atol=1e-14)
    assert ((network[1] - network[3]).abs() > 0.1 * network[3].abs()).double().mean() > 0.5
    same = gaps(lambda x, i: noise_in(x, x0, i) + 0.1 * i)          # errors blind to the state
    torch.testing.assert_close(same[1], same[3], rtol=1e-10, atol=1e-14)


# ---- Theorem 2 -----------------------------------------------------------------------------------

TAU = sa_tau(SHORT, torch.arange(1, 11), 1, "paper")[0]


def window_losses(errors, top, K):
    """L_sa of the windows top, top-1, ..., top-K+1 (B,), where eps_hat_s - eps_s = errors[s - 1].

    From sa_loss, with D = -sigma error around x0 = 0.  tau is zero outside 2 ... T.
    """
    s = top - torch.arange(K)[:, None]                                            # (K, B)
    row, inside = s.clamp(1, 10) - 1, (s >= 1) & (s <= 10)
    x0, noise = errors.new_zeros(len(top), 4), randn(K, len(top), 4)

    def denoise(x, sigma):
        return -sigma * errors[(sigma - SHORT).abs().argmin(1)]
    return sa_loss(denoise, x0, noise, shaped(SHORT[row], x0), torch.zeros_like,
                   shaped(TAU[row] * inside, x0))


def random_errors(seed):
    """(10, 4), of the size of 1/tau, so that no level outweighs the others in the gap."""
    return randn(10, 4, seed=seed) / TAU.clamp(min=TAU[-1])[:, None]


@pytest.mark.parametrize("K", [1, 2, 3, 5, 12])
def test_sa_theorem_2_bounds(K):
    """(T-1)/(T+K) L_simple^tau >= L_sa >= L_theta/(T+K)^2, windows t ... t+K-1, t from 1-K to T."""
    T, slack = 10, []
    top = torch.arange(1 - K, T + 1) + K - 1                                      # T + K of them
    for seed in range(50):
        errors = random_errors(seed)
        L_sa = window_losses(errors, top, K).mean()
        gaps = TAU[:, None] * errors
        upper, total = (gaps[1:] ** 2).mean(1).mean(), (gaps.sum(0) ** 2).mean()
        slack.append(torch.stack([(T - 1) / (T + K) * upper / L_sa, L_sa * (T + K) ** 2 / total]))
    slack = torch.stack(slack)
    assert (slack >= 1 - 1e-12).all()
    if K == 1:
        torch.testing.assert_close(slack[:, 0], torch.ones(50).double())    # nothing to lose
    equal = 1 / TAU.clamp(min=TAU[1:].min())[:, None].expand(10, 4)  # then neither is loose by K
    L_sa, total = window_losses(equal, top, K).mean(), ((TAU[:, None] * equal).sum(0) ** 2).mean()
    assert 1 <= L_sa * (T + K) ** 2 / total < 2.7


def test_sa_theorem_2_lower_bound_needs_windows_that_reach_past_T():
    """The published code's windows, down from t in {1 ... T}: the K-1 top levels are in fewer than
    K of them.  The upper bound holds, the lower one does not: errors that cancel in all windows but
    those of t = T, T-K, ... leave a gap.
    """
    T, K, top = 10, 3, torch.arange(1, 11)
    for seed in range(50):
        errors = random_errors(seed)
        upper = ((TAU[:, None] * errors)[1:] ** 2).mean(1).mean()
        assert window_losses(errors, top, K).mean() <= (T - 1) / T * upper
    gaps = torch.zeros(T + 1).double()                                            # tau_s error_s
    for s in range(2, T + 1):
        gaps[s] = (K if s in (T, T - K, T - 2 * K) else 0) - gaps[max(s - K + 1, 0):s].sum()
    errors = (gaps[1:] / TAU.clamp(min=TAU[-1]))[:, None].expand(-1, 4)
    L_sa = window_losses(errors, top, K).mean()
    assert L_sa < 0.7 * gaps.sum() ** 2 / (T + K) ** 2 and L_sa < 0.4 * gaps.sum() ** 2 / T ** 2
    whole = window_losses(errors, torch.arange(0, T + K), K).mean()               # Theorem 2's
    assert whole > gaps.sum() ** 2 / (T + K) ** 2


# ---- The loss ------------------------------------------------------------------------------------

def eps_network(x, s):
    """Some eps_hat(x_s, s) of images in DDPM's frame."""
    return (1.5 * x).tanh() + 0.1 * x.roll(1, -1) + s / 50


def as_denoiser(x, sigma):
    s = 1 + (sigma.flatten(1) - LINEAR).abs().argmin(1).view(sigma.shape).to(x)
    return x - sigma * eps_network(x / (1 + sigma ** 2).sqrt(), s)


@pytest.mark.parametrize("K, lam", [(2, 1.0), (3, 0.3), (4, 0.2), (6, 0.7)])
def test_sa_loss_is_the_published_form(K, lam):
    """tau = 1, independent noises, windows down from t with a mask, K^2 always, pixels summed."""
    t = torch.tensor([1, 2, 3, 40, 500, 1000])
    x0, noise = randn(6, 3, 4, 4, seed=3), randn(K, 6, 3, 4, 4, seed=4)
    s = window(t, K)
    got = sa_loss(as_denoiser, x0, noise, shaped(LINEAR[s - 1], x0), constant_weight,
                  shaped(sa_tau(LINEAR, t, K), x0), lam)
    for b in range(6):
        gap, simple = torch.zeros(3, 4, 4).double(), None
        for k in range(K):
            level = t[b].item() - k
            if level < 1:
                break
            ab = 1 / (1 + LINEAR[level - 1] ** 2)
            x = ab.sqrt() * x0[b] + (1 - ab).sqrt() * noise[k, b]
            error = noise[k, b] - eps_network(x, level)
            gap, simple = gap + error, (error ** 2).sum() if k == 0 else simple
        want = simple + lam * (gap ** 2).sum() / K ** 2
        assert got[b].item() * 48 == pytest.approx(want.item(), rel=1e-9)


def test_sa_loss_alone_is_dsm_loss():
    """With lam = 0 for every K and weight; with K = 1 and the constant weight, 1 + lam times."""
    t, x0, noise = torch.tensor([2, 30, 700]), randn(3, 1, 4, 4, seed=5), randn(4, 3, 1, 4, 4)
    sigma, tau = shaped(LINEAR[window(t, 4) - 1], x0), shaped(sa_tau(LINEAR, t, 4), x0)
    for weight in (constant_weight, torch.ones_like, lambda s: 1 / s):
        want = dsm_loss(as_denoiser, x0, noise[0], sigma[0], weight)
        for K in (1, 2, 4):
            assert torch.equal(sa_loss(as_denoiser, x0, noise[:K], sigma[:K], weight, tau[:K],
                                       lam=0.0), want)
    got = sa_loss(as_denoiser, x0, noise[:1], sigma[:1], constant_weight, tau[:1], lam=0.3)
    want = dsm_loss(as_denoiser, x0, noise[0], sigma[0], constant_weight)
    torch.testing.assert_close(got, 1.3 * want)


@pytest.mark.parametrize("K", range(1, 7))
def test_sa_loss_is_one_call_of_the_network_and_its_gradient_that_of_K_calls(K):
    calls, theta = [], torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def denoise(x, sigma):
        calls.append(x.shape)
        return as_denoiser(theta * x, sigma)

    t, x0, noise = torch.tensor([9, 60]), randn(2, 1, 4, 4, seed=6), randn(K, 2, 1, 4, 4, seed=7)
    sigma, tau = shaped(LINEAR[window(t, K) - 1], x0), shaped(sa_tau(LINEAR, t, K, "window"), x0)
    loss = sa_loss(denoise, x0, noise, sigma, constant_weight, tau)
    assert calls == [x0.shape]
    gap = sum(tau[k] * (x0 - denoise(x0 + sigma[k] * noise[k], sigma[k])) / sigma[k]
              for k in range(K)) / K
    want = (dsm_loss(denoise, x0, noise[0], sigma[0], constant_weight)
            + (gap ** 2).flatten(1).mean(1))
    torch.testing.assert_close(loss, want)
    g, h = (torch.autograd.grad(value.sum(), theta)[0] for value in (loss, want))
    torch.testing.assert_close(g, h)


# ---- Noise read off one forward path -------------------------------------------------------------

def test_path_noise_is_normal_at_each_level_and_correlated_as_a_forward_path():
    """Linear in its noise, so the identity gives its matrix M: M M' = sigma_s/sigma_t, s < t."""
    t, K = torch.tensor([6, 50, 900]), 5
    sigma = LINEAR[window(t, K) - 1]                                              # (K, 3)
    M = path_noise(torch.eye(K).double()[:, None].expand(K, 3, K), sigma[..., None]).transpose(0, 1)
    low = torch.minimum(sigma[:, None], sigma[None]).permute(2, 0, 1)
    high = torch.maximum(sigma[:, None], sigma[None]).permute(2, 0, 1)
    torch.testing.assert_close(M @ M.mT, low / high)                              # 1 where s = t


def test_path_noise_is_that_of_an_explicit_forward_trajectory():
    K, x0, z = 5, randn(2, 3, 4, 4, seed=8), randn(5, 2, 3, 4, 4, seed=9)
    sigma = shaped(LINEAR[window(torch.tensor([5, 300]), K) - 1], x0)
    got = x0 + sigma * path_noise(z, sigma)
    x = x0 + sigma[-1] * z[-1]                                                    # the lowest level
    for k in range(K - 1, -1, -1):
        if k < K - 1:
            x = x + (sigma[k] ** 2 - sigma[k + 1] ** 2).sqrt() * z[k]
        torch.testing.assert_close(got[k], x)


def test_path_noise_below_the_ladder_and_in_float32():
    """Levels below the ladder repeat level 1: no step, the same noise, finite (tau masks them)."""
    z = randn(4, 2, 3, seed=10, dtype=torch.float32)
    got = path_noise(z, shaped(LINEAR[window(torch.tensor([2, 800]), 4) - 1], z[0]))
    assert got.dtype == torch.float32 and got.isfinite().all()
    torch.testing.assert_close(got[1:, 0], z[-1, 0].expand(3, -1))
    torch.testing.assert_close(got[-1], z[-1])


# ---- What the loss's minimiser is ----------------------------------------------------------------
# Data N(0, 1) and a linear predictor eps_hat_s = c_s x_s, x_s = x0 + sigma_s eps_s, on the whole
# linear-beta ladder, t uniform.  E[eps_s | x_s] has c_s = sigma_s/(1 + sigma_s^2).  The loss is
# quadratic in c = (c_1 ... c_1000), and all its moments are known.

POSTERIOR = LINEAR / (1 + LINEAR ** 2)


def minimiser(K, lam, path):
    """The c at which the gradient of the expected loss vanishes: (1000,)."""
    row, column = LINEAR[:, None], LINEAR
    if path:                                  # eps_s = (sigma_r/sigma_s) eps_r + new, for r < s
        low, high = torch.minimum(row, column), torch.maximum(row, column)
        xx, xe = 1 + low ** 2, row * low / high
    else:
        xx, xe = 1 + torch.diag(LINEAR ** 2), torch.diag(LINEAR)       # across levels only x0 stays
    together = torch.zeros(1000, 1000).double()                        # windows with both levels
    for t in range(1, 1001):
        low = max(t - K, 0)
        together[low:t, low:t] += lam / K ** 2
    A = torch.diag(1 + LINEAR ** 2) + together * xx
    return torch.linalg.solve(A, LINEAR + (together * xe).sum(1))


def gradients(c, u, K, lam, path, N=100_000):
    """sa_loss's gradient in c_u, summed over the K windows with level u: N samples (N/2,), each at
    +noise and at -noise.
    """
    near = torch.arange(u - K, u + K)                                  # rows of the ladder
    theta = torch.zeros(N, 1, dtype=torch.float64, requires_grad=True)
    x0, loss = randn(N // 2, 1, seed=20).repeat(2, 1), 0

    def denoise(x, sigma):
        row = near[(sigma - LINEAR[near]).abs().argmin(1)]
        return x - sigma * (c[row, None] + theta * (row == u - 1)[:, None]) * x

    for t in range(u, u + K):
        t = torch.full((N,), t)
        sigma, noise = shaped(LINEAR[window(t, K) - 1], x0), randn(K, N // 2, 1, seed=21)
        noise = torch.cat([noise, -noise], 1)
        noise = path_noise(noise, sigma) if path else noise
        loss = loss + sa_loss(denoise, x0, noise, sigma, constant_weight,
                              shaped(sa_tau(LINEAR, t, K), x0), lam)
    return torch.autograd.grad(loss.sum(), theta)[0].view(2, -1).mean(0)


FACTORS = {  # (K, lam, path): c/c of the posterior mean at t = 10, 100, 200, 500
    (2, 1.0, False): [0.750, 0.770, 0.820, 0.974], (2, 1.0, True): [0.982, 0.998, 0.999, 1.000],
    (3, 0.3, False): [0.847, 0.860, 0.893, 0.986], (3, 0.3, True): [0.985, 0.998, 0.999, 1.000],
    (4, 0.2, False): [0.875, 0.886, 0.914, 0.989], (4, 0.2, True): [0.985, 0.998, 0.999, 1.000],
}


@pytest.mark.parametrize("K, lam, path", FACTORS)
def test_sa_minimiser_under_predicts_the_noise_if_noises_are_independent(K, lam, path):
    factor = (minimiser(K, lam, path) / POSTERIOR)[[9, 99, 199, 499]]
    torch.testing.assert_close(factor, torch.tensor(FACTORS[K, lam, path]).double(),
                               rtol=0, atol=6e-4)


def test_sa_minimiser_without_the_sequence_term_is_the_posterior_mean():
    torch.testing.assert_close(minimiser(3, 0.0, False), POSTERIOR)


@pytest.mark.parametrize("path", [False, True])
@pytest.mark.parametrize("u", [10, 100, 200, 500])
@pytest.mark.parametrize("K, lam", [(2, 1.0), (3, 0.3)])
def test_sa_loss_has_that_minimiser(K, lam, u, path):
    """By sampling: the gradient of the real function is zero there, and at the posterior mean it is
    not, unless the noises are a path's.
    """
    assert abs(z_score(gradients(minimiser(K, lam, path), u, K, lam, path))) < 3.5
    away = z_score(gradients(POSTERIOR, u, K, lam, path))
    assert abs(away) < 4 if path else away > 10           # positive: descent makes c_u smaller


# ---- Antithetic pairs ----------------------------------------------------------------------------

def curved(x, sigma):
    return (0.8 * x).tanh() + 0.1 * x ** 2 / (1 + sigma)


@pytest.mark.parametrize("shape", [(2,), (3, 4, 4)])
def test_antithetic_loss_is_the_mean_of_dsm_loss_at_both_noises(shape):
    x0, noise = randn(5, *shape, seed=30), randn(5, *shape, seed=31)
    sigma, calls = torch.tensor([0.01, 0.1, 1, 5, 50]).double().view(5, *[1] * len(shape)), []
    denoise = lambda x, s: calls.append(1) or curved(x, s)
    got = antithetic_loss(denoise, x0, noise, sigma, constant_weight)
    assert got.shape == (5,) and len(calls) == 1
    want = sum(dsm_loss(curved, x0, sign * noise, sigma, constant_weight) for sign in (1, -1)) / 2
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_antithetic_loss_cancels_all_that_is_odd_exactly_for_a_linear_denoiser():
    """D = a x: |(a - 1) x0 + a sigma eps|^2 without its cross term."""
    x0, noise, sigma, a = randn(6, 4, seed=32), randn(6, 4, seed=33), 0.1 + randn(6, 1) ** 2, 0.6
    got = antithetic_loss(lambda x, s: a * x, x0, noise, sigma, torch.ones_like)
    want = (((a - 1) * x0) ** 2 + (a * sigma * noise) ** 2).mean(1)
    torch.testing.assert_close(got, want)


def slopes(loss, denoise, x0, noise, sigma):
    """Each sample's loss, and its gradient where `denoise` is scaled: (B,) both."""
    theta = torch.ones(len(x0), 1, dtype=x0.dtype, requires_grad=True)
    value = loss(lambda x, s: theta * denoise(x, s), x0, noise, sigma, torch.ones_like)
    return value.detach(), torch.autograd.grad(value.sum(), theta)[0][:, 0]


def test_antithetic_minimiser_is_the_posterior_mean_of_gaussian_data():
    x0, noise = randn(40_000, 2, seed=34), randn(40_000, 2, seed=35)
    sigma = 0.1 * 30 ** torch.rand(40_000, 1, generator=generator(36), dtype=torch.float64)
    for scale in (1.0, 0.97):
        denoise = lambda x, s: scale * x / (1 + s ** 2)
        z = z_score(slopes(antithetic_loss, denoise, x0, noise, sigma)[1])
        assert abs(z) < 3.5 if scale == 1 else z < -10


@pytest.mark.parametrize("sigma, most", [(0.01, 0.002), (0.03, 0.02), (0.1, 0.2)])
def test_antithetic_variance_at_small_sigma_is_far_below_a_half(sigma, most):
    """Given x0: of the loss and of its gradient.  Two independent noises would halve it."""
    x0 = torch.tensor([[1.0, -0.7, 0.4]]).double().expand(20_000, 3)
    noise, s = randn(20_000, 3, seed=37), x0.new_full((20_000, 1), sigma)
    one, two = (slopes(loss, curved, x0, noise, s) for loss in (dsm_loss, antithetic_loss))
    for single, pair in zip(one, two):
        assert pair.var() < most * single.var()


# ---- Interpolation -------------------------------------------------------------------------------

LEVELS = torch.tensor([0.01, 0.1, 0.5, 3.0, 80.0]).double()
VALUES = torch.tensor([0.0, 0.3, 0.2, 0.9, 1.0]).double()


def test_interpolate_is_exact_at_the_knots_and_flat_outside():
    f = interpolate(LEVELS, VALUES)
    assert torch.equal(f(LEVELS), VALUES)
    outside = torch.tensor([0.0, 1e-9, 0.0099, 81.0, 1e9, torch.inf]).double()
    assert f(outside).tolist() == [0, 0, 0, 1, 1, 1]


def test_interpolate_is_linear_in_ln_sigma_between():
    f = interpolate(LEVELS, VALUES)
    for k in range(4):
        for share in (0.1, 0.5, 0.99):
            sigma = LEVELS[k] ** (1 - share) * LEVELS[k + 1] ** share
            want = (1 - share) * VALUES[k] + share * VALUES[k + 1]
            assert f(sigma).item() == pytest.approx(want.item(), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (7,), (4, 1, 1, 1), (2, 3, 1)])
def test_interpolate_keeps_any_shape_and_dtype(shape, dtype):
    sigma = torch.rand(shape, generator=generator(40), dtype=torch.float64) * 5
    for knots in (torch.float32, torch.float64):
        got = interpolate(LEVELS.to(knots), VALUES.to(knots))(sigma.to(dtype))
        assert got.shape == shape and got.dtype == dtype
        torch.testing.assert_close(got.double(), interpolate(LEVELS, VALUES)(sigma),
                                   rtol=0, atol=1e-6)
