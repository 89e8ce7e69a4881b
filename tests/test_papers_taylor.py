"""papers/taylor.py: each share's gradients, and variances that are known in closed form."""

import csv
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import train
from losses import antithetic_loss, dsm_loss, stf_loss, stf_target, taylor_terms
from networks import MLP, Denoiser
from oracles import close, generator, randn
from papers import plot, taylor
from schedules import EDM

edm = EDM()
DATA = 0.5                                                           # edm.sigma_data


def normal_pool(N=4000, d=1):
    """Quantiles of N(0, DATA^2), with the variance of exactly that; in d coordinates, each in an
    order of its own."""
    z = torch.special.ndtri((torch.arange(N, dtype=torch.float64) + 0.5) / N)
    z = DATA * z / z.square().mean().sqrt()
    return torch.stack([z[torch.randperm(N, generator=generator(k))] for k in range(d)], 1)


class Raw(nn.Module):
    """F(u) = c + w u: one number to be learned, the other fixed."""

    def __init__(self, learn, c=0.0, w=0.0):
        super().__init__()
        self.c, self.w = torch.tensor([[c], [w]], dtype=torch.float64)
        setattr(self, learn, nn.Parameter(getattr(self, learn)))

    def forward(self, u, c_noise, labels=None, augment_labels=None):
        return self.c + self.w * u


def raw(*args, **given):
    return Denoiser(Raw(*args, **given), edm.precondition)


def mlp(classes=0):
    torch.manual_seed(0)
    net = MLP(2, 16, 2, classes)
    net.out.reset_parameters()
    return Denoiser(net, edm.precondition).double()


def measure(net, sigma, pool, num, **given):
    """{name: the variance over DSM's} of a network on the pool, and {control: beta}."""
    V, beta = taylor.variances(net, pool, edm.weight, sigma, num, generator(1), **given)
    return {name: v / V["DSM"] for name, v in V.items()}, beta


# ---- Gradients of shares -------------------------------------------------------------------------

def test_gradients_are_those_of_each_share_alone():
    """Of a class, with references of its own, the first of which are its samples; and of a
    parameter that nothing uses."""
    net, pool = mlp(classes=3), normal_pool(60, d=2)
    net.unused = nn.Parameter(torch.zeros(2).double())
    shares = next(taylor.draw_shares(net, pool, 4, 3, 8, generator(0)))
    x0, noise, _, reference = shares
    assert torch.equal(reference[:3].flatten(0, 1), x0)
    found = taylor.gradients(net, shares, edm.weight, 0.5, (0, 1, 2), (4, 8), label=2)
    D, sigma = partial(net, labels=torch.full((3,), 2)), torch.full((3, 1), 0.5).double()
    for i in range(4):
        given = D, x0[i::4], noise[i::4], sigma, edm.weight
        alone = dict(DSM=dsm_loss(*given), antithetic=antithetic_loss(*given))
        for n in (4, 8):
            own = partial(stf_target, reference=reference[:n, i])
            alone[f"STF {n}"] = stf_loss(*given, own)
        for k in (0, 1, 2):
            alone[f"order {k}"] = taylor_terms(*given, edm.precondition, k)[1]
        assert list(alone) == list(found)
        for name, value in alone.items():
            g = torch.autograd.grad(value.mean(), list(net.parameters()), retain_graph=True,
                                    materialize_grads=True)
            close(found[name][i], torch.cat([part.flatten() for part in g]))


# ---- Closed forms --------------------------------------------------------------------------------

