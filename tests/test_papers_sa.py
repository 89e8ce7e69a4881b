"""papers/sa.py: estimation gap and bias of SA-K in closed form, and each command in small."""

import pytest
import torch

from evaluate import BadInput
from losses import sa_tau
from oracles import called, generator, randn, runs
from papers import sa
from samplers import ddpm
from schedules import DDPM

SHORT = DDPM(beta_1=0.02, beta_T=0.4, T=10).levels
SMALL = dict(data="images.npz", cond=True, width=8, mult=(1,), blocks=1, batch=4, steps=1,
             dropout=0.1, fid_num=4, fid_features="pixels")


def call(name, folder, options=SMALL, **arguments):
    return called(sa, name, folder, options, **arguments)


# ---- Closed forms --------------------------------------------------------------------------------

def noise_source(shape):
    g = generator(0)

    def noise():
        return torch.randn(shape, generator=g, dtype=torch.float64)
    return noise


def test_gap_of_a_planted_bias_is_theorem_1s_sum():
    """eps_hat = eps + b at every step: d = b sum tau; were the errors unrelated, b sqrt(sum tau^2).

    Data of a single point, x0 = 0, so that this network is D = -sigma b.
    """
    x0, b = torch.zeros(5, 3, dtype=torch.float64), -0.3

    def biased(x, sigma):
        return -sigma * b * torch.ones_like(x)
    got = sa.estimation_gap(biased, x0, SHORT, noise_source((5, 3)))
    tau = sa_tau(SHORT, torch.arange(10, 1, -1), 1, "paper")[0]
    d, unrelated = tau.cumsum(0), (tau ** 2).cumsum(0).sqrt()
    size = SHORT ** 2 / (1 + SHORT ** 2).sqrt()                # of what is one gap at all x_t
    want = torch.stack([b * d, abs(b) * d, abs(b) * unrelated], 1) / size[0]
    torch.testing.assert_close(got, want * size[:-1].flip(0)[:, None])


def test_gap_is_the_distance_to_the_true_reverse_process_at_every_step():
    """Any denoiser: ddpm with D = x0 and the same noise, less the model's states."""
    x0 = randn(6, 3, seed=1)

    def network(x, sigma):
        return (x + sigma).tanh()

    def true(x, sigma):
        return x0
    got = sa.estimation_gap(network, x0, SHORT, noise_source((6, 3)))
    paths = []
    for denoise in (true, network):
        noise, path = noise_source((6, 3)), []
        ddpm(denoise, x0 + SHORT[-1] * noise(), SHORT.flip(0), noise,
             callback=lambda i, x: path.append(x))
        paths.append(torch.stack(path))                                          # (9, 6, 3)
    scale = 1 / (1 + SHORT[:-1].flip(0) ** 2).sqrt()                             # DDPM's frame
    apart = scale[:, None, None] * (paths[0] - paths[1])
    torch.testing.assert_close(got[:, 0], apart.mean((1, 2)))
    torch.testing.assert_close(got[:, 1], apart.square().mean((1, 2)).sqrt())


def test_tau_and_the_bias_of_independent_noises(tmp_path):
    """Independent noises: .75, .77, .82, .97 of the noise at t = 10, 100, 200, 500; a path: .98.

    test_sequence.py: the factors are those of sa_loss's minimiser.
    """
    table = call("tau", tmp_path)
    assert [row["t"] for row in table] == [str(t) for t in range(1, 1001)]
    assert table[0]["tau"] == ""
    for t, tau in [(2, 8.1e-3), (10, 4.0e-4), (100, 6.1e-6), (1000, 1.3e-8)]:
        assert float(table[t - 1]["tau"]) == pytest.approx(tau, rel=0.01)
    for name, factors in [("SA-2, independent", (0.750, 0.770, 0.820, 0.974)),
                          ("SA-3, independent", (0.847, 0.860, 0.893, 0.986)),
                          ("SA-2, path", (0.982, 0.998, 0.999, 1.000))]:
        for t, factor in zip((10, 100, 200, 500), factors):
            assert float(table[t - 1][name]) == pytest.approx(factor, abs=6e-4)


# ---- Commands ------------------------------------------------------------------------------------

@pytest.fixture
def two(folder, monkeypatch):
    """Of the four losses only dsm and SA-3, to be quicker."""
    monkeypatch.setattr(sa, "LOSSES", {name: sa.LOSSES[name] for name in ("dsm", "SA-3")})
    return folder


def test_table_has_every_loss_sampler_and_number_of_steps(two, capsys):
    """Each head's run starts from the run whose samples it draws; only SA-K gets --tau."""
    table = call("table", two, SMALL | dict(tau="window"), T=(2, 3), head=1, seeds=1)
    assert [(row["sampler"], row["T"]) for row in table] == [
        (name, T) for name in ("ddpm", "ddim", "analytic", "sn", "npr") for T in ("2", "3")]
    assert all(float(row[name]) > 0 and row[f"sd {name}"] == "" for row in table
               for name in ("dsm", "SA-3"))
    assert table[1]["dsm"] != table[3]["dsm"]                                    # ddpm, ddim
    plain = [options for options in runs() if options["head"] == "none"]
    assert sorted((o["loss"], o["K"], o["lam"], o["tau"]) for o in plain) == [
        ("dsm", 2, None, "unit"), ("sa", 3, 0.3, "window")]
    assert all((o["schedule"], o["weight"], o["steps"]) == ("ddpm", "constant", 1) for o in plain)
    heads = sorted((o["head"], o["init"]) for o in runs() if o["head"] != "none")
    assert heads == sorted((head, o["out"]) for head in ("sn", "npr") for o in plain)


def test_ablation_shares_runs_with_the_table_and_dsm_has_no_lam(two, capsys):
    call("table", two, samplers=("npr",), T=(2,), head=1, seed=5, seeds=2)
    assert len(runs()) == 4 + 4
    plain, heads = ([(o["out"], o["seed"]) for o in runs() if o["head"] == "none"],
                    [(o["init"], o["seed"]) for o in runs() if o["head"] == "npr"])
    assert sorted(plain) == sorted(heads)
    table = call("ablation", two, K=(2, 3), lam=(0.3, 1.0), T=(2,), seed=5, seeds=2)
    assert len(runs()) == 4 + 4 + 6                               # all but dsm and SA-3 with lam .3
    assert [(row["T"], row["lam"]) for row in table] == [("2", "0.3"), ("2", "1")]
    assert table[0]["dsm"] == table[1]["dsm"] and table[0]["SA-3"] != table[1]["SA-3"]
    assert float(table[0]["sd dsm"]) > 0


def test_gap_compares_runs_and_refuses_other_data(two, capsys):
    table = call("gap", two, num=4, start=6)
    assert [float(row["t"]) for row in table] == [5, 4, 3, 2, 1]
    for name in ("dsm", "SA-3"):
        assert float(table[0][f"{name}: ratio"]) == pytest.approx(1)        # a single step so far
        assert all(abs(float(row[f"{name}: mean"])) <= float(row[f"{name}: rms"]) for row in table)
    folders = [options["out"] for options in runs()]
    again = call("gap", two, runs=folders, num=4, start=6)
    assert {name.rsplit(": ")[0] for name in again[0]} == {"t", *folders}
    call("table", two, SMALL | dict(cond=False), samplers=("ddim",), T=(1,), seeds=1)
    other = next(options["out"] for options in runs() if not options["cond"])
    with pytest.raises(BadInput, match="other data or classes"):
        call("gap", two, runs=[folders[0], other], num=4, start=6)
