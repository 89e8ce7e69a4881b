"""Losses against the truth: finite sets and Gaussians, whose posterior is known in closed form.

Where a claim is about an average over batches of two or three points, the batches are all summed
over; where it is about noise, it is tested in standard errors with a fixed seed.
"""

import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from losses import dsm_loss, head_loss, stf_loss, stf_target, stf_weights

SIGMAS = (0.002, 0.01, 0.05, 0.2, 1.0, 5.0, 20.0, 80.0)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def images(n, seed=0):
    """Smooth fields in [-1, 1] with 256 levels, as 8-bit photographs have them: (n, 3, 32, 32)."""
    coarse = randn(n, 3, 5, 5, seed=seed, dtype=torch.float32)
    smooth = F.interpolate(coarse, size=32, mode="bicubic").tanh()
    return ((smooth + 1) * 127.5).round() / 127.5 - 1


def points(n, seed=0):
    """Eight clusters on a circle, float32 (n, 2)."""
    angle = torch.arange(n) * (2 * math.pi / 8)
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * randn(n, 2, seed=seed).float()


def shaped(sigma, x):
    """A list of noise levels, one per sample of x, shaped to broadcast."""
    return torch.as_tensor(sigma, dtype=x.dtype).view(-1, *[1] * (x.ndim - 1))


def near_duplicates(base, sigma, n=32):
    """A reference around base (1, ...): n - 1 rows at distance sigma from it, itself, n others."""
    away = randn(n - 1, *base.shape[1:], seed=11).to(base)
    away = away / away.flatten(1).norm(dim=1).view(-1, *[1] * (base.ndim - 1))
    others = images(n, seed=12) if base.ndim == 4 else points(n, seed=12)
    return torch.cat([base, base + sigma * away, others.to(base)])[torch.randperm(
        2 * n, generator=generator(13))]


def direct_weights(x, sigma, reference, counts=None):
    """softmax_k(-|x - y_k|^2 / 2 sigma^2) by the (B, n, d) broadcast, in float64."""
    square = ((x.double()[:, None] - reference.double()[None]) ** 2).flatten(2).sum(2)
    logits = -square / (2 * sigma.double().flatten(1) ** 2)
    return (logits if counts is None else logits.masked_fill(~counts, -torch.inf)).softmax(1)


def direct(x, sigma, reference, counts=None):
    weights = direct_weights(x, sigma, reference, counts)
    return torch.einsum("bk,k...->b...", weights, reference.double())


def error(got, want):
    """The largest relative error of a sample, in norm."""
    got, want = got.double().flatten(1), want.double().flatten(1)
    return ((got - want).norm(dim=1) / want.norm(dim=1)).max().item()


# ---- Denoising score matching --------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(2,), (3, 4, 4), (1, 5, 7), (6,)])
def test_dsm_loss_is_its_formula_by_hand(shape):
    x0, noise = randn(5, *shape, seed=1), randn(5, *shape, seed=2)
    sigma = shaped([0.1, 0.5, 1.0, 3.0, 20.0], x0)
    got = dsm_loss(lambda x, s: 0.5 * x + s, x0, noise, sigma, lambda s: 1 / s ** 2)
    assert got.shape == (5,)
    for b in range(5):
        s, total = sigma[b].item(), 0.0
        for clean, eps in zip(x0[b].flatten().tolist(), noise[b].flatten().tolist()):
            total += (0.5 * (clean + s * eps) + s - clean) ** 2 / s ** 2
        assert got[b].item() == pytest.approx(total / math.prod(shape), rel=1e-12)


def test_losses_are_zero_where_the_denoiser_is_the_target():
    x0, noise = images(4), randn(4, 3, 32, 32).float()
    sigma, weight = shaped([0.1, 1.0, 5.0, 9.0], x0), torch.ones_like
    assert dsm_loss(lambda x, s: x0, x0, noise, sigma, weight).eq(0).all()
    target = partial(stf_target, reference=x0)
    assert stf_loss(target, x0, noise, sigma, weight, target).eq(0).all()


def gradients(loss, denoise, x0, noise, sigma, *rest):
    """(B, 3) each sample's gradient of the loss along three directions `denoise` could move in."""
    theta = torch.zeros(len(x0), 3, dtype=x0.dtype, requires_grad=True)

    def moved(x, s):
        return denoise(x, s) + theta[:, :1] + theta[:, 1:2] * x + theta[:, 2:] * (3 * x).sin()

    loss = loss(moved, x0, noise, sigma, torch.ones_like, *rest)
    return torch.autograd.grad(loss.sum(), theta)[0]


