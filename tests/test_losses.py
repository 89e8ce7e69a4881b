"""Losses against the truth: finite sets and Gaussians, whose posterior is known in closed form."""

import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from losses import (antithetic_loss, constant_weight, dsm_loss, head_loss, sa_loss, stf_loss,
                    stf_target, stf_weights, taylor_terms, together)
from oracles import (MU, VAR, C, Largest, Q, close, gaussian_denoise, gaussian_denoiser, generator,
                     gradients, randn, shaped, small_unet, tensor)
from schedules import SCHEDULES

SIGMAS = (0.002, 0.01, 0.05, 0.2, 1.0, 5.0, 20.0, 80.0)


def points(n):
    """Eight clusters on a circle: (n, 2)."""
    angle = torch.arange(n) * (2 * math.pi / 8)
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * randn(n, 2)


def gaussian_batch(seed, B=40_000):
    """x0 ~ N(MU, C), noise, and sigma log-uniform between .1 and 3."""
    x0 = MU + randn(B, 2, seed=seed) * VAR.sqrt() @ Q.T
    u = torch.rand(B, 1, generator=generator(seed + 1), dtype=torch.float64)
    return x0, randn(B, 2, seed=seed + 2), 0.1 * 30 ** u


def largest_z(samples):
    """How many standard errors the mean of (B, k) samples is from zero, at most over k."""
    return (samples.mean(0) / samples.std(0) * len(samples) ** 0.5).abs().max().item()


def curved(x, sigma):
    """A denoiser that is good for nothing but has even and odd parts."""
    return (0.8 * x).tanh() + 0.1 * x ** 2 / (1 + sigma)


# ---- Denoising score matching --------------------------------------------------------------------

def test_dsm_loss_is_its_formula_by_hand():
    x0, noise = randn(5, 3, 4, 5, seed=1), randn(5, 3, 4, 5, seed=2)
    sigma = shaped([0.1, 0.5, 1.0, 3.0, 20.0], x0)
    got = dsm_loss(lambda x, s: 0.5 * x + s, x0, noise, sigma, constant_weight)
    x = x0 + sigma * noise
    close(got, ((0.5 * x + sigma - x0) ** 2 / sigma ** 2).sum((1, 2, 3)) / 60)


def test_dsm_minimiser_is_the_posterior_mean_of_gaussian_data():
    """And the least value of the loss is the posterior's variance."""
    batch, wrong = gaussian_batch(seed=20), gaussian_denoiser(0.8 * C)
    assert largest_z(gradients(dsm_loss, gaussian_denoise, *batch, torch.ones_like)) < 3.5
    assert largest_z(gradients(dsm_loss, wrong, *batch, torch.ones_like)) > 10
    least, square = dsm_loss(gaussian_denoise, *batch, torch.ones_like), batch[2] ** 2
    variance = (VAR * square / (VAR + square)).mean(1)
    assert largest_z((least - variance)[:, None]) < 3.5


def test_antithetic_loss_is_the_mean_of_dsm_loss_at_both_noises():
    x0, noise = randn(5, 3, 4, 4, seed=30), randn(5, 3, 4, 4, seed=31)
    sigma = shaped([0.01, 0.1, 1, 5, 50], x0)
    plus, minus = (dsm_loss(curved, x0, e, sigma, constant_weight) for e in (noise, -noise))
    close(antithetic_loss(curved, x0, noise, sigma, constant_weight), (plus + minus) / 2)


def test_antithetic_variance_at_small_sigma_is_far_below_a_half():
    """Given x0: of the loss and of its gradients.  Two independent noises would halve it."""
    x0, noise = tensor([1.0, -0.7]).expand(20_000, 2), randn(20_000, 2, seed=37)
    for sigma, most in ((0.01, 0.002), (0.1, 0.2)):
        batch = curved, x0, noise, x0.new_full((20_000, 1), sigma), torch.ones_like
        assert antithetic_loss(*batch).var() < most * dsm_loss(*batch).var()
        pair, single = gradients(antithetic_loss, *batch), gradients(dsm_loss, *batch)
        assert (pair.var(0) < most * single.var(0)).all()


# ---- Copies of a batch ---------------------------------------------------------------------------

