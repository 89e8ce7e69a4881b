"""Taylor control variates: exact proofs, and how much variance they take away.

What is exact is tested in float64 and without chance: the mean over a design of noises, the slope
of a remainder.  What is statistical is the variance of per-sample gradients, as a ratio to that of
plain DSM's.
"""

import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from losses import (RunningBeta, antithetic_loss, dsm_loss, taylor_control, taylor_terms,
                    together)
from networks import MLP, Denoiser, UNet
from oracles import generator, gradients, randn
from schedules import DDPM, EDM

edm, ddpm = EDM(), DDPM()
ORDERS = [0, 1, 2]


def c_skip(sigma, schedule=edm):
    return schedule.precondition(sigma)[0]


def denoiser(activation=F.silu, schedule=edm, d=2):
    torch.manual_seed(0)
    net = MLP(d, width=64, depth=2, activation=activation)
    net.out.reset_parameters()                                     # which start as zero
    return Denoiser(net, schedule.precondition)


def unet(**options):
    """8x8, attention at 4x4; every parameter random, so that no branch is off."""
    torch.manual_seed(0)
    net = UNet(8, 1, width=8, mult=(1, 2), blocks=1, attend=(4,), **options)
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return Denoiser(net, edm.precondition)


# ---- The mean of the control over the noise is zero: exactly -------------------------------------

def design(d):
    """2d noises with the moments of N(0, I) up to the third: mean 0, covariance I, nothing odd.

    A control of order 2 is a polynomial of degree 3 in the noise, so its mean over these is exact.
    """
    e = d ** 0.5 * torch.eye(d, dtype=torch.float64)
    return torch.cat([e, -e])


def flat_gradient(value, net):
    """The gradient of a scalar in all of net's parameters, zero for those it does not depend on."""
    parameters = list(net.parameters())
    g = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return torch.cat([torch.zeros_like(p).flatten() if a is None else a.flatten()
                      for p, a in zip(parameters, g)])


def design_batch(sigma):
    """x0, noise, sigma: one x0 at each noise of the design."""
    return randn(1, 3, seed=1).expand(6, -1), design(3), torch.full((6, 1), sigma).double()


def design_terms(net, schedule, sigma, order):
    """loss and control of that batch, (6,) both."""
    batch = design_batch(sigma)
    return taylor_terms(net, *batch, schedule.weight, partial(c_skip, schedule=schedule), order)


@pytest.mark.parametrize("order", ORDERS)
def test_control_and_its_gradient_have_mean_zero_over_the_design(order):
    """For any network (ReLU too) and sigma; DDPM's schedule predicts eps."""
    for activation in (F.silu, F.relu):
        for schedule, sigma in ((edm, 0.01), (edm, 0.4), (edm, 10.0), (ddpm, 0.4)):
            net = denoiser(activation, schedule, d=3).double()
            control = design_terms(net, schedule, sigma, order)[1]
            assert control.mean().abs() < 1e-12 * control.abs().mean()
            size = flat_gradient(control[0], net).norm()
            assert size > 0 and flat_gradient(control.mean(), net).norm() < 1e-12 * size


@pytest.mark.parametrize("order", ORDERS)
def test_controlling_the_objective_keeps_the_mean_of_its_gradient_and_not_each_samples(order):
    """beta has no graph: grad (L - beta cv) is grad L - beta grad cv, whose mean is grad L's."""
    net, beta = denoiser(d=3).double(), RunningBeta()
    x0, noise, sigma = design_batch(0.4)
    loss, control = design_terms(net, edm, 0.4, order)
    beta.update(sigma, loss, control, [net.model.out.weight])
    objective = loss - beta(sigma).flatten() * control
    dsm = dsm_loss(net, x0, noise, sigma, edm.weight)
    torch.testing.assert_close(loss, dsm, rtol=1e-12, atol=0)
    want = flat_gradient(dsm.mean(), net)
    torch.testing.assert_close(flat_gradient(objective.mean(), net), want, rtol=1e-9, atol=1e-12)
    for i in range(6):
        change = flat_gradient(objective[i], net) - flat_gradient(dsm[i], net)
        assert change.norm() > 0.01 * want.norm()


