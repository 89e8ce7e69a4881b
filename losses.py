"""losses.py: what is minimised.

    x0 (B, ...)  clean data    noise (B, ...)  N(0, I), drawn by the caller    sigma (B, 1, ..., 1)
    x = x0 + sigma * noise     denoise(x, sigma) -> (B, ...)  an estimate of E[x0 | x]
    weight(sigma) -> lambda    the weight on |D - x0|^2, e.g. a schedule's
    every loss returns (B,);  every shape rank works: (B, 2) points as well as (B, C, H, W)
    Needs: names the other functions of this file that must travel with a copy

D seen otherwise: eps_hat = (x - D)/sigma, score = (D - x)/sigma^2.  In losses |.|^2 is a mean over
a sample's coordinates, so that losses compare across sizes (published code sums); in STF's
|x - y_k|^2 and in the Taylor control products are sums.  Labels are bound to `denoise` by the
caller, and appear here only where references of another class must not count.

Sources: EDM = Karras et al. 2022; STF = Xu et al. 2023, "Stable Target Field for Reduced Variance
Score Estimation in Diffusion Models"; SA = Nguyen et al. 2024, "On Inference Stability for
Diffusion Models"; DB = Yu et al. 2024, "Unmasking Bias in Diffusion Model Training"; TCV = Jeha et
al. 2024, "Variance reduction of diffusion model's gradients with Taylor approximation-based control
variate"; P2 = Choi et al. 2022; Min-SNR = Hang et al. 2023; SN/NPR-DPM = Bao et al. 2022.
"""

import math

import torch


# ---- Weights -------------------------------------------------------------------------------------
# Each is lambda(sigma) on |D - x0|^2.  A weight on one target is a weight on the others:
#
#     w_eps |eps_hat - eps|^2 = lambda |D - x0|^2    w_eps = lambda sigma^2       (DB eq. 6-7)
#     w_v   |v_hat - v|^2     = lambda |D - x0|^2    w_v   = lambda sigma^2/(1 + sigma^2)
#     w_F   |F_hat - F|^2     = lambda |D - x0|^2    w_F   = lambda c_out^2      (EDM eq. 8)
#
# with SNR = 1/sigma^2.  Published code states w_eps, EDM w_F; the docstrings have it beside lambda.

def constant_weight(sigma):
    """lambda = 1/sigma^2: w_eps = 1, DDPM's simple loss (DB eq. 1).  Needs: nothing."""
    return 1 / sigma ** 2


def p2_weight(sigma, k=1.0, gamma=1.0):
    """lambda = 1/(sigma^2 (k + SNR)^gamma): w_eps = 1/(k + SNR)^gamma (P2).

    Written without SNR, so that sigma may be 0 where gamma is at least 1.  Needs: nothing.
    """
    return sigma ** (2 * gamma - 2) / (k * sigma ** 2 + 1) ** gamma


def min_snr_weight(sigma, gamma=5.0):
    """lambda = min(SNR, gamma): w_eps = min(SNR, gamma)/SNR (Min-SNR).  Needs: nothing."""
    return (1 / sigma ** 2).clamp(max=gamma)


def inverse_snr_weight(sigma):
    """lambda = 1: w_eps = 1/SNR, the same weight on x0 everywhere.  Needs: nothing."""
    return torch.ones_like(sigma)


def debias_weight(sigma):
    """lambda = 1/sigma: w_eps = 1/sqrt(SNR) = sigma (DB eq. 8).

    The geometric mean of constant_weight and inverse_snr_weight.  Needs: nothing.
    """
    return 1 / sigma


def edm_weight(sigma, sigma_data=0.5):
    """lambda = (sigma^2 + sigma_data^2)/(sigma sigma_data)^2 (EDM Table 1): w_F = 1.

    For D = c_skip x + c_out F(c_in x; c_noise), dsm_loss is EDM eq. 8,

        lambda |D - x0|^2 = lambda c_out^2 |F - (x0 - c_skip x)/c_out|^2

    and this weight makes lambda c_out^2 = 1 with EDM's c_out.
    Needs: nothing.
    """
    return (sigma ** 2 + sigma_data ** 2) / (sigma * sigma_data) ** 2


