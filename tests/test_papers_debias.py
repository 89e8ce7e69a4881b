"""papers/debias.py: weights and errors in closed form, and each command in small."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import train
from oracles import called, randn, runs
from papers import debias, plot

SMALL = dict(data="images.npz", cond=True, width=8, mult=(1,), blocks=1, batch=4, steps=4,
             checkpoint_every=1, fid_num=4, fid_features="pixels")


def call(name, folder, options=SMALL, **arguments):
    return called(debias, name, folder, options, **arguments)


# ---- Runs ----------------------------------------------------------------------------------------

def test_a_run_that_was_stopped_goes_on_and_one_that_is_done_is_kept(folder, monkeypatch):
    given = SMALL | dict(loss="dsm", eval_every=0, seed=0)
    run = plot.trained(given)
    Path(run, "done").unlink()
    Path(evaluate.checkpoints(run)[-1]).unlink()
    assert plot.trained(given) == run and evaluate.load_checkpoint(run)["step"] == 4
    monkeypatch.setattr(train, "run", None)
    assert plot.trained(given) == run


# ---- Weights -------------------------------------------------------------------------------------

def test_bound_weight_is_that_of_the_divergence_between_two_reverse_steps():
    """KL = |difference of means|^2/(2 beta), and the mean is gamma_1 x0 + ...; the printed weight
    is that of the means' difference alone."""
    sigma = debias.LEVELS
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    ab = (1 - beta).cumprod(0)
    gamma_1 = (ab / (1 - beta)).sqrt() * beta / (1 - ab)                         # SA section 2.2
    printed, bound = debias.bound_weights(sigma)
    torch.testing.assert_close(printed, (gamma_1 * sigma) ** 2, rtol=1e-8, atol=0)
    torch.testing.assert_close(bound, (gamma_1 * sigma) ** 2 / (2 * beta), rtol=1e-8, atol=0)


def test_weights_and_their_shares(tmp_path):
    """On linear betas 1/sqrt(SNR) runs from .01 to 157, mean 17.8; the last tenth has 57 %."""
    rows = call("weights", tmp_path)
    assert [int(row["t"]) for row in rows] == list(range(1, 1001))
    weight = [float(row["debias"]) for row in rows]
    assert weight[0] == pytest.approx(0.01, rel=1e-3) and weight[-1] == pytest.approx(157, abs=1)
    assert sum(weight) / 1000 == pytest.approx(17.8, abs=0.05)
    assert 1 - float(rows[899]["share: debias"]) == pytest.approx(0.57, abs=0.005)
    assert float(rows[499]["share: constant"]) == pytest.approx(0.5)
    assert all(float(value) == 1 for name, value in rows[-1].items() if name.startswith("share"))


# ---- Errors by noise level -----------------------------------------------------------------------

def gaussian(x, sigma, v):
    """E[x0 | x] of data N(0, v)."""
    return v / (v + sigma ** 2) * x


def columns(rows):
    return torch.tensor([list(row.values()) for row in rows], dtype=torch.float64).T


def test_error_of_the_noise_of_gaussian_data_and_of_the_initial_guess():
    """v/(v + sigma^2) for the best denoiser of N(0, v); ab v + (1 - sqrt(1 - ab))^2 for x_t."""
    v, x0 = 0.25, 0.5 * randn(20_000, 1)
    denoisers = dict(initial=debias.initial, best=partial(gaussian, v=v))
    t, sigma, first, best = columns(debias.errors_by_t(denoisers, x0, debias.noise_error, 0))
    ab = 1 / (1 + sigma ** 2)
    assert t[0] == 1 and t[-1] == 1000
    torch.testing.assert_close(best, v / (v + sigma ** 2), rtol=0.04, atol=0)
    torch.testing.assert_close(first, ab * v + (1 - (1 - ab).sqrt()) ** 2, rtol=0.04, atol=0)


@pytest.mark.parametrize("sides", [(), (4, 4)])
def test_error_of_the_colour_of_gaussian_gray_images(sides):
    """A gray c ~ N(0, v), seen in so many pixels: the error is N(0, v s^2/(v + s^2)) with s^2 =
    sigma^2/pixels, and its mean size sqrt(2/pi) times its deviation.  One pixel: a point."""
    v, pixels = 0.1, math.prod(sides)
    x0 = v ** 0.5 * randn(20_000, 1, *[1 for _ in sides]).expand(-1, 1, *sides)

    def best(x, sigma):
        mean = x.flatten(1).mean(1).view_as(sigma).expand_as(x)
        return gaussian(mean, sigma / pixels ** 0.5, v)
    t, sigma, got = columns(debias.errors_by_t(dict(best=best), x0, debias.colour_error, 0))
    s2 = sigma ** 2 / pixels
    torch.testing.assert_close(got, (2 / math.pi * v * s2 / (v + s2)).sqrt(), rtol=0.03, atol=0)


