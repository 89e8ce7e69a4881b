"""Inception against the published file's layout and computation, written out here once more."""

import io
import re

import pytest
import torch
import torch.nn.functional as F

from networks import Inception

# One convolution per entry: name, channels in > out, kernel height x width.
STEM = """Conv2d_1a_3x3 3>32 3x3, Conv2d_2a_3x3 32>32 3x3, Conv2d_2b_3x3 32>64 3x3,
    Conv2d_3b_1x1 64>80 1x1, Conv2d_4a_3x3 80>192 3x3"""
MIXED_5 = """branch1x1 {i}>64 1x1, branch5x5_1 {i}>48 1x1, branch5x5_2 48>64 5x5,
    branch3x3dbl_1 {i}>64 1x1, branch3x3dbl_2 64>96 3x3, branch3x3dbl_3 96>96 3x3,
    branch_pool {i}>{c} 1x1"""
MIXED_6A = """branch3x3 288>384 3x3, branch3x3dbl_1 288>64 1x1, branch3x3dbl_2 64>96 3x3,
    branch3x3dbl_3 96>96 3x3"""
MIXED_6 = """branch1x1 {i}>192 1x1, branch7x7_1 {i}>{c} 1x1, branch7x7_2 {c}>{c} 1x7,
    branch7x7_3 {c}>192 7x1, branch7x7dbl_1 {i}>{c} 1x1, branch7x7dbl_2 {c}>{c} 7x1,
    branch7x7dbl_3 {c}>{c} 1x7, branch7x7dbl_4 {c}>{c} 7x1, branch7x7dbl_5 {c}>192 1x7,
    branch_pool {i}>192 1x1"""
MIXED_7A = """branch3x3_1 768>192 1x1, branch3x3_2 192>320 3x3, branch7x7x3_1 768>192 1x1,
    branch7x7x3_2 192>192 1x7, branch7x7x3_3 192>192 7x1, branch7x7x3_4 192>192 3x3"""
MIXED_7 = """branch1x1 {i}>320 1x1, branch3x3_1 {i}>384 1x1, branch3x3_2a 384>384 1x3,
    branch3x3_2b 384>384 3x1, branch3x3dbl_1 {i}>448 1x1, branch3x3dbl_2 448>384 3x3,
    branch3x3dbl_3a 384>384 1x3, branch3x3dbl_3b 384>384 3x1, branch_pool {i}>192 1x1"""
BLOCKS = {"5b": (MIXED_5, 192, 32), "5c": (MIXED_5, 256, 64), "5d": (MIXED_5, 288, 64),
          "6a": (MIXED_6A, 288, 0), "6b": (MIXED_6, 768, 128), "6c": (MIXED_6, 768, 160),
          "6d": (MIXED_6, 768, 160), "6e": (MIXED_6, 768, 192), "7a": (MIXED_7A, 768, 0),
          "7b": (MIXED_7, 1280, 0), "7c": (MIXED_7, 2048, 0)}              # table, channels in, c


def listing():
    """{name: shape} of the published file."""
    out = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    tables = {"": STEM} | {f"Mixed_{name}.": table.format(i=i, c=c)
                           for name, (table, i, c) in BLOCKS.items()}
    for prefix, table in tables.items():
        for name, *sizes in re.findall(r"(\w+) (\d+)>(\d+) (\d)x(\d)", table):
            cin, cout, height, width = map(int, sizes)
            out[f"{prefix}{name}.conv.weight"] = cout, cin, height, width
            for key in ("weight", "bias", "running_mean", "running_var"):
                out[f"{prefix}{name}.bn.{key}"] = (cout,)
            out[f"{prefix}{name}.bn.num_batches_tracked"] = ()
    return out


