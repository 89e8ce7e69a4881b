"""samplers.py: how noise becomes data.

    denoise(x, sigma) -> (B, ...)  an estimate of E[x0 | x = x0 + sigma noise]; sigma is
                                   (B, 1, ..., 1), of x's dtype and device
    every sampler takes (denoise, x, t, ...) and returns x at t[-1]  (rk45: x and its NFE)
    t (N + 1,)   times from the start down to 0, e.g. a schedule's time_steps(N), N >= 1
    x (B, ...)   the start, s(t[0]) sigma(t[0]) N(0, I), drawn by the caller
    schedule     anything with functions sigma, dsigma, s, ds of t, e.g. a class of schedules.py;
                 a sampler that takes sigma instead of t works with sigma(t) = t, s(t) = 1
    noise        noise() -> (B, ...), a fresh N(0, I), e.g. seeded_noise
    callback     callback(i, x) after step i = 0, 1, ..., for trajectories; x is its to keep

Keep t on the CPU, in float64: its entries then act as plain numbers on x of any device and type,
and only rk45 waits for the device before its end.  Each docstring gives the NFE, the calls of
denoise per sample.
An x that is not finite is a FloatingPointError at the end (rk45: at once), naming step and sigma.

Sources: EDM = Karras et al. 2022, SDE = Song, Sohl-Dickstein et al. 2021, DDPM = Ho et al. 2020,
DDIM = Song, Meng & Ermon 2021, Analytic-DPM = Bao et al. 2022 (ICLR), SN/NPR-DPM = Bao et al.
2022 (ICML), CFG = Ho & Salimans 2022.
"""

import math

import torch


# ---- Every step ----------------------------------------------------------------------------------

def record(x, finite, callback):
    """After each step: callback(i, x), and whether x is finite, as a 0-d bool left on its device.

    finite: the list of those bools so far; it grows by one.  Nothing waits here.  Needs: nothing.
    """
    if callback is not None:
        callback(len(finite), x)
    finite.append(x.isfinite().all())


def checked(x, finite, sigma):
    """x, if it was finite after every step; otherwise FloatingPointError says since which.

    finite: N 0-d bools, sigma (N + 1,).  The function waits for the device, once.
    Needs: nothing.
    """
    finite = torch.stack(finite).tolist() if finite else []
    if not all(finite):
        i = finite.index(False)
        raise FloatingPointError(f"x is not finite after step {i + 1} of {len(finite)} "
                                 f"(from sigma = {float(sigma[i]):.4g})")
    return x


def level(x, sigma):
    """The number sigma as denoise wants it: (B, 1, ..., 1), of x's dtype and device.

    sigma (B, 1, ..., 1) keeps its shape.  Needs: nothing.
    """
    if sigma.ndim == 0:
        return x.new_full((len(x), *[1] * (x.ndim - 1)), float(sigma))
    return sigma.to(x.dtype)


def guidance(conditional, unconditional, weight):
    """Classifier-free guidance (CFG eq. 6, its w = weight - 1): one denoiser out of two.

        D = D_u + weight (D_c - D_u)

    weight 1 gives D_c, the conditional denoiser, 0 gives D_u, and more than 1 exaggerates what the
    condition changes.  Each call calls both.  Extra arguments, such as rk45's labels, go to
    `conditional` alone.  Needs: nothing.
    """
    def denoise(x, sigma, *labels):
        return torch.lerp(unconditional(x, sigma), conditional(x, sigma, *labels), weight)
    return denoise


# ---- Deterministic -------------------------------------------------------------------------------

def ode_slope(denoise, x, t, schedule):
    """dx/dt of the probability flow ODE at time t > 0   (EDM eq. 4, Algorithm 1 line 4).

        dx/dt = (sigma'/sigma + s'/s) x - (sigma' s / sigma) D(x/s; sigma)

    x (B, ...), t 0-d or (B, 1, ..., 1) -> (B, ...).  Needs: level.
    """
    sigma, dsigma, s, ds = schedule.sigma(t), schedule.dsigma(t), schedule.s(t), schedule.ds(t)
    D = denoise(x / s, level(x, sigma))
    return (dsigma / sigma + ds / s) * x - dsigma * s / sigma * D