def test_control_has_mean_zero_over_the_noise_whatever_the_dropout_masks():
    """Each copy has a mask of its own, which does not depend on the noise."""
    net, y = unet(dropout=0.2).double().train(), randn(1, 1, 8, 8, seed=1)
    sigma = torch.full((1, 1, 1, 1), 0.4).double()
    a, b = together(net, torch.stack([y, y]), torch.stack([sigma, sigma]))
    assert (a - b).abs().max() > 0.01
    control = []
    for noise in design(64):
        torch.manual_seed(7)                                       # the same masks for each noise
        control.append(taylor_terms(net, y, noise.view_as(y), sigma, edm.weight, c_skip)[1])
    control = torch.cat(control)
    assert control.mean().abs() < 1e-12 * control.abs().mean()


def test_control_of_an_affine_denoiser_is_its_closed_form():
    """D = A x + b: H = 0, without a graph, or with one of A alone; so orders 1 and 2 are equal."""
    A, b, s = randn(3, 3, seed=3), randn(3, seed=4), torch.full((6, 1), 0.4, dtype=torch.float64)
    y, noise, J = randn(1, 3, seed=1).expand(6, -1), design(3), A - c_skip(s[0]) * torch.eye(3)
    dot = ((y @ J.T + b + s * noise @ J.T) * noise).sum(1) - s[:, 0] * J.trace()
    want = (2 * edm.weight(s) * c_skip(s) * s)[:, 0] * dot / 3
    for learned in (False, True):
        A.requires_grad_(learned)
        for order in (1, 2):
            _, control = taylor_terms(lambda x, s: x @ A.T + b, y, noise, s, edm.weight, c_skip,
                                      order)
            torch.testing.assert_close(control, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("order", [1, 2])
def test_probe_averaged_over_all_sign_vectors_is_the_exact_trace(order):
    """At every noise: the mean of v.J v over the 2^d vectors v of +-1 is tr J."""
    net, B, d = denoiser(d=3).double(), 5, 3
    s = torch.linspace(0.1, 2, B, dtype=torch.float64)[:, None]
    control = partial(taylor_terms, net, randn(B, d, seed=1), randn(B, d, seed=2), s, edm.weight,
                      c_skip, order)
    signs = [torch.tensor(v).to(s).expand(B, d) for v in itertools.product([-1, 1], repeat=d)]
    mean = torch.stack([control(v)[1] for v in signs]).mean(0)
    torch.testing.assert_close(mean, control()[1], rtol=1e-10, atol=1e-12)
    assert (control(signs[0])[1] - mean).abs().min() > 1e-5              # one probe is not


# ---- The control is a Taylor polynomial ----------------------------------------------------------

def remainder(net, y, e, sigma, order, h):
    """|e.(G(y + h e) - T^k)|: with a probe of zeros no trace is taken off, which leaves e.T^k."""
    y, skip = y.clone().requires_grad_(), c_skip(sigma)
    control = taylor_control(net(y, sigma), y, e, h, skip, order, probe=torch.zeros_like(y))
    G = net(y + h * e, sigma) - skip * (y + h * e)
    return (e * G - control / (skip * h)).flatten(1).sum(1).norm().item()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["mlp", "unet"])
def test_remainder_of_order_k_falls_as_h_to_the_k_plus_1(kind, order):
    """The U-Net has GroupNorm, and attention, whose second derivatives need the MATH kernel."""
    net = denoiser(d=3).double() if kind == "mlp" else unet().double().eval()
    shape, h = ((8, 3), 1e-3) if kind == "mlp" else ((2, 1, 8, 8), 1e-4)
    y, e, s = randn(*shape, seed=1), randn(*shape, seed=2), torch.tensor(0.4).double()
    with sdpa_kernel(SDPBackend.MATH):
        far, near = remainder(net, y, e, s, order, 2 * h), remainder(net, y, e, s, order, h)
    assert math.log2(far / near) == pytest.approx(order + 1, abs=0.05)


def test_order_2_trains_a_unet():
    """One probe, and a gradient for every parameter that the loss itself has one for."""
    net, x0, noise = unet(), randn(2, 1, 8, 8, seed=1).float(), randn(2, 1, 8, 8, seed=2).float()
    with sdpa_kernel(SDPBackend.MATH):
        loss, control = taylor_terms(net, x0, noise, torch.full((2, 1, 1, 1), 0.2), edm.weight,
                                     c_skip, 2, probe=randn(2, 1, 8, 8, seed=3).sign().float())
        (loss - control).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.norm() > 0 for p in net.parameters())


# ---- The variance of the gradient ----------------------------------------------------------------

