"""The weights of losses.py, and the same weight through every target that a network can have."""

import pytest
import torch

from losses import WEIGHTS, debias_weight, dsm_loss, edm_weight, min_snr_weight, p2_weight
from networks import target_coefficients
from oracles import randn
from schedules import DDPM, EDM

SIGMA = torch.logspace(-3, 3, 61, dtype=torch.float64)
TARGETS = ("eps", "x0", "v", "F")                      # F: EDM's own, the target of its schedule


def test_published_forms_on_eps_times_snr():
    """lambda = w_eps SNR, w_eps as each paper prints it."""
    snr = 1 / SIGMA ** 2
    published = {"constant": torch.ones_like(snr), "p2": 1 / (1 + snr),
                 "min-snr": snr.clamp(max=5) / snr, "inverse-snr": 1 / snr,
                 "debias": 1 / snr.sqrt()}
    for name, w_eps in published.items():
        torch.testing.assert_close(WEIGHTS[name](SIGMA), w_eps * snr, rtol=1e-12, atol=0)
    general = p2_weight(SIGMA, k=2.0, gamma=0.5)
    torch.testing.assert_close(general, snr / (2 + snr) ** 0.5, rtol=1e-12, atol=0)
    torch.testing.assert_close(edm_weight(SIGMA), EDM().weight(SIGMA), rtol=1e-12, atol=0)


def test_limits_at_snr_zero_and_infinity_are_finite_for_p2_and_min_snr():
    ends = torch.tensor([0.0, float("inf")])
    assert p2_weight(ends).tolist() == [1, 0]
    assert min_snr_weight(ends).tolist() == [5, 0]


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


@pytest.mark.parametrize("target", TARGETS)
def test_d_of_the_true_target_is_x0(target):
    """DB eq. 6-7 for eps; v and F likewise."""
    x0, eps = randn(2, 61)
    c_skip, c_out = coefficients(target)
    D = c_skip * (x0 + SIGMA * eps) + c_out * truth(target, x0, eps)
    torch.testing.assert_close(D, x0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("target", TARGETS)
def test_same_weight_through_every_target_same_loss_and_gradient_at_d(target):
    """w_target |prediction - target|^2 = lambda |D - x0|^2 with w_target = lambda c_out^2."""
    x0, eps, noise = randn(3, 61)
    D = (x0 + 0.1 * noise).requires_grad_()
    c_skip, c_out = coefficients(target)
    prediction = (D - c_skip * (x0 + SIGMA * eps)) / c_out
    square = (prediction - truth(target, x0, eps)) ** 2
    w_target = {"eps": SIGMA ** 2, "x0": 1, "v": SIGMA ** 2 / (1 + SIGMA ** 2), "F": c_out ** 2}
    for weight in WEIGHTS.values():
        loss = dsm_loss(lambda x, s: D[:, None], x0[:, None], eps[:, None], SIGMA[:, None], weight)
        through = weight(SIGMA) * w_target[target] * square
        torch.testing.assert_close(loss, through, rtol=1e-6, atol=0)
        g, = torch.autograd.grad(loss.sum(), D)
        g_through, = torch.autograd.grad(through.sum(), D, retain_graph=True)
        torch.testing.assert_close(g, g_through, rtol=1e-6, atol=0)


def test_edms_weight_is_one_on_its_own_target():
    torch.testing.assert_close(edm_weight(SIGMA) * coefficients("F")[1] ** 2,
                               torch.ones_like(SIGMA), rtol=1e-12, atol=0)


def test_unknown_target_is_refused():
    with pytest.raises(ValueError, match="'flow' is none of eps, x0, v"):
        target_coefficients("flow", SIGMA)
