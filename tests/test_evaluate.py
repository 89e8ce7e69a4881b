"""evaluate.py: samples that depend on their seeds alone, distances in closed form, the commands."""

import io
import itertools
import math
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import train
from evaluate import (SAMPLERS, VARIANCES, BadInput, denoising_error, frechet_distance, generate,
                      load_data, load_run, noise_table)
from oracles import randn
from schedules import DDPM, SCHEDULES
from test_data import noise, offer

pytestmark = pytest.mark.usefixtures("folder")


def options_of(**more):
    """What evaluate.py reads of a run's options: of points without classes, but for `more`."""
    return SimpleNamespace(**dict(
        shape=(2,), classes=(), counts=(), device="cpu", schedule="edm", P_mean=-1.2, P_std=1.2,
        head="none", label_dropout=0.0, size=None, data_dir="data", seed=0) | more)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A class-conditional run of a few steps on 8x8 noise; beside it one with each head."""
    folder = tmp_path_factory.mktemp("run")
    np.savez(folder / "images.npz", images=noise(40, 8, 8, 3), labels=np.arange(40) % 2)
    argv = (f"--data {folder}/images.npz --cond --steps 5 --label-dropout 0.2 --width 8 --mult 1,1 "
            "--blocks 1 --batch 8 --warmup 0 --sample-steps 1 --eval-every 0").split()
    assert train.main([*argv, "--out", f"{folder}/run"]) == 0
    for head in ("sn", "npr"):
        assert train.main([*argv, "--head", head, "--init", f"{folder}/run",
                           "--out", f"{folder}/{head}"]) == 0
    return folder / "run"


def by_class(x, sigma, labels=None, head=False):
    """An exact denoiser, of images lighter in class 1 than in class 0; and a head's output."""
    mean = 0 * x if labels is None else (0.8 * labels - 0.4).to(x).view(-1, 1, 1, 1)
    D = mean + 0.2 / (0.2 + sigma ** 2) * (x - mean)
    return (D, torch.full_like(x, 0.3)) if head else D


@pytest.fixture
def images(folder):
    """The options of a run on images.npz whose denoiser is by_class."""
    return options_of(data="images.npz", fingerprint=load_data("images.npz").fingerprint,
                      shape=(3, 8, 8), classes=("0", "1"), counts=(20, 20), label_dropout=0.1)


# ---- Samples -------------------------------------------------------------------------------------

@pytest.mark.parametrize("sampler, how", [
    *[(name, {}) for name in SAMPLERS], ("ddim", dict(eta=0.5)),
    ("edm-stochastic", dict(S_churn=2.0)), ("ddpm", dict(variance="analytic")),
    ("ddpm", dict(variance="sn")), ("heun", dict(guide=2.0)), ("rk45", dict(guide=2.0))])
def test_sample_i_depends_on_its_seed_and_its_label_alone(images, sampler, how):
    images.head = how.get("variance")

    def samples(seeds, labels, batch):
        return generate(by_class, images, seeds, sampler, 4, torch.tensor(labels), batch=batch,
                        **how)
    x = samples([5, 6, 7, 8, 9], [0, 1, 0, 1, 1], batch=5)
    assert x.shape == (5, 3, 8, 8) and x.dtype == torch.float32
    some = samples([9, 8, 5], [1, 1, 0], batch=2)
    assert torch.allclose(some, x[[4, 3, 0]], rtol=1e-4, atol=1e-4)
    for other in (samples([9], [0], batch=1), samples([10], [1], batch=1)):
        assert (other - x[4]).abs().max() > 0.1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_sampler_starts_from_the_schedules_own_noise_in_one_step_too(schedule):
    """The denoiser first sees x = sigma(t_0) noise, whatever the frame s(t) x of the sampler."""
    seen, column = [], SCHEDULES[schedule]()

    def denoise(x, sigma):
        seen.append((x.std().item(), sigma.flatten()[0].item()))
        return x / (1 + sigma ** 2)
    for sampler in SAMPLERS:
        for steps in (1, 3):
            seen.clear()
            x = generate(denoise, options_of(schedule=schedule), range(500), sampler, steps,
                         batch=500)
            first = float(column.sigma(column.time_steps(steps)[0]))
            assert seen[0] == pytest.approx((first, first), rel=0.1) and x.isfinite().all()


