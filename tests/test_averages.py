"""averages.py: half-lives and widths, by their integrals; widths put together afterwards."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import runs
import train
from averages import ema_beta, exponent, mixture, update_ema

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
    assert averaged([5.0, 6.0], width) == pytest.approx([5, 6 - 0.5 ** (g + 1)])


def test_mixture_gives_back_an_average_that_is_there():
    times, widths = [100, 100, 200, 200], [0.05, 0.1, 0.05, 0.1]
    for i in range(4):
        x, error = mixture(times, widths, times[i], widths[i])
        assert np.allclose(x, np.eye(4)[i], atol=1e-6) and error < 1e-6


def test_mixture_is_the_closest_in_mean_square():
    """Against least squares on a fine grid of the profiles themselves, scaled to sum 1."""
    times, widths, u = [50, 100, 100], [0.1, 0.05, 0.1], np.arange(0.005, 100, 0.01)
    profile = lambda t, w: (u < t) * (exponent(w) + 1) * (u / t) ** exponent(w) / t
    P, p = np.stack([*map(profile, times, widths)], axis=1), profile(100, 0.2)
    best = np.linalg.lstsq(P, p, rcond=None)[0]
    x, error = mixture(times, widths, 100, 0.2)
    assert np.allclose(x, best / best.sum(), atol=2e-3)
    assert error == pytest.approx(np.linalg.norm(P @ x - p) / np.linalg.norm(p), rel=1e-3)


def flat(weights):
    return torch.cat([w.flatten() for w in weights.values()])


def test_a_run_gives_widths_that_it_did_not_average():
    """0.2 from the checkpoints of 0.05 and 0.1 is nearly the one that was averaged on the way."""
    every = ["--steps", "120", "--checkpoint-every", "6", "--decay", "0"]
    assert train.main([*POINTS, *every, "--ema", "0.2,0.1", "--out", "a"]) == 0
    assert train.main([*POINTS, *every, "--ema", "0.05,0.1", "--keep", "99"]) == 0
    tracked = runs.load_checkpoint("a")["ema"]
    true, near = flat(tracked["0.2"]), flat(tracked["0.1"])
    made = flat(runs.load_run("r", weights="0.2")[0].state_dict())
    assert (made - true).norm() < 0.03 * (near - true).norm()
    assert evaluate.main(["sample", "r", "--weights", "0.15", "--steps", "2", "--num", "4"]) == 0
    for path in runs.checkpoints("r")[:-2]:
        Path(path).unlink()
    with pytest.raises(runs.BadInput, match="2 checkpoints of the run miss it by"):
        runs.load_run("r", weights="0.2")
    with pytest.raises(runs.BadInput, match="0.01 to 0.28"):
        runs.load_run("r", weights="0.5")


def test_after_one_step_every_width_is_the_weights():
    assert train.main([*POINTS, "--steps", "1", "--ema", "0.05,0.28"]) == 0
    state = runs.load_checkpoint("r")
    for average in state["ema"].values():
        assert torch.equal(flat(average), flat(state["model"]))


def test_a_run_without_widths_says_so():
    assert train.main([*POINTS, "--steps", "2", "--ema", "50,500"]) == 0
    with pytest.raises(runs.BadInput, match="averaged no width"):
        runs.load_run("r", weights="0.15")
    runs.load_run("r", weights="500")
