"""The weights of losses.py, and the same weight through every target that a network can have."""

import pytest
import torch

from losses import WEIGHTS, debias_weight, dsm_loss, edm_weight, min_snr_weight, p2_weight
from networks import target_coefficients
from oracles import close, randn
from schedules import DDPM, EDM

SIGMA = torch.logspace(-3, 3, 61, dtype=torch.float64)
every_target = pytest.mark.parametrize("target", ["eps", "x0", "v", "F"])   # F: the schedule's own


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
    """On eps: from .01 to 157, mean 17.8; the last tenth of the steps carries 57 %."""
    levels = DDPM().levels
    w_eps = debias_weight(levels) * levels ** 2
    assert w_eps[0].item() == pytest.approx(0.01, abs=1e-5)
    assert w_eps[-1].item() == pytest.approx(157.4, abs=0.1)
    assert w_eps.mean().item() == pytest.approx(17.8, abs=0.05)
    assert (w_eps[-100:].sum() / w_eps.sum()).item() == pytest.approx(0.57, abs=0.005)


def coefficients(target):
    """c_skip, c_out of D = c_skip x + c_out prediction."""
    return EDM().precondition(SIGMA)[:2] if target == "F" else target_coefficients(target, SIGMA)


def truth(target, x0, eps):
    """The targets by their definitions, not through D."""
    alpha, r = 1 / (1 + SIGMA ** 2).sqrt(), (SIGMA ** 2 + 0.25).sqrt()
    return {"eps": eps, "x0": x0, "v": alpha * eps - alpha * SIGMA * x0,
            "F": (SIGMA * x0 - 0.25 * eps) / (0.5 * r)}[target]


@every_target
def test_d_of_the_true_target_is_x0(target):
    """DB eq. 6-7 for eps; v and F likewise."""
    x0, eps = randn(2, 61)
    c_skip, c_out = coefficients(target)
    close(c_skip * (x0 + SIGMA * eps) + c_out * truth(target, x0, eps), x0, atol=1e-9)


@every_target
def test_same_weight_through_every_target_same_loss_at_d(target):
    """w_target |prediction - target|^2 = lambda |D - x0|^2, the table's w; EDM's w_F is 1."""
    x0, eps, noise = randn(3, 61)
    D = x0 + 0.1 * noise
    c_skip, c_out = coefficients(target)
    prediction = (D - c_skip * (x0 + SIGMA * eps)) / c_out
    w = {"eps": SIGMA ** 2, "x0": 1, "v": SIGMA ** 2 / (1 + SIGMA ** 2), "F": c_out ** 2}[target]
    for weight in WEIGHTS.values():
        loss = dsm_loss(lambda x, s: D[:, None], x0[:, None], eps[:, None], SIGMA[:, None], weight)
        through = weight(SIGMA) * w * (prediction - truth(target, x0, eps)) ** 2
        close(loss, through, rtol=1e-6)
    if target == "F":
        close(edm_weight(SIGMA) * c_out ** 2, 1)


def test_unknown_target_is_refused():
    with pytest.raises(ValueError, match="'flow' is none of eps, x0, v"):
        target_coefficients("flow", SIGMA)