def test_samples_start_from_noise_that_training_does_not_draw():
    starts = []

    def denoise(x, sigma):
        starts.append(x / sigma)
        return 0 * x
    generate(denoise, options_of(), range(8), "euler", 1)
    drawn = [torch.randn(2, generator=train.generator(0, step, stream))
             for step in range(8) for stream in range(4)]
    assert torch.cdist(starts[0], torch.stack(drawn)).min() > 1e-3


def draw(run, *argv):
    assert evaluate.main(["sample", str(run), "--out", "x.npz", *map(str, argv)]) == 0
    return np.load("x.npz")["images"]


@pytest.mark.parametrize("sampler, choice", [(sampler, choice) for sampler in SAMPLERS
                                             for choice in SAMPLERS[sampler]])
def test_every_choice_of_a_sampler_changes_its_samples(run, sampler, choice):
    values, more = [0.001, 0.9], []
    if choice == "variance":
        values = [v for v in VARIANCES if (sampler, v) != ("ddim", "beta")]
    if choice in ("S_tmin", "S_tmax", "S_noise"):
        more = ["--S_churn", 5]

    def samples(value):
        folder = run.parent / value if value in ("sn", "npr") else run
        return draw(folder, "--sampler", sampler, "--num", 2, "--steps", 12, *more, f"--{choice}",
                    value)
    for a, b in itertools.combinations(map(samples, values), 2):
        assert (a != b).any()


@pytest.mark.parametrize("sampler, how, sentence", [
    ("heun", dict(eta=0.5), "--eta: not of --sampler heun"), ("ddim", dict(eta=5), "--eta 5"),
    ("edm-stochastic", dict(S_churn=-40), "--S_churn -40"),
    ("heun", dict(steps=2.5), "--steps 2.5"), ("ddpm", dict(variance="foo"), "--variance foo"),
    *[("ddpm", dict(variance=name, guide=2.0), "--guidance: the variance is that of")
      for name in ("analytic", "sn", "npr")]], ids=str)
def test_a_choice_without_a_meaning_is_refused_from_python_too(images, sampler, how, sentence):
    images.head = how.get("variance")
    with pytest.raises(BadInput, match=sentence):
        generate(by_class, images, range(2), sampler, **how)


def test_rk45_takes_its_own_steps(images):
    few, many = (generate(by_class, images, range(2), "rk45", steps, schedule=DDPM())
                 for steps in (1, 5000))
    assert torch.equal(few, many)


def test_guidance_exaggerates_the_class(images):
    """Class 0 has the mean gray -.4, all images together 0."""
    labels, gray = torch.zeros(200).long(), []
    for guide in (0.0, 1.0, 3.0):
        x = generate(by_class, images, range(200), steps=4, labels=labels, guide=guide, batch=200)
        gray.append(float(x.mean()))
    assert gray == pytest.approx([0, -0.4, -1.2], abs=0.05)


def test_a_variance_costs_no_calls(run, capsys):
    for head, folder in (("sn", run.parent / "sn"), ("analytic", run)):
        draw(folder, "--num", 4, "--sampler", "ddpm", "--steps", 5, "--variance", head)
        assert "NFE 5," in capsys.readouterr().out


def test_a_head_learns_what_it_is_named_for():
    """A point mass at 0: eps = x/sigma, so that h -> eps^2 for SN, and (D/sigma)^2 for NPR."""
    np.save("zero.npy", np.zeros((64, 2), np.float32))
    argv = "--data zero.npy --batch 64 --warmup 0 --lr 0.01 --sample-steps 1 --eval-every 0".split()
    assert train.main([*argv, "--width", "64", "--steps", "150", "--out", "run"]) == 0
    eps, sigma = randn(2000, 2).float(), torch.tensor(0.3)
    for head in ("sn", "npr"):
        more = f"--init run --head {head} --steps 200 --out {head}".split()
        assert train.main([*argv, *more]) == 0
        with torch.no_grad():
            D, h = load_run(head)[0](sigma * eps, sigma, head=True)
        want = eps ** 2 if head == "sn" else (D / sigma) ** 2
        assert (h - want).square().mean() < 0.3 * (eps ** 2).var()


