"""schedules.py: which noise levels.  EDM Table 1 as code, one class per column, plus DDPM.

    x(t) = s(t) (x0 + sigma(t) noise)            the noisy sample at time t
    D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)      the denoiser around a raw network F

Every class has the same members, for a comparison line by line (the ladders' are in Ladder):

    sigma(t)  sigma_inv(sigma)  dsigma(t)      noise level, its inverse, its derivative in t
    s(t)  ds(t)                                scale and its derivative in t
    time_steps(N)        -> (N + 1,) float64   t_0 > ... > t_N = 0, N >= 1; ladders limit N
    training_sigma(u)    -> sigma              u uniform on (0, 1): inverse CDF of p_train(sigma)
    precondition(sigma)  -> c_skip, c_out, c_in, c_noise
    weight(sigma)        -> lambda             the column's own weight on |D - x0|^2

t, sigma and u are tensors of any shape.  sigma is in units of the data (images in [-1, 1]); t is
whatever the column calls time.  The caller draws u, and may stratify it; at u = 0 and u = 1 a
log-normal sigma is 0 and infinite.
`Needs:` names what must travel with a copy, beside torch, math and dataclass.
Sampling and training are independent: D is a black box, and a network trained with one column can
be sampled with the time steps of any other.

Source: EDM = Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative
Models", Table 1.  Published code computes VP in float32 as sqrt(exp(.) - 1), whose sigma is up to
3 % off near t = 1e-5; here expm1 and log1p keep it exact.
"""

import math
from dataclasses import dataclass

import torch


# ---- Continuous columns --------------------------------------------------------------------------

@dataclass
class VP:
    """Variance preserving SDE (Song et al. 2021): EDM Table 1, column 'VP'.  Needs: nothing."""

    beta_d: float = 19.9
    beta_min: float = 0.1
    eps_s: float = 1e-3                   # smallest t in sampling
    eps_t: float = 1e-5                   # smallest t in training
    M: int = 1000                         # c_noise spans [0, M - 1]

    def sigma(self, t):
        return torch.expm1(self.beta_d * t ** 2 / 2 + self.beta_min * t).sqrt()

    def sigma_inv(self, sigma):
        """The root t of beta_d t^2/2 + beta_min t = ln(1 + sigma^2), without cancellation."""
        L = torch.log1p(sigma ** 2)
        return 2 * L / (self.beta_min + (self.beta_min ** 2 + 2 * self.beta_d * L).sqrt())

    def dsigma(self, t):
        sigma = self.sigma(t)
        return (self.beta_d * t + self.beta_min) / 2 * (sigma + 1 / sigma)

    def s(self, t):
        return torch.exp(-(self.beta_d * t ** 2 / 2 + self.beta_min * t) / 2)

    def ds(self, t):
        return -self.s(t) * (self.beta_d * t + self.beta_min) / 2

    def time_steps(self, N):
        i = torch.arange(N, dtype=torch.float64)
        t = 1 + i / max(N - 1, 1) * (self.eps_s - 1)
        return torch.cat([t, t.new_zeros(1)])

    def training_sigma(self, u):
        return self.sigma(self.eps_t + u * (1 - self.eps_t))

    def precondition(self, sigma):
        c_noise = (self.M - 1) * self.sigma_inv(sigma)
        return torch.ones_like(sigma), -sigma, 1 / (sigma ** 2 + 1).sqrt(), c_noise

    def weight(self, sigma):
        return 1 / sigma ** 2


@dataclass
class VE:
    """Variance exploding SDE (Song et al. 2021): EDM Table 1, column 'VE'.  Needs: nothing.

    Its last step, an Euler step in t = sigma^2, ends at (x + D)/2: noise of sigma_min/2 stays.
    """

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    def sigma(self, t):
        return t.sqrt()

    def sigma_inv(self, sigma):
        return sigma ** 2

    def dsigma(self, t):
        return 1 / (2 * t.sqrt())

    def s(self, t):
        return torch.ones_like(t)

    def ds(self, t):
        return torch.zeros_like(t)

    def time_steps(self, N):
        i = torch.arange(N, dtype=torch.float64)
        t = self.sigma_max ** 2 * (self.sigma_min ** 2 / self.sigma_max ** 2) ** (i / max(N - 1, 1))
        return torch.cat([t, t.new_zeros(1)])

    def training_sigma(self, u):
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** u

    def precondition(self, sigma):
        return torch.ones_like(sigma), sigma, torch.ones_like(sigma), (sigma / 2).log()

    def weight(self, sigma):
        return 1 / sigma ** 2


