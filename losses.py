"""losses.py: what is minimised.

    x0 (B, ...)  clean data    noise (B, ...)  N(0, I), drawn by the caller    sigma (B, 1, ..., 1)
    x = x0 + sigma * noise     denoise(x, sigma) -> (B, ...)  an estimate of E[x0 | x]
    weight(sigma) -> lambda    the weight on |D - x0|^2, e.g. a schedule row's
    every loss returns (B,);  every shape rank works: (B, 2) points as well as (B, C, H, W)

|.|^2 is the mean over a sample's coordinates, so that losses compare across sizes; published code
sums.  Class labels are bound to `denoise` by the caller, and appear here only where references of
another class must not count.

Sources: EDM = Karras et al. 2022;  STF = Xu, Tong, Jaakkola 2023, "Stable Target Field for Reduced
Variance Score Estimation in Diffusion Models";  DB = Yu et al. 2024, "Unmasking Bias in Diffusion
Model Training";  P2 = Choi et al. 2022;  Min-SNR = Hang et al. 2023.
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

    Written in sigma, so that SNR = infinity gives no inf/inf: for gamma = 1, 1/(1 + k sigma^2).
    Needs: nothing.
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


# ---- Stable target fields ------------------------------------------------------------------------

@torch.no_grad()
def stf_target(x, sigma, reference, labels=None, reference_labels=None, chunk=512):
    """Stable target: E[x0 | x] when x0 is one of the rows y_k of a reference batch (STF eq. 5-7).

        w = softmax_k(-|x - y_k|^2 / (2 sigma^2)),      target = sum_k w_k y_k

    This is attention with query x, keys and values y.  The exponent is needed only up to a constant
    per row, (x.y_k - |y_k|^2/2) / sigma^2, so one matrix product gives it; the reference is
    streamed in chunks under a running maximum m and sum.

    x (B, ...), sigma (B, 1, ..., 1), reference (n, ...) -> (B, ...).  Time O(B n d), memory
    O(B chunk + chunk d), never (B, n, d).  With labels (B,) and reference_labels (n,) only
    references of the sample's own class count, as a class-conditional D demands.

    Unbiased for every n, if each x's own source is among its references: given x and the unordered
    batch, the source is row k with probability w_k, so the target is E[x0 | x, batch], and the mean
    of that is E[x0 | x].  (The paper calls it biased.)  One row is plain DSM; a whole finite data
    set gives its exact posterior mean.

    float64 inside, whatever the inputs and autocast: the difference of two large products, over
    sigma^2, leaves float32 no digits between near-duplicates at small sigma.  NaN where a sample
    has no reference of its class.
    Needs: nothing.
    """
    query = x.flatten(1).double() / sigma.flatten(1).double() ** 2                # (B, d)
    m = query.new_full((len(x), 1), torch.finfo(torch.float64).min)               # (B, 1)
    total, target = torch.zeros_like(m), torch.zeros_like(query)                  # (B, 1), (B, d)
    for start in range(0, len(reference), chunk):
        y = reference[start:start + chunk].flatten(1).to(query)                   # (k, d)
        half = torch.linalg.vecdot(y, y) / 2                                      # (k,)
        logits = query @ y.T - half / sigma.flatten(1).double() ** 2              # (B, k)
        if labels is not None:
            other = labels[:, None] != reference_labels[None, start:start + chunk]
            logits = logits.masked_fill(other, -torch.inf)
        m_new = torch.maximum(m, logits.amax(1, keepdim=True))
        w, shrink = (logits - m_new).exp(), (m - m_new).exp()                     # (B, k), (B, 1)
        total, target, m = shrink * total + w.sum(1, keepdim=True), shrink * target + w @ y, m_new
    return (target / total).view_as(x).to(x.dtype)


def stf_loss(denoise, x0, noise, sigma, weight, reference, labels=None, reference_labels=None):
    """Stable target field: lambda(sigma) |D(x; sigma) - stf_target|^2   (STF eq. 6, Algorithm 1).

    x0, noise (B, ...), sigma (B, 1, ..., 1), reference (n, ...) that has the rows of x0 among its
    own -> (B,).  Same minimiser as dsm_loss, never more variance.  Needs: stf_target.
    """
    x = x0 + sigma * noise                                                        # (B, ...)
    target = stf_target(x, sigma, reference, labels, reference_labels)            # (B, ...)
    return (weight(sigma) * (denoise(x, sigma) - target) ** 2).flatten(1).mean(1)  # (B,)