def test_together_equals_the_copies_calls_and_repeats_the_batchs_labels():
    """GroupNorm is per sample, so it does not see that the copies share a batch."""
    denoiser = small_unet(classes=3, augment_dim=9).double().eval()
    x, sigma = randn(3, 6, 1, 8, 8, seed=1), randn(3, 6, 1, 1, 1, seed=2).exp()
    labels = dict(labels=torch.arange(6) % 3, augment_labels=randn(6, 9, seed=3))
    got = together(partial(denoiser, **labels), x, sigma)
    for k in range(3):
        close(got[k], denoiser(x[k], sigma[k], **labels), rtol=1e-7, atol=1e-7)


def test_every_loss_calls_the_network_once_with_all_its_copies():
    x0, noise = randn(4, 2, seed=1), randn(3, 4, 2, seed=2)
    sigma, calls = shaped([0.1, 1, 2, 3], x0), []

    def recorded(x, sigma):
        assert len(sigma) == len(x)
        calls.append(len(x))
        return curved(x, sigma)
    batch = recorded, x0, noise[0], sigma, constant_weight
    dsm_loss(*batch)
    stf_loss(*batch, partial(stf_target, reference=x0))
    antithetic_loss(*batch)
    sa_loss(recorded, x0, noise, sigma.expand(3, 4, 1), constant_weight, torch.ones(3, 4, 1))
    for order in (0, 1, 2):
        taylor_terms(*batch, SCHEDULES["edm"]().precondition, order)
    assert calls == [4, 4, 8, 12, 8, 8, 8]


# ---- Stable target fields ------------------------------------------------------------------------

def direct_weights(x, sigma, reference):
    """softmax_k(-|x - y_k|^2 / 2 sigma^2) by the (B, n, d) broadcast, in float64."""
    square = ((x.double()[:, None] - reference.double()) ** 2).flatten(2).sum(2)
    return (-square / (2 * sigma.double().flatten(1) ** 2)).softmax(1)


def direct(x, sigma, reference):
    w = direct_weights(x, sigma, reference)
    return torch.einsum("bk,k...->b...", w, reference.double())


def test_stf_eq_5_target_is_the_direct_softmax_at_every_sigma():
    """In any chunks; each sample has its own sigma."""
    reference = randn(65, 3, 8, 8).float()
    x0 = reference[:8]
    sigma = shaped(SIGMAS, x0)
    x = x0 + sigma * randn(*x0.shape, seed=3).float()
    weights, want = direct_weights(x, sigma, reference), direct(x, sigma, reference)
    for chunk in (1, 7, 1000):
        got = stf_target(x, sigma, reference, chunk=chunk)
        assert got.dtype == x.dtype
        close(got.double(), want, rtol=1e-6, atol=1e-7)
        close(stf_weights(x, sigma, reference, chunk=chunk), weights, rtol=1e-6, atol=1e-9)


def test_stf_target_is_exact_between_near_duplicates_and_does_not_heed_autocast():
    """32 rows at distance sigma from one: the weights are mixed, and every digit of them shows."""
    base, away = randn(1, 3, 8, 8, seed=14).float(), randn(31, 3, 8, 8, seed=11).float()
    away = away / away.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    for sigma in SIGMAS:
        reference = torch.cat([randn(32, 3, 8, 8, seed=12).float(), base, base + sigma * away])
        s = shaped([sigma], base)
        x = base + s * randn(*base.shape, seed=15).float()
        w, want = direct_weights(x, s, reference), direct(x, s, reference)
        assert 3 < 1 / (w ** 2).sum() < 60
        got = stf_target(x, s, reference)
        double = stf_target(x.double(), s.double(), reference.double())
        close(got.double(), want, rtol=1e-6, atol=1e-7)
        assert (double - want).norm() < 1e-6 * sigma
        with torch.autocast("cpu", torch.bfloat16):
            assert (x.flatten(1) @ x.flatten(1).T).dtype == torch.bfloat16       # it is active
            assert torch.equal(stf_target(x, s, reference), got)


