"""EDM's augmentation against plane waves, whose every transform is known, explicit 3x3 matrices and
brute force; and stable targets of augmented data.
"""

import itertools
import math

import pytest
import torch

from losses import augment, augment_labels, augmented_stf_target, draw_augmentation, stf_target
from networks import UNet

PI = math.pi


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


def parameters(**named):
    """a (1, 8) from a0=..., a1=..., zero where not named."""
    return tensor([[named.get(f"a{i}", 0) for i in range(8)]])


def drawn(B, seed, p=1.0):
    return draw_augmentation(B, p, generator(seed)).double()


# ---- Parameters ----------------------------------------------------------------------------------

N = 40_000
GATES = {"y-flip": [1], "scaling": [2], "rotation": [3], "anisotropy": [4, 5],
         "translation": [6, 7]}                                     # and the parameters each has


def within(mean, expected, sd):
    """A mean of N draws, in standard errors."""
    return abs(mean.item() - expected) < 4 * sd / N ** 0.5


@pytest.mark.parametrize("p", [0.12, 0.5, 1.0])
def test_each_transform_is_on_with_probability_p_and_the_x_flip_is_a_fair_coin(p):
    on = drawn(N, 1, p) != 0
    assert within(on[:, 0].double().mean(), 0.5, 0.5)
    for name, columns in GATES.items():
        expected = p / 2 if name == "y-flip" else p                 # a coin as well
        sd = (expected * (1 - expected)) ** 0.5 + 1e-9
        for k in columns:
            assert torch.equal(on[:, k], on[:, columns[0]])         # all of a transform's at once
            assert within(on[:, k].double().mean(), expected, sd)
    rates = [on[:, 0] * 1.0] + [on[:, columns[0]] * 1.0 for columns in GATES.values()]
    for a, b in itertools.combinations(rates, 2):                   # and independently
        covariance = (a - a.mean()) * (b - b.mean())
        assert abs(covariance.mean()) <= 4 * covariance.std() / N ** 0.5


def test_parameters_have_the_distributions_of_the_table():
    a = drawn(N, 2)
    assert set(a[:, :2].unique().tolist()) == {0, 1}
    quantile = (torch.arange(N).double() + 0.5) / N
    for k in range(2, 8):                                           # Kolmogorov-Smirnov, by hand
        uniform = (a[:, k] + PI) / (2 * PI) if k in (3, 4) else torch.special.ndtr(a[:, k])
        assert (uniform.sort().values - quantile).abs().max() < 1.95 / N ** 0.5      # 1 in 1000
    off = torch.corrcoef(a.T) - torch.eye(8)
    assert off.abs().max() < 4.5 / N ** 0.5


def test_draw_is_reproducible_and_p_0_is_the_identity():
    assert torch.equal(drawn(5, 3, 0.5), drawn(5, 3, 0.5))
    assert not torch.equal(drawn(5, 3), drawn(5, 4))
    a, images = drawn(5, 3, p=0.0), randn(5, 3, 8, 8).float()
    assert a.shape == (5, 8) and (a == 0).all()
    assert torch.equal(augment(images, a), images)
    assert torch.equal(augment_labels(a), torch.zeros(5, 9).double())


def test_labels_are_the_tables_conditioning():
    r = 0.7
    for given, want in (
            (dict(a0=1), {0: 1}), (dict(a1=1), {1: 1}), (dict(a2=-1.3), {2: -1.3}),
            (dict(a3=r), {3: math.cos(r) - 1, 4: math.sin(r)}),
            (dict(a4=r, a5=1.3), {5: 1.3 * math.cos(r), 6: 1.3 * math.sin(r)}),
            (dict(a6=0.4), {7: 0.4}), (dict(a7=-0.4), {8: -0.4})):
        want = tensor([[want.get(k, 0) for k in range(9)]])
        torch.testing.assert_close(augment_labels(parameters(**given)), want, rtol=1e-12, atol=0)
    together = augment_labels(parameters(a0=1, a1=1, a2=2, a3=PI / 2, a4=0, a5=3, a6=4, a7=5))
    torch.testing.assert_close(together, tensor([[1, 1, 2, -1, 1, 3, 0, 4, 5]]))