@pytest.mark.parametrize("sigma", [0.1, 0.4])
def test_linear_network(sigma):
    """F = w u: gradients are 2 p q, quadratic in (x0, noise), so Gaussian moments give it all.

    p = u = c_in (x0 + sigma noise), q = w u - t; control of order 0: 2 b c_in x0 noise, of
    order 1: 2 b c_in (x0 noise + sigma (noise^2 - 1)).
    """
    w, V = 0.6, torch.tensor([DATA ** 2, 1.0]).double()              # variances of x0, noise
    c_skip, c_out, c_in, _ = edm.precondition(torch.tensor(sigma))
    a, b = (1 - c_skip) / c_out, c_skip * sigma / c_out
    p = c_in * torch.tensor([1.0, sigma]).double()
    q = w * p - torch.stack([a, -b])

    def cov(A, B):                                                   # of quadratic forms: Isserlis
        return 2 * (A * B * V[:, None] * V).sum()

    dsm = (p[:, None] * q + q[:, None] * p) / 2
    zeroth = b * c_in * torch.tensor([[0, 1.0], [1, 0]]).double() / 2
    first = zeroth + b * c_in * sigma * torch.diag(torch.tensor([0, 1.0]).double())
    left, factors = measure(raw("w", w=w), sigma, normal_pool(), 20_000, orders=[0, 1])
    for name, control in (("order 0", zeroth), ("order 1", first)):
        beta = cov(dsm, control) / cov(control, control)
        truth = 1 - beta * cov(dsm, control) / cov(dsm, dsm)
        assert left[name] == pytest.approx(truth.item(), abs=0.03)
        assert factors[name] == pytest.approx(beta.item(), abs=0.05)
    even = dsm * torch.eye(2)                                        # what a pair does not cancel
    assert left["antithetic"] == pytest.approx((cov(even, even) / cov(dsm, dsm)).item(), abs=0.03)


@pytest.mark.parametrize("m", [1, 16])
def test_the_variance_of_a_mini_batch_that_shares_n_references_falls_by_m_over_n_only(m):
    """At large sigma STF's target is the mean of its n = 32 references, of which DSM's are m."""
    left, _ = measure(raw("c", c=0.7), 100.0, normal_pool(), 1500, m=m, sizes=[32])
    assert left["STF 32"] == pytest.approx(m / 32, rel=0.15)


def test_the_trace_of_the_covariance_is_the_sum_over_parameters():
    """Those that a scale of 0 or 1 leaves, and the others."""
    net, pool = mlp(), normal_pool(d=2)
    some = (torch.arange(sum(p.numel() for p in net.parameters())) % 3 == 0).double()
    whole, one, other = (taylor.variances(net, pool, edm.weight, 0.3, 60, generator(0),
                                          scale=scale)[0]["DSM"] for scale in (1, some, 1 - some))
    assert one + other == pytest.approx(whole) and 0 < one < whole


def test_the_average_over_edms_noise_of_a_constant_network():
    """F = c: the gradient 2 (c - a x0 + b noise) is linear in the noise.  Pairs and controls take
    that and leave sigma^2/(sigma^2 + sigma_data^2) of DSM's variance, which no level changes."""
    found = taylor.average_left(raw("c", c=0.7), normal_pool(), 2000, generator(0))
    s = edm.training_sigma((torch.arange(6).double() + 0.5) / 6)
    truth = pytest.approx((s ** 2 / (s ** 2 + DATA ** 2)).mean().item(), rel=0.08)
    assert found == {"antithetic": truth, "order 0": truth, "order 1": truth}


# ---- The ring ------------------------------------------------------------------------------------

def test_ring_mean_is_the_posterior_mean_of_the_built_in_ring():
    """By the orthogonality that marks it: E <x0 - mean, h(x)> = 0."""
    x0 = taylor.points().double()
    for sigma in (0.03, 0.3, 3.0):
        x = x0 + sigma * randn(*x0.shape, seed=1)
        error = x0 - taylor.ring_mean(x, torch.full((len(x), 1), sigma).double())
        for h in (x, (8 * x).sin(), x ** 3):
            samples = (error * h).sum(1)
            assert samples.mean().abs() < 4 * samples.std() / len(samples) ** 0.5


def test_at_one_small_level_the_control_learns_and_plain_dsm_does_not():
    """TCV fig. 1: after 500 steps, of which DSM's are lost in noise."""
    pool = taylor.points()
    dsm, order_0 = (taylor.errors_of(method, pool, 0.01, [500], seed=0)[0]
                    for method in ("DSM", "order 0"))
    assert dsm > 0.95 and order_0 < 0.85


