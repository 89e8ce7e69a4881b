"""papers/edm.py against closed forms: Gaussian data, whose ideal denoiser is linear, and data at
+1 and -1, where it is tanh(x/sigma^2)."""

import csv
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
import train
from papers import edm, plot
from samplers import euler, heun
from schedules import EDM, VE, VP

V = 0.16                                                        # the Gaussian data's variance


class Wiener(torch.nn.Module):
    """E[x0 | x] where x0 ~ N(0, V I)."""

    def forward(self, x, sigma, labels=None):
        return V / (V + sigma ** 2) * x


@pytest.fixture(scope="module")
def gaussian(tmp_path_factory):
    """A run of one step on 4000 points of N(0, V) in the plane."""
    folder = tmp_path_factory.mktemp("gaussian")
    x = np.random.default_rng(0).standard_normal((4000, 2))
    x = x - x.mean(0)
    x = V ** 0.5 * x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T, bias=True))).T
    np.save(folder / "points.npy", x.astype(np.float32))
    return train.run(train.Options(data=str(folder / "points.npy"), loss="dsm", width=8, batch=8,
                                   steps=1, warmup=0, eval_every=0, out=str(folder / "run")),
                     brief=True)


@pytest.fixture
def exact(gaussian, monkeypatch, tmp_path):
    """The same run, whose network is now the ideal denoiser."""
    options = evaluate.load_run(gaussian)[1]
    monkeypatch.setattr(evaluate, "load_run", lambda run, device=None: (Wiener(), options))
    monkeypatch.chdir(tmp_path)
    return gaussian


def table(*argv):
    """The columns of the CSV that a command has written, {name: words, "nan" for empty cells}."""
    assert plot.main("edm", edm.COMMANDS, [*argv, "--out", "out"]) == 0
    names, *rows = csv.reader(Path(f"out/edm-{argv[0]}.csv").read_text().splitlines())
    return dict(zip(names, np.array([[cell or "nan" for cell in row] for row in rows]).T))


@pytest.mark.parametrize("line, sentence", [
    ("loss --run a --lr 5", "--lr: no effect"), ("solvers --runs a b --steps 7", "--steps: no"),
    ("trajectories --steps 7", "--steps: no"), ("loss --preset mnist", "--preset: no"),
    ("configs --seeds 0", "0 is not at least 1")])
def test_options_that_would_have_no_effect_are_refused(line, sentence, capsys):
    assert plot.main("edm", edm.COMMANDS, line.split()) == 2
    assert sentence in capsys.readouterr().err


def numbers(*argv):
    return {name: column.astype(float) for name, column in table(*argv).items()}


def judge(run, num):
    return plot.Judge(SimpleNamespace(options=dict(fid_num=num)), run)


# ---- Denoising -----------------------------------------------------------------------------------

def test_the_ideal_denoiser_goes_from_the_image_to_the_mean_of_its_class(folder, monkeypatch):
    """The picture has two images of three rows each: noisy (scaled), ideal, network."""
    run = train.run(train.Options(data="images.npz", cond=True, width=8, mult=(1, 1), steps=1,
                                  batch=8, eval_every=0, out="run"), brief=True)
    saved = []
    monkeypatch.setattr(evaluate, "save_pictures", lambda *given: saved.append(given))
    found = numbers("denoise", "--run", run, "--num", "40", "--levels", ".001", "1000")
    images = np.load("images.npz")["images"] / 127.5 - 1
    spread = np.concatenate([images[k::2] - images[k::2].mean(0) for k in (0, 1)]).std()
    assert found["ideal - x0"] == pytest.approx([0, spread], abs=0.003)
    assert found["ideal - mean"] == pytest.approx([spread, 0], abs=0.003)
    (_, panels, names), = saved
    little, much = (evaluate.to_uint8(x).reshape(2, 3, -1).astype(int).swapaxes(0, 1)
                    for _, x in panels)
    assert len(names) == 6 and abs(little[0] - little[1]).max() <= 1 < abs(much[2] - much[1]).max()
    assert ((much[0] > 0) & (much[0] < 255)).mean() > 0.9


# ---- Sampling ------------------------------------------------------------------------------------

def test_edms_time_steps_on_another_schedule_have_edms_noise_levels():
    mixed = edm.with_edm_steps(VP())
    t = mixed.time_steps(18)
    torch.testing.assert_close(mixed.sigma(t), EDM().time_steps(18))
    torch.testing.assert_close(mixed.s(t), VP().s(t))