RADIUS = math.sqrt(2 * (0.25 - 0.07 ** 2))                   # so that the data's deviation is .5
ANGLE = torch.arange(8).double() * (math.pi / 4)
MODES = RADIUS * torch.stack([ANGLE.cos(), ANGLE.sin()], 1)


def ring(n, g):
    """8 Gaussians of deviation .07 on a circle."""
    mode = MODES[torch.randint(8, (n,), generator=g)]
    return mode + 0.07 * torch.randn(n, 2, generator=g, dtype=torch.float64)


def ring_mean(x, sigma):
    """E[x0 | x] in closed form."""
    total = 0.07 ** 2 + sigma ** 2
    w = (-((x[:, None] - MODES.to(x)) ** 2).sum(2) / (2 * total)).softmax(1)
    return (sigma ** 2 * (w @ MODES.to(x)) + 0.07 ** 2 * x) / total


def initial(x, sigma):
    """A denoiser whose raw network gives zero, as at the start of a training."""
    return c_skip(sigma) * x


def ratios(denoise, sigma, order=0):
    """Of a Taylor control with beta = 1, with the best beta, and of an antithetic pair."""
    x0, noise = ring(20_000, generator(1)), randn(20_000, 2, seed=3)
    batch = denoise, x0, noise, x0.new_full((20_000, 1), sigma), edm.weight

    def controls(*batch):
        return taylor_terms(*batch, c_skip, order)[1]
    dsm, control = gradients(dsm_loss, *batch), gradients(controls, *batch)
    centred = control - control.mean(0)
    beta = ((dsm - dsm.mean(0)) * centred).sum() / (centred ** 2).sum()
    variances = [g.var(0).sum().item() for g in (dsm - control, dsm - beta * control,
                                                 gradients(antithetic_loss, *batch))]
    return [v / dsm.var(0).sum().item() for v in variances]


def test_edm_untrained():
    """Order 0 takes nearly all at sigma .01; at .1 order 1 halves the rest, order 2 hardly acts."""
    assert ratios(initial, 0.01)[0] < 0.002
    zeroth, first, second = (ratios(initial, 0.1, order)[0] for order in ORDERS)
    assert zeroth < 0.1 and first < 0.6 * zeroth and 0.7 * first < second < first


def test_edm_trained():
    """Order 0 takes nearly all at sigma .01 and nothing at 1.  At .1 beta = 1 does harm, the best
    beta is of use, and the antithetic pair, at the price of order 0, is better than both.
    """
    assert ratios(ring_mean, 0.01)[0] < 0.03 and ratios(ring_mean, 1.0)[1] > 0.98
    one, best, pair = ratios(ring_mean, 0.1)
    assert one > 1.2 and pair < 0.9 * best < 0.9 * 0.7
    first, second = (ratios(ring_mean, 0.1, order)[1] for order in (1, 2))
    assert 0.9 * best < second < first < best


