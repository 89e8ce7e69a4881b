"""evaluate.py: distances, pictures, and samples that do not depend on their company."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
import evaluate
import runs
import train
from schedules import SCHEDULES


# ---- Frechet distance ----------------------------------------------------------------------------

def gaussian(d, rank, seed):
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((d, rank))
    return rng.standard_normal(d), A @ A.T / rank


def test_frechet_equals_the_textbook_formula():
    """Tr (C1 C2)^{1/2} = sum of the square roots of the (real, positive) eigenvalues of C1 C2."""
    (m1, c1), (m2, c2) = gaussian(6, 12, 0), gaussian(6, 12, 1)
    root = np.sqrt(np.linalg.eigvals(c1 @ c2).astype(complex)).sum().real
    textbook = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2) - 2 * root
    assert evaluate.frechet_distance(m1, c1, m2, c2) == pytest.approx(textbook, rel=1e-10)


def test_frechet_of_commuting_covariances_is_a_difference_of_deviations():
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 0.0, 1.0])
    zero = np.zeros(3)
    assert evaluate.frechet_distance(zero, np.diag(a), zero, np.diag(b)) == pytest.approx(
        ((np.sqrt(a) - np.sqrt(b)) ** 2).sum())


def test_frechet_is_zero_with_itself_symmetric_and_finite_when_singular():
    (m1, c1), (m2, c2) = gaussian(8, 3, 0), gaussian(8, 2, 1)
    assert evaluate.frechet_distance(m1, c1, m1, c1) == pytest.approx(0, abs=1e-6)
    forth = evaluate.frechet_distance(m1, c1, m2, c2)
    back = evaluate.frechet_distance(m2, c2, m1, c1)
    assert np.isfinite(forth) and forth == pytest.approx(back, rel=1e-6)


def test_pixel_features_are_the_pixels_averaged_to_at_most_16():
    x = torch.randn(2, 3, 32, 32)
    assert evaluate.pixel_features(x).shape == (2, 3 * 256)
    assert np.allclose(evaluate.pixel_features(x)[0, 0], x[0, 0, :2, :2].mean())
    assert np.allclose(evaluate.pixel_features(x[..., :8, :8]), x[..., :8, :8].flatten(1))


# ---- Pictures ------------------------------------------------------------------------------------

def test_grid_shows_every_image_unchanged(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (6, 3, 16, 16), dtype=np.uint8)
    grid = np.asarray(runs.tile(x))                             # 2 rows of 3, zoomed by 4
    assert grid.shape == (2 * 64, 3 * 64, 3)
    assert (grid[64:128:4, 128:192:4].transpose(2, 0, 1) == x[5]).all()
    runs.save_pictures(tmp_path / "two.png", [("left", x), ("right, gray", x[:, :1])])
    assert Image.open(tmp_path / "two.png").size[0] > 2 * 192
    assert [p.name for p in tmp_path.iterdir()] == ["two.png"]


def test_to_uint8_maps_the_interval_and_clips():
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).view(1, 1, 1, 5)
    assert runs.to_uint8(x).ravel().tolist() == [0, 0, 128, 255, 255]


# ---- Sampling ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A class-conditional run of a few steps on 8x8 noise, with a head for each covariance."""
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    np.savez(folder / "images.npz", images=rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8),
             labels=np.arange(40) % 2)
    argv = ["--data", str(folder / "images.npz"), "--cond", "--width", "8", "--mult", "1,1",
            "--blocks", "1", "--batch", "8", "--steps", "5", "--warmup", "0", "--sample-steps", "1",
            "--label-dropout", "0.2"]
    assert train.main([*argv, "--out", str(folder / "run")]) == 0
    for head in ("sn", "npr"):
        assert train.main([*argv, "--head", head, "--init", str(folder / "run"),
                           "--out", str(folder / head)]) == 0
    return folder / "run"


def draw(run, *argv):
    out = run / "out.npz"
    assert evaluate.main(["sample", str(run), "--out", str(out), *argv]) == 0
    return np.load(out)["images"]


@pytest.mark.parametrize("sampler", [
    "heun", "euler", "edm-stochastic --churn 2", "ddim", "ddim --eta 0.5", "ddpm", "pc",
    "ddpm --variance beta", "ddpm --variance analytic", "ddim --variance analytic",
    "rk45 --rtol 1e-2", "heun --guidance 2", "rk45 --rtol 1e-2 --guidance 2", "heun --schedule vp",
    "pc --schedule vp", "rk45 --rtol 1e-2 --schedule ddpm"])