WEIGHTS = {"constant": constant_weight, "p2": p2_weight, "min-snr": min_snr_weight,
           "inverse-snr": inverse_snr_weight, "debias": debias_weight, "edm": edm_weight}


# ---- Denoising score matching --------------------------------------------------------------------

def dsm_loss(denoise, x0, noise, sigma, weight):
    """Denoising score matching: lambda(sigma) |D(x; sigma) - x0|^2   (EDM eq. 2, STF eq. 2).

    x0, noise (B, ...), sigma (B, 1, ..., 1) -> (B,).  Its minimiser is E[x0 | x].  Needs: nothing.
    """
    x = x0 + sigma * noise                                                        # (B, ...)
    return (weight(sigma) * (denoise(x, sigma) - x0) ** 2).flatten(1).mean(1)     # (B,)


def antithetic_loss(denoise, x0, noise, sigma, weight):
    """The mean of dsm_loss at noise and at -noise, an antithetic pair.

    What is odd in the noise cancels: at small sigma, most of the variance of the gradient, though
    not of the loss.  The pair costs two evaluations of D, in one call.  A Taylor control variate of
    order 0 costs as much, and has to take more variance away to be worth it.  Needs: together.
    """
    x = x0 + sigma * torch.stack([noise, -noise])                                 # (2, B, ...)
    D = together(denoise, x, torch.stack([sigma, sigma]))
    return (weight(sigma) * (D - x0) ** 2).mean(0).flatten(1).mean(1)             # (B,)


def together(denoise, x, sigma):
    """D of c copies of a batch in one call: x (c, B, ...), sigma (c, B, 1, ..., 1) -> (c, B, ...).

    denoise sees one batch of c B rows, the first copy's first.  Labels bound for B rows must be
    repeated c times for it, as networks.Denoiser does.  Dropout draws a mask for each row, so
    copies have different masks.  Needs: nothing.
    """
    return denoise(x.flatten(0, 1), sigma.flatten(0, 1)).unflatten(0, x.shape[:2])


# ---- Stable target fields ------------------------------------------------------------------------

def rows(reference, like, chunk=512):
    """The references y_k, `chunk` of them at a time, as (chunk, d) in like's dtype and device.

    uint8 images become [-1, 1] here, so a large reference never is floating-point as a whole.
    Needs: nothing.
    """
    for y in reference.split(chunk):
        y = y.to(like.device)
        yield (y.float() / 127.5 - 1 if y.dtype == torch.uint8 else y).flatten(1).to(like)


@torch.no_grad()
def stf_weights(x, sigma, reference, labels=None, reference_labels=None, chunk=512, transform=None):
    """Posterior weights of references y_k: softmax_k(-|x - y_k|^2 / (2 sigma^2))   (STF eq. 5).

    This is attention with query x and keys y.  |x|^2 is the same for all k and drops out; what is
    left of the exponent, (x.y_k - |y_k|^2/2)/sigma^2, is one matrix product.

    x (B, ...), sigma (B, 1, ..., 1), reference (n, ...), like x or uint8 images that stand for
    [-1, 1], on any device -> (B, n) float64.  Time O(B n d), memory O(B n + chunk d), never
    (B, n, d).  With labels (B,) and reference_labels (n,) only references of the sample's own class
    count, as a class-conditional D demands; NaN where there is none.  1/sum_k w_k^2 is the
    effective sample size: where it is 1, the target is the nearest reference, x0: nothing is won.
    transform: a function of (m, ...) references, which then stand for y_k; None: as they are.

    float64 inside, whatever the inputs and autocast: the difference of two large products, over
    sigma^2, leaves float32 no digits between near-duplicates at small sigma.  Needs: rows.
    """
    variance = sigma.flatten(1).double() ** 2                                     # (B, 1)
    query, logits = x.flatten(1).double(), []                                     # (B, d)
    for y in rows(reference, query, chunk):                                       # (chunk, d)
        if transform is not None:
            y = transform(y.view(-1, *x.shape[1:])).flatten(1)
        logits.append((query @ y.T - torch.linalg.vecdot(y, y) / 2) / variance)   # (B, chunk)
    logits = torch.cat(logits, dim=1)                                             # (B, n)
    if labels is not None:
        logits = logits.masked_fill(labels[:, None] != reference_labels, -torch.inf)
    return logits.softmax(1)