def test_every_solver_reaches_the_floor_and_eulers_method_last(exact):
    found = numbers("solvers", "--runs", exact, "--N", "6", "128", "--rtol", ".001", "--fid-num",
                    "1000")
    limit = 4 * judge(exact, 1000).real["floor"]
    few, many = np.flatnonzero(found["NFE"] == 11)[0], np.flatnonzero(found["NFE"] == 255)[0]
    assert max(found[name][many] for name in ("Heun, VP", "Heun, VP at EDM's steps", "Heun, EDM",
                                              "Euler, EDM")) < limit
    assert np.nanmax(found["rk45, VP"]) < limit < found["Heun, EDM"][few]
    assert found["Euler, VP"][few] > found["Euler, VP"][many]
    assert found["Heun, VP"][few] != found["Heun, VP at EDM's steps"][few]
    assert found["Heun, EDM"][many] < found["Euler, VP"][many]


def test_a_table_of_several_runs_has_their_mean_and_deviation(exact, monkeypatch):
    runs, judge = [exact, exact], plot.Judge(SimpleNamespace(options={}), exact)
    distances = iter([1.0, 3.0, 5.0, 5.0])
    monkeypatch.setattr(evaluate, "run_distance", lambda *given, **how: next(distances))
    found = judge.cells(dict(a=runs, b=runs), "heun", 3)
    assert found == pytest.approx({"a": 2, "sd a": 2 ** 0.5, "b": 5, "sd b": 0})


def test_each_setting_of_churn_switches_off_what_it_names(exact):
    """S_noise 2 inflates the samples.  Within the interval is the first of 24 steps alone, and
    the flow of Gaussian data is linear: it carries that step's variance, r, down to the samples.
    """
    found = numbers("churn", "--runs", exact, "--N", "24", "--S_churn", "8", "--S_tmin", "75",
                    "--S_tmax", "90", "--S_noise", "2", "--fid-num", "1000")
    limit = 4 * judge(exact, 1000).real["floor"]
    assert found["Heun"] == pytest.approx(judge(exact, 1000)([exact], "heun", 24)[0], rel=1e-4)
    r = (1 + 2 ** 2 * (16 / 9 - 1)) * 9 / 16                           # sigma_hat = 4/3 sigma
    assert found["all"] == pytest.approx(2 * V * (r ** 0.5 - 1) ** 2, rel=0.25)
    assert found["all"] > limit and found["S_noise"] > 2 * found["all"]
    assert found["interval"] < limit and found["neither"] < limit
    assert found["interval"] != found["neither"] and found["SDE"] < limit


def test_flow_lines_are_the_same_in_every_schedule():
    """x(t)/s(t) at a noise level does not depend on sigma(t) and s(t) (EDM eq. 4)."""
    schedule = VP()
    sigma = EDM(sigma_max=25.0).time_steps(1000)[:-1]
    starts = torch.tensor([-1, -0.1, 0, 0.5], dtype=torch.float64)
    want = edm.flow_lines(heun, EDM(), sigma, starts)[1]
    t, x = edm.flow_lines(heun, schedule, sigma, starts)
    torch.testing.assert_close(schedule.sigma(t), sigma)
    torch.testing.assert_close(x / schedule.s(t)[:, None], want, rtol=5e-3, atol=1e-5)
    torch.testing.assert_close(want[-1], starts.sign(), rtol=0, atol=0.02)


def test_the_table_of_trajectories_has_eulers_error_which_is_of_first_order(folder):
    found = numbers("trajectories")
    sigma = EDM(sigma_max=25.0).time_steps(151)[:-1]
    starts = torch.tensor([-2, -1, -0.5, -0.1, 0.1, 0.5, 1, 2], dtype=torch.float64)
    for name, schedule in dict(VP=VP(), VE=VE(), EDM=EDM()).items():
        t, x = edm.flow_lines(heun, schedule, sigma, starts)
        off = (edm.flow_lines(euler, schedule, sigma[::10], starts)[1] - x[::10]) / (
            schedule.s(t) * (1 + sigma ** 2).sqrt())[::10, None]
        error = dict(zip(found["steps"], found[f"{name}, 25"]))
        assert error[15] == pytest.approx(off.square().mean().sqrt().item(), rel=1e-4)
        assert error[75] / error[150] == pytest.approx(2, abs=0.1)
    assert found["VE, 25"][2] > 5 * found["EDM, 25"][2]


def test_local_errors_of_gaussian_data_have_their_closed_form():
    """The flow is x sqrt((V + b^2)/(V + a^2)) from sigma = a to b, and a step's slope is linear."""
    x, sigma = 3 * torch.randn(50, 2, dtype=torch.float64), EDM(rho=3.0).time_steps(12)[:-1]
    found = edm.local_errors(Wiener(), x, sigma, fine=256)
    for row, b in zip(found, sigma[1:].tolist()):
        a = row["sigma"]
        slope = a / (V + a ** 2)                                          # dx/dsigma = slope x
        euler_step = 1 + (b - a) * slope
        heun_step = 1 + (b - a) / 2 * (slope + b / (V + b ** 2) * euler_step)
        true = math.sqrt((V + b ** 2) / (V + a ** 2))
        size = x.square().mean().sqrt().item()
        want = [size * abs(step - true) for step in (euler_step, heun_step)]
        assert [row["Euler"], row["Heun"]] == pytest.approx(want, rel=2e-3,
                                                            abs=1e-4 * size * abs(a - b))
        x = true * x