def test_sample_i_is_the_same_in_any_batch(run, sampler, capsys):
    argv = ["--sampler", *sampler.split(), "--steps", "4"]
    whole = draw(run, *argv, "--num", "7").astype(int)
    assert whole.shape == (7, 3, 8, 8) and whole.std() > 1
    twos = draw(run, *argv, "--num", "7", "--batch", "2")
    assert abs(whole - twos).max() <= 1                                  # rounding at most
    later = draw(run, *argv, "--num", "5", "--seed", "2")
    assert abs(whole[2:3] - later[:1]).max() <= 1                        # seed 2, class 0, both
    assert abs(whole[0] - whole[2]).max() > 1


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", runs.SAMPLERS)
def test_every_sampler_runs_in_every_schedule_in_one_step_too(run, sampler, schedule, capsys):
    argv = ["--sampler", sampler, "--schedule", schedule, "--num", "2"]
    argv += ["--rtol", "0.01"] if sampler == "rk45" else []
    for steps in "1", "3":
        assert draw(run, *argv, "--steps", steps).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("head", ["sn", "npr"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_head_learns_alone_and_its_covariance_is_used(run, head, sampler, capsys):
    """The trunk is the run's own, so deterministic samples are; and NFE is one a step."""
    trained, folder = runs.load_run(run)[0].state_dict(), run.parent / head
    with_head = runs.load_run(folder)[0].state_dict()
    extra = {name for name in with_head if name not in trained}
    assert extra == {"model.head.weight", "model.head.bias"} and with_head["model.head.bias"].any()
    assert all(torch.equal(trained[name], with_head[name]) for name in trained)
    argv = ["--num", "4", "--sampler", sampler, "--steps", "5"]
    capsys.readouterr()
    learned = draw(folder, *argv, "--variance", head)
    assert "NFE 5," in capsys.readouterr().out
    assert (learned != draw(folder, *argv)).any()


def test_head_learns_what_it_is_named_for(tmp_path, monkeypatch, capsys):
    """A point mass at 0: eps_hat = eps, so h -> eps^2 = (x/sigma)^2 for SN and 0 for NPR."""
    monkeypatch.chdir(tmp_path)
    np.save("zero.npy", np.zeros((64, 2), np.float32))
    found = {}
    for head in ("sn", "npr"):
        assert train.main(["--data", "zero.npy", "--head", head, "--steps", "600", "--batch", "256",
                           "--width", "64", "--loss", "dsm", "--sample-steps", "1", "--out",
                           head]) == 0
        denoiser = runs.load_run(head)[0]
        noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            found[head] = denoiser.with_head(0.3 * noise, torch.tensor(0.3))[1]
    assert (found["sn"] - noise ** 2).square().mean() < 0.3 * (noise ** 2).var()
    assert found["npr"].abs().mean() < 0.1


def test_analytic_moments_are_measured_once_and_right_for_a_gaussian(tmp_path, monkeypatch):
    """N(0, v) and its exact D: E|eps_hat|^2/d = sigma^2/(v + sigma^2)."""
    monkeypatch.chdir(tmp_path)
    v = 0.3
    np.save("x.npy", (np.random.default_rng(0).standard_normal((4000, 2)) * v ** 0.5).astype("f4"))
    options = {"data": "x.npy", "data-dir": "data", "size": None, "seed": 0, "cond": False,
               "fingerprint": datasets.load_data("x.npy").fingerprint}
    calls = []

    def denoise(x, sigma, labels=None):
        calls.append(1)
        return v / (v + sigma ** 2) * x
    levels, moments = runs.analytic_moments(".", denoise, options, 7, count=4000)
    spread = [s ** 2 * (1 - moment) for s, moment in zip(levels, moments)]        # Cov[x0 | x]
    want = [v * s ** 2 / (v + s ** 2) for s in levels]
    assert len(levels) == 33 and spread == pytest.approx(want, rel=0.15)
    first = len(calls)
    assert runs.analytic_moments(".", denoise, options, 7) == (levels, moments)
    assert len(calls) == first and Path("analytic-ema-0000007.json").exists()
    with pytest.raises(datasets.BadInput, match="other data"):
        runs.analytic_moments(".", denoise, options | {"fingerprint": "another"}, 8)


def test_names_of_samples_tell_their_choices_apart(run, capsys):
    names = set()
    for more in ("", "--class 1", "--sampler ddpm", "--seed 3", "--sampler ddpm --variance beta",
                 "--schedule vp", "--guidance 2", "--weights raw"):
        assert evaluate.main(["sample", str(run), "--num", "2", "--steps", "1", *more.split()]) == 0
        names.add(capsys.readouterr().out.split()[-1])
    assert len(names) == 8 and str(run / "ddpm-1-variance-beta.png") in names


def test_guidance_exaggerates_the_class(run, capsys):
    none, plain, strong = (draw(run, "--num", "4", "--guidance", w, "--steps", "4").astype(int)
                           for w in ("0", "1", "3"))
    assert abs(strong - none).mean() > abs(plain - none).mean() > 0


def test_nfe_is_a_table_a_csv_and_a_picture_of_nfe_and_distance(run, tmp_path, capsys):
    argv = ["nfe", str(run), "--num", "6", "--steps", "2", "3", "--out", str(tmp_path)]
    assert evaluate.main(argv) == 0
    printed = capsys.readouterr().out
    header, *rows = csv.reader((tmp_path / "nfe.csv").read_text().splitlines())
    assert header == ["sampler", "steps", "NFE", "frechet_pixels_6"]
    nfe = {(row[0], row[1]): float(row[2]) for row in rows}
    assert nfe["euler", "2"] == 2 and nfe["heun", "3"] == 5 and nfe["pc", "3"] == 6
    assert nfe["edm-stochastic churn 3.0", "2"] == 3 and ("rk45", "rtol 0.01") in nfe
    assert {row[0].split()[0] for row in rows} == {*runs.SAMPLERS, "6"}
    assert len(rows) == 11 * 2 + 2 + 2 and all(float(row[3]) >= 0 for row in rows)
    assert all(name in printed for name, _ in nfe)
    distance = {(row[0], row[1]): float(row[3]) for row in rows}
    assert distance["euler", "2"] == pytest.approx(distance["ddim eta 0.0", "2"], rel=1e-3)


def test_class_is_a_name_or_a_number_and_matters(run, capsys):
    zero, one = (draw(run, "--class", k, "--num", "2", "--steps", "2") for k in "01")
    both = draw(run, "--num", "2", "--steps", "2")
    assert abs(both[0].astype(int) - zero[0]).max() <= 1
    assert abs(both[1].astype(int) - one[1]).max() <= 1


def test_sample_saves_a_labelled_grid_in_the_run(run, capsys):
    assert evaluate.main(["sample", str(run), "--num", "4", "--steps", "1"]) == 0
    path = capsys.readouterr().out.split()[-1]
    assert Path(path).parent == run and Image.open(path).mode == "RGB"


@pytest.mark.parametrize("sampler, nfe", [("heun", 19), ("euler", 10), ("edm-stochastic", 19)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_generate_starts_from_the_schedules_own_noise(schedule, sampler, nfe):
    """With D = 0 (all data at 0), x at t_0 is s sigma noise, whatever the row and the sampler."""
    seen = []

    def denoise(x, sigma, labels=None):
        seen.append((x.std().item(), float(sigma)))
        return torch.zeros_like(x)
    row = SCHEDULES[schedule]()
    x = runs.generate(denoise, range(2000), (2,), sampler, row, 10, batch=2000)
    assert len(seen) == nfe
    assert seen[0][0] == pytest.approx(seen[0][1], rel=0.05)             # D sees x/s
    assert x.std() < 0.05 * seen[0][1]


@pytest.mark.parametrize("argv", [
    ["sample", "nowhere"], ["sample"], ["draw"], ["sample", "RUN", "--steps", "0"],
    ["sample", "RUN", "--class", "cat"], ["sample", "RUN", "--sampler", "magic"],
    ["sample", "RUN", "--num", "-3"], ["sample", "RUN", "--out", "no/such/folder/x.png"],
    ["sample", "RUN", "--device", "abacus"], ["sample", "RUN", "--batch", "0"],
    ["sample", "RUN", "--churn", "-1"], ["sample", "RUN", "--churn", "1"],
    ["sample", "RUN", "--out", "RUN"], ["sample", "RUN", "--out", "x.jpg"],
    ["sample", "RUN", "--seed", "x"], ["sample", "RUN", "--eta", "0.5"],
    ["sample", "RUN", "--sampler", "ddim", "--eta", "2"],
    ["sample", "RUN", "--sampler", "ddim", "--variance", "beta"],
    ["sample", "RUN", "--sampler", "ddpm", "--variance", "npr"],
    ["sample", "RUN", "--sampler", "heun", "--rtol", "1e-3"],
    ["sample", "RUN", "--sampler", "rk45", "--rtol", "0"],
    ["sample", "RUN", "--schedule", "cosine"], ["nfe", "RUN", "--steps", "0"],
    ["nfe", "RUN", "--schedule", "iddpm", "--steps", "2000"],
    ["nfe", "RUN", "--num", "1"], ["nfe", "RUN", "--num", "20000"],
    ["sample", "RUN", "--seed", str(10 ** 23)],
    ["sample", "RUN", "--sampler", "pc", "--snr", "1e9"],
    ["sample", "RUN", "--sampler", "rk45", "--rtol", "1e-12"]])
def test_bad_input_is_one_sentence(argv, run, capsys):
    assert evaluate.main([str(run) if a == "RUN" else a for a in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("evaluate.py: ") and error.count("\n") == 1 and len(error) > 30


def test_too_many_steps_of_a_ladder_are_refused_with_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--data", "checkerboard", "--schedule", "ddpm", "--width", "8", "--steps",
                       "1", "--sample-steps", "1", "--out", "run"]) == 0
    capsys.readouterr()
    assert evaluate.main(["sample", "run", "--steps", "1001"]) == 2
    assert "1000 levels" in capsys.readouterr().err


def test_hostile_checkpoint_is_not_unpickled(tmp_path, capsys):
    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "owned",)
    (tmp_path / "run").mkdir()
    torch.save({"options": Hostile()}, tmp_path / "run" / "checkpoint-0000001.pt")
    assert evaluate.main(["sample", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "owned").exists()
    assert capsys.readouterr().err.count("\n") == 1