def largest_z(samples):
    """How many standard errors the mean of (B, k) samples is from zero."""
    return (samples.mean(0) / samples.std(0) * len(samples) ** 0.5).abs().max().item()


MEAN, VARIANCE = torch.tensor([0.3, -1.0]).double(), torch.tensor([1.0, 0.1]).double()


def gaussian_batch(B, seed, low=0.1, high=3.0):
    x0 = MEAN + VARIANCE.sqrt() * randn(B, 2, seed=seed)
    u = torch.rand(B, 1, generator=generator(seed + 1), dtype=torch.float64)
    return x0, randn(B, 2, seed=seed + 2), low * (high / low) ** u


def gaussian_denoiser(x, sigma):
    return MEAN + VARIANCE / (VARIANCE + sigma ** 2) * (x - MEAN)


def test_dsm_minimiser_is_the_posterior_mean_of_gaussian_data():
    batch = gaussian_batch(40000, seed=20)
    assert largest_z(gradients(dsm_loss, gaussian_denoiser, *batch)) < 3.5
    wrong = gradients(dsm_loss, lambda x, s: gaussian_denoiser(x, 1.1 * s), *batch)
    assert largest_z(wrong) > 10


def test_dsm_best_linear_denoiser_of_gaussian_data_is_the_wiener_filter():
    sigma = 0.7
    x0, noise, _ = gaussian_batch(100000, seed=30)
    for i in range(2):
        x = x0[:, i] + sigma * noise[:, i]
        fit = torch.linalg.lstsq(torch.stack([x, torch.ones_like(x)], 1), x0[:, i, None]).solution
        a, b = fit[:, 0].tolist()
        slope = (VARIANCE[i] / (VARIANCE[i] + sigma ** 2)).item()
        residual = (sigma ** 2 * slope) ** 0.5
        assert abs(a - slope) < 4 * residual / (x.std().item() * 100000 ** 0.5)
        assert abs(a * MEAN[i].item() + b - MEAN[i].item()) < 4 * residual / 100000 ** 0.5

        def loss(scale):                  # the least value of the loss is the posterior's variance
            denoise = lambda x, s: scale * a * x + b
            shape = dict(x0=x0[:, i, None], noise=noise[:, i, None])
            return dsm_loss(denoise, **shape, sigma=x0.new_full((len(x0), 1), sigma),
                            weight=torch.ones_like).mean().item()
        assert loss(1) == pytest.approx(residual ** 2, rel=0.02)
        assert loss(1) < loss(0.97) and loss(1) < loss(1.03)


# ---- Stable target fields: values ----------------------------------------------------------------

@pytest.mark.parametrize("make", [images, points])
def test_stf_eq_5_target_is_the_direct_softmax_at_every_sigma(make):
    """One batch whose samples all have different sigma, two of each."""
    reference = make(65)
    x0 = reference[:16]
    sigma = shaped(SIGMAS * 2, x0)
    x = x0 + sigma * randn(*x0.shape, seed=3).float()
    w = stf_weights(x, sigma, reference)
    torch.testing.assert_close(w, direct_weights(x, sigma, reference), rtol=1e-6, atol=1e-9)
    got = stf_target(x, sigma, reference)
    assert got.shape == x.shape and got.dtype == torch.float32
    assert error(got, direct(x, sigma, reference)) < 1e-5


@pytest.mark.parametrize("make", [images, points])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_stf_eq_5_target_with_near_duplicates_at_distance_sigma(make, sigma):
    """The hard case: the weights are mixed, so every digit of their logits shows in the target."""
    base = make(1, seed=14)
    reference, s = near_duplicates(base, sigma), shaped([sigma], base)
    x = base + s * randn(*base.shape, seed=15).float()
    weights = direct_weights(x, s, reference)
    assert 3 < 1 / (weights ** 2).sum() < 60
    want = direct(x, s, reference)
    assert error(stf_target(x, s, reference), want) < 1e-5
    got = stf_target(x.double(), s.double(), reference.double())
    assert (got - want).norm() < 1e-6 * sigma         # in units of the distance between the rows