@torch.no_grad()
def euler(denoise, x, t, schedule, callback=None):
    """Euler's method on the probability flow ODE: first order.  NFE = N.

        x <- x + (t_{i+1} - t_i) dx/dt(x, t_i)

    x (B, ...), t (N + 1,) -> (B, ...).  Needs: ode_slope, level, record, checked.
    """
    finite = []
    for t_cur, t_next in zip(t[:-1], t[1:]):
        d = ode_slope(denoise, x, t_cur, schedule)
        x = x + (t_next - t_cur) * d
        record(x, finite, callback)
    return checked(x, finite, schedule.sigma(t))


@torch.no_grad()
def heun(denoise, x, t, schedule, callback=None):
    """Heun's method on the probability flow ODE: second order (EDM Algorithm 1).  NFE = 2N - 1.

        x' = x + (t_{i+1} - t_i) d,  d = dx/dt(x, t_i),  d' = dx/dt(x', t_{i+1})
        x <- x + (t_{i+1} - t_i) (d + d')/2,     or x' itself where t_{i+1} = 0

    x (B, ...), t (N + 1,) -> (B, ...).  Needs: ode_slope, level, record, checked.
    """
    finite = []
    for t_cur, t_next in zip(t[:-1], t[1:]):
        d = ode_slope(denoise, x, t_cur, schedule)
        x_next = x + (t_next - t_cur) * d
        if t_next > 0:
            d_next = ode_slope(denoise, x_next, t_next, schedule)
            x_next = x + (t_next - t_cur) * (d + d_next) / 2
        x = x_next
        record(x, finite, callback)
    return checked(x, finite, schedule.sigma(t))


