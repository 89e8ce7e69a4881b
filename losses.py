"""losses.py: what is minimised.

    x0 (B, ...)  clean data    noise (B, ...)  N(0, I), drawn by the caller    sigma (B, 1, ..., 1)
    x = x0 + sigma * noise     denoise(x, sigma) -> (B, ...)  an estimate of E[x0 | x]
    weight(sigma) -> lambda    the weight on |D - x0|^2, e.g. a schedule row's
    every loss returns (B,);  every shape rank works: (B, 2) points as well as (B, C, H, W)

D seen otherwise: eps_hat = (x - D)/sigma, score = (D - x)/sigma^2.  In losses and their controls
|.|^2 and a.b are means over a sample's coordinates, so that losses compare across sizes (published
code sums); elsewhere, as in STF's |x - y_k|^2, they are sums.  Labels are bound to `denoise` by the
caller, and appear here only where references of another class must not count.

Sources: EDM = Karras et al. 2022; STF = Xu et al. 2023, "Stable Target Field for Reduced Variance
Score Estimation in Diffusion Models"; SA = Nguyen et al. 2024, "On Inference Stability for
Diffusion Models"; DB = Yu et al. 2024, "Unmasking Bias in Diffusion Model Training"; TCV = Jeha et
al. 2024, "Variance reduction of diffusion model's gradients with Taylor approximation-based control
variate"; P2 = Choi et al. 2022; Min-SNR = Hang et al. 2023; SN/NPR-DPM = Bao et al. 2022.
"""

import torch


# ---- Weights -------------------------------------------------------------------------------------
# Each is lambda(sigma) on |D - x0|^2.  A weight on one target is a weight on the others:
#
#     w_eps |eps_hat - eps|^2 = lambda |D - x0|^2    w_eps = lambda sigma^2       (DB eq. 6-7)
#     w_v   |v_hat - v|^2     = lambda |D - x0|^2    w_v   = lambda sigma^2/(1 + sigma^2)
#     w_F   |F_hat - F|^2     = lambda |D - x0|^2    w_F   = lambda c_out^2
#
# with SNR = 1/sigma^2.  Published code states w_eps; the docstrings give both.

def constant_weight(sigma):
    """lambda = 1/sigma^2: w_eps = 1, DDPM's simple loss (DB eq. 1).  Needs: nothing."""
    return 1 / sigma ** 2


def p2_weight(sigma, k=1.0, gamma=1.0):
    """lambda = 1/(sigma^2 (k + SNR)^gamma): w_eps = 1/(k + SNR)^gamma (P2).

    Written in sigma: no inf/inf at SNR = inf; for gamma = 1, 1/(1 + k sigma^2).  Needs: nothing.
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

    What is odd in the noise cancels; that is most of the variance at small sigma.  Two evaluations
    in one call, no coefficient: what a control variate has to beat.  Needs: together.
    """
    x = x0 + sigma * torch.stack([noise, -noise])                                 # (2, B, ...)
    D = together(denoise, x, sigma.expand(2, *sigma.shape))
    return (weight(sigma) * (D - x0) ** 2).mean(0).flatten(1).mean(1)             # (B,)


