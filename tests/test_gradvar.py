"""evaluate.py gradvar: per-sample gradients, and variances that are known in closed form."""

import csv
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import evaluate
import gradients
import train
from losses import stf_target, taylor_terms
from networks import MLP, Denoiser
from schedules import EDM

edm = EDM()
DATA = 0.5                                                           # edm.sigma_data


def settings(**given):
    return SimpleNamespace(**dict(num=64, n=[8, 4], batch=1, orders=[0, 1, 2], atoms=3) | given)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


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


def mlp(classes=0, width=16):
    torch.manual_seed(0)
    net = MLP(2, width, 2, classes)
    net.out.reset_parameters()
    return Denoiser(net, edm.precondition).double()


def measure(net, sigma, pool, seed=1, gamma=0.0, scale=1.0, **given):
    """reduction(loss, control) by kind, of `net` on the pool."""
    args = settings(**given)
    labels = torch.zeros(len(pool), dtype=torch.int64)
    names, covs = gradients.covariances(net, pool, labels, sigma, edm.weight, gamma, scale, args,
                                     generator(seed))
    return {kind: partial(gradients.reduction, names, cov) for kind, cov in covs.items()}


# ---- Gradients of shares -------------------------------------------------------------------------

@pytest.mark.parametrize("batch", [1, 3])
def test_share_gradients_are_those_of_each_share_alone(batch):
    """With labels; order 1, which has a derivative inside; and a parameter that nothing uses."""
    net, copies, g = mlp(classes=3), 4, generator()
    net.unused = nn.Parameter(torch.zeros(2).double())
    x0, noise = torch.randn(2, copies * batch, 2, generator=g).double()
    labels, s = torch.arange(copies * batch) % 3, torch.rand(len(x0), 1, generator=g).double() + .1
    value = lambda D, *given: taylor_terms(D, *given, edm.weight, lambda s: 1 / (1 + s), order=1)[1]
    own, theta = gradients.own_parameters(net, copies)
    got, = gradients.share_gradients([value(partial(own, labels=labels), x0, noise, s)], theta)
    assert got.shape == (copies, sum(p.numel() for p in net.parameters()))
    for i, row in enumerate(got):
        mine = slice(i * batch, (i + 1) * batch)
        mean = value(partial(net, labels=labels[mine]), x0[mine], noise[mine], s[mine]).mean()
        g = torch.autograd.grad(mean, list(net.parameters()), materialize_grads=True)
        torch.testing.assert_close(row, torch.cat([a.flatten() for a in g]), rtol=1e-9, atol=1e-12)


def test_each_share_has_references_of_its_own_its_samples_first_and_of_their_class():
    pool, labels, net = normal_pool(60, d=2), torch.arange(60) % 3, mlp(classes=3)
    b = next(gradients.draw_shares(net, pool, labels, 20, settings(num=5, batch=2), generator()))
    assert b["reference"].shape == (5, 20, 2) and b["x0"].shape == (10, 2)
    assert torch.equal(b["reference"][:, :2].flatten(0, 1), b["x0"])
    x, s = b["x0"] + 0.5 * b["noise"], torch.full((10, 1), 0.5).double()
    torch.testing.assert_close(b["D"](x, s), net(x, s, b["labels"]))
    got = gradients.by_share(stf_target, b, 12, x, s)
    for i, y in enumerate(b["reference"][:, :12]):
        mine, label = slice(2 * i, 2 * i + 2), b["reference_labels"][i, :12]
        want = [stf_target(x[mine][j:j + 1], s[mine][:1], y[label == b["labels"][mine][j]])
                for j in range(2)]
        torch.testing.assert_close(got[i], torch.cat(want), rtol=1e-9, atol=1e-12)
    for k in range(3):
        torch.testing.assert_close(b["mu"][b["labels"] == k][:1], pool[labels == k].mean(0)[None])


# ---- Unbiased ------------------------------------------------------------------------------------