@torch.no_grad()
def stf_target(x, sigma, reference, labels=None, reference_labels=None, chunk=512):
    """Stable target: E[x0 | x] when x0 is one of the rows y_k of a reference batch (STF eq. 5).

        w = softmax_k(-|x - y_k|^2 / (2 sigma^2)),      target = sum_k w_k y_k

    The paper writes the score of this target, sum_k w_k (y_k - x)/sigma^2 = (target - x)/sigma^2.
    x (B, ...), sigma (B, 1, ..., 1), reference (n, ...) -> (B, ...); labels, time, memory and
    precision as in stf_weights.

    Unbiased for every n, if each x's own source is among its references: given x and the unordered
    batch, row k is the source with probability w_k, so the target is E[x0 | x, batch], whose mean
    is E[x0 | x].  The paper (eq. 7) calls the target biased; that is true only of references
    without the source.  One reference is plain DSM; a whole finite data set gives its exact
    posterior mean.  Needs: stf_weights, weighted_sum, rows.
    """
    w = stf_weights(x, sigma, reference, labels, reference_labels, chunk)         # (B, n)
    return weighted_sum(w, reference, chunk).view_as(x).to(x.dtype)


def weighted_sum(w, reference, chunk=512):
    """sum_k w_k y_k: w (B, n), reference (n, ...) as in stf_weights -> (B, d).  Needs: rows."""
    return sum(w_k @ y for w_k, y in zip(w.split(chunk, dim=1), rows(reference, w, chunk)))


def stf_loss(denoise, x0, noise, sigma, weight, target):
    """Stable target field: lambda(sigma) |D(x; sigma) - target|^2   (STF eq. 6, Algorithm 1).

    target(x, sigma) -> (B, ...), e.g. partial(stf_target, reference=reference) with the rows of x0
    among the reference's own.  Its minimiser is that of dsm_loss.  A single sample's gradient never
    varies more; samples that share a reference can, together, where the reference is small.
    Needs: nothing.
    """
    x = x0 + sigma * noise                                                        # (B, ...)
    target = target(x, sigma)
    return (weight(sigma) * (denoise(x, sigma) - target) ** 2).flatten(1).mean(1)  # (B,)


# The losses that train.py calls alike, by --loss.
LOSSES = {                 # called with (denoise, x0, noise, sigma, weight)
    "dsm": dsm_loss,
    "antithetic": antithetic_loss,
}
STABLE_LOSSES = {          # called with (denoise, x0, noise, sigma, weight, target)
    "stf": stf_loss,
}


# ---- Sequence-aware loss -------------------------------------------------------------------------
# K consecutive levels t, t-1, ... of a ladder sigma_1 < ... < sigma_T; row 0 of every (K, B, ...)
# tensor is t.

def sa_tau(ladder, t, K, kind="unit"):
    """tau of the K levels t, t-1, ..., t-K+1; zero outside the ladder   (SA Theorem 1).

        tau_i = sqrt(ab_1) sigma_1^2 (sigma_i^2 - sigma_{i-1}^2) / (sigma_i sigma_{i-1}^2)

    which is the paper's formula in sigma, with ab_1 = 1/(1 + sigma_1^2).  An error e of eps_hat at
    step i moves x_{i-1} by -(1 - sigma_{i-1}^2/sigma_i^2) sigma_i e, and each later step j shrinks
    that by sigma_{j-1}^2/sigma_j^2; the product telescopes, and sqrt(ab_1) is DDPM's scale of x_1.

    kind 'unit': 1, as the published code has it;  'paper': tau_i, and tau_1 = 0: on linear betas it
    falls from 8e-3 at i = 2 to 1e-8 at 1000, so that its loss does next to nothing;  'window':
    tau_s/tau_t, or tau_s/tau_T for t > T, so that the highest level has the factor 1, also at
    t = 1.  ValueError: another kind.

    ladder (T,), t (B,) int64 -> (K, B) float64.  t in 1..T, as published, or in 0..T+K-1, as in
    the paper, where each level is in K windows.  Needs: nothing.
    """
    s = t - torch.arange(K, device=t.device)[:, None]                             # (K, B)
    inside, variance = (s >= 1) & (s <= len(ladder)), ladder.double() ** 2
    step = variance.diff() / (ladder.double()[1:] * variance[:-1])                # (T-1,) i = 2..T
    tau = torch.cat([step[:1] * 0, step * variance[0] / (1 + variance[0]).sqrt()])
    tau = tau[s.clamp(1, len(ladder)) - 1]
    if kind == "unit":
        tau = torch.ones_like(tau)
    elif kind == "window":
        tau = torch.where(tau[0] > 0, tau / tau[0], 1.0)
    elif kind != "paper":
        raise ValueError(f"tau {kind!r} is none of unit, window, paper")
    return tau * inside


