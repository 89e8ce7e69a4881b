"""papers.py's pictures of denoising against cases whose answer is known: Gaussian data, whose ideal
denoiser is linear, and a probability flow that is one and the same in every schedule.
"""

import csv
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import papers
import train
from losses import sa_tau
from samplers import ddpm, euler, heun
from schedules import DDPM, EDM, VE, VP

LADDER = DDPM(beta_1=0.02, beta_T=0.4, T=10).levels


def figure(tmp_path, *argv):
    """The columns of NAME.csv, {name: array}, which a command of evaluate.py has written."""
    assert evaluate.main([*argv, "--out", str(tmp_path)]) == 0
    with open(tmp_path / f"{argv[0]}.csv", newline="") as file:
        names, *rows = csv.reader(file)
    return dict(zip(names, np.array(rows, float).T))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Gaussian points, gray images of one colour each, and a class-conditional run on noise."""
    folder, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    z = torch.special.ndtri((torch.arange(800) + 0.5) / 800).numpy()      # N(0, 1)'s quantiles
    np.save(folder / "line.npy", 0.5 * z[:, None])
    gray = (127.5 + 40 * z).round().astype(np.uint8)[:, None, None, None]
    np.savez(folder / "gray.npz", images=gray.repeat(4, 2).repeat(4, 3))
    np.savez(folder / "noise.npz", images=rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8),
             labels=np.arange(40) % 2)
    assert train.main(["--data", str(folder / "noise.npz"), "--cond", "--width", "8", "--mult",
                       "1,1", "--blocks", "1", "--batch", "8", "--steps", "1", "--warmup", "0",
                       "--sample-steps", "1", "--out", str(folder / "run")]) == 0
    return folder


# ---- Denoising -----------------------------------------------------------------------------------

def test_the_ideal_denoiser_knows_the_class_where_the_run_does(folder):
    """Far from all data, x tells nothing: D is the mean of the data, of x0's own class."""
    args = SimpleNamespace(run=str(folder / "run"), data="digits", data_dir="data", size=None,
                           num=6, seed=0, device="cpu")
    images = np.load(folder / "noise.npz")["images"].transpose(0, 3, 1, 2) / 127.5 - 1
    mean = torch.tensor(np.stack([images[k::2].mean(0) for k in (0, 1)]), dtype=torch.float32)
    x0, sources, _ = papers.denoisers(args)
    row = [(abs(images - x.numpy()).max((1, 2, 3))).argmin() for x in x0]
    sigma = torch.tensor(1e5, dtype=torch.float64)
    torch.testing.assert_close(sources["ideal"](x0, sigma), mean[[i % 2 for i in row]],
                               rtol=0, atol=1e-3)
    args.run, args.data = None, str(folder / "noise.npz")
    x0, sources, _ = papers.denoisers(args)
    assert list(sources) == ["ideal"]
    torch.testing.assert_close(sources["ideal"](x0, sigma), mean.mean(0).expand(6, -1, -1, -1),
                               rtol=0, atol=1e-3)


def test_mse_of_gaussian_data_is_that_of_its_linear_denoiser(folder, tmp_path):
    """N(0, v): E|eps_hat - eps|^2/d = v/(v + sigma^2), and the initial guess's closed form."""
    table = figure(tmp_path, "mse", "--data", str(folder / "line.npy"), "--num", "800")
    v, sigma = 0.25, table["sigma"]
    ab = 1 / (1 + sigma ** 2)
    assert table["t"][[0, -1]].tolist() == [1, 1000] and sigma[-1] == pytest.approx(157.4, abs=0.1)
    assert table["initial"] == pytest.approx(ab * v + (1 - np.sqrt(1 - ab)) ** 2, rel=0.01)
    share = (table["ideal"] * (v + sigma ** 2) / v)[2:]                  # from t = 55, sigma .19
    assert share == pytest.approx(np.ones(36), abs=0.2) and abs(share.mean() - 1) < 0.02
    assert table["ratio:ideal"] == pytest.approx(table["ideal"] / table["initial"], rel=1e-4)
    assert table["ratio:ideal"][-5:] == pytest.approx(np.ones(5), abs=0.01)      # as the mean is 0


def test_colour_error_of_gaussian_data(folder, tmp_path):
    """A gray c ~ N(0, v) seen through 16 pixels: the error is N(0, v s^2/(v + s^2)), s = sigma/4.

    On a line, each point its own colour, s = sigma; and points have no pictures."""
    for name, pixels, v in (("gray.npz", 16, (40 / 127.5) ** 2), ("line.npy", 1, 0.25)):
        table = figure(tmp_path / name, "denoise", "--data", str(folder / name), "--num", "800",
                       "--levels", "1")
        s2 = table["sigma"] ** 2 / pixels
        share = (table["ideal"] / np.sqrt(2 / math.pi * v * s2 / (v + s2)))[2:]
        assert share == pytest.approx(np.ones(36), abs=0.12) and abs(share.mean() - 1) < 0.02
        assert (tmp_path / name / "denoise-images.png").exists() == (pixels > 1)


