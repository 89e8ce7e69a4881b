"""Taylor control variates: exact proofs, and how much variance they take away."""

import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from losses import RunningBeta, dsm_loss, taylor_control, taylor_terms, together
from networks import MLP, Denoiser
from oracles import close, gradients, randn, small_unet, tensor
from schedules import DDPM, EDM

edm, ddpm = EDM(), DDPM()
every_order = pytest.mark.parametrize("order", [0, 1, 2])


def c_skip(sigma):
    return edm.precondition(sigma)[0]


def denoiser(activation=F.silu, schedule=edm):
    torch.manual_seed(0)
    net = MLP(3, width=64, depth=2, activation=activation)
    net.out.reset_parameters()                                     # which start as zero
    return Denoiser(net, schedule.precondition)


# ---- The mean of the control over the noise is zero: exactly -------------------------------------

def design(d):
    """2d noises with the moments of N(0, I) up to the third: mean 0, covariance I, nothing odd.

    A control of order 2 is a polynomial of degree 3 in the noise, so its mean over these is exact.
    """
    e = d ** 0.5 * torch.eye(d, dtype=torch.float64)
    return torch.cat([e, -e])


X0 = randn(1, 3, seed=1).expand(6, -1)                             # the same at each noise
SIGMA = torch.full((6, 1), 0.4).double()


def design_terms(net, schedule, order):
    """loss and control of X0 at each noise of the design, (6,) each."""
    given = net, X0, design(3), SIGMA, schedule.weight, schedule.precondition
    return taylor_terms(*given, order)


def flat_gradient(value, net):
    """The gradient of a scalar in all of net's parameters, zero for those it does not depend on."""
    g = torch.autograd.grad(value, [*net.parameters()], retain_graph=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in g])


@every_order
def test_control_and_its_gradient_have_mean_zero_over_the_design(order):
    """For any network (ReLU too) and target (DDPM's schedule predicts eps)."""
    for activation, schedule in ((F.silu, edm), (F.relu, ddpm)):
        net = denoiser(activation, schedule).double()
        _, control = design_terms(net, schedule, order)
        assert control.mean().abs() < 1e-12 * control.abs().mean()
        size = flat_gradient(control[0], net).norm()
        assert size > 0 and flat_gradient(control.mean(), net).norm() < 1e-12 * size


@every_order
def test_controlling_the_objective_keeps_the_mean_of_its_gradient_and_not_each_samples(order):
    """beta has no graph: grad (L - beta cv) is grad L - beta grad cv, whose mean is grad L's."""
    net, beta = denoiser().double(), RunningBeta()
    loss, control = design_terms(net, edm, order)
    dsm = dsm_loss(net, X0, design(3), SIGMA, edm.weight)
    close(loss, dsm)
    beta.update(SIGMA, loss, control, [net.model.out.weight])
    assert all(p.grad is None for p in net.parameters())
    objective = loss - beta(SIGMA).flatten() * control
    want = flat_gradient(dsm.mean(), net)
    close(flat_gradient(objective.mean(), net), want)
    for i in range(6):
        assert flat_gradient(objective[i] - dsm[i], net).norm() > 0.01 * want.norm()


def test_control_has_mean_zero_over_the_noise_whatever_the_dropout_masks():
    """Each copy has a mask of its own, which does not depend on the noise."""
    net, y = small_unet(dropout=0.2).double().train(), randn(1, 1, 8, 8, seed=1)
    sigma = torch.full((1, 1, 1, 1), 0.4).double()
    a, b = together(net, torch.stack([y, y]), torch.stack([sigma, sigma]))
    assert (a - b).abs().max() > 0.01
    control = []
    for noise in design(64):
        torch.manual_seed(7)                                       # the same masks for each noise
        control.append(taylor_terms(net, y, noise.view_as(y), sigma, edm.weight,
                                    edm.precondition)[1])
    control = torch.cat(control)
    assert control.mean().abs() < 1e-12 * control.abs().mean()


def test_control_of_an_affine_denoiser_is_its_closed_form():
    """D = A x + b: H = 0, without a graph, or with one of A alone; so orders 1 and 2 are equal."""
    A, b, noise, s = randn(3, 3, seed=3), randn(3, seed=4), design(3), tensor([0.4])
    J = A - c_skip(s) * torch.eye(3)
    dot = ((X0 @ J.T + b + s * noise @ J.T) * noise).sum(1) - s[0] * J.trace()
    want = (2 * edm.weight(s) * c_skip(s) * s)[0] * dot / 3
    for learned in (False, True):
        A.requires_grad_(learned)
        for order in (1, 2):
            _, control = taylor_terms(lambda x, s: x @ A.T + b, X0, noise, s.expand(6, 1),
                                      edm.weight, edm.precondition, order)
            close(control, want)


@pytest.mark.parametrize("order", [1, 2])
def test_probe_averaged_over_all_sign_vectors_is_the_exact_trace(order):
    """At every noise: the mean of v.J v over the 2^d vectors v of +-1 is tr J."""
    s = torch.linspace(0.1, 2, 5, dtype=torch.float64)[:, None]
    control = partial(taylor_terms, denoiser().double(), randn(5, 3, seed=1), randn(5, 3, seed=2),
                      s, edm.weight, edm.precondition, order)
    signs = [tensor(*v).expand(5, 3) for v in itertools.product([-1, 1], repeat=3)]
    mean = torch.stack([control(v)[1] for v in signs]).mean(0)
    close(mean, control()[1])
    assert (control(signs[0])[1] - mean).abs().min() > 1e-5              # one probe is not