def path_noise(noise, sigma):
    """The noises of K levels read off one forward trajectory, from independent ones.

        sigma_s eps_s = sigma_{s-1} eps_{s-1} + sqrt(sigma_s^2 - sigma_{s-1}^2) z_s

    noise (K, B, ...), sigma (K, B, 1, ..., 1) falling along K -> (K, B, ...), each N(0, I).
    Needs: nothing.
    """
    below = torch.cat([sigma[1:], torch.zeros_like(sigma[:1])])
    steps = (sigma ** 2 - below ** 2).sqrt() * noise
    return steps.flip(0).cumsum(0).flip(0) / sigma


def sa_loss(denoise, x0, noise, sigma, weight, tau, lam=1.0):
    """Sequence-aware loss: L_simple + lam |1/K sum_s tau_s (eps_hat_s - eps_s)|^2   (SA Alg. 2).

    L_simple is dsm_loss at the first of the K levels; all K go through the network in one call.
    Published: lam 1, .3, .2 for K = 2, 3, 4, and an independent noise at each level.  Those noises
    share x0 alone, so the cross terms pull the minimiser away from E[x0 | x]: on Gaussian data with
    K = 2, lam = 1 it predicts .75 of E[noise | x] at t = 10.  With path_noise that is .98.

    x0 (B, ...), noise (K, B, ...), sigma, tau (K, B, 1, ..., 1) -> (B,).  Needs: together.
    """
    D = together(denoise, x0 + sigma * noise, sigma)                              # (K, B, ...)
    simple = weight(sigma[0]) * (D[0] - x0) ** 2
    gap = (tau * (x0 - D) / sigma).mean(0)            # (B, ...), for eps_hat - eps = (x0 - D)/sigma
    return (simple + lam * gap ** 2).flatten(1).mean(1)


# ---- Taylor control variates ---------------------------------------------------------------------
# A control variate is a function of (x0, noise) whose mean over the noise is known to be 0, and
# whose gradient rises and falls with that of the loss.  Subtracting it keeps the mean of both, and
# takes variance from the gradient (TCV section 3).  With D = c_skip x + c_out F, the loss is
#
#     lambda |D - x0|^2 = lambda c_out^2 |F - t|^2,    F's target t = a x0 - b noise,
#     a = (1 - c_skip)/c_out,  b = c_skip sigma/c_out
#
# and contains the term 2 b F.noise.  The control is that term with a Taylor polynomial for F:
#
#     2 b (T^k.noise - E),    T^k = the Taylor polynomial of F around the clean x0, to order k
#
# where E is the mean of T^k.noise: 0 for k = 0, c_in sigma tr(Jacobian of F) for k = 1 and 2.
# Products here are sums over coordinates; taylor_terms takes the mean over them at the end.