def test_denoise_shows_two_images_a_column_for_each_level(folder, tmp_path):
    """Rows noisy, ideal, network; at little noise the first two are the image.  At much noise the
    ideal is the mean of the class, and its colour error what lies between the images' colours."""
    table = figure(tmp_path, "denoise", str(folder / "run"), "--num", "40", "--levels", ".001", "9")
    colour = np.load(folder / "noise.npz")["images"].mean((1, 2)) / 127.5 - 1            # (40, 3)
    spread = [np.linalg.norm(colour[k::2] - colour[k::2].mean(0), axis=1).mean() for k in (0, 1)]
    assert table["ideal"][-3:] == pytest.approx(np.full(3, np.mean(spread)), rel=0.01)
    assert {"ideal", "network", "network to ideal"} < set(table)
    assert (table["ideal"] <= table["network"] + table["network to ideal"] + 1e-6).all()
    page = np.asarray(Image.open(tmp_path / "denoise-images.png")).astype(int)
    assert page.shape[0] == 28 + 6 * 64 + 16
    column = page[28:28 + 6 * 64].reshape(6, 64, *page.shape[1:])
    pixel = np.abs(column[0] - column[1]).max((0, 2)), np.abs(column[0] - column[3]).max((0, 2))
    right = np.flatnonzero(pixel[1])                          # two images differ: inside the panels
    assert right.size > 64 and pixel[0][right[0]:right[0] + 64].max() <= 1


# ---- Trajectories --------------------------------------------------------------------------------

@pytest.mark.parametrize("schedule", [VP(), VE()])
def test_flow_lines_are_the_same_in_every_schedule(schedule):
    """x(t)/s(t) at a noise level does not depend on sigma(t) and s(t) (EDM eq. 4)."""
    sigma = EDM(sigma_max=25.0).time_steps(1000)[:-1]
    starts = torch.tensor([-1, -0.1, 0, 0.5], dtype=torch.float64)
    want = papers.flow_lines(heun, EDM(), sigma, starts)[1]
    t, x = papers.flow_lines(heun, schedule, sigma, starts)
    torch.testing.assert_close(schedule.sigma(t), sigma)
    torch.testing.assert_close(x / schedule.s(t)[:, None], want, rtol=5e-3, atol=1e-5)
    torch.testing.assert_close(want[-1], starts.sign(), rtol=0, atol=0.02)


def test_edms_lines_are_straight_far_out_and_point_to_the_denoiser():
    """dx/dsigma = (x - D)/sigma: the tangent meets sigma = 0 at D, far out 0, close by +-1."""
    sigma = EDM(sigma_max=50.0).time_steps(2000)[:-1]
    t, x = papers.flow_lines(heun, EDM(), sigma, torch.tensor([0.3, 1.0]).double())
    slope = (x[2:] - x[:-2]) / (t[2:] - t[:-2])[:, None]
    aim = x[1:-1] - t[1:-1, None] * slope
    torch.testing.assert_close(aim, torch.tanh(x / t[:, None] ** 2)[1:-1], rtol=0, atol=1e-3)
    assert aim[0].abs().max() < 0.03 and aim[-1] == pytest.approx(1, abs=1e-6)


def test_trajectories_command(tmp_path, capsys):
    table = figure(tmp_path, "trajectories", "--levels", "25")
    out = capsys.readouterr().out
    error = {name: float(out.split(f"{name} to sigma 25; Euler's error")[1].split()[0])
             for name in ("VP", "VE", "EDM")}
    assert error["VE"] > 5 * error["EDM"] and error["VP"] < error["EDM"] < 0.06
    assert table["VE to sigma 25:t"][0] == pytest.approx(625)
    for name in error:
        lines = np.stack([table[c] for c in table if c.startswith(name + " ")][1:])      # (8, 151)
        assert lines == pytest.approx(-lines[::-1], rel=1e-4)                    # symmetric
        assert abs(lines[:, -1]) == pytest.approx(np.ones(8), abs=0.01)
    vp = torch.tensor(np.stack([table[c] for c in table if c.startswith("VP")])[1:].T)   # (151, 8)
    sigma = EDM(sigma_max=25.0).time_steps(151)[:-1:10]                 # vp[0]: s sqrt(1 + sigma^2)
    t, coarse = papers.flow_lines(euler, VP(), sigma, vp[0])                     # is 1 everywhere
    off = (coarse - vp[::10]) / VP().s(t)[:, None] / (1 + sigma ** 2).sqrt()[:, None]
    assert off.square().mean().sqrt().item() == pytest.approx(error["VP"], abs=6e-4)


