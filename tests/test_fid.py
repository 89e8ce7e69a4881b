"""Image quality: sums, Frechet distance, KID and IS in closed form, and what the command says."""

import hashlib
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import datasets
import evaluate
import train
from datasets import BadInput
from networks import Inception


def normal(n, d, seed=0, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).double() + shift


def sums_of(x):
    return evaluate.measure([x], lambda x: (x, None))[0]


# ---- Sums ----------------------------------------------------------------------------------------

def test_streaming_sums_equal_numpys_moments_and_add():
    x = normal(101, 7, shift=3.0) * torch.arange(1, 8)
    sums, kept, p = evaluate.measure(x.split(8), lambda x: (x, None))
    assert p is None and torch.equal(kept, x) and sums.n == 101
    for found in (sums, sums_of(x[:30]) + sums_of(x[30:])):
        mean, cov = found.moments()
        assert np.allclose(mean, x.numpy().mean(0), rtol=1e-10, atol=1e-12)
        assert np.allclose(cov, np.cov(x.numpy(), rowvar=False), rtol=1e-10, atol=1e-10)


def test_features_are_kept_up_to_a_limit_and_probabilities_all(monkeypatch):
    monkeypatch.setattr(evaluate, "KEPT", 10)
    x = normal(40, 3)
    sums, kept, p = evaluate.measure(x.split(8), lambda x: (x, x.softmax(1)))
    assert torch.equal(kept, x[:10]) and torch.equal(p, x.softmax(1)) and sums.n == 40
    with pytest.raises(FloatingPointError):
        evaluate.measure([x * math.nan], lambda x: (x, None))


def test_ranks_share_the_work_and_their_sums_add(monkeypatch):
    """Two ranks, one after the other: what is handed to `total` adds to the one process's sums."""
    data, features = datasets.load_data("checkerboard"), evaluate.extractor("pixels", [2])
    whole, parts = evaluate.real_statistics(data, 100, features, most=300)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(evaluate, "ranks", lambda: (rank, 2))
        shares.append(evaluate.real_statistics(data, 100, features, most=300)[1])
    for (one, *_), (first, *_), (second, *_) in zip(parts, *shares):
        together = first + second
        assert first.n == second.n and together.n == one.n
        assert torch.allclose(together.xx, one.xx) and torch.allclose(together.x, one.x)


# ---- Distances -----------------------------------------------------------------------------------

def test_frechet_takes_the_same_value_through_either_root(monkeypatch):
    """Cholesky's factor, and the eigendecomposition that stands in where C1 is singular."""
    (m1, c1), (m2, c2) = (sums_of(normal(40, 6, seed, seed)).moments() for seed in (0, 1))
    distance = evaluate.frechet_distance(m1, c1, m2, c2)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda C: (C, torch.tensor(1)))
    assert evaluate.frechet_distance(m1, c1, m2, c2) == pytest.approx(distance, rel=1e-10)


def test_frechet_of_fewer_samples_than_dimensions_is_finite():
    few, many = sums_of(normal(20, 64)).moments(), sums_of(normal(2000, 64, 1)).moments()
    assert evaluate.frechet_distance(*few, *many) == pytest.approx(
        evaluate.frechet_distance(*many, *few), rel=1e-6)
    assert 0 < evaluate.frechet_distance(*few, *many) < 200
    assert evaluate.frechet_distance(*few, *few) == pytest.approx(0, abs=1e-5)


def test_mmd_equals_the_double_loop():
    x, y = normal(6, 3), normal(5, 3, seed=1, shift=0.5)

    def k(a, b):
        return (float(a @ b) / 3 + 1) ** 3
    within = [np.mean([k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j])
              for z in (x, y)]
    across = np.mean([k(a, b) for a in x for b in y])
    assert evaluate.polynomial_mmd(x, y) == pytest.approx(sum(within) - 2 * across, rel=1e-12)


def test_kid_is_unbiased():
    """In one dimension (ab + 1)^3 = sum_j C(3, j) a^j b^j, so MMD^2 = sum_j C(3, j) (difference of
    the j-th moments)^2; 0 for equal distributions, and that at any size."""
    for shift in (0.0, 0.3):
        wanted = 3 * shift ** 2 + 3 * shift ** 4 + (3 * shift + shift ** 3) ** 2
        for size in (5, 20):
            draws = [evaluate.polynomial_mmd(x, y) for x, y in zip(
                normal(500 * size, 1, 0).split(size), normal(500 * size, 1, 1, shift).split(size))]
            error = np.std(draws) / len(draws) ** 0.5
            assert np.mean(draws) == pytest.approx(wanted, abs=4 * error)