def taylor_control(D0, y, noise, sigma, c_skip, order=0, probe=None):
    """The terms, one for each coordinate, whose sum is c_out^2 b (T^k.noise - E), of mean 0.

    F is known only through G = c_out F.  As c_out b = c_skip sigma, with G's T and E this is

        c_skip sigma (T.noise - E),    G(y) = D(y; sigma) - c_skip y,    J, H: its derivatives
        T = G + sigma J noise + sigma^2/2 H[noise, noise],    E = sigma tr J (order 0: T = G, E = 0)

    The trace is exact, by d products with J.  With a probe (B, ...) of random signs the trace is
    estimated by Hutchinson's probe.J probe, which has the same mean, costs one product and adds
    variance.
    y (B, ...) with requires_grad if order > 0, D0 = D(y; sigma), c_skip (B, 1, ..., 1) -> (B, ...).
    Needs: nothing.
    """
    G = D0 - c_skip * y
    dot = G * noise                                                               # T.noise - E

    def product(v):
        return torch.autograd.grad(G, y, v, create_graph=True)[0]                 # J^T v

    if order > 0 and probe is None:
        basis = torch.eye(y[0].numel(), dtype=y.dtype, device=y.device)
        basis = basis.view(-1, 1, *y.shape[1:])                                   # (d, 1, ...)
        trace = sum(product(e.expand_as(y)) * e for e in basis)
        dot = dot + sigma * (product(noise) * noise - trace)
    elif order > 0:
        dot = dot + sigma * (product(noise) * noise - product(probe) * probe)
    if order > 1:
        curve = (product(noise) * noise + 0 * y).sum()     # noise.J noise; + 0 y: J may be constant
        H = torch.autograd.grad(curve, y, create_graph=True)[0]              # noise.H[noise, .]
        dot = dot + sigma ** 2 / 2 * H * noise
    return c_skip * sigma * dot


def taylor_terms(denoise, x0, noise, sigma, weight, precondition, order=0, probe=None):
    """dsm_loss and its control variate of order 0, 1 or 2, both (B,)   (TCV).

    Minimise loss - beta(sigma) control, with beta from past batches (RunningBeta).  The gradient
    keeps its mean for every network, order, beta and sigma.  Order 0 does nearly all the work, at
    sigma well below the data's own scale; order 1 gains a constant factor, order 2 hardly anything.

    precondition: D's, sigma -> c_skip, ...; c_skip alone is used.  D is called once, on 2 B rows.
    Orders 1 and 2 add a backward pass through D for each product in taylor_control, and order 2 one
    through such a pass; D's attention must have second derivatives then
    (torch.nn.attention.sdpa_kernel(SDPBackend.MATH)).
    Needs: together, taylor_control.
    """
    y = x0.detach()
    if order > 0:
        y.requires_grad_()
    x = torch.stack([x0 + sigma * noise, y])                                      # (2, B, ...)
    D, D0 = together(denoise, x, torch.stack([sigma, sigma]))
    c_skip, *_ = precondition(sigma)
    control = taylor_control(D0, y, noise, sigma, c_skip, order, probe)
    loss, control = weight(sigma) * (D - x0) ** 2, 2 * weight(sigma) * control
    return loss.flatten(1).mean(1), control.flatten(1).mean(1)                    # (B,), (B,)


class RunningBeta:
    """beta(sigma) = <g_loss, g_control> / |g_control|^2, the regression coefficient of gradients.

    g_loss and g_control are per-sample gradients of a few parameters; those of the last layer are
    a good proxy for all.  beta must come from past batches: one from the same batch adds bias.
    Each bin of ln sigma keeps running sums of these two products and of n, the number of samples;
    each new sample multiplies the old sums by `decay`.  beta is (n measured + 4 guess)/(n + 4),
    clamped to [0, 1.2], of sigma's shape.  The guess is 1/(1 + (sigma/scale)^1.3), where scale is
    about twice the smallest local spread of the data, by default of the built-in ring.
    All state is one tensor, sums (3, bins).  Needs: nothing.
    """

    def __init__(self, low=1e-3, high=100.0, bins=24, decay=0.99, scale=0.13, device="cpu"):
        self.low, self.high, self.decay, self.scale = low, high, decay, scale
        self.sums = torch.zeros(3, bins, device=device)     # <g_loss, g_control>, |g_control|^2, n

    def bin(self, sigma):
        share = (sigma / self.low).log() / math.log(self.high / self.low)
        return (share * self.sums.shape[1]).long().clamp(0, self.sums.shape[1] - 1)

    def __call__(self, sigma):
        product, square, count = self.sums[:, self.bin(sigma)].to(sigma.dtype)
        prior, trust = 1 / (1 + (sigma / self.scale) ** 1.3), count / (count + 4)
        return torch.lerp(prior, product / square.clamp(min=1e-30), trust).clamp(0, 1.2)

    def update(self, sigma, loss, control, parameters):
        """loss, control (m,) with graph, of samples with noise levels sigma (m, 1, ..., 1)."""
        def gradients(values):
            return torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(
                value, parameters, retain_graph=True)]) for value in values])     # (m, p)

        g_loss, g_control = gradients(loss), gradients(control)
        one = torch.ones_like(g_loss[:, 0])
        new = torch.stack([(g_loss * g_control).sum(1), (g_control ** 2).sum(1), one])
        new = torch.where(new.isfinite().all(0), new, 0).to(self.sums)            # (3, m)
        k = self.bin(sigma.flatten())
        count = torch.zeros_like(self.sums[0]).index_add(0, k, new[2])
        self.sums = (self.sums * self.decay ** count).index_add(1, k, new)