class OfX(nn.Module):
    """A raw network that sees x alone, which is enough at one noise level."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(),
                                    nn.Linear(64, 2))
        nn.init.zeros_(self.layers[-1].weight), nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x, c_noise, labels, augment_labels):
        return self.layers(x)


def test_fixed_sigma_training_learns_with_the_control_and_not_without():
    """sigma = .01, B = 64, 1000 steps; E|D - D*|^2/E|c_skip x - D*|^2 of the averaged weights."""
    errors, sigma = [], torch.full((64, 1), 0.01)
    for beta in (0, 1):
        torch.manual_seed(0)
        net, g = Denoiser(OfX(), edm.precondition), generator(3)
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-3, fused=True)
        average = [p.detach().clone() for p in net.parameters()]
        for _ in range(1000):
            batch = ring(64, g).float(), torch.randn(64, 2, generator=g), sigma, edm.weight
            if beta:
                loss, control = taylor_terms(net, *batch, c_skip)
                loss = loss - beta * control
            else:
                loss = dsm_loss(net, *batch)
            optimizer.zero_grad(), loss.mean().backward(), optimizer.step()
            torch._foreach_lerp_(average, [p.detach() for p in net.parameters()], 1 / 250)
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(average), net.parameters())
        s = torch.full((4096, 1), 0.01)
        x = ring(4096, g).float() + s * torch.randn(4096, 2, generator=g)
        error, size = net(x, s) - ring_mean(x, s), c_skip(s) * x - ring_mean(x, s)
        errors.append(((error ** 2).sum() / (size ** 2).sum()).item())
    assert errors[0] >= 0.95 and errors[1] <= 0.60


# ---- Beta ----------------------------------------------------------------------------------------

def prior(sigma):
    return 1 / (1 + (sigma / 0.13) ** 1.3)


def test_beta_of_the_same_batch_biases_and_of_another_does_not():
    """Exactly: all batches of two noises of the design, and all pairs of such batches."""
    net = denoiser(d=3).double()
    g, c = (torch.stack([flat_gradient(v, net) for v in values])
            for values in design_terms(net, edm, 0.4, order=0))
    batches = [torch.tensor(b) for b in itertools.product(range(6), repeat=2)]
    beta = [(g[b] * c[b]).sum() / (c[b] ** 2).sum() for b in batches]
    same = torch.stack([(g[b] - k * c[b]).mean(0) for b, k in zip(batches, beta)]).mean(0)
    past = torch.stack([(g[b] - k * c[b]).mean(0) for b in batches for k in beta]).mean(0)
    assert (past - g.mean(0)).norm() < 1e-12 * g.mean(0).norm()
    assert (same - g.mean(0)).norm() > 0.02 * g.mean(0).norm()


def test_running_beta_is_its_prior_where_nothing_is_known_and_is_clamped():
    sigma, beta = torch.logspace(-4, 3, 50)[:, None, None, None], RunningBeta()
    torch.testing.assert_close(beta(sigma), prior(sigma))
    for value, want in ((5.0, 1.2), (-5.0, 0.0)):
        beta.sums = torch.stack([value * torch.ones(24), torch.ones(24), 1e6 * torch.ones(24)])
        torch.testing.assert_close(beta(sigma), torch.full_like(sigma, want))


def test_running_beta_is_the_regression_of_per_sample_gradients_by_bin_with_older_ones_decayed():
    """Gradients in two tensors of 3 and 1 parameters; the first two samples share a bin."""
    a, c = randn(4, 4, seed=1), randn(4, 4, seed=2) + randn(4, 4, seed=1)
    three, one = torch.ones(3).double().requires_grad_(), torch.ones(1).double().requires_grad_()
    sigma, beta = torch.tensor([0.1, 0.1, 5.0, 0.1]).double()[:, None], RunningBeta(decay=0.5)
    for rows in (slice(0, 3), slice(3, 4)):
        loss, control = (v[rows, :3] @ three + v[rows, 3:] @ one for v in (a, c))
        beta.update(sigma[rows], loss, control, [three, one])
    new = torch.stack([(a * c).sum(1), (c ** 2).sum(1), torch.ones(4)])           # (3, 4)
    near, far = 0.5 * (new[:, 0] + new[:, 1]) + new[:, 3], new[:, 2]
    for k, want in ((0, near), (2, far)):
        torch.testing.assert_close(beta.sums[:, beta.bin(sigma[k, 0])].double(), want)
        trust = want[2] / (want[2] + 4)
        mean = trust * want[0] / want[1] + (1 - trust) * prior(sigma[k, 0])
        assert 0 < mean < 1.2
        torch.testing.assert_close(beta(sigma[k, 0]), mean)
    assert beta.sums.count_nonzero() == 6                                # nothing in other bins
    copy = RunningBeta()
    copy.sums = beta.sums.clone()                                        # the state is one tensor
    assert torch.equal(copy(sigma), beta(sigma))


def test_running_beta_leaves_out_what_is_not_finite():
    beta, theta = RunningBeta(), torch.ones(1, requires_grad=True)
    for value in (math.inf, 2.0, math.nan):
        beta.update(torch.tensor([[0.1]]), torch.tensor([value]) * theta, 1 * theta, [theta])
    assert beta.sums[:, beta.bin(torch.tensor(0.1))].tolist() == [2.0, 1.0, 1.0]


def test_running_beta_neither_changes_the_graph_nor_adds_to_it():
    net, beta, sigma = denoiser().double(), RunningBeta(), randn(16, 1, seed=3).exp()
    loss, control = taylor_terms(net, randn(16, 2, seed=1), randn(16, 2, seed=2), sigma, edm.weight,
                                 c_skip)
    want = flat_gradient((loss - 0.5 * control).sum(), net)
    beta.update(sigma, loss, control, list(net.model.out.parameters()))
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(flat_gradient((loss - 0.5 * control).sum(), net), want)
    assert not beta.sums.requires_grad and not beta(sigma).requires_grad