def test_stf_target_needs_float64_at_small_sigma():
    """Why the products are in float64: in float32 they are off by nats between near-duplicates."""
    base = images(1, seed=14)
    reference, s = near_duplicates(base, 0.002), shaped([0.002], base)
    x = base + s * randn(*base.shape, seed=15).float()
    y = reference.flatten(1)
    wrong = ((x.flatten(1) @ y.T - (y ** 2).sum(1) / 2) / 0.002 ** 2).log_softmax(1).double()
    right = direct_weights(x, s, reference).log()
    assert (wrong - right)[right > -5].abs().max() > 1


@pytest.mark.parametrize("make", [images, points])
def test_stf_target_does_not_heed_autocast(make):
    for sigma in (0.002, 0.2, 5.0):
        base = make(1, seed=14)
        reference, s = near_duplicates(base, sigma), shaped([sigma], base)
        x = base + s * randn(*base.shape, seed=15).float()
        with torch.autocast("cpu", torch.bfloat16):
            assert (x.flatten(1) @ x.flatten(1).T).dtype == torch.bfloat16      # it is active
            got = stf_target(x, s, reference)
        assert torch.equal(got, stf_target(x, s, reference))
        assert error(got, direct(x, s, reference)) < 1e-5


@pytest.mark.parametrize("chunk", [1, 7, 64, 65, 1000])
@pytest.mark.parametrize("B", [1, 16])
def test_stf_target_is_the_same_for_any_chunk(chunk, B):
    for reference in (images(65), points(65)):
        x0 = reference[-B:]
        sigma = shaped((SIGMAS * 2)[:B] if B > 1 else [5.0], x0)
        x = x0 + sigma * randn(*x0.shape, seed=4).float()
        got = stf_target(x, sigma, reference, chunk=chunk)
        assert error(got, direct(x, sigma, reference)) < 1e-5
        got = stf_target(x.double(), sigma.double(), reference.double(), chunk=chunk)
        assert error(got, direct(x, sigma, reference)) < 1e-9


def test_stf_target_with_fewer_references_than_samples():
    reference = points(3)
    x0 = reference[torch.arange(40) % 3]
    sigma = shaped([0.05 * (1 + i) for i in range(40)], x0)
    x = x0 + sigma * randn(*x0.shape, seed=5).float()
    assert error(stf_target(x, sigma, reference), direct(x, sigma, reference)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2,), (7,), (3, 8, 8), (1, 5, 3)])
def test_stf_target_keeps_shape_and_dtype(shape, dtype):
    reference = randn(9, *shape, seed=6).to(dtype)
    x = reference[:4] + randn(4, *shape, seed=7).to(dtype)
    got = stf_target(x, shaped([0.5, 1.0, 2.0, 4.0], x), reference)
    assert got.shape == x.shape and got.dtype == dtype
    assert error(got, direct(x, shaped([0.5, 1.0, 2.0, 4.0], x), reference)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [images, points])
def test_stf_n_1_is_dsm_bit_for_bit(make, dtype):
    """STF sec. 4: "When n = 1, STF reduces to the vanilla denoising score-matching"."""
    x0 = make(1).to(dtype)
    noise = randn(*x0.shape, seed=8).to(dtype)
    denoise, weight = lambda x, s: x / (1 + s ** 2), lambda s: 1 / s ** 2
    for sigma in SIGMAS:
        s = shaped([sigma], x0)
        assert torch.equal(stf_target(x0 + s * noise, s, x0), x0)
        target = partial(stf_target, reference=x0)
        assert torch.equal(stf_loss(denoise, x0, noise, s, weight, target),
                           dsm_loss(denoise, x0, noise, s, weight))


def test_stf_whole_finite_set_is_the_exact_posterior_mean():
    """By Tweedie's formula, E[x0 | x] = x + sigma^2 grad log p_t(x), with p_t differentiated."""
    data = points(24).double()
    x = (2 * randn(50, 2, seed=9)).requires_grad_()
    sigma = 0.05 * (100 ** (torch.arange(50)[:, None] / 49)).double()
    log_p = (-((x[:, None] - data) ** 2).sum(2) / (2 * sigma ** 2)).logsumexp(1)
    score, = torch.autograd.grad(log_p.sum(), x)
    x = x.detach()
    torch.testing.assert_close(stf_target(x, sigma, data), x + sigma ** 2 * score, rtol=1e-9,
                               atol=1e-9)