# ---- Second heads --------------------------------------------------------------------------------

def head_loss(with_head, x0, noise, sigma, kind="sn"):
    """Regression of a second head h on squared noise, for the covariances of the DDPM sampler.

        sn   |h - eps^2|^2                   h -> E[eps^2 | x]                 (SN-DPM)
        npr  |h - (eps - eps_hat)^2|^2       h -> E[(eps - eps_hat)^2 | x]     (NPR-DPM)

    eps_hat = (x - D)/sigma, detached.  Train it with the network in eval mode: dropout in eps_hat
    would add its own variance to NPR's target, as it does in the published code.
    with_head(x, sigma) -> D, h, e.g. partial(denoiser, head=True);  x0, noise (B, ...), sigma
    (B, 1, ..., 1) -> (B,).  KeyError: another kind.  Needs: nothing.
    """
    x = x0 + sigma * noise                                                        # (B, ...)
    D, h = with_head(x, sigma)
    target = {"sn": noise, "npr": noise - ((x - D) / sigma).detach()}[kind]
    return ((h - target ** 2) ** 2).flatten(1).mean(1)                            # (B,)


# ---- Augmentation --------------------------------------------------------------------------------
# EDM Table 6: non-leaky, for the network is told (the 9 labels) and sampling asks for none (zeros).

def draw_augmentation(B, p, generator=None):
    """Parameters a_0 ... a_7 of EDM's augmentation, (B, 8), each zero unless it is on.

        x-flip  a_0 ~ U{0, 1}             y-flip      a_1 ~ U{0, 1}
        scaling a_2 ~ N(0, 1)             rotation    a_3 ~ U(-pi, pi)
        anisotropy a_4 ~ U(-pi, pi), a_5 ~ N(0, 1)    translation a_6, a_7 ~ N(0, 1)

    Each of the six is on with probability p, EDM's is .12 or .15; but the x-flip always, if p > 0.
    Needs: nothing.
    """
    coin, angle, gate = torch.rand(3, B, 6, generator=generator)
    normal = torch.randn(B, 4, generator=generator)
    on = gate < p
    on[:, 0] = p > 0
    angle = (2 * angle - 1) * torch.pi
    a = torch.stack([coin[:, 0] < 0.5, coin[:, 1] < 0.5, normal[:, 0], angle[:, 0], angle[:, 1],
                     normal[:, 1], normal[:, 2], normal[:, 3]], dim=1)
    return a * on[:, [0, 1, 2, 3, 4, 4, 5, 5]]


def augment_labels(a):
    """What the network is told of a (B, 8): (B, 9), zeros for the identity (EDM Table 6).

        a_0, a_1, a_2, cos a_3 - 1, sin a_3, a_5 cos a_4, a_5 sin a_4, a_6, a_7

    Needs: nothing.
    """
    a0, a1, a2, a3, a4, a5, a6, a7 = a.unbind(1)
    along = a5 * a4.cos(), a5 * a4.sin()
    return torch.stack([a0, a1, a2, a3.cos() - 1, a3.sin(), *along, a6, a7], dim=1)


