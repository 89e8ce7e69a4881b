"""Taylor control variates: the proofs, and the numbers of taylor.md ("md" below).

What is exact is tested exactly, in float64 and without chance: the mean over a design of noises,
the mean over the source, the slope of a remainder.  What is statistical is a variance of per-sample
gradients: every sample has parameters of its own (own_parameters), all equal, so that the gradient
of the batch's sum holds one gradient a sample.  "Ratio" is a variance over plain DSM's.
"""

import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from losses import (RunningBeta, antithetic_loss, dsm_loss, mean_correction, stf_atoms, stf_loss,
                    stf_target, stf_taylor_terms, stf_weights, taylor_control, taylor_terms,
                    together)
from networks import MLP, Denoiser, UNet
from schedules import DDPM, EDM

edm, ddpm = EDM(), DDPM()
c_skip = lambda sigma: edm.precondition(sigma)[0]
ORDERS = [0, 1, 2]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


class Net(nn.Module):
    """(x, c_noise) -> 64 -> 64 -> d."""

    def __init__(self, activation=F.silu, d=2, width=64):
        super().__init__()
        self.activation = activation
        self.layers = nn.ModuleList([nn.Linear(d + 1, width), nn.Linear(width, width),
                                     nn.Linear(width, d)])

    def forward(self, x, c_noise, labels=None, augment_labels=None):
        h = torch.cat([x, c_noise[:, None]], 1)
        for layer in self.layers[:-1]:
            h = self.activation(layer(h))
        return self.layers[-1](h)


def denoiser(activation=F.silu, row=edm, d=2, seed=0):
    torch.manual_seed(seed)
    return Denoiser(Net(activation, d), row.precondition)


def unet(**options):
    """8x8, attention at 4x4; every parameter random, so that no branch is off."""
    torch.manual_seed(0)
    net = UNet(8, 1, width=8, mult=(1, 2), blocks=1, attend=(4,), **options)
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return Denoiser(net, edm.precondition)


# ---- The expectation of the control is zero: exactly ---------------------------------------------

def design(d):
    """2d noises with the moments of N(0, I) up to the third: mean 0, covariance I, nothing odd."""
    e = d ** 0.5 * torch.eye(d, dtype=torch.float64)
    return torch.cat([e, -e])


def assert_mean_zero(control, net, tolerance=1e-12):
    """The mean of control (n,) and of its gradient, against their own size."""
    assert control.mean().abs() < tolerance * control.abs().mean()
    parameters = list(net.parameters())
    mean = torch.autograd.grad(control.mean(), parameters, retain_graph=True, allow_unused=True)
    single = torch.autograd.grad(control[0], parameters, allow_unused=True)
    size = sum(g.norm() for g in single if g is not None)
    assert size > 0 and sum(g.norm() for g in mean if g is not None) < tolerance * size


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("activation", [torch.tanh, F.silu, F.relu])
@pytest.mark.parametrize("row, sigma", [(edm, 0.01), (edm, 0.4), (edm, 10.0), (ddpm, 0.4)])
def test_control_and_its_gradient_have_mean_zero_over_the_design(row, sigma, activation, order):
    """md 1.1, 1.3: for any network (ReLU too), order and sigma; DDPM's row is eps-prediction."""
    net, noise = denoiser(activation, row, d=3).double(), design(3)
    y, s = randn(1, 3, seed=1).expand(6, -1), torch.full((6, 1), sigma, dtype=torch.float64)
    skip = lambda s: row.precondition(s)[0]
    assert_mean_zero(taylor_terms(net, y, noise, s, row.weight, skip, order)[1], net)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("order", [1, 2])
def test_control_of_an_affine_denoiser_is_its_closed_form(order, learned):
    """D = A x + b: H = 0, without a graph, or with one of A alone; so both orders are the same."""
    A, b, s = randn(3, 3, seed=3), randn(3, seed=4), torch.full((6, 1), 0.4, dtype=torch.float64)
    y, noise, J = randn(1, 3, seed=1).expand(6, -1), design(3), A - c_skip(s[0]) * torch.eye(3)
    A.requires_grad_(learned)
    control = taylor_terms(lambda x, s: x @ A.T + b, y, noise, s, edm.weight, c_skip, order)[1]
    dot = ((y @ J.T + b + s * noise @ J.T) * noise).sum(1) - s[:, 0] * J.trace()
    factor = 2 * edm.weight(s) * c_skip(s) * s
    torch.testing.assert_close(control, factor[:, 0] * dot / 3, rtol=1e-12, atol=0)
    assert control.mean().abs() < 1e-12 * control.abs().mean()


@pytest.mark.parametrize("order", [1, 2])
def test_probe_control_has_mean_zero_over_designs_of_noise_and_probe(order):
    """(noise + v).J(noise - v): both are N(0, I), so tr J - tr J, and the cross terms are odd."""
    net = denoiser(d=3).double()
    noise, probe = design(3).repeat_interleave(6, 0), design(3).repeat(6, 1)
    y, s = randn(1, 3, seed=1).expand(36, -1), torch.full((36, 1), 0.4, dtype=torch.float64)
    assert_mean_zero(taylor_terms(net, y, noise, s, edm.weight, c_skip, order, probe)[1], net)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("d", [2, 3])