@pytest.mark.parametrize("variance", ["analytic", "sn", "npr"])
def test_measured_variances_draw_gaussian_data_exactly_in_few_steps(variance):
    """N(0, v), its exact D and heads: DDPM has the right variance, and loses half without them.

    In two steps, all of it is Cov[x0 | x] at sigma 80, which analytic_moments must measure well.
    """
    v = 0.3
    np.save("x.npy", randn(4000, 2).float().numpy() * v ** 0.5)
    options = options_of(data="x.npy", fingerprint=load_data("x.npy").fingerprint, head=variance)

    def denoise(x, sigma, head=False):
        D, spread = v / (v + sigma ** 2) * x, v / (v + sigma ** 2)     # Cov[x0 | x]/sigma^2
        return (D, spread + ((x - D) / sigma) ** 2 * (variance == "sn")) if head else D
    for steps in (2, 3):
        found, without = (generate(denoise, options, range(4000), "ddpm", steps, batch=4000,
                                   variance=name).var() for name in (variance, "beta_tilde"))
        assert found == pytest.approx(v, rel=0.15) and without < 0.5 * v


# ---- Classes -------------------------------------------------------------------------------------

@pytest.mark.parametrize("counts", [[9, 1], [5, 3, 2], [1] * 10, [1000, 1]])
def test_drawn_labels_have_the_shares_of_the_data_and_depend_on_the_seed_alone(counts):
    options = options_of(classes=list("abcdefghij")[:len(counts)], counts=counts)
    share = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    for n in (10, 80, 500, 2000, 50_000):
        labels = evaluate.draw_labels(range(n), options)
        found = torch.bincount(labels, minlength=len(counts)) / n
        assert (found - share).abs().max() <= 2 / n
    assert torch.equal(evaluate.draw_labels([777, 5, 49_999], options), labels[[777, 5, 49_999]])
    assert evaluate.draw_labels(range(9), options_of()) is None

    def denoise(x, sigma, labels):
        return 0 * x + labels[:, None]
    x = generate(denoise, options, range(80), "euler", 1)
    assert torch.equal(x[:, 0].round().long(), labels[:80])


@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 2, 3], [0.5, 1, 0, 1], [-1, 0, 0, 0]], ids=str)
def test_labels_that_do_not_fit_the_seeds_or_the_classes_are_refused(labels):
    for classes in (("a", "b", "c"), ()):
        with pytest.raises(BadInput, match="labels must be 4 class numbers"):
            generate(None, options_of(classes=classes), range(4), labels=labels)


def test_a_class_can_be_named_and_a_picture_has_a_row_for_each(run):
    zero, one = (draw(run, "--class", k, "--num", 4, "--steps", 2).astype(int) for k in "01")
    assert abs(zero - one).max() > 1
    assert evaluate.main(["sample", str(run), "--num", "4", "--steps", "2", "--out", "x.png"]) == 0
    assert abs(pixels("x.png").astype(int) - grid(np.stack([*zero[:2], *one[2:]]))).max() <= 1
    assert len(draw(run, "--class", 1, "--steps", 1)) == 8
    later = draw(run, "--class", 0, "--num", 3, "--steps", 2, "--seed", 1)         # seeds 1 to 3
    assert abs(later - zero[1:]).max() <= 1


# ---- Pictures, the sample command ----------------------------------------------------------------

def grid(x):
    """Four images 8x8 in two rows."""
    return x.reshape(2, 2, 3, 8, 8).transpose(0, 3, 1, 4, 2).reshape(16, 16, 3)


def pixels(path):
    """The four images of a picture: without captions and margin, and without the zoom to 64x64."""
    return np.asarray(Image.open(path))[-144:-16, -144:-16][::8, ::8]