def together(denoise, x, sigma):
    """D of c copies of a batch in one call: x (c, B, ...), sigma (c, B, 1, ..., 1) -> (c, B, ...).

    vmap folds the copies into the batch.  So labels bound for B samples do for all copies, and
    dropout draws one mask for all, as differences between copies need.  A network that vmap refuses
    (BatchNorm in training) can be called copy by copy instead.  Needs: nothing.
    """
    return torch.vmap(denoise, randomness="same")(x, sigma)


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
def stf_weights(x, sigma, reference, labels=None, reference_labels=None, chunk=512):
    """Posterior weights of references y_k: softmax_k(-|x - y_k|^2 / (2 sigma^2))   (STF eq. 5).

    This is attention with query x and keys y.  The exponent is needed only up to a constant per
    row, (x.y_k - |y_k|^2/2) / sigma^2, so one matrix product gives it.

    x (B, ...), sigma (B, 1, ..., 1), reference (n, ...), like x or uint8 images that stand for
    [-1, 1], on any device -> (B, n) float64.  Time O(B n d), memory O(B n + chunk d), never
    (B, n, d).  With labels (B,) and reference_labels (n,) only references of the sample's own class
    count, as a class-conditional D demands; NaN where there is none.  1/sum_k w_k^2 is the
    effective sample size: where it is 1, the target is x0 and nothing is won.

    float64 inside, whatever the inputs and autocast: the difference of two large products, over
    sigma^2, leaves float32 no digits between near-duplicates at small sigma.  Needs: rows.
    """
    variance = sigma.flatten(1).double() ** 2                                     # (B, 1)
    query, logits = x.flatten(1).double(), []                                     # (B, d)
    for y in rows(reference, query, chunk):                                       # (chunk, d)
        logits.append((query @ y.T - torch.linalg.vecdot(y, y) / 2) / variance)   # (B, chunk)
    logits = torch.cat(logits, dim=1)                                             # (B, n)
    if labels is not None:
        logits = logits.masked_fill(labels[:, None] != reference_labels, -torch.inf)
    return logits.softmax(1)


@torch.no_grad()
def stf_target(x, sigma, reference, labels=None, reference_labels=None, chunk=512):
    """Stable target: E[x0 | x] when x0 is one of the rows y_k of a reference batch (STF eq. 5).

        w = softmax_k(-|x - y_k|^2 / (2 sigma^2)),      target = sum_k w_k y_k

    The paper's is this one's score, sum_k w_k (y_k - x)/sigma^2 = (target - x)/sigma^2.
    x (B, ...), sigma (B, 1, ..., 1), reference (n, ...) -> (B, ...); labels, time, memory and
    precision as in stf_weights.

    Unbiased for every n, if each x's own source is among its references: given x and the unordered
    batch, the source is row k with probability w_k, so the target is E[x0 | x, batch], and the mean
    of that (eq. 7) is E[x0 | x]; the paper calls it biased.  One row is plain DSM; a whole finite
    data set gives its exact posterior mean.  Needs: stf_weights, weighted_sum, rows.
    """
    w = stf_weights(x, sigma, reference, labels, reference_labels, chunk)         # (B, n)
    return weighted_sum(w, reference, chunk).view_as(x).to(x.dtype)


def weighted_sum(w, reference, chunk=512):
    """sum_k w_k y_k: w (B, n), reference (n, ...) as in stf_weights -> (B, d).  Needs: rows."""
    return sum(w_k @ y for w_k, y in zip(w.split(chunk, dim=1), rows(reference, w, chunk)))


def stf_loss(denoise, x0, noise, sigma, weight, target):
    """Stable target field: lambda(sigma) |D(x; sigma) - target|^2   (STF eq. 6, Algorithm 1).

    target(x, sigma) -> (B, ...), e.g. partial(stf_target, reference=reference) with the rows of x0
    among the reference's own.  Same minimiser as dsm_loss, never more variance.  Needs: nothing.
    """
    x = x0 + sigma * noise                                                        # (B, ...)
    return (weight(sigma) * (denoise(x, sigma) - target(x, sigma)) ** 2).flatten(1).mean(1)


# ---- Stable target fields: one reference for the whole mini-batch --------------------------------
# All targets of a batch then share the reference's luck, and a batch mean gains less than its
# samples do.  The common error is close to gamma(sigma) times that of the reference's mean.

def others_mean(x0, reference, labels=None, reference_labels=None):
    """ybar_{-i}: the mean of the references of i's class without i's own row.

    x0 (B, ...), reference (n, ...) that has the rows of x0 among its own -> (B, ...), and the
    number of those rows, (B, 1, ..., 1); zeros where there are none.  Needs: weighted_sum, rows.
    """
    same = x0.new_ones(1, len(reference)) if labels is None else (
        labels[:, None] == reference_labels).to(x0)                               # (1 or B, n)
    count = same.sum(1).expand(len(x0)).view(-1, *[1] * (x0.ndim - 1)) - 1
    total = weighted_sum(same, reference).view(-1, *x0.shape[1:])
    return (total - x0) / count.clamp(min=1), count