def surprise(g):
    """n |mean|^2 / tr Cov: about 1 if the mean is zero, with the tail of Exp(1)."""
    return len(g) * (g.mean(0) ** 2).sum().item() / g.var(0).sum().item()


@pytest.mark.parametrize("sigma", [0.1, 2.0])
@pytest.mark.parametrize("batch", [1, 4])
def test_all_losses_have_the_gradient_of_dsm_on_average_and_controls_have_none(batch, sigma):
    args, net, pool, rows = settings(num=800, batch=batch), mlp(), normal_pool(d=2), []
    labels = torch.zeros(len(pool), dtype=torch.int64)
    for b in gradients.draw_shares(net, pool, labels, 8, args, generator(2)):
        s = torch.full((len(b["x0"]), 1), sigma).double()
        losses = gradients.loss_estimates(b["D"], b, s, edm.weight, 0.8, args.n)
        controls = gradients.control_estimates(b["D"], b, s, edm.weight,
                                            lambda s: edm.precondition(s)[0], args.orders, 8, 3)
        rows.append(gradients.share_gradients([*losses.values(), *controls.values()], b["theta"]))
    dsm, *others = torch.cat(rows, 1)
    for name, g in zip([*losses, *controls][1:], others):
        assert surprise(g - dsm if name in losses else g) < 7, name


# ---- Closed forms --------------------------------------------------------------------------------

@pytest.mark.parametrize("sigma", [0.05, 0.5, 3.0])
def test_constant_network(sigma):
    """F = c: the gradient 2 (c - a x0 + b noise) is linear in the noise, and so is L less what is
    theta-free, c^2 - 2 c t.  Antithetic pairs and a control of any order take all of that, with
    beta = 1, and leave a^2 Var x0 = sigma^2/(sigma^2 + sigma_data^2) of 1.  Adam scales one
    parameter's gradient by a number."""
    by = measure(raw("c", c=0.7), sigma, normal_pool(), num=6000, orders=[0, 1],
                 scale=torch.tensor([3.0]))
    left = pytest.approx(sigma ** 2 / (sigma ** 2 + DATA ** 2), rel=0.08)
    one = pytest.approx(1, abs=4 * ((sigma ** 2 + DATA ** 2) / DATA ** 2 / 6000) ** 0.5)  # 4 errors
    for kind in ("gradient", "Adam", "objective"):
        assert by[kind]("dsm") == (1.0, 0.0) and by[kind]("antithetic") == (left, 0.0)
        for k in (0, 1):
            assert by[kind]("dsm", f"order {k}") == (left, one)
    assert by["Adam"]("stf 8") == pytest.approx(by["gradient"]("stf 8"), rel=1e-9)


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
    form = lambda p, q: (p[:, None] * q + q[:, None] * p) / 2        # of the quadratic form p q
    cov = lambda A, B: 2 * (A * B * V[:, None] * V).sum()            # Isserlis
    dsm, swap = form(p, q), torch.tensor([[0, 1.0], [1, 0]]).double() / 2
    zeroth = b * c_in * swap
    first = zeroth + b * c_in * sigma * torch.diag(torch.tensor([0, 1.0]).double())
    by = measure(raw("w", w=w), sigma, normal_pool(), num=20_000, orders=[0, 1])["gradient"]
    for order, control in enumerate((zeroth, first)):
        beta = cov(dsm, control) / cov(control, control)
        ratio = 1 - beta * cov(dsm, control) / cov(dsm, dsm)
        assert by("dsm", f"order {order}") == (pytest.approx(ratio.item(), abs=0.03),
                                               pytest.approx(beta.item(), abs=0.05))
    even = dsm * torch.eye(2)                                        # what a pair does not cancel
    assert by("antithetic")[0] == pytest.approx((cov(even, even) / cov(dsm, dsm)).item(), abs=0.03)