def test_stf_target_of_far_and_near_noise():
    """The limits: the nearest row as sigma -> 0, the mean of the references as it grows."""
    reference = images(32)
    x0 = reference[:4]
    near = stf_target(x0, shaped([0.01] * 4, x0), reference)
    torch.testing.assert_close(near, x0, rtol=0, atol=1e-6)
    far = stf_target(x0, shaped([1e5] * 4, x0), reference)
    torch.testing.assert_close(far, reference.mean(0).expand(4, -1, -1, -1), rtol=0, atol=1e-5)


# ---- Stable target fields: classes, gradients, memory --------------------------------------------

@pytest.mark.parametrize("chunk", [1, 5, 16, 1000])
@pytest.mark.parametrize("sort", [True, False])
def test_stf_labels_average_over_the_own_class_only(chunk, sort):
    """Equal to each class by itself; sorted, whole chunks hold no reference of a class."""
    reference = images(48)
    classes = torch.arange(48) % 3
    if sort:
        classes = classes.sort().values
    source = torch.arange(0, 48, 5)
    x0, labels = reference[source], classes[source]
    sigma = shaped([0.5 + 2 * i for i in range(10)], x0)
    x = x0 + sigma * randn(*x0.shape, seed=16).float()
    got = stf_target(x, sigma, reference, labels, classes, chunk=chunk)
    for c in range(3):
        own = stf_target(x[labels == c], sigma[labels == c], reference[classes == c])
        torch.testing.assert_close(got[labels == c], own, rtol=0, atol=1e-6)
    counts = labels[:, None] == classes[None]
    assert error(got, direct(x, sigma, reference, counts)) < 1e-5
    assert error(got, stf_target(x, sigma, reference)) > 0.1             # the classes do matter


