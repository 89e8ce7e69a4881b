"""averages.py: averages of the weights over training, which is what one samples with.

    half-life h        ema <- beta ema + (1 - beta) weights,  beta = 1/2^(batch/h)
    width w in (0, 1)  ema(t) = int_0^t p(tau) weights(tau) dtau,  p = (g + 1) tau^g / t^(g + 1):
                       a power function, whose standard deviation is w t   (Karras et al. 2024,
                       Analyzing and Improving the Training Dynamics of Diffusion Models, sec. 3)

A half-life forgets the first weights after some images; a width is a share of all training so far.
From the checkpoints of one or two widths that of any other can be put together afterwards.
"""

import math

import numpy as np
import torch


def ema_beta(length, step, batch=1, rampup=math.inf):
    """beta after a number of steps of `batch`, for a half-life or a width.

    half-life, in images, at most rampup step batch   1/2^(batch/length)       (EDM's ramp-up)
    width, a number below 1                           (1 - 1/step)^(g + 1)
    Needs: exponent.
    """
    if length < 1:
        return (1 - 1 / step) ** (exponent(length) + 1)
    return 0.5 ** (batch / max(min(length, rampup * step * batch), 1e-8))


@torch.no_grad()
def update_ema(ema, model, beta):
    """ema <- beta ema + (1 - beta) weights.  Buffers stay as they are.  Needs: nothing."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - beta)


def exponent(width):
    """g of the width:  width^2 = (g + 1)/((g + 2)^2 (g + 3));  .01 to .28: g = 97 to .03.

    ValueError outside.  Needs: nothing.
    """
    if not 0.01 <= width <= 0.28:
        raise ValueError("a width is a number from .01 to .28")
    return np.roots([1, 7, 16 - width ** -2, 12 - width ** -2]).real.max()


def mixture(times, widths, time, width):
    """x with sum_i x_i p_i closest to the p of (time, width), in mean square: the averages at these
    times, with these widths, are to be mixed so.  sum x = 1: weights that rest are met.

    A x = b with A_ij = int p_i p_j, b_i = int p_i p.  times, widths (n,) -> (n,), in float64.
    Needs: exponent.
    """
    t = np.append(times, time)
    g = np.array([exponent(w) for w in (*widths, width)])
    low, high = np.minimum.outer(t, t), np.maximum.outer(t, t)                    # (n + 1, n + 1)
    A = np.outer(g + 1, g + 1) / (np.add.outer(g, g) + 1) / high \
        * (low / t[:, None]) ** g[:, None] * (low / t) ** g
    x = np.linalg.lstsq(A[:-1, :-1], A[:-1, -1], rcond=None)[0]
    return x / x.sum()


def reconstruct(paths, load, width):
    """The average of this width at the last of a run's checkpoints, from their averages by widths.

    load(path) -> dict(step=, ema={text of the width: state_dict, ..}); it is called twice, and one
    checkpoint is held at a time.  -> state_dict.  ValueError if no width was averaged.
    Needs: mixture, exponent.
    """
    widths = lambda state: [name for name in state["ema"] if float(name) < 1]
    given = [(state["step"], float(name)) for state in map(load, paths) for name in widths(state)]
    if not given:
        raise ValueError("the run averaged no width, as --ema 0.05,0.1 does")
    times, found = zip(*given)
    x, total = iter(mixture(times, found, max(times), width)), {}
    for state in map(load, paths):
        for average in widths(state):
            x_i = next(x)
            for name, value in state["ema"][average].items():
                total[name] = total.get(name, 0) + x_i * value.double()
    return {name: value.float() for name, value in total.items()}