def test_network_takes_the_labels_and_zeros_are_none():
    torch.manual_seed(0)
    net = UNet(8, 3, width=8, mult=(1,), blocks=1, attend=(), augment_dim=9)
    for p in net.parameters():                                      # the output starts as zero
        p.data.normal_(0, 0.2)
    x, c_noise = randn(4, 3, 8, 8).float(), torch.linspace(-1, 1, 4)
    plain = net(x, c_noise)
    assert torch.equal(net(x, c_noise, augment_labels=augment_labels(torch.zeros(4, 8))), plain)
    told = net(x, c_noise, augment_labels=augment_labels(draw_augmentation(4, 1.0, generator(1))))
    assert ((told - plain).flatten(1).abs().amax(1) > 1e-3).all()


# ---- Geometry ------------------------------------------------------------------------------------
# Plane waves on the whole plane: the image is a wave at the pixels, and the truth about its
# transform by A is the wave at A^-1 of the pixels, where those lie inside the image.

def rotate(r):
    c, s = math.cos(r), math.sin(r)
    return tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def scale(x, y):
    return tensor([[x, 0, 0], [0, y, 0], [0, 0, 1]])


def translate(x, y):
    return tensor([[1, 0, x], [0, 1, y], [0, 0, 1]])


def matrix(a, H):
    """Where each point goes, in pixels from the centre, y down; the first transform first."""
    a0, a1, a2, a3, a4, a5, a6, a7 = a.flatten().tolist()
    A = scale(1 - 2 * a0, 1)
    A = scale(1, 1 - 2 * a1) @ A
    A = scale(2 ** (0.2 * a2), 2 ** (0.2 * a2)) @ A
    A = rotate(-a3) @ A
    A = rotate(-a4) @ scale(2 ** (0.2 * a5), 2 ** (-0.2 * a5)) @ rotate(a4) @ A
    return translate(H * a6 / 8, H * a7 / 8) @ A


def pixels(H):
    y, x = torch.meshgrid(*[torch.arange(H).double() - (H - 1) / 2] * 2, indexing="ij")
    return torch.stack([x, y, torch.ones(H, H).double()], 2)                      # (H, H, 3)


def wave(points, period, direction, phase):
    along = points[..., 0] * math.cos(direction) + points[..., 1] * math.sin(direction)
    return (2 * PI * along / period + phase).cos()


def squared_error(a, H, period, direction, phase, A=None):
    """Mean over the pixels that come from inside the image, relative to a wave's mean square."""
    source = pixels(H) @ (matrix(a, H) if A is None else A).inverse().T
    inside = (source[..., :2].abs() <= H / 2 - 2).all(2)            # two pixels for the bicubic
    got = augment(wave(pixels(H), period, direction, phase)[None, None], a)[0, 0]
    assert inside.sum() > 10
    return 2 * ((got - wave(source, period, direction, phase))[inside] ** 2).mean().item()


ALONE = {"x-flip": dict(a0=1), "y-flip": dict(a1=1), "larger": dict(a2=1.5),
         "smaller": dict(a2=-1.5), "rotation": dict(a3=0.6), "anisotropy": dict(a4=0.5, a5=1.5),
         "right": dict(a6=0.7), "down": dict(a7=0.7),
         "all": dict(a0=1, a1=1, a2=0.5, a3=2.0, a4=0.5, a5=1.0, a6=0.3, a7=-0.4)}


@pytest.mark.parametrize("H", [8, 16, 32])
@pytest.mark.parametrize("name", ALONE)
def test_each_transform_moves_a_wave_to_where_its_matrix_does(name, H):
    """A wave of 16 pixels within 2 % of its size; with the sign changed, four times as far off."""
    a, directions = parameters(**ALONE[name]), (0.3, 1.1, 2.9)
    assert all(squared_error(a, H, 16, d, 0.4) < 0.02 ** 2 for d in directions)
    wrong = matrix(parameters(), H) if "flip" in name else matrix(-a, H)
    assert max(squared_error(a, H, 16, d, 0.4, wrong) for d in directions) > 0.08 ** 2