def test_stf_with_one_reference_is_dsm_and_with_many_the_posterior_mean():
    """Of Gaussian data that is c_skip x, so F* = 0 and the gradient of F = c has no variance."""
    by = measure(raw("c", c=0.7), 0.5, normal_pool(), n=[1, 300], atoms=1, num=300, orders=[0])
    for kind in ("gradient", "objective"):
        assert by[kind]("stf 1")[0] == pytest.approx(1, rel=1e-9)
        assert by[kind]("stf 300")[0] < 0.02
        pairs = by[kind]("stf, antithetic"), by[kind]("antithetic")
        assert pairs[0] == pytest.approx(pairs[1], rel=1e-9) and pairs[0][0] < 0.9


@pytest.mark.parametrize("batch, shared", [(1, 1 / 16), (16, 1.0)])
def test_a_shared_reference_gains_little_and_the_mean_correction_repairs_it(batch, shared):
    """At large sigma STF's target is the mean of its 16 references.  A mini-batch of 16 that shares
    them has the mean of its own 16 sources for a target: nothing is won.  What the correction by
    gamma = 1 leaves is Var x0/15 (y_i - ybar)^2-like for one sample, and nothing of the batch's."""
    net, pool = raw("c", c=0.7), normal_pool()
    by = measure(net, 100.0, pool, batch=batch, n=[16], num=1500, gamma=1.0,
                 orders=[0])["gradient"]
    assert by("stf 16")[0] == pytest.approx(shared, rel=0.15)
    assert by("stf, corrected")[0] == pytest.approx(1 / 256 if batch == 1 else 0, abs=1e-3)


def test_stf_with_all_atoms_is_never_worse_than_either(sigma=0.3):
    by = measure(mlp(), sigma, normal_pool(d=2), n=[8], atoms=8, num=600)["gradient"]
    assert by("stf 8", "atoms")[0] < min(by("stf 8")[0], by("dsm", "order 0")[0])


def test_one_atom_is_the_source_drawn_anew(sigma=0.5):
    by = measure(mlp(), sigma, normal_pool(d=2), n=[8], atoms=1)["gradient"]
    assert by("order 0", "atoms")[0] > 0.1 * by("order 0")[0]


def test_controls_take_nearly_all_at_small_sigma_and_nothing_at_large():
    small, large = (measure(mlp(), sigma, normal_pool(d=2), num=300)["gradient"]
                    for sigma in (1e-3, 30.0))
    for k in range(3):
        assert small("dsm", f"order {k}")[0] < 0.02 and large("dsm", f"order {k}")[0] > 0.98


def test_the_trace_of_the_covariance_is_the_sum_over_parameters():
    """Those that a scale of 0 or 1 leaves, and the others."""
    net, pool = mlp(), normal_pool(d=2)
    some = (torch.arange(sum(p.numel() for p in net.parameters())) % 3 == 0).double()
    one, other = (gradients.covariances(net, pool, torch.zeros(len(pool), dtype=torch.int64), 0.3,
                                     edm.weight, 0.5, scale, settings(), generator())[1]
                  for scale in (some, 1 - some))
    torch.testing.assert_close(one["Adam"] + other["Adam"], one["gradient"])
    assert one["Adam"][0, 0] > 0 and other["Adam"][0, 0] > 0


def test_adam_scale_of_a_constant_network():
    """E (2 (c - t))^2 = 4 (c^2 + 1) at every sigma, EDM's t having unit variance; times E sigma =
    exp(P_mean + P_std^2/2) under a weight that has sqrt(sigma) beside EDM's."""
    pool, weight = normal_pool(), lambda s: edm.weight(s) * s.sqrt()
    scale = gradients.adam_scale(raw("c", c=0.7), pool, torch.zeros(len(pool), dtype=torch.int64),
                              weight, settings(num=6000), generator())
    assert scale.item() == pytest.approx((4 * 1.49 * math.exp(-0.48)) ** -0.5, rel=0.08)