def test_stf_n_1_is_dsm_bit_for_bit():
    """STF sec. 4: "When n = 1, STF reduces to the vanilla denoising score-matching"."""
    x0, noise = randn(2, 1, 3, 8, 8).float()
    target = partial(stf_target, reference=x0)
    for sigma in SIGMAS:
        batch = curved, x0, noise, shaped([sigma], x0), constant_weight
        assert torch.equal(stf_loss(*batch, target), dsm_loss(*batch))


def test_stf_target_on_a_whole_finite_set_is_the_exact_posterior_mean():
    """By Tweedie's formula, E[x0 | x] = x + sigma^2 grad log p_t(x), with p_t differentiated."""
    data, x = points(24).requires_grad_(), (2 * randn(50, 2, seed=9)).requires_grad_()
    sigma = 0.05 * (100 ** (torch.arange(50)[:, None] / 49)).double()
    log_p = (-((x[:, None] - data) ** 2).sum(2) / (2 * sigma ** 2)).logsumexp(1)
    score, = torch.autograd.grad(log_p.sum(), x)
    got = stf_target(x, sigma, data)
    close(got, x + sigma ** 2 * score, atol=1e-9)
    assert not got.requires_grad


def test_stf_target_of_far_and_near_noise():
    """The limits: the nearest row as sigma -> 0, the mean of the references as it grows."""
    reference = randn(32, 3, 4, 4)
    x0 = reference[:4]
    near, far = (torch.full((4, 1, 1, 1), sigma).double() for sigma in (0.01, 1e5))
    close(stf_target(x0, near, reference), x0, atol=1e-6)
    close(stf_target(x0, far, reference), reference.mean(0).expand(4, -1, -1, -1), atol=1e-5)


def test_stf_sec_4_target_in_each_kernels_own_frame_is_the_target_at_x_over_s_and_sigma():
    """x_t ~ N(a x0, std^2 I), as printed, at quantile u of training; here x = x_t/s(t), sigma."""
    reference, u = randn(40, 2, seed=10), torch.linspace(0.02, 0.98, 20).double()[:, None]
    t = 1e-5 + u * (1 - 1e-5)                                # VP's beta runs from .1 to 20
    a, one = (-(20 - 0.1) * t ** 2 / 4 - 0.1 * t / 2).exp(), torch.ones_like(u)
    kernels = {"vp": (a, (1 - a ** 2).sqrt()), "ve": (one, 0.02 * (100 / 0.02) ** u),
               "edm": (one, (-1.2 + 1.2 * torch.special.ndtri(u)).exp())}
    for name, (a, std) in kernels.items():
        schedule = SCHEDULES[name]()
        x_t, sigma = a * reference[:20] + std * randn(20, 2, seed=11), schedule.training_sigma(u)
        x = x_t / schedule.s(schedule.sigma_inv(sigma))
        w = torch.cat([direct_weights(x_t[[i]], std[[i]], a[i] * reference) for i in range(20)])
        close(stf_target(x, sigma, reference), w @ reference, rtol=1e-7)


def test_stf_labels_average_over_the_own_class_only():
    """In any chunks, of which some hold no reference of a class.  NaN where no chunk does."""
    reference, classes = randn(48, 3, 8, 8).float(), torch.arange(48) // 16
    x0, labels = reference[::5], classes[::5]
    sigma = shaped([0.5 + 2 * i for i in range(10)], x0)
    x = x0 + sigma * randn(10, 3, 8, 8, seed=16).float()
    want = torch.cat([direct(x[[i]], sigma[[i]], reference[classes == labels[i]])
                      for i in range(10)])
    plain = stf_target(x, sigma, reference)
    assert ((plain - want).flatten(1).norm(dim=1) > 0.1).any()               # the classes do matter
    for chunk in (5, 1000):
        got = stf_target(x, sigma, reference, labels, classes, chunk=chunk)
        close(got.double(), want, rtol=1e-6, atol=1e-7)
    got = stf_target(x[:2], sigma[:2], reference, torch.tensor([0, 7]), classes)
    assert got[0].isfinite().all() and got[1].isnan().all()