# ---- The control is a Taylor polynomial ----------------------------------------------------------

def remainder(net, y, e, sigma, order, h):
    """|e.(G(y + h e) - T^k)|: with a probe of zeros no trace is taken off, which leaves e.T^k."""
    y, skip = y.clone().requires_grad_(), c_skip(sigma)
    control = taylor_control(net(y, sigma), y, e, h, skip, order, probe=torch.zeros_like(y))
    G = net(y + h * e, sigma) - skip * (y + h * e)
    return (e * G - control / (skip * h)).flatten(1).sum(1).norm().item()


@every_order
def test_remainder_of_order_k_falls_as_h_to_the_k_plus_1(order):
    """Of a U-Net with GroupNorm, and attention, whose second derivatives need the MATH kernel."""
    net, h = small_unet().double().eval(), 1e-4
    y, e, s = randn(2, 1, 8, 8, seed=1), randn(2, 1, 8, 8, seed=2), torch.tensor(0.4).double()
    with sdpa_kernel(SDPBackend.MATH):
        far, near = remainder(net, y, e, s, order, 2 * h), remainder(net, y, e, s, order, h)
    assert math.log2(far / near) == pytest.approx(order + 1, abs=0.05)


# ---- The variance of the gradient ----------------------------------------------------------------

def left(sigma, order):
    """The share of DSM's gradient variance that the control leaves, on 8 points of a circle.

    The raw network gives zero, as at the start of a training.
    """
    angle = torch.arange(20_000).double() * (math.pi / 4)
    x0 = math.sqrt(0.5) * torch.stack([angle.cos(), angle.sin()], 1)      # of deviation .5

    def initial(x, sigma):
        return c_skip(sigma) * x

    def controlled(*batch):
        loss, control = taylor_terms(*batch, edm.precondition, order)
        return loss - control
    batch = initial, x0, randn(20_000, 2, seed=3), x0.new_full((20_000, 1), sigma), edm.weight
    return gradients(controlled, *batch).var(0).sum() / gradients(dsm_loss, *batch).var(0).sum()


def test_edm_untrained():
    """Order 0 takes nearly all at sigma .01; at .1 order 1 halves the rest, order 2 hardly acts."""
    assert left(0.01, order=0) < 0.002
    zeroth, first, second = (left(0.1, order) for order in (0, 1, 2))
    assert zeroth < 0.1 and first < 0.6 * zeroth and 0.7 * first < second < first


# ---- Beta ----------------------------------------------------------------------------------------

def prior(sigma):
    return 1 / (1 + (sigma / 0.13) ** 1.3)


def test_beta_of_the_same_batch_biases_and_of_another_does_not():
    """Exactly: all batches of two noises of the design, and all pairs of such batches."""
    net = denoiser().double()
    g, c = (torch.stack([flat_gradient(v, net) for v in values])
            for values in design_terms(net, edm, order=0))
    batches = [torch.tensor(b) for b in itertools.product(range(6), repeat=2)]
    beta = [(g[b] * c[b]).sum() / (c[b] ** 2).sum() for b in batches]
    same = torch.stack([(g[b] - k * c[b]).mean(0) for b, k in zip(batches, beta)]).mean(0)
    past = torch.stack([(g[b] - k * c[b]).mean(0) for b in batches for k in beta]).mean(0)
    assert (past - g.mean(0)).norm() < 1e-12 * g.mean(0).norm()
    assert (same - g.mean(0)).norm() > 0.02 * g.mean(0).norm()


def test_running_beta_is_its_prior_where_nothing_is_known_and_is_clamped():
    sigma, beta = torch.logspace(-4, 3, 50)[:, None, None, None], RunningBeta()
    close(beta(sigma), prior(sigma), rtol=1e-5)
    for value, want in ((5.0, 1.2), (-5.0, 0.0)):
        beta.sums = torch.stack([value * torch.ones(24), torch.ones(24), 1e6 * torch.ones(24)])
        close(beta(sigma), want, rtol=1e-6)


def test_running_beta_is_the_regression_of_finite_per_sample_gradients_by_bin_with_older_decayed():
    """Gradients in two tensors of 3 and 1 parameters; the first two samples share a bin."""
    a, c = randn(5, 4, seed=1), randn(5, 4, seed=2) + randn(5, 4, seed=1)
    a[4] = tensor(1, math.inf, math.nan, 1)                        # left out
    three, one = torch.ones(3).double().requires_grad_(), torch.ones(1).double().requires_grad_()
    sigma, beta = tensor(0.1, 0.1, 5.0, 0.1, 0.1)[:, None], RunningBeta(decay=0.5)
    for rows in (slice(0, 3), slice(3, 4), slice(4, 5)):
        loss, control = (v[rows, :3] @ three + v[rows, 3:] @ one for v in (a, c))
        beta.update(sigma[rows], loss, control, [three, one])
    new = torch.stack([(a * c).sum(1), (c ** 2).sum(1), torch.ones(5)])           # (3, 5)
    near, far = 0.5 * (new[:, 0] + new[:, 1]) + new[:, 3], new[:, 2]
    for k, want in ((0, near), (2, far)):
        close(beta.sums[:, beta.bin(sigma[k, 0])].double(), want, rtol=1e-6)
        trust = want[2] / (want[2] + 4)
        mean = trust * want[0] / want[1] + (1 - trust) * prior(sigma[k, 0])
        assert 0 < mean < 1.2
        close(beta(sigma[k, 0]), mean, rtol=1e-6)
    assert beta.sums.count_nonzero() == 6                                # nothing in other bins