@torch.no_grad()
def mean_correction(x0, sigma, reference, mu, gamma, labels=None, reference_labels=None):
    """gamma(sigma) (ybar_{-i} - mu_{-i}): subtract it from stf_target if all share a reference.

    ybar_{-i} as in others_mean; mu (B, ...) the same mean over the whole data set, mu_{-i}, which
    is ybar_{-i}'s expectation given y_i: so the mean of the target stays, for any gamma.
    gamma: function of sigma, from measure_gamma.  0 where a sample is alone in its class.

    x0 (B, ...), sigma (B, 1, ..., 1), reference (n, ...) -> (B, ...).
    Needs: others_mean, weighted_sum, rows.
    """
    ybar, count = others_mean(x0, reference, labels, reference_labels)
    return gamma(sigma) * torch.where(count > 0, ybar - mu, 0)


@torch.no_grad()
def measure_gamma(x0, noise, levels, reference, labels=None, reference_labels=None):
    """The regression coefficient of the target on the reference's mean, by noise level.

        gamma(sigma) = Cov(T, ybar_{-i}) / Var(ybar_{-i})
                     = E sum_{k != i} w_k/(1 - w_k) <y_k - T, y_k - mu> / E |y - mu|^2

    exactly: T_{-k}, the target without reference k, is independent of y_k, and T differs from it by
    w_k (y_k - T_{-k}) = w_k/(1 - w_k) (y_k - T).  Clamped to [0, 1].

    To be measured, for it depends on the data: about the posterior's variance over the data's, it
    is 1 - c_skip on Gaussians, but near 0 up to sigma 4 on photographs, whose posteriors are sharp.

    x0, noise (m, ...), levels (L,), reference (n, ...), its first m rows x0, mu its mean -> (L,).
    Needs: stf_weights, others_mean, weighted_sum, rows.
    """
    mu = others_mean(x0, reference, labels, reference_labels)[0].flatten(1).double()  # (m, d)
    dot = lambda a: torch.cat([a @ y.T for y in rows(reference, a)], dim=1)       # <a_i, y_k>
    from_mu = torch.cat([(y ** 2).sum(1) for y in rows(reference, mu)]) - 2 * dot(mu) + (
        mu ** 2).sum(1, keepdim=True)                                             # |y_k - mu|^2
    others = torch.ones_like(from_mu).fill_diagonal_(0)                           # (m, n)
    if labels is not None:
        others = others * (labels[:, None] == reference_labels)
    gamma = []
    for sigma in levels:
        sigma = sigma.to(x0).expand(len(x0), *[1] * (x0.ndim - 1))
        w = stf_weights(x0 + sigma * noise, sigma, reference, labels, reference_labels)
        T = weighted_sum(w, reference)                                            # (m, d)
        along = from_mu - dot(T - mu) + ((T - mu) * mu).sum(1, keepdim=True)      # <y - T, y - mu>
        moved = others * w / (1 - w).clamp(min=1e-12) * along
        gamma.append(moved.sum() / len(x0) / ((others * from_mu).sum() / others.sum()))
    return torch.stack(gamma).clamp(0, 1).to(x0.dtype)


def interpolate(levels, values):
    """A function of sigma: piecewise linear in ln sigma through (levels, values), flat outside.

    levels (L,) ascending, L > 1, values (L,) -> f(sigma), of sigma's shape.  Needs: nothing.
    """
    knots = levels.log()

    def function(sigma):
        z = sigma.log().clamp(knots[0], knots[-1]).to(knots)
        k = torch.searchsorted(knots, z).clamp(min=1)
        share = (z - knots[k - 1]) / (knots[k] - knots[k - 1])
        return torch.lerp(values[k - 1], values[k], share).to(sigma.dtype)
    return function


# ---- Sequence-aware loss -------------------------------------------------------------------------
# K consecutive levels t, t-1, ... of a ladder sigma_1 < ... < sigma_T; row 0 of every (K, B, ...)
# tensor is t.