def test_a_picture_shows_every_image_unchanged(run, capsys):
    """As float within [-1, 1], or as uint8."""
    assert evaluate.main(["sample", str(run), "--num", "4", "--steps", "2"]) == 0
    path = Path(capsys.readouterr().out.split()[-1])
    assert path == run / "heun-2-at-5.png" and not list(run.glob("*.png.part"))
    x = generate(*load_run(run), range(4), steps=2, labels=[0, 0, 1, 1])
    assert (pixels(path) == grid(evaluate.to_uint8(x))).all()
    evaluate.save_pictures("x.png", [("x", x)])
    assert (pixels("x.png") == pixels(path)).all()


def test_an_array_of_samples_has_all_classes_in_the_datas_shares(run):
    draw(run, "--num", 5, "--steps", 1, "--seed", 3)
    labels = evaluate.draw_labels(range(3, 8), load_run(run)[1])
    assert np.load("x.npz")["labels"].tolist() == labels.tolist() != sorted(labels.tolist())


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_a_picture_of_points_shows_all_of_them_at_any_scale(scale):
    x = scale * np.array([[-1.0, 1.0], [1.0, -1.0], [0.0, 0.5]])
    evaluate.save_pictures("new/x.png", [("points", x)])
    page = np.asarray(Image.open("new/x.png").convert("L"))[28:428, 16:416]
    assert not page[[18, 382, 109], [18, 382, 200]].any() and (page == 0).sum() < 30


def test_samples_from_minus_1_to_1_are_saved_as_0_to_255_and_clipped():
    levels = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, 0.5]).expand(1, 3, 1, 6)
    assert evaluate.to_uint8(levels)[0, 0, 0].tolist() == [0, 0, 128, 255, 255, 191]


def test_names_of_pictures_tell_their_choices_apart(run, monkeypatch, capsys):
    names = set()
    for more in ("", "--class 1", "--sampler ddpm", "--seed 3", "--sampler ddpm --variance beta",
                 "--schedule vp", "--guidance 2", "--weights raw"):
        assert evaluate.main(["sample", str(run), "--num", "2", "--steps", "1", *more.split()]) == 0
        names.add(capsys.readouterr().out.split()[-1])
    assert len(names) == 8 and str(run / "ddpm-1-variance-beta-at-5.png") in names
    monkeypatch.chdir(run)                         # of a checkpoint's name: into its folder
    assert evaluate.main("sample checkpoint-0000005.pt --num 2 --steps 1".split()) == 0
    path = Path(capsys.readouterr().out.split()[-1]).resolve()
    assert path == run / "heun-1-at-5.png"


def test_a_gif_shows_the_state_after_each_step_and_ends_with_the_samples(images, monkeypatch):
    """Each frame has full contrast: in heun and pc, whose states are s(t) x, and in ddpm, of x."""
    images.step, images.folder = 1, "."
    monkeypatch.setattr(evaluate, "load_run", lambda *given: (by_class, images))
    for sampler in ("heun", "pc", "ddpm"):
        line = f"sample RUN --gif --schedule vp --sampler {sampler} --num 4 --steps 5 --out x.npz"
        assert evaluate.main([*line.split(), "--batch", "3"]) == 0
        x = grid(np.load("x.npz")["images"])
        with Image.open("x.gif") as gif:
            assert gif.n_frames in (4, 5)                              # Pillow joins equal ones
            for i in range(gif.n_frames):
                gif.seek(i)
                frame = np.asarray(gif.convert("RGB")).astype(int)[::4, ::4]
                assert 0.8 < frame.std() / x.std() < 1.2
        assert abs(frame - x).mean() < 20


# ---- Distances -----------------------------------------------------------------------------------

def moments(x):
    return x.mean(0), torch.cov(x.T)


def test_frechet_distance_equals_the_textbook_formula():
    """Tr (C1 C2)^{1/2} = sum of the square roots of the (real, positive) eigenvalues of C1 C2."""
    (m1, C1), (m2, C2) = moments(randn(40, 6)), moments(randn(40, 6, seed=1) + 0.5)
    root = torch.linalg.eigvals(C1 @ C2).sqrt().sum().real
    textbook = ((m1 - m2) ** 2).sum() + (C1 + C2).trace() - 2 * root
    assert frechet_distance(m1, C1, m2, C2) == pytest.approx(float(textbook), rel=1e-10)