def test_a_uint8_reference_is_the_same_as_its_images_in_minus_one_to_one():
    """Bit for bit, source and all; and only a chunk of it is ever floating-point."""
    raw = torch.randint(256, (40, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    reference = raw.float() / 127.5 - 1
    x0, sigma = reference[:4], shaped([0.01, 0.5, 2.0, 50.0], reference)
    x = x0 + sigma * randn(*x0.shape, seed=19).float()
    labels = torch.arange(40) % 2
    for more in ((), (labels[:4], labels)):
        assert torch.equal(stf_target(x, sigma, raw, *more), stf_target(x, sigma, reference, *more))
    with Largest() as largest:
        stf_target(x, sigma, raw, chunk=8)
    assert largest.numel <= 8 * 192


def test_stf_target_without_a_reference_of_the_class_is_nan_there_and_only_there():
    reference, classes = points(8), torch.zeros(8, dtype=torch.int64)
    got = stf_target(reference[:2], shaped([1.0, 1.0], reference[:2]), reference,
                     torch.tensor([0, 1]), classes, chunk=3)
    assert got[0].isfinite().all() and got[1].isnan().all()


def test_stf_target_has_no_gradient_and_stf_loss_has_that_of_the_denoiser():
    reference, noise = points(16).double(), randn(4, 2, seed=17)
    x0, sigma = reference[:4].clone().requires_grad_(), shaped([0.1, 0.5, 1.0, 2.0], noise)
    a = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    x = x0 + sigma * noise
    target = stf_target(x, sigma, reference.requires_grad_())
    assert not target.requires_grad
    loss = stf_loss(lambda x, s: a * x, x0, noise, sigma, torch.ones_like,
                    partial(stf_target, reference=reference))
    g, = torch.autograd.grad(loss.sum(), a)
    want = (2 * (a * x - direct(x, sigma, reference)) * x).mean(1).sum()
    torch.testing.assert_close(g, want, rtol=1e-9, atol=0)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation gives."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("B, n, d, chunk", [(8, 200, 300, 16), (64, 500, 10, 32), (2, 90, 600, 1)])
def test_stf_target_makes_tensors_of_B_n_and_chunk_d_but_never_of_B_n_d(B, n, d, chunk):
    reference = randn(n, d, seed=18)
    x, labels = reference[:B] + 1, torch.arange(n) % 2
    with Largest() as largest:
        stf_target(x, x.new_ones(B, 1), reference, labels[:B], labels, chunk=chunk)
    assert 0 < largest.numel <= max(B * n, chunk * d, B * d) < B * n * d
    with Largest() as largest:
        direct(x, x.new_ones(B, 1), reference)
    assert largest.numel == B * n * d                                # the instrument sees it


def test_stf_algorithm_1_minibatch_is_part_of_the_reference():
    """Algorithm 1 by hand, one sample at a time: L = mean_i lambda |D(x_i) - v(x_i)|^2."""
    reference, B = randn(12, 1, 2, 2, seed=21), 5
    x0, noise = reference[:B], randn(B, 1, 2, 2, seed=22)
    sigma = shaped([0.3, 0.6, 1.0, 2.0, 5.0], x0)
    denoise, weight = lambda x, s: x / (1 + s), lambda s: (1 + s) / s
    got = stf_loss(denoise, x0, noise, sigma, weight, partial(stf_target, reference=reference))
    assert got.shape == (B,)
    for b in range(B):
        s, x = sigma[b].item(), x0[b] + sigma[b] * noise[b]
        w = [math.exp(-((x - y) ** 2).sum().item() / (2 * s ** 2)) for y in reference]
        v = sum(wk * y for wk, y in zip(w, reference)) / sum(w)
        want = (1 + s) / s * ((x / (1 + s) - v) ** 2).mean().item()
        assert got[b].item() == pytest.approx(want, rel=1e-9)


# ---- Stable target fields: theorems --------------------------------------------------------------

X = torch.linspace(-2, 3, 11, dtype=torch.float64)[:, None]              # where x is looked at


def posterior(x, sigma, data, prior):
    """p(x0 = data_j | x): (B, N)."""
    return (-((x[:, None] - data[None]) ** 2).sum(2) / (2 * sigma ** 2) + prior.log()).softmax(1)


def mean_target(x, sigma, data, prior, n, with_source):
    """E[stf_target | x], summed over every batch of n that could be drawn."""
    s, total = torch.full((len(x), 1), sigma, dtype=x.dtype), torch.zeros_like(x)
    first = posterior(x, sigma, data, prior) if with_source else prior.expand(len(x), -1)
    for batch in itertools.product(range(len(data)), repeat=n):
        p = first[:, batch[0], None] * math.prod(prior[k].item() for k in batch[1:])
        total += p * stf_target(x, s, data[list(batch)])
    return total


@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0])
def test_stf_is_unbiased_with_the_source_and_not_without_two_points(sigma):
    """Data {0, 1}, n = 2, r = p(1|x): the mean target is r with the source, 1/4 + r/2 without."""
    data, prior = torch.tensor([[0.0], [1.0]]).double(), torch.tensor([0.5, 0.5]).double()
    r = ((X - 0.5) / sigma ** 2).sigmoid()
    torch.testing.assert_close(mean_target(X, sigma, data, prior, 2, True), r)
    torch.testing.assert_close(mean_target(X, sigma, data, prior, 2, False), 0.25 + r / 2)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_stf_is_unbiased_for_every_n_and_any_prior(n):
    """The paper calls STF biased, the less the larger n (sec. 5.1); with the source it is not."""
    data = torch.tensor([[-1.0], [0.2], [1.5]]).double()
    prior = torch.tensor([0.5, 0.2, 0.3]).double()
    exact = posterior(X, 0.8, data, prior) @ data
    torch.testing.assert_close(mean_target(X, 0.8, data, prior, n, True), exact)
    assert (mean_target(X, 0.8, data, prior, n, False) - exact).abs().max() > 0.1


def test_stf_weight_k_is_the_probability_that_row_k_is_the_source():
    """sum_I p(x | y_I) (m(x) - y_I) = 0 for any batch and every x (taylor.md 4.1)."""
    batch = randn(6, 2, seed=24)
    x, sigma = 2 * randn(200, 2, seed=25), shaped([0.1 + 0.02 * i for i in range(200)], X[:1])
    likelihood = (-((x[:, None] - batch) ** 2).sum(2) / (2 * sigma ** 2)).exp()     # (200, 6)
    likelihood = likelihood / likelihood.amax(1, keepdim=True)      # any factor per x: still zero
    m = stf_target(x, sigma, batch)
    residual = (likelihood[:, :, None] * (m[:, None] - batch)).sum(1)
    assert residual.abs().max() < 1e-12


def independent_references(data, source, n, seed):
    """For each sample n rows of the data, its source the first: (B, n, d)."""
    rows = torch.randint(len(data), (len(source), n), generator=generator(seed))
    rows[:, 0] = source
    return data[rows]