# ---- The command ---------------------------------------------------------------------------------

TINY = ["--num", "20", "--n", "8", "4", "--atoms", "2", "--levels", "1", "0.01"]


def figure(tmp_path, *argv):
    """The rows of gradvar.csv, as dicts of numbers."""
    assert evaluate.main(["gradvar", *argv, "--out", str(tmp_path)]) == 0
    with open(tmp_path / "gradvar.csv", newline="") as file:
        return [{name: float(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


def test_command_on_points(tmp_path, capsys):
    rows = figure(tmp_path, *TINY, "--steps", "2", "--width", "8", "--activation", "tanh")
    assert [row["sigma"] for row in rows] == [0.01, 1.0]
    for row in rows:
        for kind in ("gradient", "Adam", "objective"):
            assert row[f"{kind}:dsm"] == 1 and row[f"{kind} variance:dsm"] > 0
            assert all(0 <= row[f"{kind}:{name}"] < 1 for name in ("order 0", "stf 8, 2 atoms"))
            assert math.isfinite(row[f"{kind} beta:order 2"])
    printed = capsys.readouterr().out.splitlines()
    for name, cost in [("dsm", "1"), ("order 1", "2 + 3 J"), ("order 2", "2 + 5 J"),
                       ("antithetic", "2"), ("stf 8, 2 atoms", "3")]:
        assert any(line.startswith(name) and line.endswith(f" {cost}") for line in printed)


def test_command_on_a_conditional_run_of_images(tmp_path, capsys):
    """Mini-batches; order 1 with a probe, through attention."""
    x = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", images=x, labels=np.arange(40) % 2)
    run = str(tmp_path / "run")
    assert train.main(["--data", str(tmp_path / "noise.npz"), "--cond", "--width", "8", "--mult",
                       "1,1", "--blocks", "1", "--batch", "8", "--steps", "1", "--warmup", "0",
                       "--sample-steps", "1", "--out", run]) == 0
    _, pool, labels, _ = gradients.measured(SimpleNamespace(run=run, device="cpu"), generator())
    assert labels.bincount().tolist() == [20, 20]
    for image, label in zip(pool[:5], labels):
        rows = torch.from_numpy(x.transpose(0, 3, 1, 2)) / 127.5 - 1
        assert (rows - image).flatten(1).norm(dim=1).argmin() % 2 == label
    row, = figure(tmp_path, run, "--num", "6", "--levels", "0.1", "--n", "4", "--batch", "2",
                  "--atoms", "2", "--orders", "1")
    assert row["gradient:dsm"] == 1 and 0 <= row["gradient:order 1"] < 1
    capsys.readouterr()
    assert evaluate.main(["gradvar", "--data", str(tmp_path / "noise.npz")]) == 2
    assert "name a RUN" in capsys.readouterr().err


def test_trained_mlp_learns_the_posterior_mean_and_is_the_same_again():
    """E[x0 | x] = c_skip x: F = 0."""
    pool, s = normal_pool(d=2).float(), torch.full((200, 1), 0.5)
    x = pool[:200]

    def F(activation="silu", steps=2):
        args = SimpleNamespace(seed=0, width=16, depth=1, steps=steps, activation=activation)
        net = gradients.trained_mlp(args, pool, generator())
        return net(x, s) - edm.precondition(s)[0] * x
    assert F(steps=60).norm() < 0.5 * F(steps=0).norm()
    outputs = [F(name) for name in ("silu", "softplus", "tanh", "relu")]
    assert torch.equal(F(), outputs[0])
    assert all(not torch.allclose(a, b) for a, b in zip(outputs, outputs[1:]))


def test_bad_input_is_one_sentence(capsys):
    for argv, words in [(["--batch", "32", "--n", "64", "16"], "larger --n"),
                        (["--atoms", "5", "--n", "4"], "larger --n")]:
        assert evaluate.main(["gradvar", *argv]) == 2
        assert words in capsys.readouterr().err