def test_kid_is_of_random_subsets_of_at_most_half():
    x, y = normal(400, 4), normal(300, 4, seed=1)
    mean, sd, sizes = evaluate.kernel_distance(x, y)
    assert abs(mean) < sd and sizes == "100 subsets of 150"
    assert evaluate.kernel_distance(x, y, most=20)[2] == "100 subsets of 20"
    assert evaluate.kernel_distance(x, y) == (mean, sd, sizes) != evaluate.kernel_distance(x, y, 1)
    far, sd, _ = evaluate.kernel_distance(x, y + 1)
    assert far > 5 * sd
    assert np.isfinite(evaluate.kernel_distance(x[:2], y[:3])[0])


def test_inception_score_of_certain_and_of_uniform_predictions():
    certain = torch.eye(7).repeat(10, 1)                                 # every split has all 7
    assert evaluate.inception_score(certain) == (pytest.approx(7), pytest.approx(0, abs=1e-6),
                                                 "10 splits of 7")
    assert evaluate.inception_score(torch.full((50, 7), 1 / 7))[0] == pytest.approx(1)
    assert evaluate.inception_score(certain[:1].repeat(50, 1))[0] == pytest.approx(1)
    p = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).double()
    kl = np.mean([(q * np.log(q / p.mean(0).numpy())).sum() for q in p.numpy()])
    assert evaluate.inception_score(p, splits=1)[0] == pytest.approx(np.exp(kl))
    assert evaluate.inception_score(torch.cat([certain[:35], certain[:1].repeat(35, 1)]),
                                    splits=2)[:2] == (pytest.approx(4), pytest.approx(3))


@pytest.mark.parametrize("features, n, name", [
    ("inception 6726825d", 50_000, "FID"), ("inception 6726825d", 49_999, "fid_49999"),
    ("inception 6726825d", 2000, "fid_2k"), ("inception 0", 10_000, "fid_10k"),
    ("pixels", 64, "frechet_pixels_64"), ("pixels", 50_000, "frechet_pixels_50k")])
def test_the_name_tells_the_number_of_samples(features, n, name):
    assert evaluate.distance_name(features, n) == name


def test_real_statistics_and_their_floor():
    data, features = datasets.load_data("swiss-roll"), evaluate.extractor("pixels", [2])
    real, parts = evaluate.real_statistics(data, 500, features)
    assert np.allclose(real["mean"], data.x.mean(0, dtype=float), atol=1e-10)
    assert np.allclose(real["cov"], np.cov(data.x.astype(float), rowvar=False), atol=1e-10)
    assert real["floor"] == evaluate.frechet_distance(*parts[0][0].moments(),
                                                      *parts[1][0].moments())
    assert (parts[0][0].n, parts[1][0].n, real["n"]) == (500, 19_500, 20_000)
    real, parts = evaluate.real_statistics(data, 151, features, most=300)
    assert len(parts) == 1 and math.isnan(real["floor"]) and real["floor_n"] == 0


def test_distance_of_a_run_falls_to_the_floor_as_its_denoiser_becomes_exact(tmp_path):
    """Data N(0, v): D = v/(v + sigma^2) x is exact, and D = 0 draws a point."""
    v = 0.25
    np.save(tmp_path / "x.npy", normal(5000, 2).numpy() * v ** 0.5)
    data, features = datasets.load_data(str(tmp_path / "x.npy")), evaluate.extractor("pixels", [2])
    real, _ = evaluate.real_statistics(data, 1000, features)
    given = {k.replace("_", "-"): x for k, x in vars(train.parser().parse_args([])).items()}
    options = train.resolve(given | {"loss": "dsm"}, data) | {"sample-steps": 18}
    exact, point = (evaluate.run_distance(denoise, options, 1000, features, real) for denoise in [
        lambda x, sigma: v / (v + sigma ** 2) * x, lambda x, sigma: 0 * x])
    assert exact[0] == "frechet_pixels_1k" and exact[2] == real["floor"]
    assert exact[1] < 10 * real["floor"] + 1e-3 and point[1] == pytest.approx(2 * v, rel=0.1)
    given = []
    evaluate.run_distance(lambda x, sigma, labels: given.append(labels) or 0 * x,
                          options | {"classes": ["a", "b", "c"]}, 7, features, real)
    assert given[0].tolist() == [0, 1, 2, 0, 1, 2, 0]


# ---- The command, on pixels ----------------------------------------------------------------------

