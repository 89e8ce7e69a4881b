"""The weights of losses.py, and the same weight through every target that a network can have."""

import pytest
import torch

from losses import WEIGHTS, debias_weight, edm_weight, min_snr_weight, p2_weight
from networks import target_coefficients
from oracles import close, randn
from schedules import DDPM, EDM

SIGMA = torch.logspace(-3, 3, 61, dtype=torch.float64)


def test_published_forms_on_eps_times_snr():
    """lambda = w_eps SNR, w_eps as each paper prints it; finite at SNR 0 and infinity."""
    snr = 1 / SIGMA ** 2
    published = {"constant": torch.ones_like(snr), "p2": 1 / (1 + snr),
                 "min-snr": snr.clamp(max=5) / snr, "inverse-snr": 1 / snr,
                 "debias": 1 / snr.sqrt()}
    for name, w_eps in published.items():
        close(WEIGHTS[name](SIGMA), w_eps * snr)
    close(p2_weight(SIGMA, k=2.0, gamma=0.5), snr / (2 + snr) ** 0.5)
    close(edm_weight(SIGMA), EDM().weight(SIGMA))
    ends = torch.tensor([0.0, float("inf")])
    assert p2_weight(ends).tolist() == [1, 0] and min_snr_weight(ends).tolist() == [5, 0]


def test_debias_on_ddpm_changes_the_gradients_scale():
    """On eps it runs from .01 to 157."""
    levels = DDPM().levels
    w_eps = debias_weight(levels) * levels ** 2
    close(w_eps[[0, -1]], [0.01, 157.4], rtol=1e-3)


def test_d_of_the_true_target_is_x0():
    """DB eq. 6-7 for eps; the others likewise.  So |D - x0|^2 is c_out^2 |prediction - target|^2,
    which gives losses.py's table of weights.
    """
    x0, eps = randn(2, 61)
    alpha, r = 1 / (1 + SIGMA ** 2).sqrt(), (SIGMA ** 2 + 0.25).sqrt()
    for coefficients, target, w in (
            (target_coefficients("eps", SIGMA), eps, SIGMA ** 2),
            (target_coefficients("x0", SIGMA), x0, 1),
            (target_coefficients("v", SIGMA), alpha * (eps - SIGMA * x0), (alpha * SIGMA) ** 2),
            (EDM().precondition(SIGMA), (2 * SIGMA * x0 - 0.5 * eps) / r, 1 / edm_weight(SIGMA))):
        c_skip, c_out = coefficients[:2]
        close(c_skip * (x0 + SIGMA * eps) + c_out * target, x0, atol=1e-9)
        close(c_out ** 2, w)
    with pytest.raises(ValueError, match="'flow' is none of eps, x0, v"):
        target_coefficients("flow", SIGMA)
