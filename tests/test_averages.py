"""averages.py: half-lives and widths, by their integrals; widths put together afterwards."""

import copy

import numpy as np
import pytest
import torch

import evaluate
import runs
import train
from averages import ema_beta, exponent, mixture, reconstruct, update_ema

POINTS = ["--data", "two-gaussians", "--width", "16", "--batch", "16", "--ref-batch", "32",
          "--sample-steps", "2", "--out", "r"]

pytestmark = pytest.mark.usefixtures("folder")


def averaged(values, length, **more):
    """The average, after every step, of one weight that takes these values."""
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    ema, found = copy.deepcopy(model), []
    for step, value in enumerate(values, 1):
        model.weight.data.fill_(value)
        update_ema(ema, model, ema_beta(length, step, **more))
        found.append(ema.weight.item())
    return np.array(found)


def test_half_life_counts_images_and_ramps_up():
    half = averaged([0.0] + 10 * [1.0], 100, batch=10)      # 100 images after a start at 0
    assert half[-1] - half[0] * 0.5 == pytest.approx(0.5)
    assert ema_beta(10 ** 9, 1, batch=100, rampup=1.0) == pytest.approx(0.5)
    assert ema_beta(10 ** 9, 7, batch=100, rampup=0.1) == pytest.approx(0.5 ** (1 / 0.7))


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_width_is_the_power_functions_standard_deviation(width):
    g, u = exponent(width), (np.arange(10 ** 6) + 0.5) / 10 ** 6
    p = (g + 1) * u ** g
    mean = (p * u).mean()
    assert np.sqrt((p * u ** 2).mean() - mean ** 2) == pytest.approx(width, rel=1e-3)


@pytest.mark.parametrize("width", [0.03, 0.1, 0.25])
def test_power_average_of_a_power_has_its_closed_form(width):
    """Of weights t^2: (g + 1)/(g + 3) t^2, whatever the network started with."""
    t, g = np.arange(1.0, 4001), exponent(width)
    assert averaged(t ** 2, width)[-1] == pytest.approx((g + 1) / (g + 3) * 4000 ** 2, rel=0.01)


def test_mixture_gives_back_an_average_that_is_there():
    times, widths = [100, 100, 200, 200], [0.05, 0.1, 0.05, 0.1]
    for i in range(4):
        x = mixture(times, widths, times[i], widths[i])
        assert np.allclose(x, np.eye(4)[i], atol=1e-6)
    assert mixture(times, widths, 200, 0.15).sum() == pytest.approx(1)


def test_mixture_is_the_closest_in_mean_square():
    """Against least squares on a fine grid of the profiles themselves (sum x = 1 apart)."""
    times, widths, u = [50, 100, 100], [0.1, 0.05, 0.1], np.arange(0.005, 100, 0.01)
    profile = lambda t, w: (u < t) * (exponent(w) + 1) * (u / t) ** exponent(w) / t
    P = np.stack([profile(t, w) for t, w in zip(times, widths)], axis=1)
    x = np.linalg.lstsq(P, profile(100, 0.2), rcond=None)[0]
    assert np.allclose(mixture(times, widths, 100, 0.2), x / x.sum(), atol=2e-3)


def test_a_run_gives_widths_that_it_did_not_average(capsys):
    """0.2 from the checkpoints of 0.05 and 0.1 is nearly the one that was averaged on the way."""
    assert train.main([*POINTS, "--steps", "200", "--checkpoint-every", "10", "--keep", "99",
                       "--ema", "0.05,0.1,0.2", "--decay", "0"]) == 0
    paths, last = runs.checkpoints("r"), runs.load_checkpoint("r")

    def load(path):
        state = runs.load_checkpoint(path)
        del state["ema"]["0.2"]
        return state
    flat = lambda weights: torch.cat([w.flatten() for w in weights.values()])
    made, true, near = map(flat, (reconstruct(paths, load, 0.2), last["ema"]["0.2"],
                                  last["ema"]["0.1"]))
    assert (made - true).norm() < 0.02 * (near - true).norm()
    assert evaluate.main(["sample", "r", "--weights", "0.15", "--steps", "2", "--num", "4"]) == 0
    capsys.readouterr()
    for width in ("0.5", "0.002", "nan", "x"):
        with pytest.raises(runs.BadInput, match="choose raw, ema or one of 0.05, 0.1, 0.2"):
            runs.load_run("r", weights=width)


def test_a_run_without_widths_says_so():
    assert train.main([*POINTS, "--steps", "2", "--ema", "50,500"]) == 0
    with pytest.raises(runs.BadInput, match="averaged no width"):
        runs.load_run("r", weights="0.15")
    runs.load_run("r", weights="500")
