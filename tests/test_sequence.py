"""The sequence-aware loss against its paper's theorems and its minimiser on Gaussian data."""

import pytest
import torch
import torch.nn.functional as F

from losses import constant_weight, path_noise, sa_loss, sa_tau
from oracles import close, randn, shaped
from papers.sa import gaussian_factor
from schedules import DDPM

LINEAR = DDPM().levels                                      # sigma_1 < ... < sigma_1000
SHORT = DDPM(beta_1=0.02, beta_T=0.4, T=10).levels
TAU = sa_tau(SHORT, torch.arange(1, 11), 1, "paper")[0]


def window(ladder, t, K):
    """The levels t, t-1, ..., t-K+1, those outside the ladder as its ends: (K, B)."""
    return ladder[(t - torch.arange(K)[:, None]).clamp(1, len(ladder)) - 1]


# ---- tau -----------------------------------------------------------------------------------------

def test_sa_tau_paper_is_the_formula_of_theorem_1_and_window_its_ratio():
    """The formula symbol by symbol, in alpha_bar; tau_1 = 0."""
    ab = 1 / (1 + LINEAR ** 2)
    ab_1, ab_i, ab_before = ab[0], ab[1:], ab[:-1]
    beta = 1 - ab_i / ab_before
    gamma_1 = ab_before.sqrt() * beta / (1 - ab_i)
    want = (ab_before.sqrt() * (1 - ab_1) / (ab_1.sqrt() * (1 - ab_before)) * gamma_1
            * (1 - ab_i).sqrt() / ab_i.sqrt())
    got, window = (sa_tau(LINEAR, torch.arange(1, 1001), 3, kind) for kind in ("paper", "window"))
    for k in range(3):
        close(got[k], F.pad(want, (k + 1, 0))[:1000], atol=0)
    close(window[:, 1:], got[:, 1:] / got[0, 1:])
    assert window[:, 0].tolist() == [1, 0, 0]                       # t = 1, whose own tau is 0


def test_sa_tau_unit_is_one_on_the_ladder_and_zero_outside_and_another_name_is_refused():
    got = sa_tau(LINEAR, torch.tensor([0, 1, 2, 1000, 1001]), 3)
    assert got.tolist() == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]
    with pytest.raises(ValueError, match="'exact' is none of unit, window, paper"):
        sa_tau(LINEAR, torch.tensor([5]), 2, "exact")


# ---- The theorems --------------------------------------------------------------------------------

def test_sa_theorem_1_gap_is_the_difference_of_two_trajectories_at_x_1():
    """d = sum_i tau_i (eps_hat_i - eps_i) is the true reverse process's x_1 less the model's.

    The theorem does not say which x_i the network sees.  It is exact, for any predictor, if eps_i
    is the noise in that x_i: in sampling (x_i are the sampler's own states) and in teacher forcing
    (x_i are a forward path's, and the means of the model's steps accumulate).  Training sees the
    second.  Both have the same gap only where errors do not depend on the state.
    """
    x0, x_T = randn(5, 3, seed=1), randn(5, 3, seed=2)

    def gaps(eps_hat):
        """x_1 (true) - x_1 (model) in DDPM's frame, and d, for sampling and for teacher forcing."""
        true = sampled = forced = x_T
        d_sampled = d_forced = 0
        for i in range(10, 1, -1):
            sigma, z = SHORT[i - 1], 0.1 * randn(5, 3, seed=10 + i)       # the same z in all three
            shrink = (SHORT[i - 2] / sigma) ** 2

            def step(x, estimate):
                """A draw of x_{i-1} given x_i and an estimate of x0."""
                return estimate + shrink * (x - estimate) + z
            d_sampled += TAU[i - 1] * (eps_hat(sampled, i) - (sampled - x0) / sigma)
            d_forced += TAU[i - 1] * (eps_hat(true, i) - (true - x0) / sigma)
            sampled = step(sampled, sampled - sigma * eps_hat(sampled, i))
            forced = step(forced, true - sigma * eps_hat(true, i))
            true = step(true, x0)
        scale = 1 / (1 + SHORT[0] ** 2).sqrt()
        return scale * (true - sampled), d_sampled, scale * (true - forced), d_forced

    network = gaps(lambda x, i: (x + 0.1 * i).tanh())
    close(network[0], network[1])
    close(network[2], network[3])
    assert ((network[1] - network[3]).abs() > 0.1 * network[3].abs()).double().mean() > 0.5
    same = gaps(lambda x, i: (x - x0) / SHORT[i - 1] + 0.1 * i)     # errors blind to the state
    close(same[1], same[3])