def test_stf_target_makes_tensors_of_B_n_and_chunk_d_but_never_of_B_n_d():
    """So of a uint8 reference only a chunk at a time is in floating point."""
    B, n, d, chunk = 64, 500, 100, 32
    reference = torch.randint(256, (n, d), generator=generator(0)).byte()
    x, labels = randn(B, d, seed=18), torch.arange(n) % 2
    with Largest() as largest:
        stf_target(x, x.new_ones(B, 1), reference, labels[:B], labels, chunk=chunk)
    assert largest.numel == B * n < n * d


def test_stf_algorithm_1_minibatch_is_part_of_the_reference():
    """L = mean_i lambda |D(x_i) - v(x_i)|^2."""
    reference = randn(12, 1, 2, 2, seed=21)
    x0, noise = reference[:5], randn(5, 1, 2, 2, seed=22)
    sigma = shaped([0.3, 0.6, 1.0, 2.0, 5.0], x0)
    got = stf_loss(lambda x, s: x / (1 + s), x0, noise, sigma, lambda s: (1 + s) / s,
                   partial(stf_target, reference=reference))
    x = x0 + sigma * noise
    want = (1 + sigma) / sigma * (x / (1 + sigma) - direct(x, sigma, reference)) ** 2
    close(got, want.sum((1, 2, 3)) / 4)


# ---- Stable target fields: theorems --------------------------------------------------------------

X = torch.linspace(-2, 3, 11, dtype=torch.float64)[:, None]              # where x is looked at
RING = points(64)                                                        # some data


def test_stf_is_unbiased_for_every_n_and_any_prior():
    """The paper calls STF biased, the less the larger n (sec. 5.1); with the source it is not.

    E[stf_target | x], summed over every batch of n that could be drawn; its first row is the
    source, or, for comparison, one more draw from the prior.
    """
    data, prior = tensor([-1.0], [0.2], [1.5]), tensor(0.5, 0.2, 0.3)
    s = torch.full_like(X, 0.8)
    r = direct_weights(X, s, data) * prior
    r = r / r.sum(1, keepdim=True)                                       # p(x0 = data_j | x)
    for n in (1, 2, 3, 5):
        with_source = without = 0
        for batch in itertools.product(range(3), repeat=n):
            target = stf_target(X, s, data[list(batch)])
            others = math.prod(prior[k].item() for k in batch[1:])
            with_source = with_source + r[:, batch[0], None] * others * target
            without = without + prior[batch[0]] * others * target
        close(with_source, r @ data)
        assert (without - r @ data).abs().max() > 0.1


def target_variances(sigma, n, B=2000):
    """Squared errors of the DSM and of the STF target about E[x0 | x], (B,) each, and x.

    Data RING.  Each sample has n references of its own; vmap runs stf_target on each sample alone.
    """
    references = RING[torch.randint(64, (B, n), generator=generator(40))]         # (B, n, 2)
    x0, s = references[:, 0], RING.new_full((B, 1), sigma)
    x = x0 + s * randn(B, 2, seed=41)
    stf = torch.func.vmap(stf_target)(x[:, None], s[:, None], references)[:, 0]
    exact = direct(x, s, RING)
    return ((x0 - exact) ** 2).sum(1), ((stf - exact) ** 2).sum(1), x


def test_stf_rao_blackwell_its_variance_is_at_most_that_of_dsm():
    for sigma in (0.05, 0.2, 1.0, 20.0):
        dsm, stf, _ = target_variances(sigma, n=16)
        saved = dsm - stf
        assert saved.mean() / saved.std() * len(saved) ** 0.5 > 5


def test_stf_theorem_2_far_field_variance_falls_as_1_over_n():
    """V_STF <~ V_DSM/(n - 1) where p(x0|x) ~ p0: the target is then the plain mean of n rows."""
    for n in (4, 16, 64):
        dsm, stf, _ = target_variances(50.0, n)
        assert 0.85 / n < stf.mean() / dsm.mean() < 1.15 / n