def computed(w, x):
    """pool3 and logits from the weights w and bytes x of 299 x 299, line by line as published."""
    def conv(name, x, stride=1, pad=0):
        x = F.conv2d(x, w[f"{name}.conv.weight"], None, stride, pad)
        mean, var, scale, shift = (w[f"{name}.bn.{key}"][:, None, None] for key in
                                   ("running_mean", "running_var", "weight", "bias"))
        return ((x - mean) / (var + 0.001).sqrt() * scale + shift).clamp(min=0)

    def average(x):
        ones = torch.ones_like(x[:1, :1])
        return F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(ones, 3, 1, 1)

    def double(n, x, stride=1, pad=1):
        h = conv(f"{n}.branch3x3dbl_2", conv(f"{n}.branch3x3dbl_1", x), pad=1)
        return conv(f"{n}.branch3x3dbl_3", h, stride, pad)

    row, column = (0, 3), (3, 0)
    x = conv("Conv2d_2a_3x3", conv("Conv2d_1a_3x3", x / 127.5 - 1, 2))
    x = F.max_pool2d(conv("Conv2d_2b_3x3", x, pad=1), 3, 2)
    x = F.max_pool2d(conv("Conv2d_4a_3x3", conv("Conv2d_3b_1x1", x)), 3, 2)
    for n in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = torch.cat([conv(f"{n}.branch1x1", x),
                       conv(f"{n}.branch5x5_2", conv(f"{n}.branch5x5_1", x), pad=2),
                       double(n, x), conv(f"{n}.branch_pool", average(x))], 1)
    n = "Mixed_6a"
    x = torch.cat([conv(f"{n}.branch3x3", x, 2), double(n, x, 2, 0), F.max_pool2d(x, 3, 2)], 1)
    for n in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        a = conv(f"{n}.branch7x7_2", conv(f"{n}.branch7x7_1", x), pad=row)
        b = conv(f"{n}.branch7x7dbl_2", conv(f"{n}.branch7x7dbl_1", x), pad=column)
        b = conv(f"{n}.branch7x7dbl_3", b, pad=row)
        b = conv(f"{n}.branch7x7dbl_4", b, pad=column)
        x = torch.cat([conv(f"{n}.branch1x1", x), conv(f"{n}.branch7x7_3", a, pad=column),
                       conv(f"{n}.branch7x7dbl_5", b, pad=row),
                       conv(f"{n}.branch_pool", average(x))], 1)
    n = "Mixed_7a"
    b = conv(f"{n}.branch7x7x3_2", conv(f"{n}.branch7x7x3_1", x), pad=row)
    b = conv(f"{n}.branch7x7x3_4", conv(f"{n}.branch7x7x3_3", b, pad=column), 2)
    x = torch.cat([conv(f"{n}.branch3x3_2", conv(f"{n}.branch3x3_1", x), 2), b,
                   F.max_pool2d(x, 3, 2)], 1)
    for n in ("Mixed_7b", "Mixed_7c"):
        a, b = conv(f"{n}.branch3x3_1", x), conv(f"{n}.branch3x3dbl_1", x)
        b = conv(f"{n}.branch3x3dbl_2", b, pad=1)
        pooled = average(x) if n == "Mixed_7b" else F.max_pool2d(x, 3, 1, 1)
        x = torch.cat([conv(f"{n}.branch1x1", x),
                       conv(f"{n}.branch3x3_2a", a, pad=(0, 1)),
                       conv(f"{n}.branch3x3_2b", a, pad=(1, 0)),
                       conv(f"{n}.branch3x3dbl_3a", b, pad=(0, 1)),
                       conv(f"{n}.branch3x3dbl_3b", b, pad=(1, 0)),
                       conv(f"{n}.branch_pool", pooled)], 1)
    pool3 = x.flatten(2).mean(2)
    return pool3, pool3 @ w["fc.weight"].T + w["fc.bias"]


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
        elif name.startswith("fc"):
            p.normal_(std=0.02)
    return net


def images(B=1, H=40, W=50, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(256, (B, 3, H, W), generator=g, dtype=torch.uint8)


# ---- The published layout ------------------------------------------------------------------------

def test_names_and_shapes_are_those_of_the_published_file(net):
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == listing()
    # 23 834 568 with the usual 1000 classes (27 161 264 less the 3 326 696 of the auxiliary head);
    # 8 more rows of fc.  A mean and a variance for each of 17 216 channels, and 94 counters.
    assert sum(p.numel() for p in net.parameters()) == 23_834_568 + 8 * (2048 + 1)
    assert sum(b.numel() for b in net.buffers()) == 2 * 17_216 + 94


def test_a_file_in_that_layout_loads_and_gives_the_same_even_without_batch_counters(net):
    file = io.BytesIO()
    torch.save({k: v for k, v in net.state_dict().items() if "num_batches" not in k}, file)
    file.seek(0)
    with torch.device("meta"):
        other = Inception()
    other.load_state_dict(torch.load(file, weights_only=True), assign=True)
    assert torch.equal(other(images())[1], net(images())[1])


# ---- The published computation -------------------------------------------------------------------

def test_the_whole_network_line_by_line_on_small_and_large_images(net):
    large = images(1, 299 * 4, 299 * 3)       # resized without antialiasing: of 4 rows the 2 in the
    by_hand = (large[:, :, 1::4, 1::3].double() + large[:, :, 2::4, 1::3]) / 2    # middle count, of
    small = F.interpolate(images().double(), (299, 299), mode="bilinear")         # 3 columns the 1
    # In float64, so that nothing but float32's rounding in 48 layers is between the two.
    w = {k: v.double() for k, v in net.state_dict().items()}
    for given, resized in (images(), small), (large, by_hand):
        pool3, logits = net(given)
        assert pool3.shape == (1, 2048) and logits.shape == (1, 1008)
        assert pool3.dtype == logits.dtype == torch.float32
        for ours, exact in zip((pool3, logits), computed(w, resized)):
            assert exact.std() > 0.1
            assert (ours - exact).abs().max() < 1e-4 * exact.abs().max()


# ---- A ruler does not move -----------------------------------------------------------------------

def test_it_is_made_to_measure(net):
    assert not any(m.training for m in net.modules())
    assert not any(p.requires_grad for p in net.parameters())
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert torch.equal(net(images())[0], net(images())[0])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


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