def fid(capsys, *argv):
    """{name: numbers of its row} and all that was printed."""
    assert evaluate.main(["fid", *map(str, argv)]) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines()
            if re.match(r"(frechet|fid_|FID |KID |IS )", line)]
    return {row[0]: [float(x) for x in row[1:] if re.fullmatch(r"-?[\d.e+-]*\d", x)]
            for row in rows}, text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    np.savez(folder / "images.npz", images=rng.integers(0, 256, (80, 8, 8, 3), dtype=np.uint8),
             labels=np.arange(80) % 2)
    assert train.main(["--data", str(folder / "images.npz"), "--cond", "--width", "8", "--mult",
                       "1,1", "--blocks", "1", "--batch", "8", "--steps", "3", "--sample-steps",
                       "1", "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_fid_of_a_run_says_of_what_it_is(run, capsys):
    values, text = fid(capsys, run, "--features", "pixels", "--num", 30, "--sampler", "ddim",
                       "--eta", 0.5, "--steps", 3, "--seed", 2, "--weights", "raw")
    assert set(values) == {"frechet_pixels_30", "KID"} and "FID" not in text
    assert len(values["frechet_pixels_30"]) == 2 and min(values["frechet_pixels_30"]) > 0
    fingerprint = datasets.load_data(str(run.parent / "images.npz")).fingerprint
    for part in ("step 3", "weights raw", "ddim, 3 steps, eta 0.5", "seed 2", "NFE 3", "30 samples",
                 f"images, fingerprint {fingerprint}, n 80 (for the floor 50)", "30 real",
                 "100 subsets of 15",
                 "warning: the covariance of 30 images in 192 dimensions is singular"):
        assert part in text, part
    values, text = fid(capsys, run, "--features", "pixels", "--num", 41, "--steps", 2)
    assert len(values["frechet_pixels_41"]) == 1 and "needs 82 real images" in text


def test_fid_of_samples_that_were_saved_is_that_of_the_run(run, tmp_path, capsys):
    out = tmp_path / "x.npz"
    assert evaluate.main(["sample", str(run), "--num", "30", "--steps", "3", "--seed", "5", "--out",
                          str(out)]) == 0
    capsys.readouterr()
    drawn, _ = fid(capsys, run, "--features", "pixels", "--num", 30, "--steps", 3, "--seed", 5)
    saved, text = fid(capsys, out, "--features", "pixels", "--ref", run.parent / "images.npz")
    assert saved["frechet_pixels_30"][0] == pytest.approx(drawn["frechet_pixels_30"][0], rel=1e-3)
    assert "30 RGB images 8x8 from" in text


def test_saved_statistics_give_the_same_and_refuse_what_is_something_else(run, tmp_path, capsys):
    stats, argv = tmp_path / "stats.npz", [run, "--num", 30, "--steps", 2, "--features", "pixels"]
    direct, _ = fid(capsys, *argv, "--save-stats", stats)
    assert [p.name for p in tmp_path.iterdir()] == ["stats.npz"]
    stored, text = fid(capsys, *argv, "--ref", stats)
    assert stored == {"frechet_pixels_30": direct["frechet_pixels_30"]} and "no KID" in text
    other, text = fid(capsys, *argv, "--num", 20, "--ref", stats)
    assert len(other["frechet_pixels_20"]) == 1 and "saved with --num 20" in text
    with np.load(stats) as file:
        arrays = dict(file)
    for name, value in [("features", "inception 6726825d"), ("shape", [3, 16, 16]), ("n", None)]:
        np.savez(tmp_path / "other.npz", **{k: v for k, v in (arrays | {name: value}).items()
                                            if v is not None})
        refused(capsys, *argv, "--ref", tmp_path / "other.npz")
    np.savez(tmp_path / "other.npz", **arrays | {"mean": np.array([Hostile(tmp_path)], object)})
    refused(capsys, *argv, "--ref", tmp_path / "other.npz")
    assert not (tmp_path / "owned").exists()
    (tmp_path / "other.npz").write_bytes(stats.read_bytes()[:1000])
    refused(capsys, *argv, "--ref", tmp_path / "other.npz")
    refused(capsys, *argv, "--ref", stats, "--save-stats", tmp_path / "new.npz")


class Hostile:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return Path.touch, (self.folder / "owned",)


def refused(capsys, *argv):
    capsys.readouterr()
    assert evaluate.main(["fid", *map(str, argv)]) == 2
    printed = capsys.readouterr()
    error = printed.err
    assert error.startswith("evaluate.py: ") and error.count("\n") == 1 and len(error) > 30
    assert not printed.out
    return error


@pytest.mark.parametrize("argv", [
    "nowhere --ref checkerboard", "checkerboard", "checkerboard --ref nowhere", "RUN --num 1",
    "checkerboard --ref swiss-roll --num 20001", "checkerboard --ref swiss-roll --sampler euler",
    "checkerboard --ref swiss-roll --features inception", "checkerboard --ref two-gaussians-64d",
    "checkerboard --ref swiss-roll --weights raw", "RUN --churn 3", "RUN --size 8",
    "RUN --features pixels --save-stats stats.txt", "RUN --features pixels --save-stats no/x.npz",
    "RUN --features pixels --ref RUN/../images.npz --size 16", "RUN --inception no.pth",
    "RUN --features pca"])
def test_bad_input_is_one_sentence(argv, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused(capsys, *argv.replace("RUN", str(run)).split())


# ---- The command, on Inception -------------------------------------------------------------------

class Small(torch.nn.Module):
    """In Inception's stead: means of colours, and classes of these."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 5).requires_grad_(False)

    def forward(self, images):
        assert images.dtype == torch.uint8 and images.shape[1] == 3
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
        pool3 = images.float().mean((2, 3))
        return pool3, self.fc(pool3 / 100)


def test_inception_is_downloaded_once_by_its_sha256(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "Inception", Small)
    torch.save(Small().state_dict(), tmp_path / "there.pth")
    digest = hashlib.sha256((tmp_path / "there.pth").read_bytes()).hexdigest()
    monkeypatch.setattr(evaluate, "INCEPTION_URL", (tmp_path / "there.pth").as_uri())
    folder, argv = tmp_path / "data", [run, "--num", 30, "--steps", 2, "--ref-num", 70,
                                       "--data-dir", tmp_path / "data"]
    assert "sha256" in refused(capsys, *argv) and not list(folder.iterdir())
    monkeypatch.setattr(evaluate, "SHA256", digest[:8])
    values, text = fid(capsys, *argv)
    assert [p.name for p in folder.iterdir()] == [evaluate.INCEPTION]
    assert list(values) == ["fid_30", "KID", "IS"] and f"inception {digest[:8]}\n" in text
    assert "warning" not in text and "10 splits of 3" in text
    monkeypatch.setattr(datasets, "urllib", None)                        # not a second time
    assert fid(capsys, *argv)[0] == values


def test_download_takes_a_prefix_of_any_sum(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    url, digest = (tmp_path / "file").as_uri(), hashlib.sha256(b"content").hexdigest()
    for prefix in (digest, digest[:8]):
        path = datasets.download([url], tmp_path / prefix, prefix, "sha256")
        assert path.read_bytes() == b"content"
    with pytest.raises(BadInput, match="another sha256 sum"):
        datasets.download([url], tmp_path / "c", digest[1:9], "sha256")
    assert not list(tmp_path.glob("c*"))


def test_tf32_is_off_while_features_are_computed_and_back_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "Inception", Small)
    torch.save(Small().state_dict(), tmp_path / "small.pth")
    _, extract = evaluate.extractor("inception", [1, 4, 4], tmp_path / "small.pth")
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    features, p = extract(torch.full((2, 1, 4, 4), 7, dtype=torch.uint8))          # gray
    after = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    assert after == (True, True)
    assert features.dtype == torch.float64 and features.tolist() == [[7.0] * 3] * 2
    assert p.shape == (2, 5) and p.sum(1).tolist() == pytest.approx([1, 1])


def test_weights_of_something_else_are_refused(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "Inception", Small)
    state = Small().state_dict()
    torch.save(state, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    for wrong in (state | {"more": torch.ones(1)}, {"fc.bias": state["fc.bias"]}, [1], whole[:700],
                  {"x": Hostile(tmp_path)}):
        path = tmp_path / "wrong.pth"
        path.write_bytes(wrong) if isinstance(wrong, bytes) else torch.save(wrong, path)
        assert evaluate.INCEPTION_URL in refused(capsys, run, "--num", 4, "--inception", path)
    assert not (tmp_path / "owned").exists()


def test_fid_through_the_whole_inception(tmp_path, capsys):
    """Random weights in the published layout, two gray images against two."""
    torch.manual_seed(0)
    torch.save(Inception().state_dict(), tmp_path / "random.pth")
    x = np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=x[:2]), np.savez(tmp_path / "y.npz", images=x[2:])
    values, text = fid(capsys, tmp_path / "x.npz", "--ref", tmp_path / "y.npz", "--inception",
                       tmp_path / "random.pth", "--device", "cpu")
    assert list(values) == ["fid_2", "KID", "IS"] and np.isfinite(sum(values.values(), [])).all()
    assert values["fid_2"][0] > 0 and 1 <= values["IS"][0] <= 2
    digest = hashlib.sha256((tmp_path / "random.pth").read_bytes()).hexdigest()[:8]
    for part in (f"inception {digest}", "the covariance of 2 images in 2048 dimensions is singular",
                 "not the published weights"):
        assert part in text, part