def test_every_method_has_the_gradient_of_dsm_on_average():
    """Of F = w u, at sigma .03, where a few references count, the source most."""
    pool = taylor.points().double()
    net, means = raw("w", c=0.7), {}
    for method in taylor.METHODS:
        g, values = generator(3), []
        for _ in range(150):
            loss = taylor.loss_by(method, net, pool, 0.03, g)
            values.append(torch.autograd.grad(loss, net.model.w)[0])
        means[method] = torch.stack(values)
    truth = means["exact target"].mean()
    for method, values in means.items():
        assert (values.mean() - truth).abs() < 4 * values.std() / 150 ** 0.5 + 1e-3, method


# ---- The commands --------------------------------------------------------------------------------

def command(tmp_path, name, *argv):
    """The rows of a command's CSV, as dicts."""
    assert plot.main("taylor", taylor.COMMANDS, [*argv, "--out", str(tmp_path)]) == 0
    with open(tmp_path / f"taylor-{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_gradvar_of_an_mlp(tmp_path):
    rows = command(tmp_path, "gradvar", "gradvar", "--num", "20", "--n", "4", "8", "--batch", "2",
                   "--levels", "1", "0.01", "--training", "2")
    assert [float(row["sigma"]) for row in rows] == [0.01, 1.0]
    for row in rows:
        assert 0 <= float(row["order 0"]) <= 1 and float(row["STF 8, shared"]) > 0
        assert math.isfinite(float(row["beta, order 2"]))
    assert float(rows[0]["order 0"]) < 0.1 < float(rows[1]["order 0"])


def test_gradvar_of_a_class_conditional_run_of_images(tmp_path, monkeypatch):
    """Mini-batches; order 1 with a probe, through attention."""
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    np.savez("noise.npz", images=x, labels=np.arange(40) % 2)
    run = train.run(train.Options(data="noise.npz", cond=True, width=8, mult=(1, 1), blocks=1,
                                  batch=8, steps=1, warmup=0, eval_every=0, out="run"), brief=True)
    row, = command(tmp_path, "gradvar-run", "gradvar", "--run", run, "--num", "6", "--levels",
                   "0.1", "--n", "4", "--batch", "2", "--orders", "1")
    assert 0 <= float(row["order 1"]) < 1 and float(row["STF 4"]) > 0


def test_converge_optimizers_and_grid(tmp_path):
    rows = command(tmp_path, "converge", "converge", "--training", "2", "--levels", ".1", ".3")
    assert [(row["sigma"], row["step"]) for row in rows] == [
        ("0.1", "1"), ("0.1", "2"), ("0.3", "1"), ("0.3", "2")]
    assert all(float(row["order 1"]) == pytest.approx(1, abs=0.01) for row in rows)
    rows = command(tmp_path, "optimizers", "optimizers", "--training", "2", "--num", "5")
    assert [row["step"] for row in rows] == ["1", "2"]
    assert 0 < float(rows[1]["SGD order 0"]) < 1 and 0 < float(rows[1]["Adam's step order 1"]) < 1
    assert rows[1]["Adam order 0"] != rows[1]["Adam's step order 0"]
    assert rows[1]["Adam order 0"] != rows[1]["SGD order 0"]
    rows = command(tmp_path, "grid", "grid", "--training", "1", "--num", "5", "--width", "4",
                   "--depth", "1", "2")
    assert [row["activation"] for row in rows] == ["silu"] * 2 + ["tanh"] * 2 + ["relu"] * 2
    first, second = 4 * (2 + 4) + 4 + (2 * 4 + 2), 4 * 4 + 4          # of layers and output; more
    assert [row["parameters"] for row in rows[2:4]] == [str(first), str(first + second)]
    assert 0 < float(rows[3]["order 0"]) < 1
    g = torch.Generator().manual_seed(0)
    net = taylor.fitted(taylor.mlp(0, 4, 2, "tanh"), taylor.points(), 1, g)
    left = taylor.average_left(net, taylor.points(), 5, g)
    assert [float(rows[3][name]) for name in taylor.ORDERS] == pytest.approx(
        [left[name] for name in taylor.ORDERS], rel=1e-4)
