"""EDM's augmentation against plane waves, whose every transform is known; its stable targets."""

import math

import pytest
import torch

from losses import augment, augment_labels, augmented_stf_target, draw_augmentation, stf_target
from oracles import Largest, close, generator, randn, tensor

PI = math.pi


def parameters(**named):
    """a (1, 8) from a0=..., a1=..., zero where not named."""
    return tensor([named.get(f"a{i}", 0) for i in range(8)])


def drawn(B, seed, p=1.0):
    return draw_augmentation(B, p, generator(seed)).double()


# ---- Parameters ----------------------------------------------------------------------------------

N = 40_000


def uncorrelated(columns):
    return (torch.corrcoef(columns.T).fill_diagonal_(0).abs() < 4.5 / N ** 0.5).all()


def test_each_transform_is_on_with_probability_p_and_the_x_flip_is_a_fair_coin():
    p = 0.12
    on = (drawn(N, 1, p) != 0).double()
    first = on[:, [0, 1, 2, 3, 4, 6]]
    assert torch.equal(on, first[:, [0, 1, 2, 3, 4, 4, 5, 5]])      # all of a transform's at once
    assert uncorrelated(first)                                      # and independently
    want = tensor(0.5, p / 2, p, p, p, p)                           # the y-flip is a coin as well
    assert ((first.mean(0) - want).abs() < 4 * (want * (1 - want) / N) ** 0.5).all()


def test_parameters_have_the_distributions_of_the_table():
    a = drawn(N, 2)
    assert set(a[:, :2].unique().tolist()) == {0, 1} and uncorrelated(a)
    quantile = (torch.arange(N).double() + 0.5) / N
    for k in range(2, 8):                                           # Kolmogorov-Smirnov, by hand
        uniform = (a[:, k] + PI) / (2 * PI) if k in (3, 4) else torch.special.ndtr(a[:, k])
        assert (uniform.sort().values - quantile).abs().max() < 1.95 / N ** 0.5      # 1 in 1000


def test_draw_is_reproducible_and_p_0_is_the_identity():
    assert torch.equal(drawn(5, 3, 0.5), drawn(5, 3, 0.5))
    assert not torch.equal(drawn(5, 3), drawn(5, 4))
    a, images = drawn(5, 3, p=0.0), randn(5, 3, 8, 8).float()
    assert torch.equal(a, torch.zeros(5, 8).double()) and torch.equal(augment(images, a), images)
    assert torch.equal(augment_labels(a), torch.zeros(5, 9).double())


def test_labels_are_the_tables_conditioning():
    a = tensor([1, 0, -1.3, 0.7, 0.4, 1.5, 0.6, -0.2])
    close(augment_labels(a)[0], [1, 0, -1.3, math.cos(0.7) - 1, math.sin(0.7), 1.5 * math.cos(0.4),
                                 1.5 * math.sin(0.4), 0.6, -0.2])


# ---- Geometry ------------------------------------------------------------------------------------
# Plane waves on the whole plane: the image is a wave at the pixels, and the truth about its
# transform by A is the wave at A^-1 of the pixels, where those lie inside the image.

def rotate(r):
    c, s = math.cos(r), math.sin(r)
    return tensor([c, -s, 0], [s, c, 0], [0, 0, 1])


def scale(x, y):
    return tensor([x, 0, 0], [0, y, 0], [0, 0, 1])


def squared_error(a, A, H, period, direction, phase=0.4):
    """Mean over the pixels that come from inside the image, relative to a wave's mean square."""
    y, x = torch.meshgrid(*[torch.arange(H).double() - (H - 1) / 2] * 2, indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)], 2)             # (H, H, 3)
    source = pixels @ A.inverse().T

    def wave(at):
        along = at[..., 0] * math.cos(direction) + at[..., 1] * math.sin(direction)
        return (2 * PI * along / period + phase).cos()
    inside = (source[..., :2].abs() <= H / 2 - 2).all(2)            # two pixels for the bicubic
    got = augment(wave(pixels)[None, None], a)[0, 0]
    assert inside.sum() > 10
    return 2 * ((got - wave(source))[inside] ** 2).mean().item()


# Parameters, and where each point of a 16x16 image goes, in pixels from the centre, y down.
X_FLIP, Y_FLIP = (dict(a0=1), scale(-1, 1)), (dict(a1=1), scale(1, -1))
SCALING = dict(a2=1.5), scale(2 ** 0.3, 2 ** 0.3)
ROTATION = dict(a3=0.6), rotate(-0.6)
ANISOTROPY = dict(a4=0.5, a5=1.5), rotate(-0.5) @ scale(2 ** 0.3, 2 ** -0.3) @ rotate(0.5)
X_SHIFT = dict(a6=0.7), tensor([1, 0, 2 * 0.7], [0, 1, 0], [0, 0, 1])
Y_SHIFT = dict(a7=0.7), tensor([1, 0, 0], [0, 1, 2 * 0.7], [0, 0, 1])


@pytest.mark.parametrize("first, second", [
    (X_FLIP, ROTATION), (Y_FLIP, ROTATION), (X_FLIP, ANISOTROPY), (X_FLIP, X_SHIFT),
    (Y_FLIP, Y_SHIFT), (SCALING, X_SHIFT), (ROTATION, ANISOTROPY), (ROTATION, X_SHIFT),
    (ANISOTROPY, X_SHIFT)])