def sa_tau(ladder, t, K, kind="unit"):
    """tau of the K levels t, t-1, ..., t-K+1; zero below the ladder   (SA Theorem 1).

        tau_i = sqrt(ab_1) sigma_1^2 (sigma_i^2 - sigma_{i-1}^2) / (sigma_i sigma_{i-1}^2)

    which is the paper's formula in sigma, with ab_1 = 1/(1 + sigma_1^2): an error of eps_hat at
    step i moves the posterior's mean by its share (1 - sigma_{i-1}^2/sigma_i^2) sigma_i, and each
    later step j shrinks that by sigma_{j-1}^2/sigma_j^2, which telescopes.

    kind 'unit': 1, as the published code has it;  'paper': tau_i, and tau_1 = 0: on linear betas it
    falls from 8e-3 at i = 2 to 1e-8 at 1000, so that its loss does next to nothing;  'window':
    tau_s/tau_t, the same errors measured at the window's start (1 at the ladder's first level).

    ladder (T,), t (B,) int64 in 1..T -> (K, B) float64.  Needs: nothing.
    """
    s = t - torch.arange(K, device=t.device)[:, None]                             # (K, B)
    inside, variance = s >= 1, ladder.double() ** 2
    step = variance.diff() / (ladder.double()[1:] * variance[:-1])                # (T-1,) i = 2..T
    tau = torch.cat([step[:1] * 0, step * variance[0] / (1 + variance[0]).sqrt()])[s.clamp(1) - 1]
    if kind == "unit":
        tau = torch.ones_like(tau)
    elif kind == "window":
        tau = torch.where(tau[0] > 0, tau / tau[0], (s == t).double())
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
    steps = (sigma ** 2 - below ** 2).clamp(min=0).sqrt() * noise
    return steps.flip(0).cumsum(0).flip(0) / sigma


def sa_loss(denoise, x0, noise, sigma, weight, tau, lam=1.0):
    """Sequence-aware loss: L_simple + lam |1/K sum_s tau_s (eps_hat_s - eps_s)|^2  (SA sec. 3.2).

    L_simple is dsm_loss at the first of the K levels; all K go through the network in one call.
    Published: lam 1, .3, .2 for K = 2, 3, 4, and an independent noise at each level.  Those noises
    share x0 alone, so the cross terms pull the minimiser away from E[x0 | x]: on Gaussian data with
    K = 2, lam = 1 it predicts .75 of the noise at t = 10.  With path_noise that is .98.

    x0 (B, ...), noise (K, B, ...), sigma, tau (K, B, 1, ..., 1) -> (B,).  Needs: together.
    """
    D = together(denoise, x0 + sigma * noise, sigma)                              # (K, B, ...)
    simple = weight(sigma[0]) * (D[0] - x0) ** 2
    gap = (tau * (x0 - D) / sigma).mean(0)            # (B, ...), for eps_hat - eps = (x0 - D)/sigma
    return (simple + lam * gap ** 2).flatten(1).mean(1)


# ---- Taylor control variates ---------------------------------------------------------------------
# A function of (x0, noise) whose mean over the noise is known to be 0, and which moves with the
# loss: subtracting it leaves the expectation, of the loss and of its gradient, and takes variance.
# With D = c_skip x + c_out F, the loss lambda |D - x0|^2 = lambda c_out^2 |F - t|^2 has noise in
# its target t = a x0 - b noise, b = c_skip sigma/c_out; hence the term 2 b F.noise, and its control
#
#     2 b (T^k.noise - E),    T^k = the Taylor polynomial of F around the clean x0, to order k
#
# with E = 0 for k = 0, and the trace of F's Jacobian (times c_in sigma) for k = 1, 2.