@dataclass
class EDM:
    """EDM Table 1, column 'Ours'.  Needs: nothing.

    c_in and c_out make the network's input and target unit variance, c_skip minimises c_out, and
    weight = 1/c_out^2: at initialisation every noise level has the same expected loss.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    sigma_data: float = 0.5
    P_mean: float = -1.2
    P_std: float = 1.2

    def sigma(self, t):
        return t

    def sigma_inv(self, sigma):
        return sigma

    def dsigma(self, t):
        return torch.ones_like(t)

    def s(self, t):
        return torch.ones_like(t)

    def ds(self, t):
        return torch.zeros_like(t)

    def time_steps(self, N):
        i = torch.arange(N, dtype=torch.float64)
        a, b = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        t = (a + i / max(N - 1, 1) * (b - a)) ** self.rho
        return torch.cat([t, t.new_zeros(1)])

    def training_sigma(self, u):
        return (self.P_mean + self.P_std * torch.special.ndtri(u)).exp()     # N(0, 1)'s quantile

    def precondition(self, sigma):
        total = sigma ** 2 + self.sigma_data ** 2
        c_out = sigma * self.sigma_data / total.sqrt()
        return self.sigma_data ** 2 / total, c_out, 1 / total.sqrt(), sigma.log() / 4

    def weight(self, sigma):
        return (sigma ** 2 + self.sigma_data ** 2) / (sigma * self.sigma_data) ** 2


# ---- Discrete columns ----------------------------------------------------------------------------

class Ladder:
    """What IDDPM and DDPM share: a ladder of noise levels, with sigma(t) = t and s(t) = 1.

    levels (M,) float64, rising.  The network knows a level by its number, counted from `first`; a
    sigma between two levels has the number of the nearest.  Needs: nothing.
    """

    first = 0

    def sigma(self, t):
        return t

    def sigma_inv(self, sigma):
        return sigma

    def dsigma(self, t):
        return torch.ones_like(t)

    def s(self, t):
        return torch.ones_like(t)

    def ds(self, t):
        return torch.zeros_like(t)

    def training_sigma(self, u):
        M = len(self.levels)
        return self.levels.to(u, non_blocking=True)[(u * M).long().clamp(max=M - 1)]

    def precondition(self, sigma):
        levels = self.levels.to(sigma, non_blocking=True)
        nearest = (levels - sigma.unsqueeze(-1)).abs().argmin(-1).to(sigma)
        c_noise = self.first + nearest
        return torch.ones_like(sigma), -sigma, 1 / (sigma ** 2 + 1).sqrt(), c_noise

    def weight(self, sigma):
        return 1 / sigma ** 2


@dataclass
class IDDPM(Ladder):
    """Improved DDPM (Nichol & Dhariwal 2021): EDM Table 1, column 'iDDPM'.  Needs: Ladder.

    u_0 = 20291 > ... > u_8 = 80.2 > ... > u_{M-1} = .0064 > u_M = 0.  Training uses all levels,
    time_steps starts at u_{j0}.  c_noise = M - 1 - j for the nearest u_j.  Published code counts
    u_M among the levels, so that its c_noise is -1 for sigma below u_{M-1}/2; here it is 0 there.
    time_steps: ValueError for more than M - j0 steps, which would repeat a level.
    """

    C1: float = 0.001
    C2: float = 0.008
    M: int = 1000
    j0: int = 8

    def __post_init__(self):
        """u_{j-1} = sqrt((u_j^2 + 1)/max(ab_{j-1}/ab_j, C1) - 1), ab_j = sin^2(pi/2 j/(M(C2+1)))"""
        alpha_bar = [math.sin(math.pi / 2 * j / (self.M * (self.C2 + 1))) ** 2
                     for j in range(self.M + 1)]
        u = [0.0]
        for j in range(self.M, 0, -1):
            ratio = max(alpha_bar[j - 1] / alpha_bar[j], self.C1)
            u.append(math.sqrt((u[-1] ** 2 + 1) / ratio - 1))
        self.levels = torch.tensor(u[1:], dtype=torch.float64)              # u_{M-1} ... u_0

    def time_steps(self, N):
        if N > self.M - self.j0:
            raise ValueError(f"iDDPM has {self.M - self.j0} levels to step on, not {N}")
        i = torch.arange(N, dtype=torch.float64)
        j = (self.j0 + (self.M - 1 - self.j0) * i / max(N - 1, 1) + 0.5).floor().long()
        return torch.cat([self.levels[self.M - 1 - j], torch.zeros(1, dtype=torch.float64)])


@dataclass
class DDPM(Ladder):
    """DDPM (Ho et al. 2020), the ladder of SA-K, Debias and Analytic-DPM.  Needs: Ladder.

    beta_t linear, alpha_bar_t = prod (1 - beta), sigma_t = sqrt((1 - alpha_bar_t)/alpha_bar_t) for
    t = 1 ... T: .0100 ... 157.  c_noise = t.
    time_steps: ValueError for more than T steps, which would repeat a level.
    """

    beta_1: float = 1e-4
    beta_T: float = 0.02
    T: int = 1000
    first = 1

    def __post_init__(self):
        beta = torch.linspace(self.beta_1, self.beta_T, self.T, dtype=torch.float64)
        log_alpha_bar = torch.log1p(-beta).cumsum(0)
        self.levels = torch.expm1(-log_alpha_bar).sqrt()                # (T,) sigma_1 ... sigma_T

    def time_steps(self, N):
        if N > self.T:
            raise ValueError(f"DDPM has {self.T} levels to step on, not {N}")
        i = torch.arange(N, dtype=torch.float64)
        t = (self.T + i / max(N - 1, 1) * (1 - self.T)).round().long()
        return torch.cat([self.levels[t - 1], torch.zeros(1, dtype=torch.float64)])


SCHEDULES = dict(vp=VP, ve=VE, iddpm=IDDPM, edm=EDM, ddpm=DDPM)