def test_rotation_by_a_small_a3_is_counter_clockwise_as_seen():
    """ROTATE2D(-a3) with y down: what is right of the centre rises."""
    image = torch.zeros(1, 1, 9, 9).double()
    image[..., 4, 7] = 1
    peak = augment(image, parameters(a3=PI / 4)).flatten().argmax().item()
    assert (peak // 9, peak % 9) == (2, 6)


ANISOTROPY = dict(a4=0.5, a5=1.5)


@pytest.mark.parametrize("first, second", [
    (dict(a0=1), dict(a3=0.6)), (dict(a1=1), dict(a3=0.6)), (dict(a0=1), ANISOTROPY),
    (dict(a0=1), dict(a6=0.7)), (dict(a1=1), dict(a7=0.7)), (dict(a2=1.5), dict(a6=0.7)),
    (dict(a3=0.6), ANISOTROPY), (dict(a3=0.6), dict(a6=0.7)), (ANISOTROPY, dict(a6=0.7))])
def test_the_order_of_composition_is_the_tables(first, second):
    """The pairs that do not commute: the other order would be seen."""
    A, B, a = matrix(parameters(**first), 16), matrix(parameters(**second), 16), first | second
    torch.testing.assert_close(matrix(parameters(**a), 16), B @ A)
    for wrong, test in ((B @ A, lambda e: e < 0.03 ** 2), (A @ B, lambda e: e > 0.1 ** 2)):
        errors = [squared_error(parameters(**a), 16, 12, d, 0.4, wrong) for d in (0.3, 1.9)]
        assert test(max(errors))


@pytest.mark.parametrize("C, H", [(1, 8), (3, 8), (3, 15), (1, 32)])
def test_flips_are_exact(C, H):
    images = randn(4, C, H, H).float()
    a = torch.zeros(4, 8)
    a[:, 0], a[:, 1] = torch.tensor([0.0, 1, 0, 1]), torch.tensor([0.0, 0, 1, 1])
    got = augment(images, a)
    for row, axes in zip(range(4), ([], [2], [1], [1, 2])):
        assert torch.equal(got[row], images[row].flip(axes) if axes else images[row])


@pytest.mark.parametrize("C, H", [(1, 8), (3, 15), (3, 32)])
def test_quarter_turns_are_those_of_rot90(C, H):
    images = randn(1, C, H, H)
    for turns in (1, 2, 3, -1):
        got = augment(images, parameters(a3=turns * PI / 2))
        torch.testing.assert_close(got, images.rot90(turns, (2, 3)), rtol=0, atol=1e-5)
        got = augment(images.float(), parameters(a3=turns * PI / 2).float())
        assert (got - images.rot90(turns, (2, 3))).abs().max() < 1e-4


@pytest.mark.parametrize("dx, dy", [(1, 0), (0, -2), (3, 5), (-8, 9), (20, -37)])
def test_whole_pixel_shifts_are_a_roll_with_the_border_reflected(dx, dy):
    H, images = 8, randn(1, 3, 8, 8)

    def source(shift):                          # ... 2 1 0 0 1 2 ... 7 7 6 ...: the edge twice
        k = (torch.arange(H) - shift) % (2 * H)
        return torch.where(k < H, k, 2 * H - 1 - k)
    want = images[:, :, source(dy)][:, :, :, source(dx)]
    got = augment(images, parameters(a6=8 * dx / H, a7=8 * dy / H))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_error_on_waves_of_4_pixels_and_longer():
    """Turned by any angle, root mean square in per cent of the wave's: the mean over the waves'
    directions is at most 3.5, and that of one direction at most 4.5 (diagonal waves of 5 pixels).
    """
    turns = [0.1 + 2 * PI * (k + 0.5) / 7 for k in range(7)]
    for period in (4, 5, 6, 8, 12, 16):
        by_direction = []
        for direction in torch.linspace(0, PI, 9)[:-1].tolist():
            errors = [squared_error(parameters(a3=r), 32, period, direction, phase=5 * r)
                      for r in turns]
            by_direction.append(sum(errors) / len(errors))
        mean, worst = sum(by_direction) / len(by_direction), max(by_direction)
        assert mean < 0.035 ** 2 and worst < 0.045 ** 2
        assert period < 12 or worst < 0.02 ** 2


@pytest.mark.parametrize("C, H, dtype", [(1, 8, torch.float64), (3, 16, torch.float32),
                                         (3, 32, torch.float64)])
def test_any_draw_stays_finite_near_the_hull_and_is_linear_in_the_images(C, H, dtype):
    """The bicubic kernel's weights sum to 1 and |weights| to at most 1.375 on each axis (a = -3/4),
    so no pixel leaves [-1, 1] by more than 1.375^2 - 1.
    """
    a, one, two = drawn(64, 5), randn(64, C, H, H, seed=6, dtype=dtype), randn(64, C, H, H, seed=7)
    one, two = one.clamp(-1, 1), two.to(dtype)
    got = augment(one, a)
    assert got.dtype == dtype and got.shape == one.shape and got.abs().max() < 1.375 ** 2 + 1e-4
    torch.testing.assert_close(augment(torch.ones_like(one), a), torch.ones_like(one),
                               rtol=0, atol=1e-5)
    want = 2 * got - augment(two, a)
    torch.testing.assert_close(augment(2 * one - two, a), want, rtol=0, atol=3e-5)
    for row in (0, 63):                                             # and each sample is its own
        alone = augment(one[row:row + 1], a[row:row + 1])
        torch.testing.assert_close(got[row:row + 1], alone, rtol=0, atol=1e-5)


# ---- Stable targets of augmented data ------------------------------------------------------------

MIXED = torch.cat([parameters(), parameters(a0=1), parameters(a0=1, a1=1), drawn(3, 8),
                   parameters(a3=0.5), parameters(a6=0.3, a7=0.1)])                # (8, 8)


def direct(x, sigma, reference, a, counts=None):
    """The softmax over explicitly augmented references, by the broadcast, in float64."""
    moved = torch.stack([augment(reference.double(), row.expand(len(reference), 8)) for row in a])
    square = ((x.double()[:, None] - moved) ** 2).flatten(2).sum(2)               # (B, n)
    logits = -square / (2 * sigma.double().flatten(1) ** 2)
    if counts is not None:
        logits = logits.masked_fill(~counts, -torch.inf)
    return torch.einsum("bk,bk...->b...", logits.softmax(1), moved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [None, torch.arange(24) % 3])
def test_augmented_stf_target_is_brute_force_over_augmented_references(classes, dtype):
    reference = 0.3 * randn(24, 3, 8, 8, seed=9, dtype=dtype)
    labels = None if classes is None else classes[:8]
    counts = None if classes is None else labels[:, None] == classes
    for sigma in (0.05, 1.0, 2.0, 20.0):
        s = (sigma * torch.linspace(0.5, 2, 8, dtype=dtype)).view(8, 1, 1, 1)
        x = augment(reference[:8], MIXED) + s * randn(8, 3, 8, 8, seed=10, dtype=dtype)
        got = augmented_stf_target(x, s, reference, MIXED, labels, classes)
        assert got.dtype == dtype
        want = direct(x, s, reference, MIXED, counts)
        bound = 1e-9 if dtype == torch.float64 else 2e-5
        torch.testing.assert_close(got.double(), want, rtol=0, atol=bound)
        if sigma == 1:
            plain = stf_target(x, s, reference, labels, classes)
            assert ((got - plain).flatten(1).norm(dim=1)[1:] > 0.1).all()          # it does matter


def test_augmented_stf_target_without_augmentation_is_stf_target():
    reference, s = randn(24, 3, 8, 8, seed=11), torch.full((8, 1, 1, 1), 2.0).double()
    x, classes = reference[:8] + s * randn(8, 3, 8, 8, seed=12), torch.arange(24) % 2
    for labels in ((), (classes[:8], classes)):
        got = augmented_stf_target(x, s, reference, torch.zeros(8, 8), *labels)
        assert torch.equal(got, stf_target(x, s, reference, *labels))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_augmented_stf_target_is_unbiased_for_every_n(n):
    """Over every source and batch: given x = A y + sigma eps and A, its mean is E[A y | x]."""
    data, B = randn(3, 1, 4, 4, seed=13), len(MIXED)
    x, s = randn(B, 1, 4, 4, seed=14), torch.full((B, 1, 1, 1), 2.0).double()
    moved = torch.stack([augment(data, row.expand(3, 8)) for row in MIXED])        # (B, 3, ...)
    r = (-((x[:, None] - moved) ** 2).flatten(2).sum(2) / (2 * 2.0 ** 2)).softmax(1)
    total = torch.zeros_like(x)
    for batch in itertools.product(range(3), repeat=n):             # the first row is the source
        target = augmented_stf_target(x, s, data[list(batch)], MIXED)
        total += r[:, batch[0], None, None, None] / 3 ** (n - 1) * target
    torch.testing.assert_close(total, direct(x, s, data, MIXED), rtol=1e-9, atol=1e-12)


def test_augmented_stf_target_is_the_augmented_source_at_small_sigma_and_the_mean_at_large():
    reference = randn(16, 3, 8, 8, seed=15)
    source = augment(reference[:8], MIXED)
    near = augmented_stf_target(source, torch.full((8, 1, 1, 1), 0.01), reference, MIXED)
    torch.testing.assert_close(near, source, rtol=0, atol=1e-12)
    far = augmented_stf_target(source, torch.full((8, 1, 1, 1), 1e6), reference, MIXED)
    torch.testing.assert_close(far, augment(reference.mean(0).expand(8, 3, 8, 8), MIXED),
                               rtol=0, atol=1e-6)                   # A is linear