def taylor_control(D0, y, noise, sigma, c_skip, order=0, probe=None):
    """c_out^2 b (T^k.noise - E), coordinate by coordinate; its sum has mean 0 over the noise.

        c_skip sigma (T.noise - E),    G(y) = D(y; sigma) - c_skip y,    J, H: its derivatives
        T = G + sigma J noise + sigma^2/2 H[noise, noise],    E = sigma tr J (order 0: T = G, E = 0)

    This is F's polynomial, had from D alone: G(x) = c_out F(c_in x), c_out b = c_skip sigma.  The
    trace is exact, by d products with J; or, with a probe (B, ...) of random signs, Hutchinson's
    probe.J probe, of the same mean: one product, more variance.
    y (B, ...) with requires_grad if order > 0, D0 = D(y; sigma), c_skip (B, 1, ..., 1) -> (B, ...).
    Needs: nothing.
    """
    G = D0 - c_skip * y
    dot = G * noise                                                               # T.noise - E
    product = lambda v: torch.autograd.grad(G, y, v, create_graph=True)[0]        # J^T v
    if order > 0 and probe is None:
        basis = torch.eye(y[0].numel()).to(y).view(-1, 1, *y.shape[1:])           # (d, 1, ...)
        trace = sum(product(e.expand_as(y)) * e for e in basis)
        dot = dot + sigma * (product(noise) * noise - trace)
    elif order > 0:
        dot = dot + sigma * (product(noise) * noise - product(probe) * probe)
    if order > 1:
        curve = (product(noise) * noise + 0 * y).sum()         # noise.J noise; J may hold no y
        H = torch.autograd.grad(curve, y, create_graph=True)[0]                   # H[noise, .]
        dot = dot + sigma ** 2 / 2 * H * noise
    return c_skip * sigma * dot


def taylor_terms(denoise, x0, noise, sigma, weight, c_skip, order=0, probe=None):
    """dsm_loss and its control variate of order 0, 1 or 2, both (B,)   (TCV).

    To be minimised: loss - beta(sigma) control, beta from past batches (RunningBeta).  Unbiased for
    every network, order, beta and sigma.  Order 0 does nearly all the work, at sigma well below the
    data's own scale; order 1 lowers the constant, order 2 hardly anything.

    c_skip: function of sigma, that of the network behind D.  One call of the network on 2 copies;
    orders 1 and 2 add backward passes through it, one for each product in taylor_control, and its
    attention must have second derivatives (torch.nn.attention.sdpa_kernel(SDPBackend.MATH)).
    Needs: together, taylor_control.
    """
    y = x0.detach()
    if order > 0:
        y.requires_grad_()
    x = torch.stack([x0 + sigma * noise, y])                                      # (2, B, ...)
    D, D0 = together(denoise, x, sigma.expand(2, *sigma.shape))
    control = taylor_control(D0, y, noise, sigma, c_skip(sigma), order, probe)
    loss, control = weight(sigma) * (D - x0) ** 2, 2 * weight(sigma) * control
    return loss.flatten(1).mean(1), control.flatten(1).mean(1)                    # (B,), (B,)


def stf_atoms(x, sigma, reference, uniform, K=4, labels=None, reference_labels=None):
    """K references and masses that stand for the posterior: the K-1 heaviest with their weights,
    and one drawn from the others with all the mass that is left.  Over the draw, a sum over them
    has the mean of the sum over all, exactly.

    x (B, ...), reference (n, ...), uniform (B,) in [0, 1) -> atoms (K, B, ...), masses (K, B), and
    stf_target (B, ...).  K at most n.  Needs: stf_weights, weighted_sum, rows.
    """
    w = stf_weights(x, sigma, reference, labels, reference_labels)                # (B, n)
    mass, k = w.topk(K - 1)                                                       # (B, K-1)
    rest = w.scatter(1, k, 0).cumsum(1)                                           # (B, n)
    drawn = torch.searchsorted(rest, uniform[:, None] * rest[:, -1:], right=True)
    k = torch.cat([k, drawn.clamp(max=w.shape[1] - 1)], dim=1).T                  # (K, B)
    mass = torch.cat([mass, rest[:, -1:]], dim=1).T.to(x.dtype)                   # (K, B)
    target = weighted_sum(w, reference).view_as(x).to(x.dtype)
    atoms = next(rows(reference[k.flatten()], x, k.numel()))                      # (K B, d)
    return atoms.view(*k.shape, *x.shape[1:]), mass, target


