"""averages.py: averages of the weights over training, which is what one samples with.

A length of 1 or more is a half-life, in images; below 1 it is a relative width.

    half-life h    ema <- beta ema + (1 - beta) weights,  beta = 1/2^(batch/h)
    width w        ema(t) = int_0^t p(tau) weights(tau) dtau,  p(tau) = (g + 1) tau^g / t^(g + 1):
                   a power function, whose standard deviation is w t   (Karras et al. 2024,
                   Analyzing and Improving the Training Dynamics of Diffusion Models, sec. 3;
                   w is their sigma_rel, g their gamma)

A half-life reaches back by a number of images; a width by a share of the training, however long
that is.  From the checkpoints of two widths, any other can be put together afterwards.
"""

import math

import numpy as np
import torch


def ema_beta(length, step, batch=1, rampup=math.inf):
    """beta in ema <- beta ema + (1 - beta) weights, after a number of steps of `batch`.

    a width      (1 - 1/step)^(g + 1)
    a half-life  1/2^(batch/h),  h = min(length, rampup step batch)   (EDM's ramp-up)

    ValueError for a width outside .01 to .28.  Needs: exponent.
    """
    if length < 1:
        return (1 - 1 / step) ** (exponent(length) + 1)
    return 0.5 ** (batch / max(min(length, rampup * step * batch), 1e-8))


@torch.no_grad()
def update_ema(ema, model, beta):
    """ema <- beta ema + (1 - beta) weights.  Buffers stay as they are.  Needs: nothing."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - beta)


def exponent(width):
    """g of a width:  width^2 (g + 2)^2 (g + 3) - (g + 1) = 0.  From .01 to .28: g = 97 to .17.

    ValueError outside.  Needs: nothing.
    """
    if not 0.01 <= width <= 0.28:
        raise ValueError("a width is a number from 0.01 to 0.28")
    return np.roots(width ** 2 * np.poly([-2, -2, -3]) - [0, 0, 1, 1]).real.max()


def mixture(times, widths, time, width):
    """x (n,) and error: sum_i x_i p_i is closest to the p of (time, width), and how close that is.

    A x = b, A_ij = int p_i p_j, b_i = int p_i p, is where int (sum_i x_i p_i - p)^2 is least; x is
    then scaled to sum 1, so that constant weights stay what they are.  error: the root of that
    integral over int p^2.  times, in steps, and widths (n,); float64.  Needs: exponent.
    """
    t = np.append(times, time)
    g = np.array([exponent(w) for w in (*widths, width)])
    low, high = np.minimum.outer(t, t), np.maximum.outer(t, t)                    # (n + 1, n + 1)
    A = np.outer(g + 1, g + 1) / (np.add.outer(g, g) + 1) / high \
        * (low / t[:, None]) ** g[:, None] * (low / t) ** g
    x = np.linalg.lstsq(A[:-1, :-1], A[:-1, -1], rcond=None)[0]
    x = x / x.sum()
    off = np.append(x, -1)
    return x, math.sqrt(max(off @ A @ off, 0) / A[-1, -1])


def reconstruct(paths, load, width):
    """The average of this width at the last of a run's checkpoints, from their averages by widths.

    load(path) -> dict(step=, ema={text of the width: state_dict, ..}); it is called twice, and one
    checkpoint is held at a time.  -> state_dict.  ValueError if the run averaged no width, or if
    these checkpoints miss the power function by more than 25 %.  Needs: mixture, exponent.
    """
    widths = lambda state: [name for name in state["ema"] if float(name) < 1]
    given = [(state["step"], float(name)) for state in map(load, paths) for name in widths(state)]
    if not given:
        raise ValueError("the run averaged no width, as --ema 0.05,0.1 does")
    times, found = zip(*given)
    x, error = mixture(times, found, max(times), width)
    if error > 0.25:
        raise ValueError(f"{len(paths)} checkpoints of the run miss it by {error:.0%}; more are "
                         "needed, by --checkpoint-every and --keep")
    total, x = {}, iter(x)
    for state in map(load, paths):
        for average in widths(state):
            x_i = next(x)
            for name, value in state["ema"][average].items():
                total[name] = total.get(name, 0) + x_i * value
    return total