def test_probe_averaged_over_all_sign_vectors_is_the_exact_trace(d, order):
    """At every noise: the mean of v.J v over the 2^d vectors v of +-1 is tr J."""
    net, B = denoiser(d=d).double(), 5
    y, noise = randn(B, d, seed=1), randn(B, d, seed=2)
    s = torch.linspace(0.1, 2, B, dtype=torch.float64)[:, None]
    control = partial(taylor_terms, net, y, noise, s, edm.weight, c_skip, order)
    signs = [torch.tensor(v).to(y).expand(B, d) for v in itertools.product([-1, 1], repeat=d)]
    mean = torch.stack([control(v)[1] for v in signs]).mean(0)
    torch.testing.assert_close(mean, control()[1], rtol=1e-10, atol=1e-12)
    assert (control(signs[0])[1] - mean).abs().min() > 1e-4              # one probe is not


def remainder(net, y, e, sigma, order, h):
    """|e.(G(y + h e) - T^k)|: with a probe of zeros no trace is taken off, which leaves e.T^k."""
    y, skip = y.clone().requires_grad_(), c_skip(sigma)
    G = lambda y: net(y, sigma) - skip * y
    control = taylor_control(net(y, sigma), y, e, h, skip, order, probe=torch.zeros_like(y))
    return (e * G(y + h * e) - control / (skip * h)).flatten(1).sum(1).norm()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("activation", [torch.tanh, F.silu])
def test_remainder_of_order_k_falls_as_h_to_the_k_plus_1(activation, order):
    net = denoiser(activation, d=3).double()
    y, e, s = randn(8, 3, seed=1), randn(8, 3, seed=2), torch.full((8, 1), 0.4).double()
    far, near = (remainder(net, y, e, s, order, h).item() for h in (2e-3, 1e-3))
    assert math.log2(far / near) == pytest.approx(order + 1, abs=0.05)


@pytest.mark.parametrize("order", ORDERS)
def test_remainder_through_a_unet_with_group_norm_and_attention(order):
    """The second derivatives of attention need the MATH kernel."""
    net = unet().double().eval()
    y, e, s = randn(2, 1, 8, 8, seed=1), randn(2, 1, 8, 8, seed=2), torch.full((2, 1, 1, 1), 0.4)
    with sdpa_kernel(SDPBackend.MATH):
        far, near = (remainder(net, y, e, s.double(), order, h).item() for h in (2e-4, 1e-4))
    assert math.log2(far / near) == pytest.approx(order + 1, abs=0.05)


@pytest.mark.parametrize("order", [1, 2])
def test_orders_1_and_2_train_a_unet(order):
    """One probe, and a gradient for every parameter that the loss itself has one for."""
    net, x0, noise = unet(), randn(2, 1, 8, 8, seed=1).float(), randn(2, 1, 8, 8, seed=2).float()
    with sdpa_kernel(SDPBackend.MATH):
        loss, control = taylor_terms(net, x0, noise, torch.full((2, 1, 1, 1), 0.2), edm.weight,
                                     c_skip, order, probe=randn(2, 1, 8, 8, seed=3).sign().float())
        (loss - control).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.norm() > 0 for p in net.parameters()
               if p is not net.model.dec["8x8_aux_conv"].bias)


# ---- One call on several copies ------------------------------------------------------------------

def counted(function, net, *args):
    """What function(net, ...) gives, and the flops of each of its calls of net."""
    flops = []

    def counting(*args):
        with FlopCounterMode(display=False) as counter:
            out = net(*args)
        flops.append(counter.get_total_flops())
        return out
    return function(counting, *args), flops


def test_each_loss_is_one_call_on_its_copies():
    """DSM 1 row a sample, antithetic and Taylor 2, K atoms K + 1."""
    net, reference = denoiser(), ring(64, generator(1))
    batch = reference[:16], randn(16, 2, seed=2).float(), torch.full((16, 1), 0.3), edm.weight
    loss, (row,) = counted(dsm_loss, net, *batch)
    assert loss.shape == (16,) and row > 0
    assert counted(antithetic_loss, net, *batch)[1] == [2 * row]
    for order in ORDERS:
        (loss, control), flops = counted(taylor_terms, net, *batch, c_skip, order)
        assert loss.shape == control.shape == (16,) and flops == [2 * row]
    for K in (1, 4, 64):
        atoms = partial(stf_atoms, reference=reference, uniform=torch.rand(16), K=K)
        (loss, control), flops = counted(stf_taylor_terms, net, *batch, c_skip, atoms)
        assert loss.shape == control.shape == (16,) and flops == [(K + 1) * row]


@pytest.mark.parametrize("shape", [(6, 2), (2, 1, 8, 8)])
def test_together_is_each_copy_by_itself(shape):
    """GroupNorm is per sample, so it does not see that the copies share a batch."""
    net = (denoiser() if len(shape) == 2 else unet()).double().eval()
    x, sigma = randn(3, *shape, seed=1), randn(3, shape[0], *[1] * (len(shape) - 1), seed=2).exp()
    each = torch.stack([net(a, s) for a, s in zip(x, sigma)])
    torch.testing.assert_close(together(net, x, sigma), each, rtol=1e-10, atol=1e-12)