def test_frechet_distance_of_fewer_samples_than_dimensions_is_finite_and_symmetric():
    few, many = moments(randn(20, 64)), moments(randn(2000, 64, seed=1))
    forth, back = frechet_distance(*few, *many), frechet_distance(*many, *few)
    assert 0 < forth < 200 and forth == pytest.approx(back, rel=1e-6)  # two roots, one value
    assert frechet_distance(*few, *few) == pytest.approx(0, abs=1e-5)


def test_pixel_features_are_the_pixels_averaged_to_at_most_16():
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    extract = evaluate.extractor("pixels", x.shape[1:])[1]
    features = extract(x).view(2, 3, 16, 16)
    means = x.double().view(2, 3, 16, 2, 16, 2).mean((3, 5)) / 127.5 - 1
    assert features.dtype == torch.float64 and torch.allclose(features, means, atol=1e-6)


def test_real_statistics_and_their_floor():
    data, features = load_data("ring"), evaluate.extractor("pixels", (2,))
    real = evaluate.real_statistics(data, 500, features, seed=3)
    x = torch.from_numpy(data.x).double()
    assert torch.allclose(real["mean"], x.mean(0)) and torch.allclose(real["cov"], torch.cov(x.T))
    order = torch.randperm(20_000, generator=torch.Generator().manual_seed(3))
    parts = moments(x[order[:500]]), moments(x[order[500:]])
    assert real["floor"] == pytest.approx(frechet_distance(*parts[0], *parts[1]))
    assert math.isnan(evaluate.real_statistics(data, 151, features, most=300)["floor"])


# ---- Loss by noise level -------------------------------------------------------------------------

def test_denoising_error_of_a_linear_denoiser_has_its_closed_form():
    """D = a x: E|a (x0 + sigma eps) - x0|^2/d = (1 - a)^2 E x0^2 + a^2 sigma^2."""
    x0 = randn(20_000, 2, seed=7)                 # not the seed of the noise
    for a in (0.0, 0.5, 1.0):
        found = denoising_error(lambda x, sigma: a * x, x0, None, (0.1, 2.0))
        want = [(1 - a) ** 2 * float((x0 ** 2).mean()) + a ** 2 * s ** 2 for s in (0.1, 2.0)]
        assert found == pytest.approx(want, rel=0.03)
    labels = torch.arange(20_000) % 2
    found = denoising_error(lambda x, sigma, label: 0 * x + label[:, None], x0, labels, (0.5,))
    assert found == pytest.approx([float((labels[:, None] - x0).square().mean())])


def test_noise_table_of_the_ideal_denoiser_is_all_chance_and_counts_the_references():
    """64 points, the set's own posterior mean for D: STF's loss is 0, DSM's the posterior variance.

    The effective number of references goes from 1 to all of them, or to all of a class.
    """
    x = randn(64, 2, seed=7).float()
    data = SimpleNamespace(x=x.numpy(), labels=np.arange(64) % 2)
    for classes, parts in (((), [x]), (("0", "1"), [x[::2], x[1::2]])):
        def ideal(y, sigma, labels=None):
            distance = torch.cdist(y, x) ** 2 / (2 * sigma ** 2)
            if labels is not None:
                distance[labels[:, None] != torch.arange(64) % 2] = math.inf
            return (-distance).softmax(1) @ x
        options = options_of(classes=classes, ref_batch=64, seed=0, weight="constant")
        table = noise_table(ideal, options, data)
        assert [row[0] for row in table] == pytest.approx(evaluate.LEVELS)
        for sigma, dsm, stf, size in table:
            assert stf == pytest.approx(0, abs=1e-6) and dsm >= 0 and size >= 1
        assert table[0][3] < 1.5 and table[-1][3] > 0.98 * len(parts[0])
        spread = np.mean([part.var(0, correction=0).mean().item() for part in parts])
        assert table[-1][1] * 50 ** 2 == pytest.approx(spread, rel=0.02)