def random_errors(seed):
    """(10, 4), of the size of 1/tau, so that no level outweighs the others in the gap."""
    return randn(10, 4, seed=seed) / TAU.clamp(min=TAU[-1])[:, None]


def both_sides(errors, top, K):
    """L_simple^tau, L_sa over the windows top, top-1, ..., top-K+1, and |d|^2, which is L_theta.

    eps_hat_s - eps_s = errors[s - 1].  L_sa is sa_loss's, with D = -sigma error around x0 = 0.
    """
    x0, noise = errors.new_zeros(len(top), 4), randn(K, len(top), 4)

    def denoise(x, sigma):
        return -sigma * errors[(sigma - SHORT).abs().argmin(1)]
    L_sa = sa_loss(denoise, x0, noise, shaped(window(SHORT, top, K), x0), torch.zeros_like,
                   shaped(sa_tau(SHORT, top, K, "paper"), x0)).mean()
    gaps = TAU[:, None] * errors
    return (gaps[1:] ** 2).mean(), L_sa, (gaps.sum(0) ** 2).mean()


def test_sa_theorem_2_bounds():
    """(T-1)/(T+K) L_simple^tau >= L_sa >= L_theta/(T+K)^2, windows t ... t+K-1, t from 1-K to T."""
    T = 10
    for K in (1, 3, 12):
        top = torch.arange(1 - K, T + 1) + K - 1                                  # T + K of them
        for seed in range(20):
            simple, L_sa, total = both_sides(random_errors(seed), top, K)
            upper, lower = (T - 1) / (T + K) * simple, total / (T + K) ** 2
            assert lower <= L_sa <= upper * (1 + 1e-12)
            assert K > 1 or L_sa.item() == pytest.approx(upper.item())  # with K = 1 nothing is lost
        equal = 1 / TAU.clamp(min=TAU[1:].min())[:, None].expand(10, 4)
        _, L_sa, total = both_sides(equal, top, K)          # then the lower one is not loose either
        assert 1 <= L_sa * (T + K) ** 2 / total < 2.7


def test_sa_theorem_2_lower_bound_needs_windows_that_reach_past_T():
    """The published code's windows, down from t in {1 ... T}: the K-1 top levels are in fewer than
    K of them.  The upper bound holds, the lower one does not: errors that cancel in all windows but
    those of t = T, T-K, ... leave a gap.
    """
    T, K, top = 10, 3, torch.arange(1, 11)
    for seed in range(20):
        simple, L_sa, _ = both_sides(random_errors(seed), top, K)
        assert L_sa <= (T - 1) / T * simple
    gaps = torch.zeros(T + 1).double()                                            # tau_s error_s
    for s in range(2, T + 1):
        gaps[s] = (K if s in (T, T - K, T - 2 * K) else 0) - gaps[max(s - K + 1, 0):s].sum()
    errors = (gaps[1:] / TAU.clamp(min=TAU[-1]))[:, None].expand(-1, 4)
    _, L_sa, total = both_sides(errors, top, K)
    assert L_sa < 0.7 * total / (T + K) ** 2 and L_sa < 0.4 * total / T ** 2
    assert both_sides(errors, torch.arange(0, T + K), K)[1] > total / (T + K) ** 2


# ---- The loss ------------------------------------------------------------------------------------

