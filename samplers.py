"""samplers.py: how noise becomes data.

    denoise(x, sigma) -> (B, ...)  an estimate of E[x0 | x = x0 + sigma noise], sigma 0-d
    every sampler takes (denoise, x, t, ...) and returns x at t[-1]
    t (N + 1,)   times from the start down to 0, e.g. a schedule's time_steps(N)
    x (B, ...)   the start, s(t[0]) sigma(t[0]) N(0, I), drawn by the caller
    schedule     anything with functions sigma, dsigma, s, ds of t, e.g. a class of schedules.py

Keep t on the CPU, in float64: its entries then act as plain numbers on x of any device and type,
and no step waits for the device.  NFE (calls of denoise per sample) stands in each docstring.

Source: EDM = Karras et al. 2022.
"""

import torch


# ---- Deterministic -------------------------------------------------------------------------------

def ode_slope(denoise, x, t, schedule):
    """dx/dt of the probability flow ODE at time t > 0   (EDM eq. 4, Algorithm 1 line 4).

        dx/dt = (sigma'/sigma + s'/s) x - (sigma' s / sigma) D(x/s; sigma)

    x (B, ...), t 0-d -> (B, ...).  Needs: nothing.
    """
    sigma, dsigma, s, ds = schedule.sigma(t), schedule.dsigma(t), schedule.s(t), schedule.ds(t)
    return (dsigma / sigma + ds / s) * x - dsigma * s / sigma * denoise(x / s, sigma)


@torch.no_grad()
def euler(denoise, x, t, schedule):
    """Euler's method on the probability flow ODE: first order.  NFE = N.

        x <- x + (t_{i+1} - t_i) dx/dt(x, t_i)

    x (B, ...), t (N + 1,) -> (B, ...).  Needs: ode_slope.
    """
    for t_cur, t_next in zip(t[:-1], t[1:]):
        d = ode_slope(denoise, x, t_cur, schedule)
        x = x + (t_next - t_cur) * d
    return x


@torch.no_grad()
def heun(denoise, x, t, schedule):
    """Heun's method on the probability flow ODE: second order (EDM Algorithm 1).  NFE = 2N - 1.

        x' = x + (t_{i+1} - t_i) d,  d = dx/dt(x, t_i),  d' = dx/dt(x', t_{i+1})
        x <- x + (t_{i+1} - t_i) (d + d')/2,     or x' itself where sigma(t_{i+1}) = 0

    x (B, ...), t (N + 1,) -> (B, ...).  Needs: ode_slope.
    """
    for t_cur, t_next in zip(t[:-1], t[1:]):
        d = ode_slope(denoise, x, t_cur, schedule)
        x_next = x + (t_next - t_cur) * d
        if t_next > 0:
            d_next = ode_slope(denoise, x_next, t_next, schedule)
            x_next = x + (t_next - t_cur) * (d + d_next) / 2
        x = x_next
    return x


# ---- Stochastic ----------------------------------------------------------------------------------

def seeded_noise(seeds, shape, device="cpu", dtype=torch.float32):
    """A noise source: each call gives N(0, I) of shape (B, *shape), row i from its own seeds[i].

    So sample i is the same whichever samples share its batch.  Needs: nothing.
    """
    generators = [torch.Generator(device).manual_seed(int(seed)) for seed in seeds]

    def draw():
        return torch.stack([torch.randn(shape, generator=g, device=device, dtype=dtype)
                            for g in generators])
    return draw


@torch.no_grad()
def edm_stochastic(denoise, x, sigma, noise, S_churn=0.0, S_tmin=0.0, S_tmax=float("inf"),
                   S_noise=1.0):
    """EDM's stochastic sampler, in sigma(t) = t, s(t) = 1   (EDM Algorithm 2).  NFE = 2N - 1.

        gamma = min(S_churn/N, sqrt(2) - 1) if sigma_i in [S_tmin, S_tmax] else 0
        sigma_hat = (1 + gamma) sigma_i,  x <- x + sqrt(sigma_hat^2 - sigma_i^2) S_noise noise
        then Heun's step from sigma_hat to sigma_{i+1}

    x (B, ...), sigma (N + 1,), noise() -> (B, ...), not called where gamma = 0; S_churn = 0 is
    Heun.  Needs: nothing.
    """
    N = len(sigma) - 1
    for s_cur, s_next in zip(sigma[:-1], sigma[1:]):
        gamma = min(S_churn / N, 2 ** 0.5 - 1) if S_tmin <= s_cur <= S_tmax else 0.0
        s_hat = (1 + gamma) * s_cur
        if gamma > 0:
            x = x + (s_hat ** 2 - s_cur ** 2).sqrt() * S_noise * noise()
        d = (x - denoise(x, s_hat)) / s_hat
        x_next = x + (s_next - s_hat) * d
        if s_next > 0:
            d_next = (x_next - denoise(x_next, s_next)) / s_next
            x_next = x + (s_next - s_hat) * (d + d_next) / 2
        x = x_next
    return x
