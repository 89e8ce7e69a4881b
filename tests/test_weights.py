"""One weight algebra: the weights of losses.py, and the same weight through every target."""

import pytest
import torch

import losses
import networks
import runs
import train
from schedules import DDPM, EDM, SCHEDULES

SIGMA = torch.logspace(-3, 3, 61, dtype=torch.float64)
TARGETS = ("eps", "x0", "v", "F")


def test_published_forms_on_eps_times_snr():
    """lambda = w_eps SNR, w_eps as each paper prints it."""
    snr = 1 / SIGMA ** 2
    published = {"constant": torch.ones_like(snr), "p2": 1 / (1 + snr),
                 "min-snr": snr.clamp(max=5) / snr, "inverse-snr": 1 / snr,
                 "debias": 1 / snr.sqrt()}
    for name, w_eps in published.items():
        assert torch.allclose(losses.WEIGHTS[name](SIGMA), w_eps * snr, rtol=1e-12)
    w = losses.p2_weight(SIGMA, k=2.0, gamma=0.5)
    assert torch.allclose(w, snr / (2 + snr) ** 0.5, rtol=1e-12)
    assert torch.allclose(losses.edm_weight(SIGMA), EDM().weight(SIGMA), rtol=1e-12)


def test_debias_is_the_geometric_mean_of_constant_eps_and_constant_x0():
    mean = (losses.constant_weight(SIGMA) * losses.inverse_snr_weight(SIGMA)).sqrt()
    assert torch.allclose(losses.debias_weight(SIGMA), mean, rtol=1e-12)


def test_limits_at_snr_zero_and_infinity_are_finite_for_p2_and_min_snr():
    ends = torch.tensor([0.0, float("inf")])
    assert losses.p2_weight(ends).tolist() == [1, 0]                # k = gamma = 1: x0, then less
    assert losses.min_snr_weight(ends).tolist() == [5, 0]
    assert losses.inverse_snr_weight(ends).tolist() == [1, 1]


def test_debias_on_ddpm_changes_the_gradients_scale():
    """method.md section 3: .01 to 157, mean 17.8, the last tenth of the steps carries 57 %."""
    levels = DDPM().levels
    w_eps = losses.debias_weight(levels) * levels ** 2
    assert (w_eps[0] - 0.01).abs() < 1e-5 and (w_eps[-1] - 157.4).abs() < 0.1
    assert (w_eps.mean() - 17.8).abs() < 0.05
    assert (w_eps[-100:].sum() / w_eps.sum() - 0.57).abs() < 0.005


def predictions(target, D, x, sigma):
    """The raw network's output that gives D."""
    c_skip, c_out = networks.target_coefficients(target, sigma)
    return (D - c_skip * x) / c_out


def truth(target, x0, eps, sigma):
    """The targets by their definitions, not through D."""
    alpha = 1 / (1 + sigma ** 2).sqrt()
    r = (sigma ** 2 + 0.25).sqrt()
    return {"eps": eps, "x0": x0, "v": alpha * eps - alpha * sigma * x0,
            "F": (sigma * x0 - 0.25 * eps) / (0.5 * r)}[target]


@pytest.mark.parametrize("target", TARGETS)
def test_d_of_the_true_target_is_x0(target):
    """DB eq. 6-7 for eps; v and F likewise."""
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 61, generator=g, dtype=torch.float64)
    x = x0 + SIGMA * eps
    c_skip, c_out = networks.target_coefficients(target, SIGMA)
    D = c_skip * x + c_out * truth(target, x0, eps, SIGMA)
    assert torch.allclose(D, x0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("weight", losses.WEIGHTS)
@pytest.mark.parametrize("target", TARGETS)
def test_same_weight_through_every_target_same_loss_and_gradient_at_d(target, weight):
    """w_target |prediction - target|^2 = lambda |D - x0|^2 with w_target = lambda c_out^2."""
    g = torch.Generator().manual_seed(0)
    x0, eps, noise = torch.randn(3, 61, generator=g, dtype=torch.float64)
    x, lam = x0 + SIGMA * eps, losses.WEIGHTS[weight](SIGMA)
    D = (x0 + 0.1 * noise).requires_grad_()
    loss = losses.dsm_loss(lambda x, s: D[:, None], x0[:, None], eps[:, None], SIGMA[:, None],
                           losses.WEIGHTS[weight])
    _, c_out = networks.target_coefficients(target, SIGMA)
    error = predictions(target, D, x, SIGMA) - truth(target, x0, eps, SIGMA)
    through = lam * c_out ** 2 * error ** 2
    assert torch.allclose(loss, through, rtol=1e-6)
    grads = [torch.autograd.grad(L.sum(), D, retain_graph=True)[0] for L in (loss, through)]
    assert torch.allclose(*grads, rtol=1e-6)


def test_eps_error_is_d_error_over_sigma():
    """DB eq. 6, last line: x0_hat - x0 = (eps - eps_hat)/sqrt(SNR)."""
    _, c_out = networks.target_coefficients("eps", SIGMA)
    assert torch.equal(c_out ** 2, SIGMA ** 2)


def test_unknown_target_is_refused():
    with pytest.raises(ValueError, match="eps, x0, v, F"):
        networks.target_coefficients("flow", SIGMA)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("weight", ["schedule", *losses.WEIGHTS])
def test_normalised_weight_has_mean_one_over_the_training_distribution(schedule, weight):
    options = {"schedule": schedule, "weight": weight, "normalize-weight": True, "P-mean": -1.2,
               "P-std": 1.2}
    u = (torch.arange(999_983, dtype=torch.float64) + 0.5) / 999_983
    sigma = SCHEDULES[schedule]().training_sigma(u)
    w_eps = runs.loss_weight(options)(sigma) * sigma ** 2
    assert w_eps.mean() == pytest.approx(1, rel=0.02)
    shape = runs.loss_weight(options | {"normalize-weight": False})(sigma) * sigma ** 2
    assert torch.allclose(w_eps / shape, (w_eps / shape)[0], rtol=1e-9)
    if (schedule, weight) == ("edm", "inverse-snr"):                # E sigma^2 = e^(2 m + 2 s^2)
        assert (w_eps / shape)[0].reciprocal().log() == pytest.approx(-2.4 + 2.88, abs=0.02)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_target_and_weight_trains_in_every_schedule(schedule, target, tmp_path, monkeypatch,
                                                          capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.evaluate, "report", lambda *given: None)        # what comes after the
    monkeypatch.setattr(train, "save_samples", lambda *given: None)           # training, elsewhere
    for weight in losses.WEIGHTS:
        assert train.main(["--data", "two-gaussians", "--width", "8", "--batch", "8", "--ref-batch",
                           "16", "--steps", "3", "--sample-steps", "1", "--schedule", schedule,
                           "--target", target, "--weight", weight, "--normalize-weight", "--out",
                           weight]) == 0
        assert (tmp_path / weight / "log.jsonl").read_text().count('"loss"') == 3    # none skipped