def each_its_own(function, *batch, references, size=10):
    """function(*batch, reference, labels, reference_labels) with the references (B, n, d) apart.

    A sample's label is its number, so that no other's references count; in blocks, for speed.
    """
    out, (_, n, d) = [], references.shape
    for start in range(0, len(references), size):
        block, own = [a[start:start + size] for a in batch], references[start:start + size]
        number = torch.arange(len(own))
        out.append(function(*block, own.reshape(-1, d), number, number.repeat_interleave(n)))
    return torch.cat(out)


def target_variances(data, sigma, n, B=1000, seed=40):
    """Squared errors of the DSM and of the STF target about E[x0 | x], (B,) each, paired."""
    source = torch.randint(len(data), (B,), generator=generator(seed))
    x0, s = data[source], data.new_full((B, 1), sigma)
    x = x0 + s * randn(B, data.shape[1], seed=seed + 1)
    references = independent_references(data, source, n, seed + 2)
    stf = each_its_own(stf_target, x, s, references=references)
    exact = direct(x, s, data)
    return ((x0 - exact) ** 2).sum(1), ((stf - exact) ** 2).sum(1), x


@pytest.mark.parametrize("sigma", [0.05, 0.2, 0.5, 1.0, 3.0, 20.0])
def test_stf_rao_blackwell_its_variance_is_at_most_that_of_dsm(sigma):
    dsm, stf, _ = target_variances(points(64).double(), sigma, n=16)
    saved = dsm - stf
    assert saved.mean() / saved.std() * len(saved) ** 0.5 > 5


@pytest.mark.parametrize("n", [4, 16, 64])
def test_stf_theorem_2_far_field_variance_falls_as_1_over_n(n):
    """V_STF <~ V_DSM/(n - 1) where p(x0|x) ~ p0: the target is then the plain mean of n rows."""
    dsm, stf, _ = target_variances(points(64).double(), 50.0, n, B=2000)
    ratio = stf.mean() / dsm.mean()
    assert 0.85 / n < ratio < 1.15 / n


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 3.0, 20.0])
def test_stf_theorem_2_bound_holds(sigma):
    """V_STF <= (V_DSM + sigma^2 sqrt(3 d) sqrt(E_x D_f(p0 | p(.|x))))/(n - 1), as D's variances.

    D_f = E_{p(x0|x)} f(p0/p(x0|x)),  f(y) = (1/y - 1)^2 for y < 1.5, 8y/27 - 1/3 from there on.
    """
    data, n = points(64).double(), 16
    dsm, stf, x = target_variances(data, sigma, n)
    p = posterior(x, sigma, data, torch.full((64,), 1 / 64).double())
    y = 1 / (64 * p.clamp(min=1e-300))
    p_f = torch.where(y < 1.5, p * (64 * p - 1) ** 2, 8 / 27 / 64 - p / 3)          # p f(y)
    D_f = p_f.sum(1).mean()
    bound = (dsm.mean() + sigma ** 2 * (3 * 2 * D_f) ** 0.5) / (n - 1)
    assert 0 < stf.mean() < bound
    if sigma <= 0.5:
        assert stf.mean() > 1.3 * dsm.mean() / (n - 1)          # so the second term is needed