def test_labels_bound_for_one_batch_serve_all_copies_and_are_dropped_alike():
    torch.manual_seed(0)
    mlp = MLP(2, width=16, depth=1, classes=3)
    nn.init.normal_(mlp.out.weight)
    net, labels = Denoiser(mlp, edm.precondition), torch.arange(6) % 3
    x, sigma = randn(2, 6, 2, seed=1).float(), torch.full((2, 6, 1), 0.5)
    each = torch.stack([net(a, s, labels) for a, s in zip(x, sigma)])
    torch.testing.assert_close(together(partial(net, labels=labels), x, sigma), each)
    net = unet(classes=3, label_dropout=0.5).train()
    x, sigma = randn(6, 1, 8, 8, seed=1).float().expand(2, 6, 1, 8, 8), torch.ones(2, 6, 1, 1, 1)
    bound = partial(net, labels=labels)
    a, b = together(bound, x, sigma)
    assert torch.equal(a, b) and not torch.equal(a, together(bound, x, sigma)[0])


def test_dropout_draws_one_mask_for_all_copies_and_the_residual_vanishes_with_sigma():
    """md 1.3: with masks of their own F(x) - F(x0) would not vanish, and the control be no use."""
    net, y, noise = unet(dropout=0.2).train(), randn(4, 1, 8, 8).float(), randn(4, 1, 8, 8, seed=1)
    a, b = together(net, torch.stack([y, y]), torch.ones(2, 4, 1, 1, 1))
    assert torch.equal(a, b) and (a - net(y, torch.ones(4, 1, 1, 1))).abs().max() > 0.1
    gap, fresh = [], []
    for sigma in (1e-2, 1e-3):
        s = torch.full((4, 1, 1, 1), sigma)
        x = y + s * noise.float()
        F_of = lambda D, x: (D - c_skip(s) * x) / edm.precondition(s)[1]
        D, D0 = together(net, torch.stack([x, y]), s.expand(2, -1, -1, -1, -1))
        gap.append((F_of(D, x) - F_of(D0, y)).norm())
        fresh.append((F_of(net(x, s), x) - F_of(net(y, s), y)).norm())
    assert gap[1] < 0.2 * gap[0] and gap[1] < 0.05 * fresh[1] and fresh[1] > 0.5 * fresh[0]


# ---- Identities ----------------------------------------------------------------------------------

def test_with_beta_0_the_losses_are_dsm_and_stf_bit_for_bit():
    plain = lambda x, sigma: x / (1 + sigma ** 2) + 0.1 * (3 * x).sin()
    reference, noise = ring(64, generator(1)), randn(16, 2, seed=2).float()
    batch = reference[:16], noise, torch.linspace(0.01, 3, 16)[:, None], edm.weight
    for order in ORDERS:
        assert torch.equal(taylor_terms(plain, *batch, c_skip, order)[0], dsm_loss(plain, *batch))
    atoms = partial(stf_atoms, reference=reference, uniform=torch.rand(16))
    target = partial(stf_target, reference=reference)
    assert torch.equal(stf_taylor_terms(plain, *batch, c_skip, atoms)[0],
                       stf_loss(plain, *batch, target))
    alone = lambda x, s: (batch[0][None], torch.ones(1, 16), batch[0])     # n = 1: the source
    for got, want in zip(stf_taylor_terms(plain, *batch, c_skip, alone),
                         taylor_terms(plain, *batch, c_skip)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_antithetic_loss_is_the_mean_of_dsm_at_both_noises():
    net, x0, noise = denoiser().double(), randn(9, 2, seed=1), randn(9, 2, seed=2)
    both = partial(dsm_loss, net, x0, sigma=randn(9, 1, seed=3).exp(), weight=edm.weight)
    got = antithetic_loss(net, x0, noise, randn(9, 1, seed=3).exp(), edm.weight)
    torch.testing.assert_close(got, (both(noise) + both(-noise)) / 2, rtol=1e-12, atol=0)


def flat_gradient(value, net):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(net.parameters()),
                                                               retain_graph=True)])


def test_controlling_the_objective_is_controlling_the_gradient():
    """TCV's equivalence: grad (L - beta cv) = grad L - beta grad cv, for beta has no graph."""
    net, x0, noise = denoiser().double(), randn(9, 2, seed=1), randn(9, 2, seed=2)
    sigma = randn(9, 1, seed=3).exp()
    loss, control = taylor_terms(net, x0, noise, sigma, edm.weight, c_skip, order=1)
    beta = RunningBeta()
    beta.update(sigma, loss, control, [net.model.layers[-1].weight])
    weights = beta(sigma).flatten()
    assert not weights.requires_grad
    got = flat_gradient((loss - weights * control).sum(), net)
    want = sum(flat_gradient(l, net) - w * flat_gradient(c, net)
               for l, c, w in zip(loss, control, weights))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.05, 0.3, 2.0])