def test_local_errors_are_of_second_and_third_order():
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    long, short = (edm.local_errors(Wiener(), x, torch.tensor([0.3, 0.3 - h]).double(), fine=64)[0]
                   for h in (0.02, 0.01))
    assert long["Euler"] / short["Euler"] == pytest.approx(4, rel=0.05)
    assert long["Heun"] / short["Heun"] == pytest.approx(8, rel=0.05)


def test_truncation_has_the_errors_of_each_rho_and_the_distance_of_its_samples(exact):
    found = numbers("truncation", "--runs", exact, "--rho", "1", "7", "--N", "8", "--num", "500",
                    "--fid-num", "1000")
    assert found["rho"].tolist() == [1] * 7 + [7] * 7                     # no step to sigma = 0
    assert found["sigma"][:7] == pytest.approx(EDM(rho=1.0).time_steps(8)[:7].numpy(), rel=1e-4)
    assert found["Heun"][:7].max() / found["Heun"][:7].min() > 20
    assert found["samples"][0] > 10 * found["samples"][-1]


# ---- Training ------------------------------------------------------------------------------------

def config(letter):
    """The options of a row of table 2: its own changes and all those before."""
    options = {}
    for name, change in edm.CONFIGS.items():
        options |= change if name[0] <= letter else {}
    return options


def test_each_config_changes_what_its_letter_says():
    data = SimpleNamespace(name="digits", x=np.zeros((9, 3, 16, 16), np.uint8), fingerprint="",
                           classes=list("01"), labels=np.arange(9) % 2)
    A, B, C, D, E, F = (train.resolve(train.Options(**config(name)), data) for name in "ABCDEF")
    sigma = torch.tensor([0.1, 1.0, 20.0])
    for options in (A, B, C, D):
        torch.testing.assert_close(evaluate.build_weight(options)(sigma), sigma ** -2)
        assert evaluate.build_schedule(options) == VP()
    for options in (A, B, C):                                            # F predicts the noise
        torch.testing.assert_close(evaluate.build_precondition(options)(sigma)[1], -sigma)
    for options in (D, E, F):
        c_out = evaluate.build_precondition(options)(sigma)[1]
        torch.testing.assert_close(c_out, EDM().precondition(sigma)[1])
    for options in (E, F):
        torch.testing.assert_close(evaluate.build_weight(options)(sigma) * c_out ** 2,
                                   torch.ones(3))
        assert evaluate.build_schedule(options) == EDM(P_mean=-0.5, P_std=1.0)
    assert A.lr < B.lr and A.clip < B.clip and len(B.mult) > len(C.mult)
    assert E.augment == 0 < F.augment


def test_configs_are_trained_with_two_seeds_and_options_that_the_user_gave_win(exact, monkeypatch):
    runs = []

    def trained(options):
        runs.append(options)
        return exact
    monkeypatch.setattr(plot, "trained", trained)
    found = table("configs", "--data", "cifar10", "--lr", ".1", "--fid-num", "100", "--seed", "5")
    given = dict(data="cifar10", lr=0.1, fid_num=100)
    assert runs == [dict(steps=400) | config(name) | given | dict(seed=seed) for name in "ABCDEF"
                    for seed in (5, 6)]
    heun = judge(exact, 100)([exact], "heun", 18)[0]
    assert found["config"].tolist() == list(edm.CONFIGS)
    assert found["mean"].astype(float) == pytest.approx([heun] * 6, rel=1e-4)


def test_loss_before_and_after_training_have_their_closed_forms(exact):
    """Before, F = 0 and D = c_skip x; after, D is the ideal denoiser of N(0, V)."""
    found = numbers("loss", "--run", exact, "--num", "4000")
    sigma = found["sigma"]
    c_skip, weight = 0.25 / (0.25 + sigma ** 2), (0.25 + sigma ** 2) / (0.5 * sigma) ** 2
    before = weight * ((1 - c_skip) ** 2 * V + c_skip ** 2 * sigma ** 2)
    after = weight * V * sigma ** 2 / (V + sigma ** 2)
    assert found["before"] == pytest.approx(before, rel=0.05)
    assert found["after"] == pytest.approx(after, rel=0.05)
    assert found["density"].sum() * math.log(sigma[1] / sigma[0]) == pytest.approx(1, abs=0.01)