def test_the_order_of_composition_is_the_tables(first, second):
    """The pairs that do not commute: the other order would be seen, and so would a wrong sign."""
    (a, A), (b, B) = first, second
    right, wrong = (max(squared_error(parameters(**a, **b), M, 16, 12, d) for d in (0.3, 1.9))
                    for M in (B @ A, A @ B))
    assert right < 0.03 ** 2 and wrong > 0.1 ** 2
    assert squared_error(parameters(**a), A, 16, 12, 0.3) < 0.03 ** 2              # and alone


def test_flips_are_exact():
    images, a = randn(4, 3, 15, 15).float(), torch.zeros(4, 8)
    a[:, 0], a[:, 1] = torch.tensor([0.0, 1, 0, 1]), torch.tensor([0.0, 0, 1, 1])
    got = augment(images, a)
    for row, axes in enumerate(([], [2], [1], [1, 2])):
        assert torch.equal(got[row], images[row].flip(axes))


def test_whole_pixel_shifts_are_a_roll_with_the_border_reflected():
    H, images = 8, randn(1, 3, 8, 8)

    def source(shift):                          # ... 2 1 0 0 1 2 ... 7 7 6 ...: the edge twice
        k = (torch.arange(H) - shift) % (2 * H)
        return torch.where(k < H, k, 2 * H - 1 - k)
    for dx, dy in ((1, 0), (3, -2), (20, -37)):
        want = images[:, :, source(dy)][:, :, :, source(dx)]
        got = augment(images, parameters(a6=8 * dx / H, a7=8 * dy / H))
        close(got, want, rtol=0, atol=1e-5)


def test_error_on_waves_of_4_pixels_and_longer():
    """Turned by any angle, root mean square in per cent of the wave's: the mean over the waves'
    directions is at most 3.5, and that of one direction at most 4.5 (diagonal waves of 5 pixels).
    """
    turns = [0.1 + 2 * PI * (k + 0.5) / 7 for k in range(7)]
    for period in (4, 5, 8, 16):
        errors = tensor(*[[squared_error(parameters(a3=r), rotate(-r), 32, period, direction, 5 * r)
                           for r in turns] for direction in torch.linspace(0, PI, 9)[:-1].tolist()])
        by_direction = errors.mean(1)
        assert by_direction.mean() < 0.035 ** 2 and by_direction.max() < 0.045 ** 2
        assert period < 12 or by_direction.max() < 0.02 ** 2


def test_any_draw_stays_finite_near_the_hull_and_is_linear_in_the_images():
    """The bicubic kernel's weights sum to 1 and |weights| to at most 1.375 on each axis (a = -3/4),
    so no pixel leaves [-1, 1] by more than 1.375^2 - 1.
    """
    a, one, two = drawn(64, 5), *randn(2, 64, 3, 15, 15, seed=6).float()
    one = one.clamp(-1, 1)
    got = augment(one, a)
    assert got.dtype == torch.float32 and got.abs().max() < 1.375 ** 2 + 1e-4
    close(augment(torch.ones_like(one), a), 1, rtol=0, atol=1e-5)
    close(augment(2 * one - two, a), 2 * got - augment(two, a), rtol=0, atol=3e-5)
    close(got[-1:], augment(one[-1:], a[-1:]), rtol=0, atol=1e-5)   # each sample is its own


# ---- Stable targets of augmented data ------------------------------------------------------------

MIXED = torch.cat([parameters(), parameters(a0=1), parameters(a0=1, a1=1), drawn(3, 8),
                   parameters(a3=0.5), parameters(a6=0.3, a7=0.1)])                # (8, 8)


@pytest.mark.parametrize("conditional", [False, True])
def test_augmented_stf_target_is_stf_target_of_each_samples_own_augmented_references(conditional):
    """One chunk of them at a time is in floating point.  So the target is unbiased for every n, as
    stf_target is, given a.
    """
    given = reference = 0.3 * randn(24, 3, 8, 8, seed=9).float()
    bound, labels, classes = 2e-5, None, None
    if conditional:                                                 # and uint8
        given, bound = ((reference.clamp(-1, 1) + 1) * 127.5).round().byte(), 1e-9
        reference, classes = (given.float() / 127.5 - 1).double(), torch.arange(24) % 3
        labels = classes[:8]
    for sigma in (0.05, 1.0, 20.0):
        s = (sigma * torch.linspace(0.5, 2, 8)).view(8, 1, 1, 1).to(reference)
        x = augment(reference[:8], MIXED) + s * randn(8, 3, 8, 8, seed=10).to(reference)
        want = []
        for i in range(8):
            y = augment(reference, MIXED[[i]].expand(24, 8))
            own = labels[[i]] if conditional else None
            want.append(stf_target(x[[i]], s[[i]], y, own, classes))
        want = torch.cat(want)
        with Largest() as largest:
            got = augmented_stf_target(x, s, given, MIXED, labels, classes, chunk=5)
        assert largest.numel <= x.numel() < given.numel()
        close(got, want, rtol=0, atol=bound)
    plain = stf_target(x, s, reference, labels, classes)
    assert ((want - plain).flatten(1).norm(dim=1)[1:] > 0.1).all()                 # it does matter