def augment(images, a):
    """Flip, scale, rotate, stretch and shift square images by a (B, 8) (EDM Table 6).

        Translate(a_6/8, a_7/8) R(-a_4) Scale(2^(.2 a_5), 2^(-.2 a_5)) R(a_4) R(-a_3)
        Scale(2^(.2 a_2)) FlipY FlipX

    about the centre, the rightmost first, in one bicubic resampling with the border reflected at
    the outer pixels' edges (published code: at their centres).
    Exact for the identity and for flips; linear in the images.  On waves of 4 pixels and longer,
    turned by any angle, its rms error is at most 3.5 % of the waves' rms on average over
    directions, 4.5 % along the worst; shrinking is not filtered.

    images (B, C, H, H), a (B, 8) -> (B, C, H, H).  Needs: nothing.
    """
    a = a.to(images, non_blocking=True)
    a0, a1, a2, a3, a4, a5, a6, a7 = a.unbind(1)
    one = torch.ones_like(a0)

    def matrix(*top):                                       # its two upper rows -> (B, 3, 3)
        return torch.stack([torch.stack([v * one for v in row], 1) for row in [*top, [0, 0, 1]]], 1)

    scale = lambda x, y: matrix([x, 0, 0], [0, y, 0])
    turn = lambda r: matrix([r.cos(), -r.sin(), 0], [r.sin(), r.cos(), 0])
    warp = (matrix([1, 0, a6 / 4], [0, 1, a7 / 4])              # in grid_sample's units, H = 2
            @ turn(-a4) @ scale(2 ** (0.2 * a5), 2 ** (-0.2 * a5)) @ turn(a4)
            @ turn(-a3) @ scale(2 ** (0.2 * a2), 2 ** (0.2 * a2)))
    flip = lambda on, x, axis: torch.where(on.view(-1, 1, 1, 1) > 0, x.flip(axis), x)
    flipped = flip(a1, flip(a0, images, 3), 2)
    inverse = torch.linalg.inv_ex(warp).inverse             # inv would wait for the device
    grid = torch.nn.functional.affine_grid(inverse[:, :2], images.shape, align_corners=False)
    warped = torch.nn.functional.grid_sample(flipped, grid, mode="bicubic",
                                             padding_mode="reflection", align_corners=False)
    return torch.where((a[:, 2:] != 0).any(1).view(-1, 1, 1, 1), warped, flipped)


@torch.no_grad()
def augmented_stf_target(x, sigma, reference, a, labels=None, reference_labels=None, chunk=512):
    """stf_target where the source of x_i was augmented by a_i: so are its references.

        w = softmax_k(-|x - A y_k|^2 / (2 sigma^2)),    target = sum_k w_k A y_k = A sum_k w_k y_k

    Flips keep |A y_k|^2 = |y_k|^2.  So samples that are only flipped are flipped back and share
    one product with the plain reference.  Each other sample augments every reference of its class:
    n resamplings for a share 1 - (1 - p)^4 of the samples, 40 % at EDM's p = .12.  To pay less,
    give fewer references: the target is unbiased for every n.

    x (B, C, H, H), a (B, 8) -> (B, C, H, H).  a, labels and reference_labels lie on the CPU, where
    rows are chosen by them, so that nothing waits for x's device.  Each sample's class must be
    among the references'.  Needs: stf_target, stf_weights, weighted_sum, rows, augment.
    """
    flips = torch.cat([a[:, :2], torch.zeros_like(a[:, 2:])], dim=1)
    classes = () if labels is None else (labels.to(x.device, non_blocking=True),
                                         reference_labels.to(x.device, non_blocking=True))
    target = stf_target(augment(x, flips), sigma, reference, *classes, chunk=chunk)
    target = augment(target, flips)
    for i in (a[:, 2:] != 0).any(1).nonzero().flatten().tolist():
        y, a_i = reference, a[i:i + 1]
        if labels is not None:
            own = (reference_labels == labels[i]).nonzero().flatten()
            y = reference[own.to(reference.device, non_blocking=True)]

        def transform(y_k):
            return augment(y_k, a_i.expand(len(y_k), 8))
        w = stf_weights(x[i:i + 1], sigma[i:i + 1], y, chunk=chunk, transform=transform)  # (1, n)
        mean = weighted_sum(w, y, chunk).view_as(x[i:i + 1])
        target[i:i + 1] = augment(mean, a_i).to(x.dtype)
    return target