def test_stf_theorem_2_bound_holds():
    """V_STF <= (V_DSM + sigma^2 sqrt(3) d sqrt(E_x D_f(p0 | p(.|x))))/(n - 1), as D's variances.

    D_f = E_{p(x0|x)} f(p0/p(x0|x)),  f(y) = (1/y - 1)^2 for y < 1.5, 8y/27 - 1/3 from there on.
    """
    for sigma in (0.1, 0.5, 1.0, 20.0):
        dsm, stf, x = target_variances(sigma, n=16)
        p = direct_weights(x, x.new_full((len(x), 1), sigma), RING)
        near = 64 * p > 1 / 1.5                                             # y = 1/(64 p) < 1.5
        p_f = torch.where(near, p * (64 * p - 1) ** 2, 8 / 27 / 64 - p / 3)       # p f(y)
        D_f = p_f.sum(1).mean()
        bound = (dsm.mean() + sigma ** 2 * 3 ** 0.5 * 2 * D_f ** 0.5) / 15
        assert 0 < stf.mean() < bound
        if sigma <= 0.5:
            assert stf.mean() > 1.3 * dsm.mean() / 15           # so the second term is needed


def test_stf_theorem_1_target_is_asymptotically_normal():
    """sqrt(n) (target - E[x0|x]) -> N(0, E_p0[p(x|y)^2 (y - E[x0|x])^2] / p(x)^2), times sigma^-4
    for scores; of one batch's target, for eq. 7's minimiser, which eq. 8 names, is a mean over
    batches, without a law of its own.  Data {0, 1}, the number of ones in the batch summed over.

    The paper's eq. 8 prints Cov(p(x|y) (y - x)) in place of the second moment about E[x0|x]: right
    for weights with p(x) known, but not for the self-normalised ones, whose limit this is.
    """
    x, sigma = X[[3, 5, 9]], torch.ones(3, 1).double()                      # -.5, .5, 2.5
    r = (x - 0.5).sigmoid()                                                 # p(x0 = 1 | x)
    limit, printed = 4 * (r * (1 - r)) ** 2, (r * (1 - x) + (1 - r) * x) ** 2
    gap, skew = [], []
    for n in (16, 64, 256):
        target = torch.cat([stf_target(x, sigma, (torch.arange(n)[:, None] < k).double())
                            for k in range(n + 1)], 1)                      # (3, n + 1)
        k = torch.arange(n, dtype=torch.float64)                            # ones among the others
        p = torch.distributions.Binomial(n - 1, tensor(0.5)).log_prob(k).exp()
        zero, one = F.pad(p, (0, 1)), F.pad(p, (1, 0))                      # by the source's value
        p = (1 - r) * zero + r * one                                        # (3, n + 1)
        mean = (p * target).sum(1, keepdim=True)
        close(mean, r)
        variance = (p * (target - mean) ** 2).sum(1, keepdim=True)
        gap.append((n * variance / limit - 1).abs().max().item())
        skew.append(((p * (target - mean) ** 3).sum(1, keepdim=True) / variance ** 1.5).abs())
    assert gap[2] < 0.05 and gap[2] < gap[1] / 3 < gap[0] / 9               # falls as 1/n
    assert (skew[2][[0, 2]] < 0.6 * skew[1][[0, 2]]).all()                  # falls as 1/sqrt(n)
    assert (printed / limit - 1)[2] > 1 and (printed / limit)[1] == pytest.approx(1)


# ---- Second heads --------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["sn", "npr"])
def test_head_minimiser_is_the_conditional_second_moment_of_gaussian_data(kind):
    """E[eps^2 | x] = eps_hat^2 + diag C (C + sigma^2 I)^-1, and the second term alone is NPR's.

    The denoiser is not trained by it.
    """
    batch, gain = gaussian_batch(seed=70), torch.ones(1).double().requires_grad_()

    def head(x, s):
        spread = VAR / (VAR + s ** 2) @ (Q ** 2).T
        return spread + ((x - gaussian_denoise(x, s)) / s) ** 2 if kind == "sn" else spread

    def smaller(x, s):
        return 0.8 * head(x, s)

    def loss(h, x0, noise, sigma):
        def with_head(x, s):
            return gain * gaussian_denoise(x, s), h(x, s)
        return head_loss(with_head, x0, noise, sigma, kind)

    assert largest_z(gradients(loss, head, *batch)) < 3.5
    assert largest_z(gradients(loss, smaller, *batch)) > 10
    assert not loss(head, *batch).requires_grad