def dormand_prince(slope, x, t, h, k1):
    """One step of the Runge-Kutta pair 5(4) of Dormand & Prince 1980: x(t + h), its error, dx/dt.

        k_i = slope(x + h sum_j a_ij k_j, t + c_i h),    x' = x + h sum_i b_i k_i   (fifth order)
        error = x' - x'' = h sum_i e_i k_i,              x'' the embedded fourth order

    The last row of a is b, so that k_7 is the next step's k_1 ("first same as last"): six calls of
    slope, not seven.  x, k1 (B, ...), t, h 0-d or (B, 1, ..., 1) -> three of (B, ...).
    Needs: nothing.
    """
    c = 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1
    a = ((1 / 5,),
         (3 / 40, 9 / 40),
         (44 / 45, -56 / 15, 32 / 9),
         (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
         (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
         (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84))
    e = 71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40
    k, step = [k1], h.to(x.dtype)
    for c_i, a_i in zip(c, a):
        x_next = x + step * sum(a_ij * k_j for a_ij, k_j in zip(a_i, k))
        k.append(slope(x_next, t + c_i * h))
    return x_next, step * sum(e_i * k_i for e_i, k_i in zip(e, k)), k[-1]


@torch.no_grad()
def rk45(denoise, x, t, schedule, rtol=1e-5, atol=1e-5, labels=(), max_steps=1000, callback=None):
    """Adaptive Dormand-Prince on the probability flow ODE.  NFE = 6 (steps taken or refused) + 1.

        r = rms(error/(atol + rtol max(|x|, |x'|))),   the step is kept if r <= 1, else tried again
        h <- h min(max(.9 r^(-1/5), .2), 10);    the step after a refused one does not grow h

    It goes from t[0] to the last t_i > 0 in steps of its own; the t_i between do not matter.  The
    first h moves x by 1 % of |x|, in r's norm, but is at least 1e-6 of the whole way and at most
    all of it.  Then comes Euler's step to 0, whose slope is known already; pass t[:-1]
    to stop before it.  Each sample has its own r and h, and so does not depend on its batch.
    denoise gets x (b, ...), sigma (b, 1, ..., 1) and the same b rows of each tensor in labels.
    x (B, ...), t (N + 1,) -> x (B, ...), NFE (B,) int64.  Errors: FloatingPointError where x is
    not finite, h below what t can resolve, or max_steps too few; it names step, sample, t, sigma.
    Needs: ode_slope, level, dormand_prince, record, checked.
    """
    double = torch.float32 if x.device.type == "mps" else torch.float64
    time, end = (v.to(x.device, double) for v in (t[0], t[t > 0][-1]))
    rows, column, finite = torch.arange(len(x), device=x.device), [-1] + [1] * (x.ndim - 1), []
    time, nfe = time.repeat(len(x)), torch.ones_like(rows)                                # (B,)
    tiny, refused = 10 * torch.finfo(double).eps, torch.zeros_like(rows, dtype=torch.bool)

    def slope(x, time):
        own = [label[rows] for label in labels]         # of the rows that are still on their way

        def D(y, sigma):
            return denoise(y.to(x.dtype), sigma, *own)
        return ode_slope(D, x, time, schedule).to(x.dtype)

    def size(y, x):                                     # rms of y, in tolerances at x
        return (y / (atol + rtol * x.abs())).flatten(1).square().mean(1).sqrt().to(double)

    k = slope(x, time.view(column))
    h = (0.01 * size(x, x) / size(k, x)).nan_to_num(0).maximum(1e-6 * (time - end))
    while (time > end).any():
        rows = (time > end).nonzero().squeeze(1)                                          # (b,)
        now, y = time[rows], x[rows]
        step = h[rows].minimum(now - end)
        y_next, error, k_next = dormand_prince(slope, y, now.view(column), -step.view(column),
                                               k[rows])
        r = size(error, y.abs().maximum(y_next.abs()))                                    # (b,)
        stuck = ~r.isfinite() | (r > 1) & (step < tiny * now)
        if stuck.any() or len(finite) == max_steps:
            j = stuck.int().argmax()
            why = ("max_steps reached" if not stuck[j] else
                   "h is too small" if r[j].isfinite() else "x is not finite")
            raise FloatingPointError(f"{why} in step {len(finite) + 1} of rk45: sample {rows[j]}, "
                                     f"t = {now[j]:.4g}, sigma = {schedule.sigma(now[j]):.4g}")
        good = r <= 1
        x = x.index_copy(0, rows[good], y_next[good])
        k = k.index_copy(0, rows[good], k_next[good])
        time[rows[good]] = torch.where(step < now - end, now - step, end)[good]
        factor = (0.9 * r ** -0.2).clamp(0.2, 10)
        h[rows] = step * torch.where(refused[rows], factor.clamp(max=1), factor)
        refused[rows] = ~good
        nfe[rows] += 6
        record(x, finite, callback)
    if t[-1] == 0:
        x = x - end.to(x.dtype) * k
        record(x, finite, callback)
    return checked(x, finite, [schedule.sigma(end)] * len(finite)), nfe


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
                   S_noise=1.0, callback=None):
    """EDM's stochastic sampler, in sigma(t) = t, s(t) = 1   (EDM Algorithm 2).  NFE = 2N - 1.

        gamma = min(S_churn/N, sqrt(2) - 1) if sigma_i in [S_tmin, S_tmax] else 0
        sigma_hat = (1 + gamma) sigma_i,  x <- x + sqrt(sigma_hat^2 - sigma_i^2) S_noise noise
        then Heun's step from sigma_hat to sigma_{i+1}

    x (B, ...), sigma (N + 1,), noise() -> (B, ...), not called where gamma = 0; S_churn = 0 is
    Heun.  Needs: level, record, checked.
    """
    N, finite = len(sigma) - 1, []
    for sigma_cur, sigma_next in zip(sigma[:-1], sigma[1:]):
        gamma = min(S_churn / N, 2 ** 0.5 - 1) if S_tmin <= sigma_cur <= S_tmax else 0.0
        sigma_hat = (1 + gamma) * sigma_cur
        if gamma > 0:
            x = x + (sigma_hat ** 2 - sigma_cur ** 2).sqrt() * S_noise * noise()
        d = (x - denoise(x, level(x, sigma_hat))) / sigma_hat
        x_next = x + (sigma_next - sigma_hat) * d
        if sigma_next > 0:
            d_next = (x_next - denoise(x_next, level(x_next, sigma_next))) / sigma_next
            x_next = x + (sigma_next - sigma_hat) * (d + d_next) / 2
        x = x_next
        record(x, finite, callback)
    return checked(x, finite, sigma)


@torch.no_grad()
def euler_maruyama(denoise, x, sigma, noise, beta=1.0, callback=None):
    """Euler's method on EDM's SDE, in sigma(t) = t, s(t) = 1   (EDM eq. 6).  NFE = N.

        dx = -sigma score dsigma - beta sigma score dsigma + sqrt(2 beta sigma) dw
        x <- x + (1 + beta) h (D - x)/sigma_i + sqrt(2 beta sigma_i h) z

    with h = sigma_i - sigma_{i+1}.  The first term is the probability flow.  The other two form a
    Langevin process, which leaves p(x; sigma) as it is: new noise z replaces old noise at the rate
    beta(t) = beta sigma'/sigma.  beta = 0 is Euler's method, beta = 1 the reverse SDE of Song et
    al.'s VE.  First order, weakly and, as the noise does not depend on x, strongly.
    The step to 0 is D.
    x (B, ...), sigma (N + 1,), noise() -> (B, ...).  Needs: level, record, checked.
    """
    finite = []
    for sigma_cur, sigma_next in zip(sigma[:-1], sigma[1:]):
        h = sigma_cur - sigma_next
        d = (denoise(x, level(x, sigma_cur)) - x) / sigma_cur
        if sigma_next > 0 and beta > 0:
            x = x + (1 + beta) * h * d + (2 * beta * sigma_cur * h).sqrt() * noise()
        else:
            x = x + h * d
        record(x, finite, callback)
    return checked(x, finite, sigma)


# ---- Ancestral -----------------------------------------------------------------------------------
# Published in the scaled frame, sqrt(alpha_bar) x with alpha_bar = 1/(1 + sigma^2); here divided by
# sqrt(alpha_bar), which leaves less to write.

@torch.no_grad()
def ddim(denoise, x, sigma, noise=None, eta=0.0, covariance=None, cap=None, callback=None):
    """DDIM with any eta in [0, 1] and covariance (DDIM eq. 12, 16; Analytic-DPM Thm 1).  NFE = N.

        x <- D + k (x - D) + sqrt(w + (1 - k)^2 Cov[x0 | x]) noise      from sigma_i = a to
        w = eta^2 (b/a)^2 (a^2 - b^2),    k = sqrt(b^2 - w)/a           sigma_{i+1} = b

    With ab = 1/(1 + a^2) and ab' = 1/(1 + b^2), w is 1/ab' times the variance of DDIM eq. 16,
    eta^2 (1 - ab')/(1 - ab) (1 - ab/ab').
    covariance(x, sigma, D) -> Cov[x0 | x], to broadcast to x; None is 0, as published for DDIM.
    cap: the last noisy step, to the smallest sigma > 0, adds noise of at most cap grey levels
    (2/255 each) on average, sqrt(w + ...) <= sqrt(1 + b^2) cap (2/255) sqrt(pi/2).  Published, for
    images: 2 in DDPM, 1 in DDIM.  None: no cap.  The step to 0 is D, without noise.
    eta = 0 without covariance is Euler in sigma(t) = t and calls no noise.  eta = 1 is DDPM.
    x (B, ...), sigma (N + 1,), noise() -> (B, ...).  Needs: level, record, checked.
    """
    last, random, finite = sigma[sigma > 0][-1], eta > 0 or covariance is not None, []
    for a, b in zip(sigma[:-1], sigma[1:]):
        D = denoise(x, level(x, a))
        w = eta ** 2 * (b / a) ** 2 * (a ** 2 - b ** 2)
        k = (b ** 2 - w).sqrt() / a
        x_next = D + k * (x - D)
        if random and b > 0:
            v = w if covariance is None else w + (1 - k) ** 2 * covariance(x, a, D)
            if cap is not None and b == last:
                v = v.clamp(max=float(1 + b ** 2) * (cap * 2 / 255) ** 2 * math.pi / 2)
            x_next = x_next + v.sqrt() * noise()
        x = x_next
        record(x, finite, callback)
    return checked(x, finite, sigma)


def ddpm(denoise, x, sigma, noise, variance="beta_tilde", cap=None, callback=None):
    """Ancestral sampling (DDPM Algorithm 2): DDIM with eta = 1.  NFE = N.

        x <- D + (b/a)^2 (x - D) + sqrt(v) noise         from sigma_i = a to sigma_{i+1} = b
        v = beta_tilde = (b/a)^2 (a^2 - b^2)             exact for data that are a single point
        v = beta = (a^2 - b^2) (1 + b^2)/(1 + a^2)       exact for data N(0, I)
        v = beta_tilde + (1 - (b/a)^2)^2 Cov[x0 | x]     exact for data N(mu, diagonal)

    The first two are the third with Cov = 0 and Cov = a^2/(1 + a^2).  variance: a name, or the
    covariance(x, sigma, D); the rest as in ddim.  Errors: ValueError for any other name.
    Needs: ddim, level, record, checked.
    """
    named = {"beta_tilde": None, "beta": lambda x, sigma, D: sigma ** 2 / (1 + sigma ** 2)}
    if not callable(variance) and variance not in named:
        raise ValueError(f"variance is beta_tilde, beta or a covariance, not {variance!r}")
    covariance = variance if callable(variance) else named[variance]
    return ddim(denoise, x, sigma, noise, 1.0, covariance, cap, callback)


def analytic_covariance(levels, moments, bound=1.0):
    """Analytic-DPM's Cov[x0 | x], one number per noise level (its Theorem 1).

        Cov = sigma^2 (1 - E|eps_hat|^2/d),     eps_hat = (x - D)/sigma,     clipped to [0, bound]

    levels, moments (n,), n >= 2: sigmas, all different, and the means of |eps_hat|^2/d over noisy
    data there; between two levels Cov is linear in log sigma, beyond them constant (but never
    above sigma^2).  bound: 1 is the largest variance of data in [-1, 1].  -> covariance(x, sigma,
    D), 0-d, on the CPU as sigma is.  Errors: ValueError for other shapes.  Needs: nothing.
    """
    levels, moments = (torch.as_tensor(v, dtype=torch.float64).cpu() for v in (levels, moments))
    if levels.ndim != 1 or len(levels) < 2 or levels.shape != moments.shape:
        raise ValueError("levels and moments are two rows of the same length, 2 at least")
    where, order = levels.log().sort()
    table = (levels ** 2 * (1 - moments))[order]

    def covariance(x, sigma, D):
        log_sigma = sigma.double().log()
        i = torch.searchsorted(where, log_sigma).clamp(1, len(where) - 1)
        share = ((log_sigma - where[i - 1]) / (where[i] - where[i - 1])).clamp(0, 1)
        value = table[i - 1] + share * (table[i] - table[i - 1])
        return value.clamp(0, min(bound, float(sigma) ** 2))
    return covariance


def sn_covariance(head, bound=1.0):
    """SN-DPM's Cov[x0 | x], one number per pixel, from the squared noise.

        Cov = sigma^2 (h - eps_hat^2),  h = E[eps^2 | x],  eps_hat = (x - D)/sigma,  in [0, bound]

    head(x, sigma) -> h (B, ...), asked once per noisy step, after denoise at the same x and sigma:
    a network with both outputs can keep its second one.  Unclipped, it can be negative.  bound: 1
    is the largest variance of data in [-1, 1].  -> covariance(x, sigma, D).  Needs: level.
    """
    def covariance(x, sigma, D):
        return (sigma ** 2 * head(x, level(x, sigma)) - (x - D) ** 2).clamp(0, bound)
    return covariance


def npr_covariance(head, bound=1.0):
    """NPR-DPM's Cov[x0 | x], one number per pixel, from the squared residual.

        Cov = sigma^2 h,  h = E[(eps - eps_hat)^2 | x],  eps_hat = (x - D)/sigma,  in [0, bound]

    As sn_covariance, but right about an imperfect D too: its error is part of h.
    head(x, sigma) -> h (B, ...).  -> covariance(x, sigma, D).  Needs: level.
    """
    def covariance(x, sigma, D):
        return (sigma ** 2 * head(x, level(x, sigma))).clamp(0, bound)
    return covariance


# ---- Predictor-corrector -------------------------------------------------------------------------

def langevin(x, score, z, step):
    """One step of Langevin dynamics   (SDE Algorithms 4 and 5).

        x + step score + sqrt(2 step) z

    Keeps the law whose score it is as step -> 0 if step does not depend on x.  x, score, z
    (B, ...), step 0-d or (B, 1, ..., 1) -> (B, ...).  Needs: nothing.
    """
    return x + step * score + (2 * step).sqrt() * z


def snr_step(score, z, snr, alpha):
    """The published step of the corrector   (SDE Algorithms 4 and 5).

        step = 2 alpha (snr |z|/|score|)^2,     norms over each sample

    Published code takes the batch's mean norms, so that samples depend on each other.  The norms of
    one sample depend on x and z, so small Langevin steps keep another law than the score's: for
    N(0, s^2 I) a law of (1 + 2/d)^2 times the variance in d dimensions.  That is negligible for
    images, and fatal in few dimensions, where |score| can be near 0.
    score, z (B, ...), alpha 0-d -> (B, 1, ..., 1).  Needs: nothing.
    """
    ratio = z.flatten(1).norm(dim=1) / score.flatten(1).norm(dim=1)                       # (B,)
    return 2 * alpha * (snr * ratio.view(-1, *[1] * (z.ndim - 1))) ** 2


@torch.no_grad()
def predictor_corrector(denoise, x, t, schedule, noise, snr=0.16, norms=True, callback=None):
    """Reverse diffusion after a Langevin step, N times   (SDE Algorithms 2 - 5).  NFE = 2N.

        x <- langevin(x, score(x), noise, step),     score(x) = (s D(x/s; sigma) - x)/(s sigma)^2
        x <- (2 - a) x + v score(x) + sqrt(v) noise,     a = s/s',  v = s^2 (sigma^2 - sigma'^2)

    from t_i (s, sigma) to t_{i+1} (s', sigma'), corrector first as in the published code, no noise
    in the step to 0.  a and v are the forward transition's: VE a = 1; VP a = sqrt(1 - beta),
    v = beta.  step: snr_step with alpha = a^2; without norms, for points, 2 alpha (snr s sigma)^2,
    which is snr_step's value where x is pure noise.  As a Langevin step is finite, the variance is
    too large: at high noise, where N is large, by a share of about snr^2.
    x (B, ...), t (N + 1,), noise() -> (B, ...).  Needs: langevin, snr_step, level, record, checked.
    """
    def score(x, s, sigma):
        return (s * denoise(x / s, level(x, sigma)) - x) / (s * sigma) ** 2

    finite = []
    for t_cur, t_next in zip(t[:-1], t[1:]):
        s, sigma = schedule.s(t_cur), schedule.sigma(t_cur)
        a, v = s / schedule.s(t_next), s ** 2 * (sigma ** 2 - schedule.sigma(t_next) ** 2)
        g, z = score(x, s, sigma), noise()
        step = snr_step(g, z, snr, a ** 2) if norms else 2 * (a * snr * s * sigma) ** 2
        x = langevin(x, g, z, step)
        x = (2 - a) * x + v * score(x, s, sigma)
        if t_next > 0:
            x = x + v.sqrt() * noise()
        record(x, finite, callback)
    return checked(x, finite, schedule.sigma(t))