# ---- Estimation gap ------------------------------------------------------------------------------

def noise_source(shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=g, dtype=torch.float64)


def test_gap_of_a_planted_bias_is_theorem_1s_sum():
    """eps_hat = eps + b at every step: d = b sum tau; were the errors unrelated, b sqrt(sum tau^2).

    Data of a single point, x0 = 0, so that this network is D = -sigma b."""
    x0, b = torch.zeros(5, 3, dtype=torch.float64), 0.3
    got = papers.estimation_gap(lambda x, sigma: -sigma * b * torch.ones_like(x), x0, LADDER,
                                noise_source((5, 3)))
    tau = sa_tau(LADDER, torch.arange(10, 1, -1), 1, "paper")[0]
    want = torch.stack([b * tau.cumsum(0), b * (tau ** 2).cumsum(0).sqrt()], 1)
    torch.testing.assert_close(got, want)


def test_gap_is_the_distance_to_the_true_reverse_process():
    """At x_1, any denoiser: ddpm with D = x0 and the same noise, less the model's sample."""
    x0 = noise_source((6, 3), 1)()
    network = lambda x, sigma: (x + sigma).tanh()
    got = papers.estimation_gap(network, x0, LADDER, noise_source((6, 3)))[-1, 0]
    x_1 = []
    for D in (lambda x, sigma: x0, network):
        noise = noise_source((6, 3))
        x_1.append(ddpm(D, x0 + LADDER[-1] * noise(), LADDER.flip(0), noise))
    scale = 1 / (1 + LADDER[0] ** 2).sqrt()                              # to DDPM's frame
    torch.testing.assert_close(got, scale * (x_1[0] - x_1[1]).square().mean().sqrt())


def test_gap_of_gaussian_data_and_its_own_denoiser():
    """N(0, v) with D = c x + b, c = v/(v + sigma^2): E d^2 by the recursion of second moments of
    (1, x0, true x, model's x), each step linear in them.  The ideal (b = 0) has a gap too."""
    v, n, gaps = 0.5, 200_000, []
    for b in (0.0, 0.2):
        x0 = v ** 0.5 * noise_source((n, 1), 1)()
        got = papers.estimation_gap(lambda x, sigma: v / (v + sigma ** 2) * x + b, x0, LADDER,
                                    noise_source((n, 1)))[:, 0]
        start = torch.tensor([[0, 0], [1, 0], [1, LADDER[-1]], [1, LADDER[-1]]]).double()
        M = start @ torch.diag(torch.tensor([v, 1.0]).double()) @ start.T
        M[0, 0] = 1
        for i in range(9, 0, -1):                                     # sigma_{i+1} -> sigma_i
            above, below = LADDER[i], LADDER[i - 1]
            r, c = (below / above) ** 2, v / (v + above ** 2)
            A = torch.eye(4, dtype=torch.float64)
            A[2] = torch.tensor([0, 1 - r, r, 0])
            A[3] = torch.tensor([(1 - r) * b, 0, 0, r + (1 - r) * c])
            M = A @ M @ A.T
            M[2:, 2:] += r * (above ** 2 - below ** 2)
            apart = (M[2, 2] - 2 * M[2, 3] + M[3, 3]) / below ** 4 * LADDER[0] ** 4
            want = (apart / (1 + LADDER[0] ** 2)).sqrt()
            assert got[9 - i] == pytest.approx(want.item(), rel=0.01)
        gaps.append(got[-1])
    assert 0 < gaps[0] < gaps[1]


def test_gap_command(folder, tmp_path):
    table = figure(tmp_path, "gap", str(folder / "run"), "--num", "4")
    assert table["t"].tolist() == list(range(299, 0, -1))
    for how in ("", ", if unrelated"):
        at_1, at_t = table[f"x_1:network{how}"], table[f"x_t:network{how}"]
        assert at_t[-1] == pytest.approx(at_1[-1]) and (at_t[:-1] > at_1[:-1]).all()
        assert table[f"x_t:ideal{how}"].max() < 1e-6         # 40 images far apart: x_300 tells which
    spread = table["x_1:network, if unrelated"]
    assert (np.diff(spread) > 0).all() and spread[0] == pytest.approx(table["x_1:network"][0])


@pytest.mark.parametrize("argv, word", [
    (["mse", "nowhere"], "nowhere"), (["gap", "RUN", "--data", "swiss-roll"], "leave --data"),
    (["denoise", "RUN", "--size", "8"], "leave --data"), (["mse", "--data", "none"], "no file"),
    (["trajectories", "--levels", "0"], "--levels")])
def test_bad_input_is_one_sentence(folder, argv, word, tmp_path, capsys):
    argv = [str(folder / "run") if a == "RUN" else a for a in argv]
    assert evaluate.main([*argv, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1
