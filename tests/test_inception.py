"""Inception against the published file's layout and computation, written out here once more."""

import pytest
import torch
import torch.nn.functional as F

from networks import Inception
from oracles import generator


def published(w, x):
    """pool3 and logits from the file's tensors w and bytes x of 299 x 299, line by line.

    Takes from w all that it uses, and says each convolution's channels out and kernel.
    """
    def conv(name, x, cout, kernel=(1, 1), stride=1, pad=None):
        weight = w.pop(f"{name}.conv.weight")
        mean, var, scale, shift = (w.pop(f"{name}.bn.{key}") for key in
                                   ("running_mean", "running_var", "weight", "bias"))
        assert weight.shape == (cout, x.shape[1], *kernel), name
        assert w.pop(f"{name}.bn.num_batches_tracked").shape == ()
        same = kernel[0] // 2, kernel[1] // 2
        x = F.conv2d(x, weight, None, stride, same if pad is None else pad)
        return F.batch_norm(x, mean, var, scale, shift, eps=0.001).clamp(min=0)

    def average(x):
        ones = torch.ones_like(x[:1, :1])
        return F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(ones, 3, 1, 1)

    def chain(name, x, *layers):
        for i, layer in enumerate(layers, 1):
            x = conv(f"{name}_{i}", x, *layer)
        return x

    one, row, column, square = (1, 1), (1, 7), (7, 1), (3, 3)
    double = (64, one), (96, square)
    x = conv("Conv2d_1a_3x3", x / 127.5 - 1, 32, square, 2, 0)
    x = conv("Conv2d_2a_3x3", x, 32, square, pad=0)
    x = F.max_pool2d(conv("Conv2d_2b_3x3", x, 64, square), 3, 2)
    x = conv("Conv2d_3b_1x1", x, 80)
    x = F.max_pool2d(conv("Conv2d_4a_3x3", x, 192, square, pad=0), 3, 2)
    for n, pooled in ("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64):
        x = torch.cat([conv(f"{n}.branch1x1", x, 64),
                       chain(f"{n}.branch5x5", x, (48, one), (64, (5, 5))),
                       chain(f"{n}.branch3x3dbl", x, *double, (96, square)),
                       conv(f"{n}.branch_pool", average(x), pooled)], 1)
    x = torch.cat([conv("Mixed_6a.branch3x3", x, 384, square, 2, 0),
                   chain("Mixed_6a.branch3x3dbl", x, *double, (96, square, 2, 0)),
                   F.max_pool2d(x, 3, 2)], 1)
    for n, c in ("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192):
        five = (c, one), (c, column), (c, row), (c, column), (192, row)
        x = torch.cat([conv(f"{n}.branch1x1", x, 192),
                       chain(f"{n}.branch7x7", x, (c, one), (c, row), (192, column)),
                       chain(f"{n}.branch7x7dbl", x, *five),
                       conv(f"{n}.branch_pool", average(x), 192)], 1)
    n, last = "Mixed_7a", (192, square, 2, 0)
    x = torch.cat([chain(f"{n}.branch3x3", x, (192, one), (320, square, 2, 0)),
                   chain(f"{n}.branch7x7x3", x, (192, one), (192, row), (192, column), last),
                   F.max_pool2d(x, 3, 2)], 1)
    for n in ("Mixed_7b", "Mixed_7c"):
        a = conv(f"{n}.branch3x3_1", x, 384)
        b = chain(f"{n}.branch3x3dbl", x, (448, one), (384, square))
        pooled = average(x) if n == "Mixed_7b" else F.max_pool2d(x, 3, 1, 1)
        x = torch.cat([conv(f"{n}.branch1x1", x, 320),
                       conv(f"{n}.branch3x3_2a", a, 384, (1, 3)),
                       conv(f"{n}.branch3x3_2b", a, 384, (3, 1)),
                       conv(f"{n}.branch3x3dbl_3a", b, 384, (1, 3)),
                       conv(f"{n}.branch3x3dbl_3b", b, 384, (3, 1)),
                       conv(f"{n}.branch_pool", pooled, 192)], 1)
    pool3 = x.flatten(2).mean(2)
    return pool3, pool3 @ w.pop("fc.weight").T + w.pop("fc.bias")


@pytest.fixture(scope="module")
def net():
    """Random weights that keep the signal's size, normalisation that does something."""
    torch.manual_seed(0)
    net = Inception()
    for name, p in net.state_dict().items():
        if name.endswith("conv.weight"):
            p.normal_(std=(2 / p[0].numel()) ** 0.5)
        elif name.endswith(("bn.weight", "running_var")):
            p.uniform_(0.7, 1.4)
        elif name.endswith(("bn.bias", "running_mean")):
            p.normal_(std=0.2)
    return net


def images(H=40, W=50, seed=0):
    return torch.randint(256, (1, 3, H, W), generator=generator(seed), dtype=torch.uint8)


def test_names_shapes_and_the_whole_network_line_by_line_on_small_and_large_images(net):
    small = F.interpolate(images().double(), (299, 299), mode="bilinear")
    # Without antialiasing only the middle counts: of 4 rows 2, of 3 columns 1.
    large = images(299 * 4, 299 * 3)
    by_hand = (large[:, :, 1::4, 1::3].double() + large[:, :, 2::4, 1::3]) / 2
    for given, resized in (images(), small), (large, by_hand):
        pool3, logits = net(given)
        assert pool3.shape == (1, 2048) and logits.shape == (1, 1008)
        assert pool3.dtype == logits.dtype == torch.float32 and not pool3.requires_grad
        # In float64, so that nothing but float32's rounding in 48 layers is between the two.
        w = {k: v.double() for k, v in net.state_dict().items()}
        for ours, exact in zip((pool3, logits), published(w, resized)):
            assert exact.std() > 0.1
            assert (ours - exact).abs().max() < 1e-4 * exact.abs().max()
        assert not w                          # no tensor is left


def test_a_file_in_that_layout_loads_and_gives_the_same_even_without_batch_counters(net):
    with torch.device("meta"):
        other = Inception()
    other.load_state_dict({k: v for k, v in net.state_dict().items() if "num_batches" not in k},
                          assign=True)
    assert torch.equal(other(images())[1], net(images())[1])


def test_an_image_is_measured_alone_whatever_its_batch(net):
    together, alone = net(torch.cat([images(seed=1), images(seed=2)])), net(images(seed=2))
    for a, b in zip(together, alone):
        torch.testing.assert_close(a[1:], b, rtol=1e-4, atol=1e-4)
        assert (a[0] - a[1]).abs().max() > 0.05


def test_float_images_count_as_their_bytes_and_autocast_as_nothing(net):
    plain = net(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = net(images())
    for other in (net(images().float()), net(images().double()), cast):
        for a, b in zip(plain, other):
            assert b.dtype == torch.float32 and torch.equal(a, b)