def test_sa_loss_is_the_published_form():
    """Independent noises, windows down from t with a mask, K^2 always, pixels summed; tau = 1 in
    the published code.
    """
    K, lam, t, x0 = 4, 0.2, torch.tensor([1, 2, 3, 40, 500, 1000]), randn(6, 3, 4, 4, seed=3)
    noise, tau = randn(K, 6, 3, 4, 4, seed=4), sa_tau(LINEAR, t, K, "window")

    def eps_network(x):                                             # in DDPM's frame
        return (1.5 * x).tanh() + 0.1 * x.roll(1, -1)

    def denoise(x, sigma):
        return x - sigma * eps_network(x / (1 + sigma ** 2).sqrt())
    sigma = shaped(window(LINEAR, t, K), x0)                                      # (K, 6, 1, 1, 1)
    got = sa_loss(denoise, x0, noise, sigma, constant_weight, shaped(tau, x0), lam)
    ab = 1 / (1 + sigma ** 2)
    error = noise - eps_network(ab.sqrt() * x0 + (1 - ab).sqrt() * noise)
    inside = t - torch.arange(K)[:, None] >= 1
    gap = (shaped(tau * inside, x0) * error).sum(0)
    want = (error[0] ** 2).sum((1, 2, 3)) + lam * (gap ** 2).sum((1, 2, 3)) / K ** 2
    close(got * 48, want)


def test_path_noise_is_normal_at_each_level_and_correlated_as_a_forward_path():
    """Linear in its noise, so the identity gives its matrix M: M M' = sigma_s/sigma_t, s < t.

    Levels below the ladder repeat level 1: no step, the same noise.
    """
    t, K = torch.tensor([2, 50, 900]), 5
    sigma = window(LINEAR, t, K)                                              # (K, 3)
    unit = torch.eye(K).double()[:, None].expand(K, 3, K)
    M = path_noise(unit, sigma[..., None]).transpose(0, 1)                        # (3, K, K)
    ratio = (sigma[:, None] / sigma).permute(2, 0, 1)
    close(M @ M.mT, torch.minimum(ratio, 1 / ratio))                              # 1 where s = t


# ---- What the loss's minimiser is ----------------------------------------------------------------
# Data N(0, 1) and a linear predictor eps_hat_s = c_s x_s, x_s = x0 + sigma_s eps_s, on the whole
# linear-beta ladder, t uniform.  E[eps_s | x_s] has c_s = sigma_s/(1 + sigma_s^2), and
# papers.sa.gaussian_factor says by which factor the minimiser's c_s is smaller.

def mean_gradient(c, K, lam, path):
    """The gradient of sa_loss in c, summed over t, its mean over x0 and noises taken exactly.

    The loss is quadratic in (x0, noises), and the 2^(K+1) vectors of signs have N(0, I)'s moments.
    """
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * (K + 1)).T
    t = torch.arange(1, 1001).repeat_interleave(signs.shape[1])                   # (B,)
    x0, noise = signs.repeat(1, 1000)[..., None].split([1, K])
    x0, c = x0[0], c.clone().requires_grad_()                                     # (B, 1)
    sigma = shaped(window(LINEAR, t, K), x0)
    noise = path_noise(noise, sigma) if path else noise

    def denoise(x, sigma):
        return x - sigma * c[torch.searchsorted(LINEAR, sigma)] * x
    tau = shaped(sa_tau(LINEAR, t, K), x0)
    loss = sa_loss(denoise, x0, noise, sigma, constant_weight, tau, lam)
    return torch.autograd.grad(loss.sum() / signs.shape[1], c)[0]


@pytest.mark.parametrize("path, share", [(False, 0.75), (True, 0.982)])
def test_sa_minimiser_under_predicts_the_noise_if_noises_are_independent(path, share):
    """The real loss's gradient vanishes at every level.  share: what is predicted at t = 10."""
    for K, lam in ((2, 1.0), (4, 0.2)):
        c = LINEAR / (1 + LINEAR ** 2) * gaussian_factor(LINEAR, K, lam, path)
        size = mean_gradient(0 * c, K, lam, path).abs()
        assert (mean_gradient(c, K, lam, path).abs() < 1e-10 * size).all()
    assert gaussian_factor(LINEAR, 2, 1.0, path)[9].item() == pytest.approx(share, abs=6e-4)