def stf_taylor_terms(denoise, x0, noise, sigma, weight, c_skip, atoms):
    """stf_loss and the posterior-weighted control of order 0, both (B,); as taylor_terms.

        control = sum_k w_k(x) control(y_k, eps_k),    eps_k = (x - y_k)/sigma

    the mean, given x and the reference, of the control at its unknown source: so
    stf_loss - beta control is that mean of dsm_loss - beta control, and has no more variance, for
    any beta; with the best beta no more than either STF or the control alone.  The sum is over the
    K atoms of stf_atoms, which keeps it unbiased; K = 1 draws the source anew.

    atoms(x, sigma) -> atoms (K, B, ...), masses (K, B), target (B, ...), e.g. stf_atoms with its
    reference bound.  One call on K + 1 copies.  Needs: together, taylor_control.
    """
    x = x0 + sigma * noise                                                        # (B, ...)
    y, mass, target = atoms(x, sigma)
    copies = torch.cat([x[None], y])                                              # (K+1, B, ...)
    D = together(denoise, copies, sigma.expand(len(copies), *sigma.shape))
    mass = mass.view(*mass.shape, *[1] * (x.ndim - 1))
    control = (mass * taylor_control(D[1:], y, (x - y) / sigma, sigma, c_skip(sigma))).sum(0)
    loss, control = weight(sigma) * (D[0] - target) ** 2, 2 * weight(sigma) * control
    return loss.flatten(1).mean(1), control.flatten(1).mean(1)                    # (B,), (B,)


class RunningBeta:
    """beta(sigma) = <g_loss, g_control> / |g_control|^2, the regression coefficient of gradients.

    From per-sample gradients of a few parameters (the last layer's are a good proxy), in bins of
    ln sigma, forgetting with `decay` a sample; from past batches only, for a beta of the same batch
    would bias.  Of n samples in a bin, n/(n + 4) is trusted; the rest is 1/(1 + (sigma/scale)^1.3),
    scale about twice the smallest local spread of the data.  Clamped to [0, 1.2].  Shapes as
    weight(sigma)'s.  The state is one tensor, sums (3, bins).  Needs: nothing.
    """

    def __init__(self, low=1e-3, high=100.0, bins=24, decay=0.99, scale=0.13, device="cpu"):
        self.low, self.high, self.decay, self.scale = low, high, decay, scale
        self.sums = torch.zeros(3, bins, device=device)     # <g_loss, g_control>, |g_control|^2, n

    def bin(self, sigma):
        share = (sigma / self.low).log() / torch.tensor(self.high / self.low).log()
        return (share * self.sums.shape[1]).long().clamp(0, self.sums.shape[1] - 1)

    def __call__(self, sigma):
        product, square, count = self.sums[:, self.bin(sigma)].to(sigma.dtype)
        prior, trust = 1 / (1 + (sigma / self.scale) ** 1.3), count / (count + 4)
        return torch.lerp(prior, product / square.clamp(min=1e-30), trust).clamp(0, 1.2)

    def update(self, sigma, loss, control, parameters):
        """loss, control (m,) with graph, of samples with noise levels sigma (m, 1, ..., 1)."""
        one = torch.eye(len(loss), device=loss.device, dtype=loss.dtype)
        g_loss, g_control = (
            torch.cat([g.flatten(1) for g in torch.autograd.grad(
                value, parameters, one, retain_graph=True, is_grads_batched=True)], dim=1)
            for value in (loss, control))                                         # (m, p)
        new = torch.stack([(g_loss * g_control).sum(1), (g_control ** 2).sum(1), one.sum(1)])
        new = torch.where(new.isfinite().all(0), new, 0).to(self.sums)            # (3, m)
        k = self.bin(sigma.flatten())
        count = torch.zeros_like(self.sums[0]).index_add(0, k, new[2])
        self.sums = (self.sums * self.decay ** count).index_add(1, k, new)


# ---- Second heads --------------------------------------------------------------------------------