def test_stf_theorem_1_target_is_asymptotically_normal():
    """sqrt(n) (target - E[x0|x]) -> N(0, E_p0[p(x|y)^2 (y - E[x0|x])^2] / p(x)^2), times sigma^-4
    for scores; of one batch's target, for eq. 7's minimiser, which eq. 8 names, is a mean over
    batches, without a law of its own.  Data {0, 1}, the number of ones in the batch summed over.

    The paper's eq. 8 prints Cov(p(x|y) (y - x)) in place of the second moment about E[x0|x]: right
    for weights with p(x) known, but not for the self-normalised ones, whose limit this is.
    """
    x, sigma = X[[3, 5, 9]], 1.0                                            # -.5, .5, 2.5
    r, s = ((x - 0.5) / sigma ** 2).sigmoid(), torch.ones_like(x)
    limit, printed = 4 * (r * (1 - r)) ** 2, (r * (1 - x) + (1 - r) * x) ** 2
    gap, skew = [], []
    for n in (16, 64, 256):
        target = torch.cat([stf_target(x, s, (torch.arange(n)[:, None] < k).double())
                            for k in range(n + 1)], 1)                      # (3, n + 1)
        k = torch.arange(n, dtype=torch.float64)                            # ones among the others
        p = math.lgamma(n) - torch.lgamma(k + 1) - torch.lgamma(n - k)
        p = (p - (n - 1) * math.log(2)).exp()
        zero, one = F.pad(p, (0, 1)), F.pad(p, (1, 0))                      # by the source's value
        p = (1 - r) * zero + r * one                                        # (3, n + 1)
        mean = (p * target).sum(1, keepdim=True)
        torch.testing.assert_close(mean, r, rtol=1e-9, atol=0)
        variance = (p * (target - mean) ** 2).sum(1, keepdim=True)
        gap.append((n * variance / limit - 1).abs().max().item())
        skew.append(((p * (target - mean) ** 3).sum(1, keepdim=True) / variance ** 1.5).abs())
    assert gap[2] < 0.05 and gap[2] < gap[1] / 3 < gap[0] / 9               # falls as 1/n
    assert (skew[2][[0, 2]] < 0.6 * skew[1][[0, 2]]).all()                  # falls as 1/sqrt(n)
    assert (printed / limit - 1)[2] > 1 and (printed / limit)[1] == pytest.approx(1)


def stf_gradients(denoise, x0, noise, sigma, *references):
    target = lambda x, s: stf_target(x, s, *references)
    return gradients(stf_loss, denoise, x0, noise, sigma, target)


@pytest.mark.parametrize("n", [2, 16])
def test_stf_minimiser_is_the_posterior_mean_of_gaussian_data(n):
    """Each sample with references of its own; without its source among them the gradient shows."""
    batch = gaussian_batch(3000, seed=50)
    references = MEAN + VARIANCE.sqrt() * randn(3000, n, 2, seed=53)
    gradient = partial(stf_gradients, gaussian_denoiser)
    assert largest_z(each_its_own(gradient, *batch, references=references)) > 6
    references[:, 0] = batch[0]
    assert largest_z(each_its_own(gradient, *batch, references=references)) < 3.5


def test_stf_minimiser_is_the_posterior_mean_of_a_finite_set():
    data, B = points(24).double(), 3000
    source = torch.randint(24, (B,), generator=generator(60))
    u = torch.rand(B, 1, generator=generator(61), dtype=torch.float64)
    batch = data[source], randn(B, 2, seed=62), 0.1 * 30 ** u
    references = independent_references(data, source, 8, seed=63)
    for shrink in (1.0, 0.9):
        gradient = partial(stf_gradients, lambda x, s: shrink * direct(x, s, data))
        z = largest_z(each_its_own(gradient, *batch, references=references))
        assert z < 3.5 if shrink == 1 else z > 10


# ---- Second heads --------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["sn", "npr"])
def test_head_minimiser_is_the_conditional_second_moment_of_gaussian_data(kind):
    """E[eps^2 | x] = eps_hat^2 + v/(v + sigma^2), and the second term alone is NPR's."""
    x0, noise, sigma = gaussian_batch(40000, seed=70)
    theta = torch.zeros(len(x0), 2, dtype=torch.float64, requires_grad=True)

    def gradient(shrink):
        def with_head(x, s):
            D, spread = gaussian_denoiser(x, s), VARIANCE / (VARIANCE + s ** 2)
            h = spread + (((x - D) / s) ** 2 if kind == "sn" else 0)
            return D, shrink * h + theta[:, :1] + theta[:, 1:] * x.sin()
        loss = head_loss(with_head, x0, noise, sigma, kind)
        assert loss.shape == (len(x0),)
        return torch.autograd.grad(loss.sum(), theta)[0]
    assert largest_z(gradient(1.0)) < 3.5 and largest_z(gradient(0.8)) > 10


def test_head_does_not_train_the_denoiser():
    a, x0 = torch.tensor(0.5, dtype=torch.float64, requires_grad=True), randn(4, 2, seed=71)
    h = torch.ones(4, 2, dtype=torch.float64, requires_grad=True)
    with_head, noise = lambda x, s: (a * x, h), randn(4, 2, seed=72)
    head_loss(with_head, x0, noise, shaped([1.0] * 4, x0), "npr").sum().backward()
    assert a.grad is None and h.grad.any()