# ---- Commands ------------------------------------------------------------------------------------

def test_table_is_the_distance_of_each_run_by_steps_and_over_training(folder, capsys, monkeypatch):
    saved = []
    monkeypatch.setattr(evaluate, "save_pictures", lambda *given: saved.append(given))
    table = call("table", folder, weights=("constant", "debias"), T=(2, 3), early=3, seeds=2)
    assert [(row["T"], row["step"]) for row in table] == [
        ("2", ""), ("3", ""), ("", "2"), ("", "4")]
    assert sorted((o["weight"], o["seed"], o["loss"], o["schedule"]) for o in runs()) == [
        (weight, seed, "dsm", "ddpm") for weight in ("constant", "debias") for seed in (0, 1)]
    found = []
    for seed in (0, 1):
        run = next(o["out"] for o in runs() if (o["weight"], o["seed"]) == ("debias", seed))
        network, options = evaluate.load_run(run)
        features = evaluate.extractor("pixels", options.shape)
        real = evaluate.real_statistics(evaluate.run_data(options), 4, features)
        found.append(evaluate.run_distance(network, options, range(4), features, real,
                                           sampler="ddpm", steps=3))
    assert float(table[1]["debias"]) == pytest.approx(np.mean(found), rel=1e-4)
    assert float(table[1]["sd debias"]) == pytest.approx(np.std(found, ddof=1), rel=1e-3)
    assert table[3]["debias"] == table[1]["debias"] != table[2]["debias"]
    (_, panels, names), = saved
    assert names == ("constant", "debias") and [x.shape for _, x in panels] == [(8, 3, 8, 8)] * 2


def test_commands_share_the_runs_that_they_compare(folder, capsys, monkeypatch):
    monkeypatch.setattr(debias, "NAMES", ("constant", "debias"))
    table = call("mse", folder, num=4)
    assert len(runs()) == 2 and len(table) == 38
    call("table", folder, weights=("constant", "debias"), T=(2,), seeds=1)
    assert len(runs()) == 2
    rows = call("targets", folder, targets=("eps", "v"), weights=("constant", "debias"), T=(2,),
                seeds=1)
    assert all(row["eps, T = 2"] != row["v, T = 2"] for row in rows)
    assert sorted((o["precondition"], o["weight"]) for o in runs()) == [
        ("schedule", "constant"), ("schedule", "debias"), ("v", "constant"), ("v", "debias")]
    folders = [o["out"] for o in runs() if o["precondition"] == "v"]
    assert {"initial", *folders} < set(call("mse", folder, runs=folders, num=4)[0])


def test_onestep_shows_the_colour_of_what_the_class_tells(folder, capsys, monkeypatch):
    """At much noise the posterior mean is the mean of x0's own class, and its colour error what
    lies between the images' colours; at little noise it is x0 itself."""
    saved = []
    monkeypatch.setattr(evaluate, "save_pictures", lambda *given: saved.append(given))
    monkeypatch.setattr(debias, "NAMES", ("debias",))
    images = np.load("images.npz")["images"]
    images[1::2] //= 2                                              # the second class is darker
    np.savez("classes.npz", images=images, labels=np.arange(40) % 2)
    table = call("onestep", folder, SMALL | dict(data="classes.npz"), num=40)
    colour = images.mean((1, 2)) / 127.5 - 1                                             # (40, 3)
    spread = [np.linalg.norm(colour[k::2] - colour[k::2].mean(0), axis=1).mean() for k in (0, 1)]
    assert float(table[-1]["posterior mean"]) == pytest.approx(np.mean(spread), rel=0.01)
    assert float(table[0]["posterior mean"]) < 1e-3 < float(table[-1]["debias"])
    (_, panels, names), = saved
    assert names == ["x0", "debias", "posterior mean"] and len(panels) == 6
    last = evaluate.to_uint8(panels[-1][1])                                      # t = 100
    x0, network, mean = last.reshape(3, 3, -1).astype(int)
    assert abs(mean - x0).max() <= 1 < abs(network - x0).max()