def head_loss(with_head, x0, noise, sigma, kind="sn"):
    """Regression of a second head h on squared noise, for the covariances of the DDPM sampler.

        sn   |h - eps^2|^2                   h -> E[eps^2 | x]                 (SN-DPM)
        npr  |h - (eps - eps_hat)^2|^2       h -> E[(eps - eps_hat)^2 | x]     (NPR-DPM)

    eps_hat = (x - D)/sigma, detached.  To be trained in eval mode: dropout in eps_hat would add its
    own variance to NPR's, as it does in the published code.  with_head(x, sigma) -> D, h;
    x0, noise (B, ...), sigma (B, 1, ..., 1) -> (B,).  KeyError: another kind.  Needs: nothing.
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

    about the centre, the rightmost first, in one bicubic resampling with the border reflected.
    Exact for the identity and for flips; linear in the images.  On waves of 4 pixels and longer,
    turned by any angle, its rms error is at most 3.5 % of theirs on average over directions, 4.5 %
    along the worst; shrinking is not filtered.

    images (B, C, H, H), a (B, 8) -> (B, C, H, H).  Needs: nothing.
    """
    def matrix(*top):                                       # its two upper rows -> (B, 3, 3)
        return torch.stack([torch.stack([v * one for v in row], 1) for row in [*top, [0, 0, 1]]], 1)

    scale = lambda x, y: matrix([x, 0, 0], [0, y, 0])
    turn = lambda r: matrix([r.cos(), -r.sin(), 0], [r.sin(), r.cos(), 0])
    a = a.to(images)
    a0, a1, a2, a3, a4, a5, a6, a7 = a.unbind(1)
    one = torch.ones_like(a0)
    warp = (matrix([1, 0, a6 / 4], [0, 1, a7 / 4])              # in grid_sample's units, H = 2
            @ turn(-a4) @ scale(2 ** (0.2 * a5), 2 ** (-0.2 * a5)) @ turn(a4)
            @ turn(-a3) @ scale(2 ** (0.2 * a2), 2 ** (0.2 * a2)))
    flip = lambda on, x, axis: torch.where(on.view(-1, 1, 1, 1) > 0, x.flip(axis), x)
    flipped = flip(a1, flip(a0, images, 3), 2)
    grid = torch.nn.functional.affine_grid(torch.linalg.inv(warp)[:, :2], images.shape,
                                           align_corners=False)
    warped = torch.nn.functional.grid_sample(flipped, grid, mode="bicubic",
                                             padding_mode="reflection", align_corners=False)
    return torch.where((a[:, 2:] != 0).any(1).view(-1, 1, 1, 1), warped, flipped)


@torch.no_grad()
def augmented_stf_target(x, sigma, reference, a, labels=None, reference_labels=None):
    """stf_target where the source of x_i was augmented by a_i: so are its references.

        w = softmax_k(-|x - A y_k|^2 / (2 sigma^2)),      target = sum_k w_k A y_k

    Flips are isometries: flipped back, their samples share one product with the plain reference.
    For the others |A y_k|^2 differs from |y_k|^2, and each of them augments every reference: that
    is n resamplings for a share 1 - (1 - p)^4 of the samples, 40 % at EDM's p = .12.  To pay less,
    give fewer references: the target is unbiased for every n.

    x (B, C, H, H), a (B, 8) -> (B, C, H, H).  Each sample's class must be among the references'.
    It waits once for the device.  Needs: stf_target, stf_weights, weighted_sum, rows, augment.
    """
    flips = torch.cat([a[:, :2], torch.zeros_like(a[:, 2:])], dim=1)
    target = augment(stf_target(augment(x, flips), sigma, reference, labels, reference_labels),
                     flips)
    for i in (a[:, 2:] != 0).any(1).nonzero().flatten().tolist():
        y = reference if labels is None else reference[reference_labels == labels[i]]
        y = next(rows(y, x, len(y))).view(-1, *x.shape[1:])                       # (n, C, H, H)
        target[i:i + 1] = stf_target(x[i:i + 1], sigma[i:i + 1],
                                     augment(y, a[i:i + 1].expand(len(y), 8)))
    return target