def test_stf_terms_are_the_mean_of_dsm_terms_over_the_unknown_source(sigma):
    """md 4.2, pointwise in x: sum_I w_I(x) control(y_I, eps_I) is the control at K = n, and

        grad (L_STF - beta cvbar) = sum_I w_I(x) grad (L_DSM - beta cv)(y_I, eps_I)

    so the expectation is the same, and the variance no more, for any beta.
    """
    net, B, n, beta = denoiser().double(), 7, 12, 0.7
    reference = ring(n, generator(1)).double()
    x, s = reference[:B] + sigma * randn(B, 2, seed=2), torch.full((B, 1), sigma).double()
    atoms = partial(stf_atoms, reference=reference, uniform=torch.rand(B).double(), K=n)
    stf, cvbar = stf_taylor_terms(net, x, 0 * x, s, edm.weight, c_skip, atoms)
    w, mean = stf_weights(x, s, reference), torch.zeros_like(cvbar)
    gradient = 0
    for k in range(n):
        y = reference[k].expand(B, 2)
        dsm, cv = taylor_terms(net, y, (x - y) / s, s, edm.weight, c_skip)
        mean += w[:, k] * cv
        gradient = gradient + flat_gradient((w[:, k] * (dsm - beta * cv)).sum(), net)
    torch.testing.assert_close(cvbar, mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(flat_gradient((stf - beta * cvbar).sum(), net), gradient,
                               rtol=1e-8, atol=1e-10)


# ---- Atoms of the posterior ----------------------------------------------------------------------

N_ATOMS = 6


def atoms_setting(sigma=0.4, B=5):
    reference, s = randn(N_ATOMS, 2, seed=1), torch.full((B, 1), sigma, dtype=torch.float64)
    return reference, reference[:B] + s * randn(B, 2, seed=2), s


def pieces(w, K):
    """Midpoints and lengths of the intervals of the uniform on which the drawn atom is one and the
    same, (n, B) each; the K - 1 heaviest have length 0."""
    rest = w.scatter(1, w.topk(K - 1).indices, 0)
    rest = rest / rest.sum(1, keepdim=True)
    return (rest.cumsum(1) - rest / 2).T, rest.T


@pytest.mark.parametrize("K", range(1, N_ATOMS + 1))
def test_a_sum_over_k_atoms_averages_to_the_sum_over_all_exactly(K):
    """The uniform is integrated piece by piece; for any function, here a cubic of the atoms."""
    reference, x, s = atoms_setting()
    w, f = stf_weights(x, s, reference), lambda y: (y ** 3 + y.flip(-1)).sum(-1)
    want, got = (w * f(reference)).sum(1), 0
    for u, length in zip(*pieces(w, K)):
        y, mass, target = stf_atoms(x, s, reference, u, K)
        assert y.shape == (K, 5, 2) and mass.shape == (K, 5)
        torch.testing.assert_close(mass.sum(0), torch.ones(5).double(), rtol=0, atol=1e-14)
        torch.testing.assert_close(target, stf_target(x, s, reference), rtol=1e-13, atol=0)
        got = got + length * (mass * f(y)).sum(0)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("K", [1, 2, 4])
def test_the_last_atom_is_drawn_by_its_weight_among_those_left(K):
    reference, x, s = atoms_setting(B=1)
    w, M = stf_weights(x, s, reference), 4000
    u = (torch.arange(M) + 0.5) / M
    y, _, _ = stf_atoms(x.expand(M, -1), s.expand(M, -1), reference, u.double(), K)
    drawn = (y[-1][:, None] == reference).all(2).double().mean(0)                # (n,)
    torch.testing.assert_close(drawn, pieces(w, K)[1][:, 0], rtol=0, atol=2 / M)
    for i, k in enumerate(w[0].topk(K - 1).indices):
        assert (y[i] == reference[k]).all()


@pytest.mark.parametrize("sigma", [1e-3, 0.4, 50.0])
def test_atoms_at_the_ends_of_the_uniform_and_where_weights_underflow(sigma):
    reference, x, s = atoms_setting(sigma)
    below_1 = 1 - torch.finfo(torch.float64).eps
    for K in range(1, N_ATOMS + 1):
        for u in (0.0, below_1):
            y, mass, _ = stf_atoms(x, s, reference, torch.full((5,), u, dtype=torch.float64), K)
            assert y.isfinite().all() and (mass >= 0).all()
            w = stf_weights(x, s, reference)[(y[-1][:, None] == reference).all(2)]     # (B,)
            assert (w[mass[-1] > 1e-300] > 0).all()           # never one that has no weight


def test_atoms_are_of_the_samples_own_class():
    reference, x, s = atoms_setting(2.0)
    classes, u = torch.arange(N_ATOMS) % 2, torch.linspace(0, 0.99, 5).double()
    y, mass, target = stf_atoms(x, s, reference, u, 2, classes[:5], classes)
    for c in (0, 1):
        own = classes[:5] == c
        want = stf_atoms(x[own], s[own], reference[classes == c], u[own], 2)
        for got, alone in zip((y[:, own], mass[:, own], target[own]), want):
            torch.testing.assert_close(got, alone, rtol=1e-12, atol=0)


def test_two_points_posterior_weighted_control_is_unbiased_and_the_naive_one_is_not():
    """md 4.2 on data {0, 1}, reference {0, 1}, the noise integrated by quadrature.

    naive: G(y).eps_hat with STF's own residual noise eps_hat = (x - target)/sigma.
    """
    net, data = denoiser(d=1, seed=1).double(), torch.tensor([[0.0], [1.0]]).double()
    e = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    p = (-e ** 2 / 2).exp() / (-e ** 2 / 2).exp().sum()
    x0, noise = data.repeat_interleave(4001, 0), e.repeat(2)[:, None]
    s = torch.full((8002, 1), 0.4, dtype=torch.float64)
    x = x0 + s * noise
    mean = lambda control: ((p.repeat(2) / 2) * control).sum().item()
    for K in (1, 2):
        total = 0
        for u, length in zip(*pieces(stf_weights(x, s, data), K)):
            atoms = partial(stf_atoms, reference=data, uniform=u, K=K)
            control = stf_taylor_terms(net, x0, noise, s, edm.weight, c_skip, atoms)[1]
            total += mean(length * control)
        assert abs(total) < 1e-12
    residual = (x - stf_target(x, s, data)) / s
    naive = taylor_control(net(x0, s), x0, residual, s, c_skip(s))[:, 0]
    assert abs(mean(2 * edm.weight(s)[:, 0] * naive)) > 0.2 * mean(control.abs())


# ---- Per-sample gradients ------------------------------------------------------------------------

RADIUS = math.sqrt(2 * (0.25 - 0.07 ** 2))                   # so that the data's deviation is .5


def modes(like):
    angle = torch.arange(8).to(like) * (math.pi / 4)
    return RADIUS * torch.stack([angle.cos(), angle.sin()], 1)


def ring(n, g):
    """md's toy: 8 Gaussians of deviation .07 on a circle."""
    k = torch.randint(8, (n,), generator=g)
    return modes(torch.zeros(()))[k] + 0.07 * torch.randn(n, 2, generator=g)


def ring_mean(x, sigma):
    """E[x0 | x] in closed form."""
    mu, total = modes(x), 0.07 ** 2 + sigma ** 2
    w = (-((x[:, None] - mu) ** 2).sum(2) / (2 * total)).softmax(1)
    return (sigma ** 2 * (w @ mu) + 0.07 ** 2 * x) / total


def own_parameters(net, n):
    """A denoiser with n copies of net's parameters, each for 1/n of a batch; and those copies."""
    theta = {k: p.detach().repeat(n, *[1] * p.ndim).requires_grad_()
             for k, p in net.named_parameters()}

    def denoise(x, sigma):
        split = lambda a: a.reshape(n, -1, *a.shape[1:])
        one = lambda theta, x, sigma: functional_call(net, theta, (x, sigma))
        return torch.vmap(one)(theta, split(x), split(sigma)).flatten(0, 1)
    return denoise, list(theta.values())


def gradients(net, sigma, function, N=3072, seed=5, block=256, per=1):
    """Gradients, (N, p) each, of what function(denoise, x0, noise, sigma, generator) returns.

    per: samples to a gradient, 1 or a mini-batch's.
    """
    denoise, theta = own_parameters(net, block)
    g, out = generator(seed), []
    for _ in range(N // block):
        x0, noise = ring(block * per, g), torch.randn(block * per, 2, generator=g)
        values = function(denoise, x0, noise, torch.full((block * per, 1), sigma), g)
        out.append([torch.cat([a.flatten(1) for a in torch.autograd.grad(
            v.sum(), theta, retain_graph=True)], 1) for v in values])
    return [torch.cat(block) for block in zip(*out)]


def variance(g):
    return g.var(0).sum().item()


def best(g, control):
    """beta*_grad: what makes the variance of g - beta control least."""
    g, control = g - g.mean(0), control - control.mean(0)
    return ((g * control).sum() / (control ** 2).sum()).item()


def surprise(g):
    """n |mean|^2 / tr Cov: about 1 if the mean is zero, with the tail of Exp(1)   (md 7)."""
    return len(g) * (g.mean(0) ** 2).sum().item() / variance(g)


def own_atoms(reference, uniform, K):
    """atoms(x, sigma) where every sample has references of its own, (B, n, ...)."""
    def atoms(x, sigma):
        one = lambda x, s, y, u: stf_atoms(x[None], s[None], y, u[None], K)
        y, mass, target = torch.vmap(one, out_dims=(1, 1, 0))(x, sigma, reference, uniform)
        return y.squeeze(2), mass.squeeze(2), target.squeeze(1)
    return atoms


def taylor(order=0, weight=edm.weight, skip=c_skip):
    def function(denoise, x0, noise, sigma, g):
        return taylor_terms(denoise, x0, noise, sigma, weight, skip, order)
    return function


def stf_taylor(n, K):
    """(dsm, cv, stf, cvbar) of one batch, with n references a sample, its source among them."""
    def function(denoise, x0, noise, sigma, g):
        reference, u = ring(len(x0) * n, g).view(-1, n, 2), torch.rand(len(x0), generator=g)
        reference[:, 0] = x0
        batch = denoise, x0, noise, sigma, edm.weight, c_skip
        return *taylor_terms(*batch), *stf_taylor_terms(*batch, own_atoms(reference, u, K))
    return function


def train(activation, steps=2000):
    """Against E[x0 | x]: where DSM, with the same minimiser, would take far longer to."""
    net, g = denoiser(activation), generator(1)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        sigma = 0.002 * 1e4 ** torch.rand(256, 1, generator=g)
        noise = torch.randn(256, 2, generator=g)
        loss = stf_loss(net, ring(256, g), noise, sigma, edm.weight, ring_mean).mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step(), schedule.step()
    return net.requires_grad_(False)


@pytest.fixture(scope="module")
def trained():
    return train(F.silu)


# ---- The expectation of the gradient, in standard errors -----------------------------------------

@pytest.mark.parametrize("activation", [F.silu, F.relu])
@pytest.mark.parametrize("order", ORDERS)
def test_gradient_of_the_control_has_mean_zero(order, activation):
    """So E grad (L - beta cv) = E grad L, whatever beta; for ReLU too."""
    for sigma in (0.05, 1.0):
        _, control = gradients(denoiser(activation), sigma, taylor(order), N=1024)
        assert surprise(control) < 6


@pytest.mark.parametrize("K", [1, 4])
def test_gradient_of_stf_minus_beta_control_has_the_mean_of_dsm(K):
    """Independent references of 16; paired, so the difference is all that is uncertain."""
    for sigma in (0.1, 1.0):
        dsm, _, stf, control = gradients(denoiser(), sigma, stf_taylor(16, K), N=1024)
        assert surprise(stf - dsm) < 6 and surprise(control) < 6
        assert surprise(stf - 0.8 * control - dsm) < 6


def coordinates_gradient(function, denoise, x0, noise, sigma):
    """(B, 3) each sample's gradient along three directions that `denoise` could move in."""
    theta = torch.zeros(len(x0), 3, dtype=x0.dtype, requires_grad=True)

    def moved(x, s):
        return denoise(x, s) + theta[:, :1] + theta[:, 1:2] * x + theta[:, 2:] * (3 * x).sin()

    loss, control = function(moved, x0, noise, sigma)
    return torch.autograd.grad((loss - 0.8 * control).sum(), theta)[0]


def largest_z(samples):
    """How many standard errors the mean of (B, k) samples is from zero."""
    return (samples.mean(0) / samples.std(0) * len(samples) ** 0.5).abs().max().item()


def log_uniform(B, low, high, seed):
    return low * (high / low) ** torch.rand(B, 1, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize("order", ORDERS)
def test_taylor_minimiser_is_the_posterior_mean_of_gaussian_data(order):
    mean, var = torch.tensor([0.3, -1.0]).double(), torch.tensor([1.0, 0.1]).double()
    x0, noise = mean + var.sqrt() * randn(20000, 2, seed=1), randn(20000, 2, seed=2)
    function = partial(taylor_terms, weight=torch.ones_like, c_skip=c_skip, order=order)
    for factor in (1.0, 1.2):
        exact = lambda x, s: mean + var / (var + (factor * s) ** 2) * (x - mean)
        batch = x0, noise, log_uniform(20000, 0.1, 3.0, seed=3)
        z = largest_z(coordinates_gradient(function, exact, *batch))
        assert z < 3.5 if factor == 1 else z > 10


def test_stf_taylor_minimiser_is_the_posterior_mean_of_a_finite_set():
    """References of 8 of the 24 points, each sample's own; 3 atoms."""
    data, g, B = ring(24, generator(1)).double(), generator(2), 4000
    rows = torch.randint(24, (B, 8), generator=g)
    reference, u = data[rows], torch.rand(B, generator=g).double()
    function = partial(stf_taylor_terms, weight=torch.ones_like, c_skip=c_skip,
                       atoms=own_atoms(reference, u, 3))
    batch = reference[:, 0], randn(B, 2, seed=3), log_uniform(B, 0.1, 3.0, seed=4)
    for shrink in (1.0, 0.9):
        exact = lambda x, s: shrink * stf_target(x, s, data)
        z = largest_z(coordinates_gradient(function, exact, *batch))
        assert z < 3.5 if shrink == 1 else z > 10


# ---- The variance of the gradient: md's acceptance table -----------------------------------------

def ratios(net, sigma, order=0, **options):
    """Of a Taylor control with beta = 1, and with beta*."""
    dsm, control = gradients(net, sigma, taylor(order, **options))
    beta = best(dsm, control)
    return variance(dsm - control) / variance(dsm), variance(dsm - beta * control) / variance(dsm)


def score_row():
    """md's score form 1/2 |S|^2 + S.eps/sigma is D = x + sigma^2 S with lambda = 1/(2 sigma^4)."""
    one = torch.ones_like
    precondition = lambda s: (one(s), s ** 2, one(s), s.log() / 4)
    torch.manual_seed(0)
    return Denoiser(Net(), precondition), dict(weight=lambda s: 1 / (2 * s ** 4), skip=one)


def test_score_form_untrained():
    """Order 0 falls as sigma^2; order 1 is 15 times better still.

    A probe of random signs spends some of that again, J's off-diagonal.
    """
    net, form = score_row()
    zeroth, first = (ratios(net, 0.01, k, **form)[0] for k in (0, 1))
    assert zeroth <= 2e-4 and first <= 1e-5 and zeroth / first >= 15
    assert 60 <= ratios(net, 0.1, **form)[0] / zeroth <= 160

    def probed(denoise, x0, noise, sigma, g):
        probe = torch.randn(x0.shape, generator=g).sign()
        return taylor_terms(denoise, x0, noise, sigma, form["weight"], form["skip"], 1, probe)

    dsm, control = gradients(net, 0.01, probed)
    assert 2 * first < variance(dsm - control) / variance(dsm) < zeroth / 2


def test_edm_untrained():
    """The floor is the variance that is the data's own."""
    assert ratios(denoiser(), 0.01)[0] <= 0.02
    zeroth, first = (ratios(denoiser(), 0.1, k)[0] for k in (0, 1))
    assert first < zeroth <= 0.12 and first <= 0.09


@pytest.fixture(scope="module")
def table(trained):
    """sigma -> ratios of CV (beta 1 and beta*), antithetic pairs, STF with 256 references, and STF
    with CV at the source ("own") or at 4 atoms, each with its beta*."""
    def function(denoise, x0, noise, sigma, g):
        pair = antithetic_loss(denoise, x0, noise, sigma, edm.weight)
        return *stf_taylor(256, 4)(denoise, x0, noise, sigma, g), pair

    def row(sigma):
        dsm, cv, stf, cvbar, pair = gradients(trained, sigma, function)
        ratio = lambda g: variance(g) / variance(dsm)
        fit = lambda g, control: ratio(g - best(g, control) * control)
        return dict(one=ratio(dsm - cv), cv=fit(dsm, cv), pair=ratio(pair), stf=ratio(stf),
                    own=fit(stf, cv), atoms=fit(stf, cvbar))
    return {sigma: row(sigma) for sigma in (0.01, 0.0316, 0.1, 1.0)}


def test_edm_trained(trained, table):
    """At .1 beta = 1 is hardly of use, beta* is, and the antithetic pair is better than both."""
    assert table[0.01]["cv"] <= 0.03 and ratios(trained, 0.01, order=1)[1] <= 0.025
    assert table[0.1]["cv"] <= 0.65 and table[0.1]["cv"] < table[0.1]["one"] <= 1.0
    assert table[0.1]["pair"] <= 0.45 and table[0.1]["pair"] < table[0.1]["cv"]


def test_relu_trained_gains_from_order_0_and_nothing_from_order_1():
    """Its Jacobian has no continuity to offer: what is left is kinks crossed."""
    net = train(F.relu, steps=1000)
    zeroth, first = (ratios(net, 0.01, k)[1] for k in (0, 1))
    assert zeroth <= 0.12 and first / zeroth >= 0.95


def test_stf_of_256_helps_at_large_sigma_and_not_at_small(table):
    assert table[1.0]["stf"] <= 0.03 and table[0.01]["stf"] >= 0.5


def test_stf_with_4_atoms_is_about_as_good_as_the_better_of_stf_and_cv_everywhere(table):
    """Not quite md 4.2, for the drawn atom has a variance: 1.30 at .0316, else at most 1.12."""
    assert table[0.01]["atoms"] <= 0.03
    for sigma, row in table.items():
        limit = 1.4 if sigma == 0.0316 else 1.2
        assert row["atoms"] <= limit * min(row["cv"], row["stf"])


def test_stf_with_the_control_at_the_source_does_not_dominate(table):
    """The documented failure: STF has averaged the source's noise out, the control has not."""
    assert table[0.01]["own"] >= 0.1 > 3 * table[0.01]["cv"]


@pytest.mark.parametrize("sigma", [0.0316, 0.1, 1.0])
def test_var_of_stf_minus_beta_control_is_at_most_either(sigma, trained):
    """md 4.2 with all atoms: for every beta at most that of CV, so with its best at most either."""
    dsm, cv, stf, cvbar = gradients(trained, sigma, stf_taylor(8, 8), N=2048)
    for beta in (0.0, 0.5, 1.0):
        assert variance(stf - beta * cvbar) < variance(dsm - beta * cv)
    both = variance(stf - best(stf, cvbar) * cvbar)
    assert both <= 1.05 * min(variance(stf), variance(dsm - best(dsm, cv) * cv))


def test_a_shared_reference_correlates_the_batch_and_the_mean_correction_undoes_it(trained):
    """md 3.1 at sigma = 10: gradients of mini-batches of 64, in a reference of 256 they share."""
    def function(denoise, x0, noise, sigma, g):
        def corrected(gamma):
            def target(x, s):
                out = []
                for x0_, x_, s_ in zip(x0.split(64), x.split(64), s.split(64)):
                    y = references[len(out)]
                    out.append(stf_target(x_, s_, y)
                               - mean_correction(x0_, s_, y, torch.zeros(2), gamma))
                return torch.cat(out)
            return stf_loss(denoise, x0, noise, sigma, edm.weight, target)
        references = [torch.cat([y, ring(192, g)]) for y in x0.split(64)]
        return (dsm_loss(denoise, x0, noise, sigma, edm.weight), corrected(torch.zeros_like),
                corrected(lambda s: 1 - c_skip(s)))
    dsm, shared, corrected = gradients(trained, 10.0, function, N=512, block=64, per=64)
    assert 0.10 <= variance(shared) / variance(dsm) <= 0.30
    assert variance(corrected) / variance(dsm) <= 0.01
    assert surprise(corrected - dsm) < 6


def test_fixed_sigma_training_learns_with_the_control_and_not_without():
    """md 3.2: sigma = .01, B = 64, 2000 steps; E|F - F*|^2/E|F*|^2 of the averaged weights."""
    errors, sigma = [], torch.full((64, 1), 0.01)
    for beta in (0, 1):
        net, g = denoiser(), generator(3)
        nn.init.zeros_(net.model.layers[-1].weight), nn.init.zeros_(net.model.layers[-1].bias)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
        average = [p.detach().clone() for p in net.parameters()]
        for _ in range(2000):
            batch = ring(64, g), torch.randn(64, 2, generator=g), sigma, edm.weight
            if beta:
                loss, control = taylor_terms(net, *batch, c_skip)
                loss = loss - beta * control
            else:
                loss = dsm_loss(net, *batch)
            optimizer.zero_grad(), loss.mean().backward(), optimizer.step()
            torch._foreach_lerp_(average, [p.detach() for p in net.parameters()], 1 / 500)
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(average), net.parameters())
        s = torch.full((4096, 1), 0.01)
        x = ring(4096, g) + s * torch.randn(4096, 2, generator=g)
        error, size = net(x, s) - ring_mean(x, s), c_skip(s) * x - ring_mean(x, s)
        errors.append(((error ** 2).sum() / (size ** 2).sum()).item())
    assert errors[0] >= 0.95 and errors[1] <= 0.60


# ---- Beta ----------------------------------------------------------------------------------------

def test_beta_of_the_same_batch_biases_and_of_another_does_not():
    """md 1.4, exactly: all batches of two noises of the design, and all pairs of such batches."""
    net, sigma, noise = denoiser().double(), 0.4, design(2)
    y, s = torch.tensor([[0.6, 0.3]]).double().expand(4, 2), torch.full((4, 1), sigma).double()
    loss, control = taylor_terms(net, y, noise, s, edm.weight, c_skip)
    g, c = (torch.stack([flat_gradient(v, net) for v in values]) for values in (loss, control))
    batches = [torch.tensor(b) for b in itertools.product(range(4), repeat=2)]
    beta = [(g[b] * c[b]).sum() / (c[b] ** 2).sum() for b in batches]
    same = torch.stack([(g[b] - k * c[b]).mean(0) for b, k in zip(batches, beta)]).mean(0)
    past = torch.stack([(g[b] - k * c[b]).mean(0) for b in batches for k in beta]).mean(0)
    assert (past - g.mean(0)).norm() < 1e-12 * g.mean(0).norm()
    assert (same - g.mean(0)).norm() > 0.03 * g.mean(0).norm()


def ring_terms(net, sigma, g):
    """Taylor terms of a batch of the ring with levels sigma (m, 1)."""
    return taylor_terms(net, ring(len(sigma), g), torch.randn(len(sigma), 2, generator=g), sigma,
                        edm.weight, c_skip)


def test_running_beta_is_its_prior_where_nothing_is_known_and_is_clamped():
    sigma, beta = torch.logspace(-4, 3, 50)[:, None, None, None], RunningBeta()
    torch.testing.assert_close(beta(sigma), 1 / (1 + (sigma / 0.13) ** 1.3))
    for value, want in ((5.0, 1.2), (-5.0, 0.0)):
        beta.sums = torch.stack([value * torch.ones(24), torch.ones(24), 1e6 * torch.ones(24)])
        torch.testing.assert_close(beta(sigma), torch.full_like(sigma, want))


def test_running_beta_converges_to_the_regression_of_per_sample_gradients(trained):
    """Of the last layer: sum <g_L, g_cv> / sum |g_cv|^2, here in one go from another sample."""
    net = denoiser()
    net.load_state_dict(trained.state_dict())
    parameters = list(net.model.layers[-1].parameters())
    last, g, levels = sum(p.numel() for p in parameters), generator(7), (0.02, 0.1, 0.4)
    beta = RunningBeta(decay=0.9999)
    sigma = torch.tensor(levels).repeat_interleave(32)[:, None]
    for _ in range(60):
        beta.update(sigma, *ring_terms(net, sigma, g), parameters)
    for level in levels:
        dsm, control = (a[:, -last:] for a in gradients(trained, level, taylor(), N=2048))
        want = ((dsm * control).sum() / (control ** 2).sum()).item()
        assert beta(torch.tensor([level])).item() == pytest.approx(want, rel=0.06)
    unseen = torch.tensor([20.0])
    torch.testing.assert_close(beta(unseen), 1 / (1 + (unseen / 0.13) ** 1.3))
    copy = RunningBeta(decay=0.9999)
    copy.sums = beta.sums.clone()                          # the state is one tensor
    assert torch.equal(copy(sigma), beta(sigma))


def test_running_beta_is_the_mean_of_its_bin_with_older_samples_decayed():
    beta, theta = RunningBeta(decay=0.5), torch.ones(1, requires_grad=True)
    for a, c in ((2.0, 4.0), (3.0, 1.0)):
        beta.update(torch.tensor([[0.1]]), a * theta, c * theta, [theta])
    k = beta.bin(torch.tensor(0.1))
    torch.testing.assert_close(beta.sums[:, k], torch.tensor([0.5 * 8 + 3, 0.5 * 16 + 1, 0.5 + 1]))
    assert beta.sums.count_nonzero() == 3


def test_running_beta_leaves_out_what_is_not_finite():
    beta, theta = RunningBeta(), torch.ones(1, requires_grad=True)
    for value in (math.inf, 2.0, math.nan):
        a, c = torch.tensor([value]), torch.ones(1)
        beta.update(torch.tensor([[0.1]]), a * theta, c * theta, [theta])
    assert beta.sums[:, beta.bin(torch.tensor(0.1))].tolist() == [2.0, 1.0, 1.0]


def test_running_beta_neither_changes_the_graph_nor_adds_to_it():
    net, g = denoiser(), generator(7)
    sigma, beta = torch.logspace(-2, 0, 16)[:, None], RunningBeta()
    loss, control = ring_terms(net, sigma, g)
    want = flat_gradient((loss - 0.5 * control).sum(), net)
    beta.update(sigma, loss, control, list(net.model.layers[-1].parameters()))
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(flat_gradient((loss - 0.5 * control).sum(), net), want)
    assert not beta.sums.requires_grad and not beta(sigma).requires_grad