def test_levels_prints_the_table(run, capsys):
    assert evaluate.main(["levels", str(run)]) == 0
    text = capsys.readouterr().out
    assert "over 40 references" in text                       # all that there are
    printed = re.findall(r"^ *([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) +\d+%", text, re.MULTILINE)
    table = noise_table(*load_run(run), load_data(f"{run.parent}/images.npz"))
    assert len(printed) == len(table) == len(evaluate.LEVELS)
    for row, values in zip(printed, table):
        assert [float(number) for number in row] == pytest.approx(values, abs=0.06)


# ---- The fid command -----------------------------------------------------------------------------

def fid(capsys, *argv):
    """{name: numbers of its row} and all that was printed."""
    capsys.readouterr()
    assert evaluate.main(["fid", *map(str, argv)]) == 0
    text = capsys.readouterr().out
    name, *row = re.search("^(?:frechet|fid).*", text, re.MULTILINE)[0].split()
    return {name: [float(x) for x in row]}, text


def test_fid_of_a_run_says_of_what_it_is_and_is_that_of_its_samples(run, capsys):
    """--ref's images are made as large as the run's."""
    np.savez("other.npz", images=noise(45, 16, 16, 3, seed=1))
    real = load_data("other.npz", size=8)
    how = ["--sampler", "ddim", "--eta", 0.5, "--steps", 3, "--seed", 2, "--weights", "raw"]
    argv = [run, "--ref", "other.npz", "--features", "pixels", "--batch", 7, *how, "--num"]
    values, text = fid(capsys, *argv, 20)
    for part in ("step 5", "weights raw", "ddim, 3 steps", "eta 0.5", "seed 2", "20 samples",
                 f"fingerprint {real.fingerprint}"):
        assert part in text, part
    denoiser, options = load_run(run, weights="raw")
    x = evaluate.to_uint8(generate(denoiser, options, range(2, 22), "ddim", 3, eta=0.5))
    parts = (moments(torch.from_numpy(y).double().flatten(1) / 127.5 - 1) for y in (x, real.x))
    features = evaluate.extractor("pixels", (3, 8, 8))
    want = [frechet_distance(*next(parts), *next(parts)),
            evaluate.real_statistics(real, 20, features, seed=2)["floor"]]
    assert values["frechet_pixels_20"] == pytest.approx(want, rel=1e-3)
    values, text = fid(capsys, *argv, 30)
    assert math.isnan(values["frechet_pixels_30"][1]) and "no floor: it takes 60 real rows" in text


# ---- Inception -----------------------------------------------------------------------------------

class Small(torch.nn.Linear):
    """In Inception's stead: the means of colours.  TF32 has to be off."""

    def __init__(self):
        super().__init__(1, 1)

    def forward(self, images):
        assert images.dtype == torch.uint8 and images.shape[1] == 3
        assert not torch.backends.cudnn.allow_tf32
        return images.float().mean((2, 3)), None


@pytest.fixture
def small(folder, monkeypatch):
    """Small in Inception's stead; its weights can be downloaded."""
    monkeypatch.setattr(evaluate, "Inception", Small)
    weights = io.BytesIO()
    torch.save(Small().state_dict(), weights)
    offer(monkeypatch, evaluate.INCEPTION, weights.getvalue(), "whole")


def test_inception_is_downloaded_to_the_folder_of_downloads_or_pixels_are_advised(run, small,
                                                                                  capsys):
    argv = [run, "--num", 20, "--steps", 2, "--data-dir", "mine"]
    values, text = fid(capsys, *argv)
    assert os.listdir("mine") == [evaluate.INCEPTION]
    assert list(values) == ["fid_20"] and "features of inception\n" in text
    shutil.rmtree("mirror")
    assert fid(capsys, *argv)[0] == values                             # not a second time
    assert evaluate.main(["fid", *map(str, argv[:-1]), "empty"]) == 2
    assert "or choose pixels" in capsys.readouterr().err


def test_inception_sees_gray_images_as_rgb(small):
    _, extract = evaluate.extractor("inception", (1, 4, 4))
    features = extract(torch.full((2, 1, 4, 4), 7, dtype=torch.uint8))
    assert features.dtype == torch.float64 and features.tolist() == [[7.0] * 3] * 2
